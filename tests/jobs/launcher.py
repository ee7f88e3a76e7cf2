"""Starts whole jobs as a user does, signals their ranks, limits their time."""

import pathlib
import signal
import subprocess
import sys
import time

import psutil

ROOT = pathlib.Path(__file__).parents[2]
HOROVODRUN = str(pathlib.Path(sys.executable).with_name("horovodrun"))
TWO_RANKS = (HOROVODRUN, "--gloo", "-np", "2")
TWO_MPI_RANKS = (HOROVODRUN, "--mpi", "-np", "2")
# A job that hangs prints its stacks before `run` kills it.
TRAIN = (
    *(sys.executable, "-m", "horovod_recipes.train"),
    "--config.hang_seconds=200",
)
# Where horovodrun and Open MPI tell a rank its number.
RANK_VARIABLES = ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK")


def run(*command, seconds=300):
    """Runs a command, and kills its processes after so many seconds."""
    return subprocess.run(
        limited(command, seconds), cwd=ROOT, capture_output=True, text=True
    )


def limited(command, seconds):
    """Returns a command that ends after so many seconds."""
    return ["timeout", "--kill-after=10", str(seconds), *command]


def python(module, *arguments):
    """Returns the command that runs a module of Python."""
    return (sys.executable, "-m", module, *arguments)


def error_lines(result):
    """Returns the lines in which ranks say why they end, sorted by rank."""
    return sorted(
        line for line in result.stderr.splitlines() if "error: " in line
    )


def run_until_sigterm(*command, rank, path=None, seconds=300):
    """Starts a training job, and sends SIGTERM to one rank.

    Args:
        *command: Strings, the command.
        rank: Integer, the rank that gets the signal.
        path: `pathlib.Path`, the file after whose appearance the rank gets it.
            Without it, the rank gets it as soon as it has a handler.
        seconds: Integer, the time limit.

    Returns:
        The exit status, and all that the job printed.
    """
    job = subprocess.Popen(
        limited(command, seconds),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    which = job, TRAIN[2], RANK_VARIABLES, str(rank)
    while job.poll() is None and not (
        path.exists() if path else _handles_sigterm(find_rank(*which))
    ):
        time.sleep(0.02)
    find_rank(*which).send_signal(signal.SIGTERM)
    output, _ = job.communicate()
    return job.returncode, output


def find_rank(job, module, variables, value):
    """Returns the `psutil.Process` of one rank of a job, or None.

    Args:
        job: The `subprocess.Popen` of the job.
        module: String, the module that the rank runs.
        variables: Environment variables, one of which has the `value`.
        value: String.
    """
    ranks = [
        process
        for process in psutil.Process(job.pid).children(recursive=True)
        if _is_rank(process, module, variables, value)
    ]
    # A child that the rank has just forked looks like the rank, but is younger.
    return min(ranks, key=psutil.Process.create_time, default=None)


def _handles_sigterm(process):
    if process is None:
        return False
    status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    caught = next(v for v in status.splitlines() if v.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def _is_rank(process, module, variables, value):
    try:
        environment = process.environ()
        return (
            process.name().startswith("python")
            and process.cmdline()[1:3] == ["-m", module]
            and value in [environment.get(name) for name in variables]
        )
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        # The process has just ended. Zombies of some kernels deny access.
        return False
