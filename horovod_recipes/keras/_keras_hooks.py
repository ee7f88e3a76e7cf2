"""A clear error where XLA would have to compile an operation of Horovod."""

import tensorflow as tf
from tensorflow.python.ops import control_flow_util


def check_outside_xla(name):
    """Raises where the operation `name` would be compiled by XLA.

    Raises:
        ValueError: While the function is traced, on every rank.
    """
    # TensorFlow has no public name for it. Without the check it fails when the
    # step runs, and does not say what to do.
    graph = tf.compat.v1.get_default_graph()
    if control_flow_util.GraphOrParentsInXlaContext(graph):
        raise ValueError(
            f"{name} is inside a function with jit_compile=True, and XLA "
            "cannot compile Horovod's operations. For model.fit: "
            "compile(..., jit_compile=False). In a loop of your own, return "
            "the gradients from the function that XLA compiles, and call "
            "optimizer.apply outside of it."
        )
