"""Collectives on Keras variables: broadcast and average over the ranks."""

import horovod.tensorflow as hvd
import tensorflow as tf


def broadcast_variables(variables, root_rank):
    """Gives every rank the values that `root_rank` holds.

    Args:
        variables: List of `keras.Variable` of any dtype, in the same order on
            every rank.
        root_rank: Integer, the rank that sends.
    """
    for index, variable in enumerate(variables):
        # Bytes travel whatever the dtype: Horovod takes no bfloat16 or uint32.
        value = tf.convert_to_tensor(variable)
        data = value if value.dtype == tf.bool else tf.bitcast(value, tf.uint8)
        data = hvd.broadcast(data, root_rank, name=f"broadcast_{index}")
        if value.dtype != tf.bool:
            data = tf.bitcast(data, value.dtype)
        variable.assign(data)


def average_variables(variables):
    """Sets each float variable to its mean over all ranks.

    The mean is taken in float64, so that values which are equal on all ranks
    stay as they are, to the last bit, on any number of ranks.
    """
    variables = [v for v in variables if tf.as_dtype(v.dtype).is_floating]
    sums = sum_over_ranks(variables)
    for variable, total in zip(variables, sums, strict=True):
        variable.assign(tf.cast(total / hvd.size(), variable.dtype))


def sum_over_ranks(variables):
    """Returns the float64 sum over all ranks of each variable."""
    if not variables:
        return []
    return hvd.grouped_allreduce(
        [tf.cast(tf.convert_to_tensor(v), tf.float64) for v in variables],
        op=hvd.Sum,
        name="sum_over_ranks",
    )
