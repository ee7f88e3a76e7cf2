"""Batch norm with the statistics of all ranks' batches."""

import horovod.tensorflow as hvd
import keras
import tensorflow as tf

from horovod_recipes.keras import _watchdog
from horovod_recipes.keras._collectives import next_name
from horovod_recipes.keras._handshake import waits_for
from horovod_recipes.keras._keras_hooks import check_outside_xla
from horovod_recipes.keras._keras_hooks import moments_of
from horovod_recipes.keras._keras_hooks import replace_moments


def SyncBatchNormalization(fused=False, **arguments):
    """Returns a batch norm that normalizes over the batches of all ranks.

    In training it equals a `keras.layers.BatchNormalization` on the ranks'
    concatenated batches, whose sizes may differ. This holds for outputs,
    gradients and moving statistics. A forward pass and a backward pass take one
    allreduce each. Evaluation takes none.

    The layer is a `keras.layers.BatchNormalization`, so a model saved with it
    loads without Horovod. A copy of the model synchronizes, by `copy`, `pickle`
    or `hvd.broadcast_object`. A layer made from its config normalizes over this
    rank's batches alone, for example in a model that was loaded, or after
    `keras.models.clone_model`.

    Args:
        fused: `False`. Horovod has this argument only to refuse `True`.
        **arguments: Arguments of `keras.layers.BatchNormalization`.

    Raises:
        ValueError: If `fused` is not `False`.
    """
    if fused is not False:
        raise ValueError(
            "Argument `fused` must be False: a fused kernel cannot use the "
            f"statistics of all ranks. Received: fused={fused!r}"
        )
    # Imported here, because the hooks need this module.
    from horovod_recipes.keras._install_hooks import install_hooks

    install_hooks()
    layer = keras.layers.BatchNormalization(**arguments)
    synchronize(layer)
    return layer


def synchronize(layer):
    """Makes a batch norm normalize over the batches of all ranks."""
    replace_moments(layer, _MomentsOfAllRanks(layer))
    # XLA cannot compile Horovod's operations: Keras then compiles the model
    # without XLA, with a warning where the user asked for it.
    layer.supports_jit = False


def is_synchronized(layer):
    """Whether a layer came from `SyncBatchNormalization`."""
    return isinstance(layer, keras.layers.BatchNormalization) and isinstance(
        moments_of(layer), _MomentsOfAllRanks
    )


class _MomentsOfAllRanks:
    """Computes a batch norm's mean and variance over all ranks."""

    def __init__(self, layer):
        self._axis = layer.axis
        self._local_moments = moments_of(layer)

    def __call__(self, inputs, mask):
        check_outside_xla("A SyncBatchNormalization")
        mean, variance = self._local_moments(inputs, mask)
        if mask is None:
            count = tf.size(inputs) // tf.shape(inputs)[self._axis]
        else:
            count = tf.math.count_nonzero(mask)
        # float32 would lose the variance where the mean is far larger.
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
    return _tracked_sum(tensor), _tracked_sum


def _tracked_sum(tensor):
    # The scope of a layer may have another number on another rank.
    inputs = waits_for(hvd.global_process_set) or []
    with tf.name_scope(""), tf.control_dependencies(inputs):
        allreduce = _watchdog.tracked(
            lambda tensors: [
                hvd.allreduce(
                    *tensors, op=hvd.Sum, name=next_name("sync_batch_norm")
                )
            ]
        )
        return allreduce([tensor])[0]
