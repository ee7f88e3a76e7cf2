"""What LARS does on TensorFlow alone: XLA programs and sparse gradients."""

import functools

import keras


def xla_is_possible():
    """Whether XLA can update variables that are made in this context."""
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    # The update of variables with several replicas talks between devices.
    return tf.distribute.get_strategy().num_replicas_in_sync == 1


def update(
    new_values, rules, variables, velocities, ratios, gradients, learning_rate
):
    """Updates variables by an XLA program.

    TensorFlow keeps each XLA program until the process ends. So optimizers with
    equal rules, for variables of equal shapes, share one.

    Args:
        new_values: Function of a rule, a gradient, a variable, its velocity and
            the learning rate. It returns the new variable, velocity and ratio.
        rules: List of hashable rules, one per variable.
        variables: List of variables.
        velocities: List of variables.
        ratios: List of variables; None for a variable without a ratio.
        gradients: List of tensors.
        learning_rate: Tensor.
    """
    program = _program(
        new_values,
        tuple(rules),
        tuple(map(_spec, variables)),
        tuple(map(_spec, velocities)),
    )
    program(
        [_handle(variable) for variable in variables],
        [_handle(velocity) for velocity in velocities],
        [None if ratio is None else _handle(ratio) for ratio in ratios],
        gradients,
        learning_rate,
    )


@functools.cache
def _program(new_values, rules, variable_specs, velocity_specs):
    """Returns an XLA program that knows no variables, but gets their handles.

    A program that got the variables would not work after they are deleted.
    """
    import tensorflow as tf

    def read(handle, spec):
        shape, dtype = spec
        value = tf.raw_ops.ReadVariableOp(resource=handle, dtype=dtype)
        return tf.ensure_shape(value, shape)

    def assign(handle, value):
        tf.raw_ops.AssignVariableOp(resource=handle, value=value)

    def update_all(variables, velocities, ratios, gradients, learning_rate):
        for i, rule in enumerate(rules):
            w, v, r = new_values(
                rule,
                gradients[i],
                read(variables[i], variable_specs[i]),
                read(velocities[i], velocity_specs[i]),
                learning_rate,
            )
            assign(velocities[i], v)
            assign(variables[i], w)
            if ratios[i] is not None:
                assign(ratios[i], r)

    return tf.function(update_all, jit_compile=True, autograph=False)


def _spec(variable):
    shape = tuple(variable.shape)
    return shape, keras.backend.standardize_dtype(variable.dtype)


def _handle(variable):
    if isinstance(variable, keras.Variable):
        variable = variable.value
    return variable.handle


def dense(gradient):
    """Returns the gradient as a tensor with all of its rows."""
    if keras.backend.backend() != "tensorflow":
        return gradient
    import tensorflow as tf

    # `keras.ops.convert_to_tensor` would leave it sparse.
    sparse = isinstance(gradient, tf.IndexedSlices)
    return tf.convert_to_tensor(gradient) if sparse else gradient
