"""A training job in which one rank goes wrong after its fifth step.

    python -m tests.jobs.faulty_job FAULT FILE --config=demo ...

FAULT is a key of `FAULTS`. FILE appears when the fault happens. The other
arguments are those of `horovod_recipes.train`.
"""

import functools
import itertools
import os
import pathlib
import signal
import sys
import threading

import keras
import psutil
import tensorflow as tf

import horovod_recipes.keras as hvd
from horovod_recipes import models
from horovod_recipes import train
from horovod_recipes.training import tasks

LAST_GOOD_STEP = 5
# In bytes. Twenty times what a step without gradients writes.
PART_OF_GRADIENTS = 2_000_000


class Fault(keras.callbacks.Callback):
    """Goes wrong after a step, on one rank.

    Args:
        rank: Integer.
        go_wrong: Function of the model.
        happened: `pathlib.Path`, the file that appears.
    """

    def __init__(self, rank, go_wrong, happened):
        super().__init__()
        self._rank = rank
        self._go_wrong = go_wrong
        self._happened = happened
        self._steps = 0

    def on_train_batch_end(self, batch, logs=None):
        self._steps += 1
        if hvd.rank() == self._rank and self._steps == LAST_GOOD_STEP:
            self._happened.touch()
            self._go_wrong(self.model)


def kill(model):
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_allreduce(model):
    """Ends this process in the next step, while it sends gradients."""

    def watch_and_kill():
        process = psutil.Process()
        before = process.io_counters().write_chars
        while process.io_counters().write_chars < before + PART_OF_GRADIENTS:
            pass
        kill(model)

    threading.Thread(target=watch_and_kill, daemon=True).start()


def kill_in_save(model):
    """Ends this process when half of the next checkpoint is written."""
    save = model.save

    def save_half(path):
        save(path)
        os.truncate(path, os.path.getsize(path) // 2)
        kill(model)

    model.save = save_half


def hang_in_callback(model):
    threading.Event().wait()


def only_file(model):
    """Does nothing more: FILE is in the way of the job."""


FAULTS = {
    "kill": (1, kill),
    "kill_in_allreduce": (1, kill_in_allreduce),
    "kill_in_save": (0, kill_in_save),
    "hang_in_callback": (1, hang_in_callback),
    "hang_in_pipeline": None,
    "only_file": (0, only_file),
}


class HangingInput(tasks.Classification):
    """Classification whose input pipeline hangs on rank 1.

    Args:
        happened: `pathlib.Path`, the file that appears.
        *arguments: As for `Classification`.
    """

    def __init__(self, happened, *arguments):
        super().__init__(*arguments)
        self._happened = happened

    def training_dataset(self, first_epoch, updates_done):
        batches = itertools.count()

        def hang_in_pipeline(labels):
            if hvd.rank() == 1 and next(batches) == LAST_GOOD_STEP:
                self._happened.touch()
                threading.Event().wait()
            return labels

        def through_python(images, labels):
            same = tf.numpy_function(hang_in_pipeline, [labels], labels.dtype)
            return images, tf.ensure_shape(same, labels.shape)

        dataset = super().training_dataset(first_epoch, updates_done)
        return dataset.map(through_python)


def large_network(image_shape, num_classes, filters):
    """Returns a network of 8 million weights, which take a while to send."""
    inputs = keras.Input(image_shape, dtype="uint8")
    x = keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(inputs))
    x = keras.layers.Dense(5000 * filters)(x)
    return keras.Model(inputs, keras.layers.Dense(num_classes)(x))


def main():
    name, happened, *arguments = sys.argv[1:]
    happened = pathlib.Path(happened)
    models.MODELS["large_network"] = large_network
    tasks.TASKS["hanging_input"] = functools.partial(HangingInput, happened)
    callbacks = []
    if FAULTS[name]:
        callbacks.append(Fault(*FAULTS[name], happened))
    return train.main([sys.argv[0], *arguments], callbacks)


if __name__ == "__main__":
    sys.exit(main())
