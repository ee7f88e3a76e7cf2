"""A job on two ranks stops, and resumes where it stopped."""

import os
import resource
import signal

import keras
import numpy as np
import pytest

import horovod_recipes.keras as hvd
from horovod_recipes.errors import JobError
from horovod_recipes.models.small_cnn import small_cnn
from horovod_recipes.training.callbacks import StoppedBySigterm
from keras_lars import LARS
from tests.parallel.training.tiny_job import assert_refused
from tests.parallel.training.tiny_job import assert_same_training
from tests.parallel.training.tiny_job import checkpoint
from tests.parallel.training.tiny_job import on_rank_0
from tests.parallel.training.tiny_job import run_job
from tests.parallel.training.tiny_job import saved_state
from tests.parallel.training.tiny_job import table
from tests.parallel.training.tiny_job import tiny_config


class SigtermToRank1(keras.callbacks.Callback):
    """Sends SIGTERM to rank 1 before an update, as a cluster would."""

    def __init__(self, step):
        super().__init__()
        self._step = step

    def on_train_batch_begin(self, batch, logs=None):
        is_time = int(self.model.optimizer.iterations) + 1 == self._step
        if hvd.rank() == 1 and is_time:
            os.kill(os.getpid(), signal.SIGTERM)


class SmallFiles(keras.callbacks.Callback):
    """Limits the size of files on rank 0, to act like a full disk."""

    def __init__(self, epoch, file_bytes):
        super().__init__()
        self._epoch = epoch
        self._file_bytes = file_bytes

    def on_epoch_end(self, epoch, logs=None):
        if hvd.rank() == 0 and epoch == self._epoch:
            _, hard_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (self._file_bytes, hard_limit)
            )


@pytest.fixture
def _unlimited_files():
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_resumed_run_equals_an_uninterrupted_one(
    finished_job, interrupted_copy
):
    assert not (interrupted_copy / "summary.json").exists()
    summary = run_job(
        interrupted_copy, mode="resume", log_trust_ratios_every_steps=3
    )
    assert summary["steps"] == 9
    assert_same_training(finished_job.workdir, interrupted_copy)


@pytest.mark.slow
def test_sigterm_to_one_rank_saves_and_stops_all(
    accumulated_job, shared_folder
):
    """After a signal within an epoch, a resumed job ends as if undisturbed."""
    whole, parts = accumulated_job.workdir, shared_folder / "parts"
    changes = {"max_micro_batch_size": 64}
    with pytest.raises(StoppedBySigterm) as stop:
        run_job(parts, callbacks=[SigtermToRank1(step=4)], **changes)
    assert stop.value.steps_done == 5
    # The job has restored the default action of the signal.
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    names = sorted(path.name for path in (parts / "checkpoints").iterdir())
    assert names[-1] == "step-00000005.keras"
    assert run_job(parts, "resume", **changes)["steps"] == 9

    for name in ("epoch", "step", "learning_rate"):
        assert [r[name] for r in table(whole)] == [
            r[name] for r in table(parts)
        ]
    for name in ("train_loss", "train_top1_percent"):
        np.testing.assert_allclose(
            *([float(r[name]) for r in table(w)] for w in (whole, parts)),
            rtol=1e-6,
        )
    # Stopping averages batch norm's moving statistics over the ranks once more.
    # All other state is bit-equal.
    state, other_state = saved_state(whole), saved_state(parts)
    for path, value in state.items():
        np.testing.assert_allclose(
            value,
            other_state[path],
            rtol=1e-5 if "moving" in path else 0,
            err_msg=path,
        )


@pytest.mark.slow
def test_sigterm_at_the_last_step_of_an_epoch(shared_folder):
    """The job first finishes the epoch with its evaluation, and then stops."""
    workdir = shared_folder / "run"
    changes = {
        "global_batch_size": 1000,
        "max_micro_batch_size": 500,
        "evaluate_every_epochs": 1,
        "epochs": 2,
    }
    with pytest.raises(StoppedBySigterm) as stop:
        run_job(workdir, callbacks=[SigtermToRank1(step=1)], **changes)
    assert stop.value.steps_done == 1
    (row,) = table(workdir)
    assert float(row["test_loss"]) > 0
    assert run_job(workdir, "resume", **changes)["steps"] == 2
    assert [row["epoch"] for row in table(workdir)] == ["1", "2"]


class StopAfterEpoch(keras.callbacks.Callback):
    """Ends training as Keras's EarlyStopping does."""

    def __init__(self, epoch):
        super().__init__()
        self._epoch = epoch

    def on_epoch_end(self, epoch, logs=None):
        self.model.stop_training = epoch == self._epoch


@pytest.mark.slow
def test_callback_stops_a_job_that_was_resumed_in_an_epoch(shared_folder):
    """Its epoch is evaluated, though the config evaluates later ones only."""
    workdir = shared_folder / "run"
    with pytest.raises(StoppedBySigterm):
        run_job(workdir, callbacks=[SigtermToRank1(step=1)])
    stop = StopAfterEpoch(epoch=0)
    summary = run_job(workdir, "resume", callbacks=[stop])
    assert (summary["epochs"], summary["steps"]) == (1, 3)
    assert 0 < summary["top1"] <= 100
    assert [row["epoch"] for row in table(workdir)] == ["1"]


@pytest.mark.slow
@pytest.mark.usefixtures("_unlimited_files")
def test_full_disk_keeps_the_older_checkpoints(shared_folder):
    workdir = shared_folder / "run"
    assert_refused(
        r"on rank 0: cannot write the checkpoint .*/step-00000006.keras: "
        r"File too large; earlier checkpoints are intact: free disk space",
        workdir,
        callbacks=[SmallFiles(epoch=1, file_bytes=20_000)],
    )
    names = sorted(path.name for path in (workdir / "checkpoints").iterdir())
    assert [name for name in names if name.endswith(".keras")] == [
        "step-00000003.keras"
    ]
    assert not list(workdir.rglob(".part-*"))


def test_resuming_a_finished_run_trains_no_more(finished_job, finished_copy):
    changes = {"log_trust_ratios_every_steps": 3}
    summary = hvd.broadcast_object(finished_job.summary, root_rank=0)
    assert run_job(finished_copy, "resume", **changes) == summary
    # A kill between the last checkpoint and the summary leaves this state.
    on_rank_0((finished_copy / "summary.json").unlink)
    again = run_job(finished_copy, "resume", **changes)
    assert again["top1"] == summary["top1"]
    assert_same_training(finished_job.workdir, finished_copy)


def test_resume_without_a_run(shared_folder):
    assert_refused("no run to resume", shared_folder / "run", "resume")


def test_resume_with_another_model_or_optimizer(interrupted_workdir):
    assert_refused(
        r"model.filters was 2 and now is 3",
        interrupted_workdir,
        "resume",
        **{"model.filters": 3},
    )
    assert_refused(
        r"optimizer.momentum was 0.9 and now is 0.8",
        interrupted_workdir,
        "resume",
        **{"optimizer.momentum": 0.8},
    )
    assert not (interrupted_workdir / "summary.json").exists()


@pytest.mark.slow
def test_resume_with_other_keys_that_change_no_result(interrupted_copy):
    changes = {"dataset.corrupt_images": "skip", "keep_checkpoints": 1}
    assert run_job(interrupted_copy, "resume", **changes)["steps"] == 9


def test_resume_from_a_broken_checkpoint(interrupted_copy):
    """Of its two checkpoints, the newest is broken, or both are."""
    on_rank_0(checkpoint(interrupted_copy, step=6).write_bytes, b"")
    on_rank_0(checkpoint(interrupted_copy, step=3).write_bytes, b"")
    assert_refused(
        "cannot load .*step-00000003.keras .*no checkpoint can be loaded",
        interrupted_copy,
        "resume",
    )


def test_second_job_in_a_workdir_in_use(shared_folder):
    """It gets one line on every rank, and the first ends as if undisturbed."""
    workdir, messages = shared_folder / "run", []

    class Second(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                for mode in ("new", "resume", "overwrite"):
                    with pytest.raises(JobError) as error:
                        run_job(workdir, mode=mode)
                    messages.append(str(error.value))

    summary = run_job(workdir, callbacks=[Second()])
    assert summary["steps"] == 9
    assert len(messages) == 3
    for message in messages:
        assert "another job uses" in message
        assert "choose another --workdir" in message
    assert hvd.allgather_object(messages) == [messages, messages]
    assert not list(workdir.glob("*.lock"))


def test_resume_from_another_optimizer(interrupted_copy):
    """The config is the same, but other code made the optimizer."""
    path = checkpoint(interrupted_copy, step=6)
    model = keras.saving.load_model(path)
    model.compile(LARS(0.1, momentum=0.5), loss=model.loss)
    model.optimizer.build(model.trainable_variables)
    on_rank_0(model.save, path)
    assert_refused("saved from another optimizer", interrupted_copy, "resume")


def test_resume_from_another_model(interrupted_copy):
    config = tiny_config()
    model = small_cnn((28, 28, 1), 10, filters=2 * config.model.filters)
    model.compile(LARS(0.1), loss="categorical_crossentropy")
    model.optimizer.build(model.trainable_variables)
    on_rank_0(model.save, checkpoint(interrupted_copy, step=6))
    assert_refused("saved from another model", interrupted_copy, "resume")
