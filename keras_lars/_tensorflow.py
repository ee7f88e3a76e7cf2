"""What LARS does on TensorFlow alone: XLA programs and sparse gradients."""

import keras


def xla_is_possible():
    """Whether XLA can update variables that are made in this context."""
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    # The update of variables with several replicas talks between devices.
    return tf.distribute.get_strategy().num_replicas_in_sync == 1


def compiled(function):
    """Returns the function as an XLA program, traced at its first call."""
    import tensorflow as tf

    return tf.function(function, jit_compile=True, autograph=False)


def dense(gradient):
    """Returns the gradient as a tensor with all of its rows."""
    if keras.backend.backend() != "tensorflow":
        return gradient
    import tensorflow as tf

    # `keras.ops.convert_to_tensor` would leave it sparse.
    sparse = isinstance(gradient, tf.IndexedSlices)
    return tf.convert_to_tensor(gradient) if sparse else gradient
