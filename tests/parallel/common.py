"""Helpers that several parallel tests share."""

import horovod.tensorflow
import numpy as np
import tensorflow as tf


def of_rank(value_of_rank_0, value_of_rank_1):
    """Returns the argument of this rank."""
    return [value_of_rank_0, value_of_rank_1][horovod.tensorflow.rank()]


def arrays_of_ranks(values):
    """Returns, for each rank, its variables or arrays as NumPy arrays."""
    return horovod.tensorflow.allgather_object(
        [np.array(value) for value in values]
    )


def assert_same_on_all_ranks(values):
    """Fails unless all ranks hold these variables or arrays, to the bit."""
    for first, second in zip(*arrays_of_ranks(values), strict=True):
        np.testing.assert_array_equal(first, second)


def largest_difference(first, second):
    """Returns the largest difference between two lists of arrays."""
    return max(np.abs(a - b).max() for a, b in zip(first, second, strict=True))


def horovod_operations(function, *arguments):
    """Returns Horovod's operations in the graph of a function, in order.

    The operation that compares the ranks is left out.
    """
    traced = tf.function(function, autograph=False)
    graph = traced.get_concrete_function(*arguments).graph
    return [
        op
        for op in graph.get_operations()
        if "Horovod" in op.type and not op.name.endswith("_agreement")
    ]
