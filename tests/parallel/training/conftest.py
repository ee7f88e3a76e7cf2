"""Finished and interrupted jobs that several tests read."""

import dataclasses
import pathlib
import shutil

import keras
import pytest

import horovod_recipes.keras as hvd
from tests.parallel.training.tiny_job import on_rank_0
from tests.parallel.training.tiny_job import run_job
from tests.parallel.training.tiny_job import run_until


@dataclasses.dataclass
class FinishedJob:
    workdir: pathlib.Path
    summary: dict
    model: keras.Model


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory):
    """A folder that all ranks share during the whole session."""
    folder = tmp_path_factory.mktemp("jobs") if hvd.rank() == 0 else None
    return hvd.broadcast_object(folder, root_rank=0)


@pytest.fixture(scope="session")
def finished_job(session_folder):
    """A job that ran to its end. Tests must not change its folder."""
    workdir, watcher = session_folder / "finished", keras.callbacks.Callback()
    summary = run_job(
        workdir, callbacks=[watcher], log_trust_ratios_every_steps=3
    )
    return FinishedJob(workdir, summary, watcher.model)


@pytest.fixture(scope="session")
def accumulated_job(session_folder):
    """A finished job with two micro-batches per update."""
    workdir, watcher = (
        session_folder / "accumulated",
        keras.callbacks.Callback(),
    )
    summary = run_job(workdir, callbacks=[watcher], max_micro_batch_size=64)
    return FinishedJob(workdir, summary, watcher.model)


@pytest.fixture(scope="session")
def interrupted_workdir(session_folder):
    """The folder of a job that was interrupted after 2 of its 3 epochs."""
    workdir = session_folder / "interrupted"
    run_until(workdir, epoch=2)
    return workdir


@pytest.fixture
def interrupted_copy(interrupted_workdir, shared_folder):
    """A copy of `interrupted_workdir` that a test may change."""
    copy = shared_folder / "run"
    on_rank_0(shutil.copytree, interrupted_workdir, copy)
    return copy


@pytest.fixture
def finished_copy(finished_job, shared_folder):
    """A copy of the finished job's folder that a test may change."""
    copy = shared_folder / "run"
    on_rank_0(shutil.copytree, finished_job.workdir, copy)
    return copy
