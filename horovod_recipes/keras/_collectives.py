"""Horovod's collectives, which take Keras variables too.

Those that `horovod.tensorflow.keras` has come first, with its signatures.
"""

import functools

import horovod.tensorflow as hvd
import keras
import tensorflow as tf

from horovod_recipes.keras._folding import not_folded
from horovod_recipes.keras._folding import one_not_folded


def allreduce(
    value,
    name=None,
    average=None,
    prescale_factor=1.0,
    postscale_factor=1.0,
    op=None,
    compression=hvd.Compression.none,
):
    """Returns the mean, or another reduction, of all ranks' values.

    Args:
        value: A number, array or tensor, of the same shape on every rank.
        name: String, the operation's name. Defaults to a generated name.
        average: Deprecated by Horovod in favour of `op`.
        prescale_factor: Float, multiplies each rank's value. Defaults to
            `1.0`.
        postscale_factor: Float, multiplies the result. Defaults to `1.0`.
        op: `Average` or `Sum`. Defaults to `Average`.
        compression: `Compression.none` or `Compression.fp16`. Defaults to
            `Compression.none`.
    """
    return hvd.allreduce(
        not_folded(tf.convert_to_tensor(value)),
        average=average,
        compression=compression,
        op=op,
        prescale_factor=prescale_factor,
        postscale_factor=postscale_factor,
        name=name,
    )


def allgather(value, name=None):
    """Returns all ranks' values, concatenated along the first dimension.

    Only the first dimension may differ between the ranks.
    """
    return hvd.allgather(not_folded(tf.convert_to_tensor(value)), name=name)


def broadcast(value, root_rank, name=None):
    """Returns the value of `root_rank`. All ranks pass the same shape."""
    return hvd.broadcast(
        not_folded(tf.convert_to_tensor(value)), root_rank, name=name
    )


def reducescatter(value, name=None, op=hvd.Average):
    """Returns this rank's slice of the reduction, along the first dimension."""
    return hvd.reducescatter(
        not_folded(tf.convert_to_tensor(value)), name=name, op=op
    )


@functools.wraps(hvd.alltoall)
def alltoall(tensor, *args, **kwargs):
    return hvd.alltoall(
        not_folded(tf.convert_to_tensor(tensor)), *args, **kwargs
    )


def _for_keras(function):
    """Returns a function of Horovod that takes a list of Keras variables."""

    @functools.wraps(function)
    def for_keras(tensors, *args, **kwargs):
        tensors = [tf.convert_to_tensor(tensor) for tensor in tensors]
        return function(one_not_folded(tensors), *args, **kwargs)

    return for_keras


grouped_allgather = _for_keras(hvd.grouped_allgather)
grouped_allreduce = _for_keras(hvd.grouped_allreduce)
grouped_reducescatter = _for_keras(hvd.grouped_reducescatter)


@functools.wraps(hvd.broadcast_)
def broadcast_(variables, *args, **kwargs):
    variables = [
        v.value if isinstance(v, keras.Variable) else v for v in variables
    ]
    return hvd.broadcast_(variables, *args, **kwargs)
