"""What the benchmarks of communication share: their start, and the update."""

import keras
import tensorflow as tf

import horovod_recipes.keras as hvd
from horovod_recipes.models import MODELS
from keras_lars import LARS
from keras_lars import _xla_flags

# Seconds without an operation after which a rank counts as hung.
WATCHDOG_SECONDS = 3600


def start(threads=1, **arguments):
    """Starts Horovod on ranks with `threads` threads within an operation.

    Returns:
        A context for all collectives: the watchdog that a job has, too.
    """
    # TensorFlow warns that each function traces again.
    tf.get_logger().setLevel("ERROR")
    # As a job does.
    _xla_flags.allow_two_outputs()
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    # With one, TensorFlow would send the handshake after the forward pass.
    tf.config.threading.set_inter_op_parallelism_threads(max(threads, 2))
    hvd.init(**arguments)
    return hvd.callbacks.Watchdog(WATCHDOG_SECONDS)


def key():
    """Returns the library and the number of ranks, as a key of results."""
    return f"{'MPI' if hvd.mpi_enabled() else 'Gloo'}, {hvd.size()} ranks"


def resnet50_v1(image_size):
    """Returns the network that the updates train."""
    return MODELS["resnet50"]((image_size, image_size, 3), 1000, version="v1")


def update_function(
    network,
    micro_batch,
    accumulation,
    xla,
    process_set=hvd.global_process_set,
    groups=None,
):
    """Returns a function that makes an update over the ranks of a set.

    Args:
        network: A `keras.Model` from uint8 images to logits.
        micro_batch: Integer, images per rank and micro-batch.
        accumulation: Integer, micro-batches per update.
        xla: Whether XLA compiles the forward and backward pass.
        process_set: The ranks that average their gradients.
        groups: How many groups of gradients travel; see `DistributedOptimizer`.
    """
    network.compile(
        hvd.DistributedOptimizer(
            # The size does not change the time; weights must stay finite.
            LARS(0.01, weight_decay=5e-4),
            backward_passes_per_step=accumulation,
            average_aggregated_gradients=True,
            process_set=process_set,
            groups=groups,
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        steps_per_execution=accumulation,
        jit_compile=xla,
    )
    network.optimizer.build(network.trainable_variables)
    network.make_train_function()
    images = tf.random.uniform(
        [micro_batch, *network.input_shape[1:]], 0, 256, tf.int32
    )
    labels = tf.random.uniform(
        [micro_batch], 0, network.output_shape[-1], tf.int32
    )
    batch = tf.cast(images, tf.uint8), labels
    batches = iter(tf.data.Dataset.from_tensors(batch).repeat())
    return lambda: network.train_function(batches)
