"""Batch norm with the statistics of all ranks' batches."""

import horovod.tensorflow as hvd
import keras
import tensorflow as tf

from horovod_recipes.keras import _watchdog
from horovod_recipes.keras._keras_hooks import check_outside_xla


def SyncBatchNormalization(fused=False, **arguments):
    """Returns a batch norm whose batches are those of all ranks together.

    In training, outputs, gradients and moving statistics are those of
    `keras.layers.BatchNormalization` on the concatenation of the ranks'
    batches, of any sizes; a forward pass takes one allreduce, a backward pass
    another. In evaluation there is none.

    The layer is a `keras.layers.BatchNormalization`, so that a model saved with
    it loads without Horovod. One that is made from its config, as by
    `keras.models.clone_model`, normalizes by this rank's batches alone.

    Args:
        fused: `False`. Horovod has the argument to refuse a fused kernel.
        **arguments: Of `keras.layers.BatchNormalization`.

    Raises:
        ValueError: If `fused` is not `False`.
    """
    if fused is not False:
        raise ValueError(
            "Argument `fused` must be False: a fused kernel has no statistics "
            f"of all ranks. Received: fused={fused!r}"
        )
    layer = keras.layers.BatchNormalization(**arguments)
    # An attribute of the instance rather than a method of a subclass, because
    # the class is what a saved file names.
    layer._moments = _MomentsOfAllRanks(layer)
    return layer


def is_synchronized(layer):
    """Whether the layer came from `SyncBatchNormalization`."""
    return isinstance(getattr(layer, "_moments", None), _MomentsOfAllRanks)


class _MomentsOfAllRanks:
    """Stands in for a batch norm's `_moments`: those of all ranks together."""

    def __init__(self, layer):
        self._axis = layer.axis
        self._local_moments = layer._moments

    def __call__(self, inputs, mask):
        check_outside_xla("A SyncBatchNormalization")
        mean, variance = self._local_moments(inputs, mask)
        if mask is None:
            count = tf.size(inputs) // tf.shape(inputs)[self._axis]
        else:
            count = tf.math.count_nonzero(mask)
        # In float64 nothing is lost where the mean is far above the standard
        # deviation.
        count = tf.cast(tf.reshape(count, [1]), tf.float64)
        local_mean = tf.cast(mean, tf.float64)
        local_square = tf.cast(variance, tf.float64) + local_mean**2
        local = tf.concat([count, count * local_mean, count * local_square], 0)
        sums = _sum_over_ranks(local)
        total_mean, total_square = tf.split(sums[1:] / sums[0], 2)
        total_variance = total_square - total_mean**2
        return (
            tf.cast(total_mean, mean.dtype),
            tf.cast(total_variance, variance.dtype),
        )


@tf.custom_gradient
def _sum_over_ranks(tensor):
    """Returns the sum; its gradient is the sum of the ranks' gradients."""
    # Horovod's own gradient is the same, but the watchdog would not see it.
    return _noted_sum(tensor), _noted_sum


def _noted_sum(tensor):
    # At the top of the names of operations, which below have those of layers:
    # Keras numbers these, and another rank may have made other ones before.
    with tf.name_scope(""):
        allreduce = _watchdog.noted(
            lambda tensors: [
                hvd.allreduce(*tensors, op=hvd.Sum, name=_next_name())
            ]
        )
        return allreduce([tensor])[0]


def _next_name():
    """Returns a name that is the same on all ranks, which trace one step."""
    if tf.executing_eagerly():
        return None
    return tf.compat.v1.get_default_graph().unique_name("sync_batch_norm")
