"""Horovod's collectives, which take Keras variables too.

Those that `horovod.tensorflow.keras` has come first, with its signatures.
"""

import functools

import horovod.tensorflow as hvd
import keras
import tensorflow as tf

from horovod_recipes.keras import _watchdog
from horovod_recipes.keras._folding import not_folded
from horovod_recipes.keras._folding import one_not_folded
from horovod_recipes.keras._handshake import waits_for


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


def differentiable_allgather(
    tensor, name=None, process_set=hvd.global_process_set
):
    """Returns all ranks' tensors as `allgather` does, with an exact gradient.

    Take a loss over gathered tensors, such as a contrastive loss, whose mean
    over the ranks is the loss of the global batch. With this function and
    `DistributedOptimizer`, its gradient is that of the global batch.

    Each rank's loss depends on the tensors of all ranks. So the gradient of a
    rank's tensor is the sum, over all ranks, of the gradients of its part. The
    gradient of `hvd.allgather` is their mean. `DistributedOptimizer` then
    divides by the number of ranks once more, and the gradient that comes
    through the gathered tensors is too small.

    Args:
        tensor: Float tensor, or array, with one dimension or more. Only the
            first dimension may differ between the ranks. It may be 0.
        name: String, the operation's name. Defaults to a generated name.
        process_set: The `ProcessSet` of the ranks that call it. Defaults to
            all ranks.

    Returns:
        Tensor, concatenated along the first dimension in the order of the
        ranks.

    Raises:
        ValueError: If `tensor` is a scalar.
    """
    tensor = tf.convert_to_tensor(tensor)
    if tensor.shape.rank == 0:
        raise ValueError(
            "Argument `tensor` must have one dimension or more. Received: a "
            "scalar"
        )
    return _gather(tensor, name, process_set)


def _gather(tensor, name, process_set):
    # The scope of a layer may have another number on another rank.
    with tf.name_scope(""):
        name = name or next_name("differentiable_allgather")

        @tf.custom_gradient
        def gather(tensor):
            rows = tf.reshape(tf.shape(tensor)[0], [1])
            gathered, rows_of_ranks = _tracked(
                lambda tensors: [
                    hvd.allgather(tensors[0], name, process_set=process_set),
                    hvd.allgather(
                        tensors[1],
                        name and f"{name}_rows",
                        process_set=process_set,
                    ),
                ],
                [tensor, rows],
                process_set,
            )

            def gradient(of_gathered):
                """Sends each rank its part, and adds up what arrives."""
                (parts,) = _tracked(
                    lambda tensors: [
                        hvd.alltoall(
                            tensors[0],
                            rows_of_ranks,
                            name and f"{name}_gradient",
                            process_set=process_set,
                        )[0]
                    ],
                    [of_gathered],
                    process_set,
                )
                ranks = tf.size(rows_of_ranks)
                shape = tf.concat([[ranks], tf.shape(tensor)], axis=0)
                return tf.reduce_sum(tf.reshape(parts, shape), axis=0)

            return gathered, gradient

        return gather(tensor)


def _tracked(collective, tensors, process_set):
    """Runs a collective in a step of `fit`, where the watchdog sees it."""
    inputs = waits_for(process_set) or []
    tensors = [not_folded(tensor) for tensor in tensors]
    with tf.control_dependencies(inputs):
        return _watchdog.tracked(collective)(tensors)


def next_name(name):
    """Returns an operation name that all ranks choose for the same step."""
    if tf.executing_eagerly():
        return None
    return tf.compat.v1.get_default_graph().unique_name(name)


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
