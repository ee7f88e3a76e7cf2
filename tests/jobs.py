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
    processes = psutil.Process(job.pid).children(recursive=True)
    (process,) = [p for p in processes if _is_rank(p, rank)]
    process.send_signal(signal.SIGTERM)
    output, _ = job.communicate()
    return job.returncode, output


def _is_rank(process, rank):
    try:
        environment = process.environ()
        return (
            process.name().startswith("python")
            and str(rank) in [environment.get(name) for name in RANK_VARIABLES]
            and process.cmdline()[1:3] == list(TRAIN[1:3])
        )
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def _limited(command, seconds):
    return ["timeout", "--kill-after=10", str(seconds), *command]
