"""The job that several tests compare with, or look at."""

import dataclasses
import pathlib
import subprocess

import pytest

from tests.jobs.launcher import TRAIN
from tests.jobs.launcher import TWO_RANKS
from tests.jobs.launcher import run

# The whole network: with few filters, jobs are bit-equal without this flag.
DETERMINISTIC = (
    "--config=demo",
    "--config.epochs=3",
    "--config.schedule.warmup_epochs=1",
    "--config.checkpoint_every_epochs=1",
    "--config.deterministic",
)


@dataclasses.dataclass
class Job:
    """A job that has ended."""

    arguments: tuple
    workdir: pathlib.Path
    result: subprocess.CompletedProcess


@pytest.fixture(scope="session")
def whole_job(tmp_path_factory):
    """A job of 9 updates on two ranks that nothing happens to."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    job = (*TWO_RANKS, *TRAIN, *DETERMINISTIC, f"--workdir={workdir}")
    return Job(DETERMINISTIC, workdir, run(*job))
