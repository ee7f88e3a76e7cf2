"""Collectives with the signatures of `horovod.tensorflow.keras`."""

import horovod.tensorflow as hvd
import tensorflow as tf

from horovod_recipes.keras._folding import not_folded


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
