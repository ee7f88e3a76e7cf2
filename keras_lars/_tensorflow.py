"""What LARS does on TensorFlow alone: XLA programs and sparse gradients."""

import functools

import keras

from keras_lars import _xla_flags
from keras_lars._packs import pack_variables


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
    """Updates variables by an XLA program, and small ones as one vector.

    TensorFlow keeps each XLA program until the process ends. So optimizers with
    equal rules, for variables of equal shapes, share one.

    Args:
        new_values: Function of a rule, a gradient, a variable, its velocity,
            the learning rate, and a function that computes the norm of a
            tensor. It returns the new variable, velocity and ratio.
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
        _xla_flags.writes_two_outputs(),
    )
    program(
        [_handle(variable) for variable in variables],
        [_handle(velocity) for velocity in velocities],
        [None if ratio is None else _handle(ratio) for ratio in ratios],
        gradients,
        learning_rate,
    )


@functools.cache
def _program(new_values, rules, variable_specs, velocity_specs, two_outputs):
    """Returns a program that knows no variables, but gets their handles.

    A program that got the variables would not work after they are deleted.
    """
    import tensorflow as tf

    packs = pack_variables(rules, variable_specs, velocity_specs)
    packed = {i for pack in packs for i in pack.indices}
    others = [i for i in range(len(rules)) if i not in packed]

    @functools.partial(tf.function, jit_compile=True, autograph=False)
    def in_xla(tensors_of_others, vectors_of_packs, learning_rate):
        for i, tensors in zip(others, tensors_of_others, strict=True):
            gradient, variable, velocity, ratio = tensors
            w, v, r = new_values(
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
        new_vectors = []
        for pack, vectors in zip(packs, vectors_of_packs, strict=True):
            w, v, r = new_values(
                pack.rule, *vectors, learning_rate, norm=pack.norm
            )
            is_adapted = r.shape.rank > 0
            new_vectors.append([w, v, pack.one_each(r) if is_adapted else None])
        return new_vectors

    def update_all(variables, velocities, ratios, gradients, learning_rate):
        gradients = [
            tf.ensure_shape(gradient, shape)
            for gradient, (shape, _) in zip(
                gradients, variable_specs, strict=True
            )
        ]
        tensors = list(
            zip(gradients, variables, velocities, ratios, strict=True)
        )
        old_vectors = [
            [
                # As `new_values` does, so that all have one dtype.
                pack.join(
                    tf.cast(g, pack.compute_dtype) for g in pack.of(gradients)
                ),
                pack.join(_read_all(pack, variables, variable_specs)),
                pack.join(_read_all(pack, velocities, velocity_specs)),
            ]
            for pack in packs
        ]
        new_vectors = in_xla(
            [tensors[i] for i in others], old_vectors, learning_rate
        )
        for pack, (w, v, r) in zip(packs, new_vectors, strict=True):
            _assign_all(pack, velocities, pack.split(v))
            _assign_all(pack, variables, pack.split(w))
            if r is not None:
                _assign_all(pack, ratios, tf.unstack(r))

    return tf.function(update_all, autograph=False)


def _read(handle, spec):
    import tensorflow as tf

    shape, dtype = spec
    value = tf.raw_ops.ReadVariableOp(resource=handle, dtype=dtype)
    return tf.ensure_shape(value, shape)


def _assign(handle, value):
    import tensorflow as tf

    tf.raw_ops.AssignVariableOp(resource=handle, value=value)


def _read_all(pack, handles, specs):
    return [_read(handles[i], specs[i]) for i in pack.indices]


def _assign_all(pack, handles, values):
    for i, value in zip(pack.indices, values, strict=True):
        _assign(handles[i], value)


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
