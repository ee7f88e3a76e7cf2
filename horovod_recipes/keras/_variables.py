"""Collectives on Keras variables: broadcast and average over the ranks."""

import horovod.tensorflow as hvd
import keras
import tensorflow as tf

from horovod_recipes.keras._agreement import check_agreement
from horovod_recipes.keras._agreement import described
from horovod_recipes.keras._agreement import kind

# What an error says to do where the ranks' variables differ.
FIX = (
    "Build the same model on every rank, and pass its variables in the same "
    "order"
)


def broadcast_variables(
    variables, root_rank, process_set=hvd.global_process_set, inplace=False
):
    """Copies the variables' values from one rank to all ranks.

    Args:
        variables: List of `keras.Variable` or `tf.Variable` of any dtype, in
            the same order on every rank.
        root_rank: Integer, the rank that sends.
        process_set: The `ProcessSet` of the ranks that call this. Defaults
            to all ranks.
        inplace: Whether to receive into the variables' memory without a copy,
            if Horovod has the dtype. Defaults to `False`.

    Raises:
        ValueError: On every rank, if the ranks pass different variables. It
            names them. From a graph, it is a
            `tf.errors.InvalidArgumentError`.
    """
    variables = list(variables)
    agreement = check_agreement(
        described(variables),
        "variables to broadcast_variables",
        FIX,
        "broadcast_agreement",
        process_set,
        keys=[kind(variable) for variable in variables],
    )
    with tf.control_dependencies(agreement):
        _broadcast(variables, root_rank, process_set, inplace)


def _broadcast(variables, root_rank, process_set, inplace):
    for index, variable in enumerate(variables):
        name = f"broadcast_{index}"
        if isinstance(variable, keras.Variable):
            variable = variable.value
        if inplace and variable.dtype not in (tf.bfloat16, tf.uint32):
            hvd.broadcast_(
                [variable], root_rank, name=name, process_set=process_set
            )
            continue
        # Horovod does not have bfloat16 or uint32, so send bytes.
        value = tf.convert_to_tensor(variable)
        data = value if value.dtype == tf.bool else tf.bitcast(value, tf.uint8)
        data = hvd.broadcast(
            data, root_rank, name=name, process_set=process_set
        )
        if value.dtype != tf.bool:
            data = tf.bitcast(data, value.dtype)
        variable.assign(data)


def broadcast_global_variables(root_rank):
    """Raises an error: Keras 3 does not have a list of all variables.

    Horovod's own function works only in TensorFlow 1's graphs.

    Args:
        root_rank: Integer, the rank that would send.

    Raises:
        RuntimeError: Always. The message names what to call instead.
    """
    raise RuntimeError(
        "Keras 3 does not have a list of all variables. Use "
        "hvd.broadcast_variables(model.weights + model.optimizer.variables, "
        f"root_rank={root_rank}), or, with model.fit, "
        f"hvd.callbacks.BroadcastGlobalVariablesCallback({root_rank})."
    )


def average_variables(variables):
    """Sets each float variable to its mean over all ranks.

    The sum is in float64, so a value that is equal on all ranks does not
    change, not even in its last bit.

    Args:
        variables: List of `keras.Variable` or `tf.Variable`, in the same order
            on every rank. Variables of integer dtypes do not change.

    Raises:
        ValueError: On every rank, if the ranks pass different variables.
    """
    variables = [v for v in variables if tf.as_dtype(v.dtype).is_floating]
    sums = sum_over_ranks(variables)
    for variable, total in zip(variables, sums, strict=True):
        variable.assign(tf.cast(total / hvd.size(), variable.dtype))


def sum_over_ranks(variables):
    """Returns a float64 tensor per variable, its sum over all ranks.

    Args:
        variables: List of `keras.Variable`, `tf.Variable` or tensors, in the
            same order on every rank.

    Raises:
        ValueError: On every rank, if the ranks pass different variables.
    """
    agreement = check_agreement(
        described(variables),
        "variables to add up",
        FIX,
        "sum_agreement",
        keys=[kind(variable) for variable in variables],
    )
    if not variables:
        return []
    with tf.control_dependencies(agreement):
        return hvd.grouped_allreduce(
            [tf.cast(tf.convert_to_tensor(v), tf.float64) for v in variables],
            op=hvd.Sum,
            name="sum_over_ranks",
        )
