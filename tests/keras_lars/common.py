"""Small networks and steps that several tests of LARS use."""

import keras
import numpy as np
import tensorflow as tf

KERNELS = [True, False, True]  # Which of the variables of `SHAPES` are kernels.


def one_step(optimizer, value, gradient):
    variable = keras.Variable(value, name="kernel")
    optimizer.apply([tf.constant(gradient, "float32")], [variable])
    return variable.numpy()


def apply(optimizer, gradients, variables, dtype="float32"):
    """Makes one update per list of gradients."""
    for grads in gradients:
        optimizer.apply([tf.constant(g, dtype) for g in grads], variables)


def assert_close(values, expected, rtol, atol=0.0):
    for value, wanted in zip(values, expected, strict=True):
        np.testing.assert_allclose(value, wanted, rtol, atol)


def small_model():
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(16, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(3),
        ]
    )


def fitted_model(optimizer, jit_compile=False, run_eagerly=False):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(96, 8)).astype("float32")
    y = np.argmax(x[:, :3], axis=1)
    model = small_model()
    model.compile(
        optimizer,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=jit_compile,
        run_eagerly=run_eagerly,
    )
    model.fit(x, y, batch_size=32, epochs=4, shuffle=False, verbose=0)
    return model
