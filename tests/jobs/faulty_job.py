"""A training job of which rank 1 goes wrong in step 5.

python -m tests.jobs.launcher.faulty_job FAULT FILE --config=demo ...

FAULT is kill, kill_in_allreduce, hang_in_callback or hang_in_pipeline; FILE is
there when it happens. The other arguments are those of `horovod_recipes.train`.
"""

import os
import pathlib
import signal
import sys
import threading
import time

import keras
import tensorflow as tf

import horovod_recipes.keras as hvd
from horovod_recipes import train
from horovod_recipes.keras import _watchdog
from horovod_recipes.training import callbacks

STEP = 5


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_allreduce():
    """Ends this process soon, while it sends gradients to rank 0."""

    def watch_and_kill():
        collectives = _watchdog._collectives
        while collectives.entered.numpy() == collectives.left.numpy():
            pass
        time.sleep(0.01)
        kill()

    threading.Thread(target=watch_and_kill, daemon=True).start()
    # Rank 0 is waiting for them by then.
    time.sleep(1)


def large_network(image_shape, num_classes, filters):
    """Returns a network of 8 million weights, which take a while to send."""
    inputs = keras.Input(image_shape, dtype="uint8")
    x = keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(inputs))
    x = keras.layers.Dense(5000 * filters)(x)
    return keras.Model(inputs, keras.layers.Dense(num_classes)(x))


def hang():
    threading.Event().wait()


def in_callback(fault):
    """Puts a fault at the end of a step."""
    on_train_batch_end = callbacks.Throughput.on_train_batch_end
    steps = iter(range(1, 1000))

    def hang_in_callback(self, batch, logs=None):
        on_train_batch_end(self, batch, logs)
        if next(steps) == STEP:
            fault()

    callbacks.Throughput.on_train_batch_end = hang_in_callback


def in_pipeline(fault):
    """Puts a fault before the batch of a step."""
    training_dataset = train.training_dataset
    batches = iter(range(1, 1000))

    def hang_in_pipeline(label):
        if next(batches) == STEP:
            fault()
        return label

    def faulty(*arguments):
        return training_dataset(*arguments).map(
            lambda images, labels: (
                images,
                tf.ensure_shape(
                    tf.numpy_function(hang_in_pipeline, [labels], labels.dtype),
                    labels.shape,
                ),
            )
        )

    train.training_dataset = faulty


def main():
    name, happened, *arguments = sys.argv[1:]
    faults = {
        "kill": kill,
        "kill_in_allreduce": kill_in_allreduce,
        "hang_in_callback": hang,
        "hang_in_pipeline": hang,
    }

    def fault():
        if hvd.rank() == 1:
            pathlib.Path(happened).touch()
            faults[name]()

    if name == "kill_in_allreduce":
        train.MODELS["small_cnn"] = large_network
    in_pipeline(fault) if name == "hang_in_pipeline" else in_callback(fault)
    return train.main([sys.argv[0], *arguments])


if __name__ == "__main__":
    sys.exit(main())
