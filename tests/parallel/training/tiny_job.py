"""A tiny job for tests: 1,000 digits, 2 filters and 9 updates."""

import csv

import keras
import numpy as np
import pytest
from ml_collections import config_dict

import horovod_recipes.keras as hvd
from horovod_recipes.configs import demo
from horovod_recipes.errors import JobError
from horovod_recipes.training.job import train_and_evaluate


def tiny_config(**changes):
    config = demo.get_config()
    config.model.filters = 2
    # The smaller split serves for training and evaluation.
    config.dataset.train_split = "test"
    config.dataset.train_examples = 1000
    config.global_batch_size = 256
    config.max_micro_batch_size = 256
    config.epochs = 3
    config.schedule.peak_learning_rate = 20.0
    config.schedule.warmup_epochs = 1
    config.evaluate_every_epochs = 5
    config.checkpoint_every_epochs = 1
    config.keep_checkpoints = 2
    # Longer than the job, so only tests that change it log trust ratios.
    config.log_trust_ratios_every_steps = 1000
    if "optimizer" in changes:
        config.optimizer = config_dict.create(**changes.pop("optimizer"))
    config.update_from_flattened_dict(changes)
    return config


def run_job(workdir, mode="new", callbacks=(), **changes):
    config = tiny_config(**changes)
    return train_and_evaluate(config, "tiny", workdir, mode, callbacks)


def assert_refused(match, workdir, mode="new", callbacks=(), **changes):
    """Checks for the same one-line error on both ranks; returns it."""
    with pytest.raises(JobError, match=match) as error:
        run_job(workdir, mode, callbacks, **changes)
    messages = hvd.allgather_object(str(error.value))
    assert messages[0] == messages[1]
    assert "\n" not in messages[0]
    return messages[0]


def run_until(workdir, epoch, **changes):
    """Runs a job that all ranks leave when the given epoch begins."""
    with pytest.raises(JobError, match="stopped by the test"):
        run_job(workdir, callbacks=[stop_at(epoch)], **changes)


def stop_at(epoch):
    """Returns a callback that ends the job when the given epoch begins."""
    return _StopAt(epoch)


class _StopAt(keras.callbacks.Callback):
    def __init__(self, epoch):
        super().__init__()
        self._epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self._epoch:
            raise JobError("stopped by the test")


def on_rank_0(function, *arguments):
    """Calls a function on rank 0, while the other ranks wait."""
    hvd.allgather_object(None)
    if hvd.rank() == 0:
        function(*arguments)
    hvd.allgather_object(None)


def table(workdir):
    """Returns the rows of metrics.csv."""
    with (workdir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def checkpoint(workdir, step=9):
    return workdir / "checkpoints" / f"step-{step:08d}.keras"


def saved_state(workdir):
    """Returns the saved weights and optimizer state of a finished job."""
    model = keras.saving.load_model(checkpoint(workdir))
    state = {v.path: v.numpy() for v in model.weights}
    for v in model.optimizer.variables:
        # The second optimizer of a process is called "adam_1".
        state[v.path.partition("/")[2]] = v.numpy()
    return state


def assert_same_training(workdir, other):
    """Checks that two jobs have the same metrics and bit-equal states."""
    for row, other_row in zip(table(workdir), table(other), strict=True):
        del row["images_per_second"], other_row["images_per_second"]
        assert row == other_row
    state, other_state = saved_state(workdir), saved_state(other)
    for path, value in state.items():
        np.testing.assert_array_equal(value, other_state[path], err_msg=path)
