"""What LARS does on TensorFlow alone: XLA programs and sparse gradients."""

import functools
import typing
from collections.abc import Callable

import keras

from keras_lars import _xla_flags
from keras_lars._stacks import stack_variables


def xla_is_possible():
    """Whether XLA can update variables that are made in this context."""
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    # The update of variables with several replicas talks between devices.
    return tf.distribute.get_strategy().num_replicas_in_sync == 1


def update(
    formulas, rules, variables, velocities, ratios, gradients, learning_rate
):
    """Updates variables by an XLA program.

    TensorFlow keeps each XLA program until the process ends. So optimizers with
    equal rules, for variables of equal shapes, share one.

    Args:
        formulas: `Formulas`.
        rules: List of hashable rules, one per variable.
        variables: List of variables.
        velocities: List of variables.
        ratios: List of variables; None for a variable without a ratio.
        gradients: List of tensors.
        learning_rate: Tensor.
    """
    program = _program(
        formulas,
        tuple(rules),
        tuple(map(_spec, variables)),
        tuple(map(_spec, velocities)),
        _xla_flags.writes_two_outputs(),
    )
    program(
        [_handle(variable) for variable in variables],
        [_handle(velocity) for velocity in velocities],
        [None if ratio is None else _handle(ratio) for ratio in ratios],
        gradients,
        learning_rate,
    )


class Formulas(typing.NamedTuple):
    """The functions of `keras_lars.lars` with these names."""

    new_values: Callable
    scaled_gradient: Callable


@functools.cache
def _program(formulas, rules, variable_specs, velocity_specs, two_outputs):
    """Returns a program that knows no variables, but gets their handles.

    A program that got the variables would not work after they are deleted.
    """
    import tensorflow as tf

    stacks = stack_variables(rules, variable_specs, velocity_specs)
    stacked = {i for stack in stacks for i in stack.places}
    others = [i for i in range(len(rules)) if i not in stacked]

    @functools.partial(tf.function, jit_compile=True, autograph=False)
    def in_xla(tensors_of_others, tensors_of_stacks, learning_rate):
        for i, tensors in zip(others, tensors_of_others, strict=True):
            gradient, variable, velocity, ratio = tensors
            w, v, r = formulas.new_values(
                rules[i],
                gradient,
                _read(variable, variable_specs[i]),
                _read(velocity, velocity_specs[i]),
                learning_rate,
                apart=two_outputs,
            )
            _assign(velocity, v)
            _assign(variable, w)
            if ratio is not None:
                _assign(ratio, r)
        scaled = []
        for stack, (gradients, variables) in zip(
            stacks, tensors_of_stacks, strict=True
        ):
            s, rate, r = formulas.scaled_gradient(
                stack.rule, gradients, variables, learning_rate, _norm_of_each
            )
            r = tf.reshape(r, [-1]) if stack.rule.is_adapted else None
            scaled.append([s, rate, r])
        return scaled

    def update_all(variables, velocities, ratios, gradients, learning_rate):
        gradients = [
            tf.cast(gradient, dtype)
            for gradient, (_, dtype) in zip(
                gradients, variable_specs, strict=True
            )
        ]
        tensors = list(
            zip(gradients, variables, velocities, ratios, strict=True)
        )
        tensors_of_stacks = [
            [
                tf.stack(stack.of(gradients)),
                tf.stack(
                    [
                        _read(variables[i], variable_specs[i])
                        for i in stack.places
                    ]
                ),
            ]
            for stack in stacks
        ]
        scaled = in_xla(
            [tensors[i] for i in others], tensors_of_stacks, learning_rate
        )
        for stack, (s, rate, r) in zip(stacks, scaled, strict=True):
            _apply_momentum(
                stack.rule,
                stack.of(variables),
                stack.of(velocities),
                tf.unstack(s),
                rate,
            )
            if r is not None:
                for ratio, value in zip(
                    stack.of(ratios), tf.unstack(r), strict=True
                ):
                    _assign(ratio, value)

    return tf.function(update_all, autograph=False)


def _read(handle, spec):
    import tensorflow as tf

    shape, dtype = spec
    value = tf.raw_ops.ReadVariableOp(resource=handle, dtype=dtype)
    # A handle that is an argument does not know the shape.
    value.set_shape(shape)
    return value


def _assign(handle, value):
    import tensorflow as tf

    tf.raw_ops.AssignVariableOp(resource=handle, value=value)


def _apply_momentum(rule, variables, velocities, gradients, rate):
    """Adds gradients to velocities, and takes these off variables."""
    import tensorflow as tf

    momentum = tf.constant(rule.momentum, rate.dtype)
    for variable, velocity, gradient in zip(
        variables, velocities, gradients, strict=True
    ):
        tf.raw_ops.ResourceApplyMomentum(
            var=variable,
            accum=velocity,
            lr=rate,
            grad=gradient,
            momentum=momentum,
            use_nesterov=rule.nesterov,
        )


def _norm_of_each(stack, size):
    """Returns the float32 norm of each tensor of a stack, to multiply it by."""
    import tensorflow as tf

    del size  # Of all together.
    squares = tf.square(tf.cast(stack, tf.float32))
    axes = list(range(1, stack.shape.rank))
    return tf.sqrt(tf.reduce_sum(squares, axes, keepdims=True))


def _spec(variable):
    shape = tuple(variable.shape)
    return shape, keras.backend.standardize_dtype(variable.dtype)


def _handle(variable):
    if isinstance(variable, keras.Variable):
        variable = variable.value
    return variable.handle


def dense(gradient, shape):
    """Returns the gradient as a tensor with all of its rows.

    Args:
        gradient: Tensor, or None.
        shape: That of its variable. TensorFlow may not know all sizes of the
            gradient before it runs, and then raises if they are others.
    """
    if keras.backend.backend() != "tensorflow" or gradient is None:
        return gradient
    import tensorflow as tf

    if isinstance(gradient, tf.IndexedSlices):
        # `keras.ops.convert_to_tensor` would leave it sparse.
        gradient = tf.convert_to_tensor(gradient)
    if isinstance(gradient, tf.Tensor):
        if not gradient.shape.is_fully_defined():
            gradient = tf.ensure_shape(gradient, shape)
    return gradient


def compiled(update):
    """Returns a function that XLA compiles, with the variables that it uses."""
    import tensorflow as tf

    return tf.function(update, jit_compile=True, autograph=False)
