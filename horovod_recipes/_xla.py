"""Tells whether XLA compiles the graph that TensorFlow traces now."""


def xla_compiles():
    """Whether XLA compiles the operations that are made now."""
    import tensorflow as tf

    # A private module: TensorFlow has no public way to ask this.
    from tensorflow.python.ops import control_flow_util

    graph = tf.compat.v1.get_default_graph()
    return control_flow_util.GraphOrParentsInXlaContext(graph)
