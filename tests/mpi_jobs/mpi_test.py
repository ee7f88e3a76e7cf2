"""Whole jobs under MPI, which has its own way to start and end ranks."""

import re
import sys

import pytest

from tests.corrupt_dataset import write_corrupt_copy
from tests.jobs.launcher import TRAIN
from tests.jobs.launcher import TWO_MPI_RANKS
from tests.jobs.launcher import error_lines
from tests.jobs.launcher import run
from tests.jobs.launcher import run_until_sigterm
from tests.jobs.results import read_summary

TINY = (
    "--config=demo",
    "--config.model.filters=2",
    "--config.epochs=3",
    "--config.schedule.warmup_epochs=1",
    "--config.evaluate_every_epochs=1",
)


def test_ranks_are_in_one_job_and_talk_over_mpi():
    script = (
        "import horovod_recipes.keras as hvd; hvd.init(); "
        "assert hvd.mpi_enabled() and not hvd.gloo_enabled(); "
        "print(hvd.allgather_object([hvd.rank(), hvd.local_rank()]))"
    )
    result = run(*TWO_MPI_RANKS, sys.executable, "-c", script)
    assert result.returncode == 0, result.stderr
    # The texts of both ranks may share a line.
    assert result.stdout.count("[[0, 0], [1, 1]]") == 2


@pytest.mark.parametrize(("setting", "yields"), [((), 1), (("0",), 0)])
def test_waiting_rank_yields_its_core(setting, yields):
    """Open MPI itself tells, through its tool information interface."""
    script = """
import ctypes
import horovod_recipes.keras as hvd

hvd.init()
mpi = ctypes.CDLL("libmpi.so.40")
level, index, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
handle, yields = ctypes.c_void_p(), ctypes.c_bool()
name = b"mpi_yield_when_idle"
assert mpi.MPI_T_init_thread(0, ctypes.byref(level)) == 0
assert mpi.MPI_T_cvar_get_index(name, ctypes.byref(index)) == 0
assert mpi.MPI_T_cvar_handle_alloc(
    index, None, ctypes.byref(handle), ctypes.byref(count)
) == 0
assert mpi.MPI_T_cvar_read(handle, ctypes.byref(yields)) == 0
print(hvd.allgather_object(int(yields.value)))
"""
    environment = [f"OMPI_MCA_mpi_yield_when_idle={value}" for value in setting]
    result = run(
        "env", *environment, *TWO_MPI_RANKS, sys.executable, "-c", script
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(str([yields, yields])) == 2


def test_failure_of_a_rank_ends_the_job_with_its_reason(tmp_path):
    folder, (name,) = write_corrupt_copy(tmp_path / "data", "train", [3000])
    workdir = f"--workdir={tmp_path / 'run'}"
    data = f"--config.dataset.data_dir={folder}"
    result = run(
        "env",
        "PYTHONUNBUFFERED=1",
        *TWO_MPI_RANKS,
        *TRAIN,
        *TINY,
        data,
        workdir,
    )
    assert result.returncode == 1
    lines = [line.partition("error: ")[2] for line in error_lines(result)]
    first, second = sorted(lines)
    # Without Gloo's server, ranks do not learn each other's reasons.
    assert first == (
        "rank 0 stopped: another rank stopped; see what that rank printed"
    )
    assert second.startswith(
        f"rank 1 found a corrupt image: {name}; replace it"
    )
    assert not (tmp_path / "run" / "summary.json").exists()


def test_killed_rank_ends_the_job(tmp_path):
    script = (
        "import os, signal, horovod_recipes.keras as hvd; hvd.init()\n"
        "if hvd.rank() == 1: os.kill(os.getpid(), signal.SIGKILL)\n"
        "hvd.allgather_object(hvd.rank())"
    )
    result = run(*TWO_MPI_RANKS, sys.executable, "-c", script, seconds=120)
    # A job that `run` ends has status 124.
    assert result.returncode == 137
    assert "on signal 9 (Killed)" in result.stdout + result.stderr


def test_sigterm_to_one_rank_saves_and_the_job_resumes(tmp_path):
    workdir = tmp_path / "run"
    job = (*TWO_MPI_RANKS, *TRAIN, *TINY, "--config.global_batch_size=100")
    status, output = run_until_sigterm(
        *(*job, f"--workdir={workdir}"), rank=1, path=workdir / "metrics.csv"
    )
    assert status == 0, output
    step = int(re.search(r"stopped by SIGTERM after step (\d+)", output)[1])
    assert 40 <= step < 120
    resumed = run(*job, f"--workdir={workdir}", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert f"from_step={step} " in resumed.stdout
    summary = read_summary(workdir)
    assert (summary["ranks"], summary["steps"]) == (2, 120)
