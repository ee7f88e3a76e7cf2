"""What a job sets for its whole process, before it builds anything."""

import sys

import keras
import tensorflow as tf
from absl import logging

import horovod_recipes.keras as hvd
from horovod_recipes.errors import JobError


def write_whole_lines():
    """Has the lines of all ranks arrive whole.

    Under PYTHONUNBUFFERED Python writes a line and its end one by one, and
    mpirun writes the label of the rank between them.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, write_through=False)


def silence_libraries():
    """Has TensorFlow and absl print errors only."""
    tf.get_logger().setLevel("ERROR")
    logging.set_verbosity(logging.ERROR)


def choose_gpu():
    """Gives this rank the GPU of its local rank, where the host has GPUs.

    Raises:
        JobError: If the host has more ranks than GPUs.
    """
    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        return
    if len(gpus) < hvd.local_size():
        raise JobError(
            f"{hvd.local_size()} ranks are more than the {len(gpus)} GPUs of "
            "their host; start one rank per GPU, or hide the GPUs with "
            "CUDA_VISIBLE_DEVICES=-1"
        )
    tf.config.set_visible_devices(gpus[hvd.local_rank()], "GPU")


def run_operations_one_by_one():
    """Makes the rounding of gradients on a CPU the same in every run.

    It depends on the operations that run beside each other. TensorFlow accepts
    this before its first operation only.
    """
    tf.config.threading.set_inter_op_parallelism_threads(1)


def set_seeds(config):
    """Seeds this rank's random numbers, and makes operations deterministic."""
    if config.deterministic:
        tf.config.experimental.enable_op_determinism()
    # Ranks differ on purpose. The weights of rank 0 are broadcast later.
    keras.utils.set_random_seed(config.seed + hvd.rank())
