"""Settings of a job's whole process, made before it builds anything."""

import sys
import time

import keras
import tensorflow as tf
from absl import logging

import horovod_recipes.keras as hvd
from horovod_recipes.errors import JobError
from horovod_recipes.errors import one_line
from keras_lars import _xla_flags


def start():
    """Starts Horovod, and lets this process print only its own lines.

    Raises:
        JobError: If a rank does not start, or `horovodrun` is lost.
    """
    silence_libraries()
    write_whole_lines()
    try:
        hvd.init()
    except RuntimeError as error:
        raise JobError(str(error)) from error


def silence_libraries():
    """Lets TensorFlow and absl print only errors."""
    tf.get_logger().setLevel("ERROR")
    logging.set_verbosity(logging.ERROR)


def write_whole_lines():
    """Makes stdout and stderr write each line in one piece.

    With PYTHONUNBUFFERED, Python writes a line and its end separately. mpirun
    then prints the label of the rank between them.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, write_through=False)


def choose_gpu():
    """Gives this rank the GPU of its local rank, if the host has GPUs.

    Raises:
        JobError: If the host has more ranks than GPUs.
    """
    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        return
    if len(gpus) < hvd.local_size():
        raise JobError(
            f"{hvd.local_size()} ranks run on a host with {len(gpus)} GPUs; "
            "start at most one rank per GPU, or hide the GPUs with "
            "CUDA_VISIBLE_DEVICES=-1"
        )
    tf.config.set_visible_devices(gpus[hvd.local_rank()], "GPU")


def make_updates_fast(config):
    """Lets XLA update a weight and its velocity in one pass, on a CPU.

    The flag changes every program that XLA compiles in this process. It was not
    tried where XLA compiles a whole network, so it is not set there.
    """
    if not config.xla and not tf.config.list_physical_devices("GPU"):
        _xla_flags.allow_two_outputs()


def run_operations_one_by_one():
    """Makes the gradients on a CPU bit-equal in every run.

    Their rounding depends on which operations run in parallel. TensorFlow only
    accepts this setting before its first operation.
    """
    tf.config.threading.set_inter_op_parallelism_threads(1)


def set_seeds(config):
    """Seeds this rank, and makes operations deterministic if asked to."""
    if config.deterministic:
        tf.config.experimental.enable_op_determinism()
    # Each rank needs its own random numbers. Rank 0 broadcasts its weights.
    keras.utils.set_random_seed(config.seed + hvd.rank())


def end_with_error(error):
    """Prints the error of this rank, and lets the others print theirs.

    horovodrun kills all ranks as soon as one exits. The shutdown stops them,
    and the wait lets them print why.
    """
    print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
    hvd.shutdown()
    time.sleep(hvd.callbacks.SECONDS_TO_SAY_WHY)
