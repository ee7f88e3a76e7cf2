"""A training job of which rank 1 goes wrong in step 5: FAULT says how.

FAULT=kill python -m tests.faulty_job --config=demo --workdir=DIR ...
"""

import os
import signal
import sys
import threading
import time

import tensorflow as tf

import horovod_recipes.keras as hvd
from horovod_recipes import train
from horovod_recipes import training_callbacks

STEP = 5


def kill(step):
    if step == STEP:
        os.kill(os.getpid(), signal.SIGKILL)


def leave(step):
    if step == STEP:
        os._exit(3)


def hang_in_callback(step):
    if step == STEP:
        time.sleep(1000)


def stop(step):
    if step == STEP:
        os.kill(os.getpid(), signal.SIGSTOP)


def skip_a_collective(step):
    if step != STEP:
        hvd.allreduce(tf.constant(1.0), name="of_all_but_one_step")


def hang_in_pipeline(step):
    pass


def after_each_step(fault):
    inner = training_callbacks.StopOnNonFinite.on_train_batch_end
    steps = iter(range(1, 1000))

    def on_train_batch_end(self, batch, logs=None):
        step = next(steps)
        if hvd.rank() == 1:
            fault(step)
        elif fault is skip_a_collective:
            hvd.allreduce(tf.constant(1.0), name="of_all_but_one_step")
        inner(self, batch, logs)

    training_callbacks.StopOnNonFinite.on_train_batch_end = on_train_batch_end


def hang_after_batches():
    inner = train.training_dataset
    batches = iter(range(1, 1000))

    def wait(label):
        if next(batches) == STEP and hvd.rank() == 1:
            threading.Event().wait()
        return label

    def training_dataset(*arguments):
        def waited(image, label):
            after = tf.numpy_function(wait, [label], label.dtype)
            return image, tf.ensure_shape(after, label.shape)

        return inner(*arguments).map(waited)

    train.training_dataset = training_dataset


if __name__ == "__main__":
    fault = globals()[os.environ["FAULT"]]
    if fault is hang_in_pipeline:
        hang_after_batches()
    else:
        after_each_step(fault)
    sys.exit(train.main(sys.argv))
