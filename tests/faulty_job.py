"""A training job of which rank 1 goes wrong in step 5.

python -m tests.faulty_job FAULT FILE --config=demo ...

FAULT is kill, hang_in_callback or hang_in_pipeline; FILE is there when it has
happened. The other arguments are those of `horovod_recipes.train`.
"""

import os
import pathlib
import signal
import sys
import threading

import tensorflow as tf

import horovod_recipes.keras as hvd
from horovod_recipes import train
from horovod_recipes import training_callbacks

STEP = 5


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def hang():
    threading.Event().wait()


def in_callback(fault):
    """Puts a fault at the end of a step."""
    on_train_batch_end = training_callbacks.Throughput.on_train_batch_end
    steps = iter(range(1, 1000))

    def hang_in_callback(self, batch, logs=None):
        on_train_batch_end(self, batch, logs)
        if next(steps) == STEP:
            fault()

    training_callbacks.Throughput.on_train_batch_end = hang_in_callback


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

    def fault():
        if hvd.rank() == 1:
            pathlib.Path(happened).touch()
            kill() if name == "kill" else hang()

    in_pipeline(fault) if name == "hang_in_pipeline" else in_callback(fault)
    return train.main([sys.argv[0], *arguments])


if __name__ == "__main__":
    sys.exit(main())
