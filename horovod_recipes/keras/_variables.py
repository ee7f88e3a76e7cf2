"""Collectives on Keras variables: broadcast and average over the ranks."""

import horovod.tensorflow as hvd
import keras
import tensorflow as tf


def broadcast_variables(
    variables, root_rank, process_set=hvd.global_process_set, inplace=False
):
    """Gives every rank the values that `root_rank` holds.

    Args:
        variables: List of `keras.Variable` or `tf.Variable` of any dtype, in
            the same order on every rank.
        root_rank: Integer, the rank that sends.
        process_set: The `ProcessSet` of the ranks that call this. Defaults
            to all ranks.
        inplace: Whether to receive into the variables' own memory, without a
            copy, where Horovod has the dtype. Defaults to `False`.
    """
    for index, variable in enumerate(variables):
        name = f"broadcast_{index}"
        if isinstance(variable, keras.Variable):
            variable = variable.value
        if inplace and variable.dtype not in (tf.bfloat16, tf.uint32):
            hvd.broadcast_(
                [variable], root_rank, name=name, process_set=process_set
            )
            continue
        # Bytes travel whatever the dtype: Horovod takes no bfloat16 or uint32.
        value = tf.convert_to_tensor(variable)
        data = value if value.dtype == tf.bool else tf.bitcast(value, tf.uint8)
        data = hvd.broadcast(
            data, root_rank, name=name, process_set=process_set
        )
        if value.dtype != tf.bool:
            data = tf.bitcast(data, value.dtype)
        variable.assign(data)


def broadcast_global_variables(root_rank):
    """Raises an error: there is no list of all variables in Keras 3.

    Horovod's own works in TensorFlow 1's graphs alone, and raises otherwise.

    Args:
        root_rank: Integer, the rank that would send.

    Raises:
        RuntimeError: Always; it names what to call instead.
    """
    raise RuntimeError(
        "Keras 3 has no list of all variables. Use "
        "hvd.broadcast_variables(model.weights + model.optimizer.variables, "
        f"root_rank={root_rank}), or, with model.fit, "
        f"hvd.callbacks.BroadcastGlobalVariablesCallback({root_rank})."
    )


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
