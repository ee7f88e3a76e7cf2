"""Starts jobs as a user does, and ends them, within a time limit."""

import pathlib
import signal
import subprocess
import sys
import time

import psutil

ROOT = pathlib.Path(__file__).parents[1]
# A job that hangs ends before its time limit does, and leaves its stacks.
TRAIN = (
    *(sys.executable, "-m", "horovod_recipes.train"),
    "--config.hang_seconds=200",
)
HOROVODRUN = (
    str(pathlib.Path(sys.executable).with_name("horovodrun")),
    "--gloo",
    "-np",
    "2",
)
MPIRUN = (HOROVODRUN[0], "--mpi", "-np", "2")
# As horovodrun tells a rank its number, or Open MPI.
RANK_VARIABLES = ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK")


def run(*command, seconds=300):
    """Runs a command; its processes are killed after so many seconds."""
    return subprocess.run(
        _limited(command, seconds), cwd=ROOT, capture_output=True, text=True
    )


def error_lines(result):
    return [line for line in result.stderr.splitlines() if "error: " in line]


def run_until_sigterm(*command, rank, path, seconds=300):
    """Starts a job, and sends SIGTERM to a rank when a file is there.

    Returns:
        The exit status, and all that was printed.
    """
    job = subprocess.Popen(
        _limited(command, seconds),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while job.poll() is None and not path.exists():
        time.sleep(0.1)
    signal_rank(job, signal.SIGTERM, TRAIN[2], RANK_VARIABLES, str(rank))
    output, _ = job.communicate()
    return job.returncode, output


def signal_rank(job, number, module, variables, value):
    """Sends a signal to the rank one of whose variables has that value.

    The first such process is the rank. A process that it forks looks the same
    for a moment.
    """
    ranks = [
        process
        for process in psutil.Process(job.pid).children(recursive=True)
        if _is_rank(process, module, variables, value)
    ]
    min(ranks, key=psutil.Process.create_time).send_signal(number)


def _is_rank(process, module, variables, value):
    try:
        environment = process.environ()
        return (
            process.name().startswith("python")
            and process.cmdline()[1:3] == ["-m", module]
            and value in [environment.get(name) for name in variables]
        )
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        # It has just ended, also where its parent has not yet heard.
        return False


def _limited(command, seconds):
    return ["timeout", "--kill-after=10", str(seconds), *command]
