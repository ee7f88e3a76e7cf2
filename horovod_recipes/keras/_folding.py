"""Keeps TensorFlow from running a collective only once for all steps.

TensorFlow runs an operation on constants once, while it optimizes a graph, and
uses the result in every step. A collective would then run on the ranks where
its input changes, but not on a rank where it is constant. The others would wait
for that rank, which trains on with an old result.
"""

import functools
import threading

import tensorflow as tf


def not_folded(tensor):
    """Returns a copy of the tensor that TensorFlow takes for unknown."""
    if tf.executing_eagerly():
        return tensor
    return tf.where(_true(), tensor, tf.zeros_like(tensor))


@functools.cache
def _true():
    """Returns a variable that is always true; TensorFlow cannot know that."""
    return variable_outside_of_graphs(True)


def one_not_folded(tensors):
    """Returns the tensors, with a copy of the smallest one by `not_folded`.

    TensorFlow runs an operation ahead only if all of its inputs are constants.
    """
    sizes = [t.shape.num_elements() or 0 for t in tensors]
    smallest = sizes.index(min(sizes))
    return [
        not_folded(tensor) if index == smallest else tensor
        for index, tensor in enumerate(tensors)
    ]


def variable_outside_of_graphs(value):
    """Returns a variable on a CPU, also where a `tf.function` is traced.

    A `tf.function` refuses variables that its later traces create, even in
    `tf.init_scope`. A new thread does not trace anything.
    """
    created = []

    def create():
        with tf.device("CPU"):
            created.append(tf.Variable(value, trainable=False))

    thread = threading.Thread(target=create)
    thread.start()
    thread.join()
    return created[0]
