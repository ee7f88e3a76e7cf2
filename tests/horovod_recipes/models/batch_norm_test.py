"""The fused batch norm equals Keras's own, and steps aside where it must."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import horovod_recipes.keras as hvd
from horovod_recipes.models.batch_norm import FusedBatchNormalization
from horovod_recipes.models.batch_norm import fuse_batch_norms

IMAGES = np.random.default_rng(0).normal(2, 3, size=(6, 5, 4, 8))
# The largest error of an output, relative to the largest output.
ROUNDING = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}


def pair(**arguments):
    """Returns a fused layer and Keras's own, with equal random weights."""
    layers = [
        FusedBatchNormalization(**arguments),
        keras.layers.BatchNormalization(**arguments),
    ]
    for layer in layers:
        rng = np.random.default_rng(1)
        layer.build(IMAGES.shape)
        layer.set_weights(
            [rng.uniform(0.5, 2, size=w.shape) for w in layer.get_weights()]
        )
    return layers


def step(layer, images, training, jit_compile=False, **call):
    """Returns outputs, gradients, weights after the step, and operations."""
    images = tf.constant(images, layer.compute_dtype)
    factors = np.random.default_rng(2).normal(size=images.shape)

    @tf.function(jit_compile=jit_compile)
    def forward_and_backward():
        with tf.GradientTape() as tape:
            tape.watch(images)
            outputs = layer(images, training=training, **call)
            loss = tf.reduce_sum(outputs * tf.constant(factors, outputs.dtype))
        variables = [v.value for v in layer.trainable_variables]
        return outputs, tape.gradient(loss, [images, *variables])

    graph = forward_and_backward.get_concrete_function().graph
    operations = {operation.type for operation in graph.get_operations()}
    outputs, gradients = forward_and_backward()
    return outputs, gradients, layer.get_weights(), operations


def assert_equal(fused, plain, dtype):
    outputs, gradients, weights, _ = zip(fused, plain, strict=True)
    assert outputs[0].dtype == outputs[1].dtype
    assert_close(*outputs, ROUNDING[dtype])
    for a, b in zip(*gradients, strict=True):
        assert a.dtype == b.dtype
        # A gradient subtracts sums that nearly cancel.
        assert_close(a, b, 4 * ROUNDING[dtype])
    for a, b in zip(*weights, strict=True):
        assert_close(a, b, ROUNDING["float32"])


def assert_close(a, b, rounding):
    a, b = (np.asarray(tf.cast(x, tf.float64)) for x in (a, b))
    np.testing.assert_allclose(a, b, rtol=0, atol=rounding * np.abs(b).max())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"momentum": 0.9, "epsilon": 1e-5},
        {"momentum": 0.0, "epsilon": 0.1, "axis": 3},
        {"center": False},
        {"scale": False},
        {"center": False, "scale": False},
        {"trainable": False},
    ],
    ids=str,
)
def test_it_equals_the_layer_of_keras(arguments, dtype, training):
    policy = dtype if dtype == "float32" else f"mixed_{dtype}"
    fused, plain = (
        step(layer, IMAGES, training)
        for layer in pair(dtype=policy, **arguments)
    )
    assert {"FusedBatchNormV3", "FusedBatchNormGradV3"} <= fused[3]
    assert "FusedBatchNormV3" not in plain[3]
    assert_equal(fused, plain, dtype)


@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (1, 2, 1, 8)])
def test_few_values_per_channel(shape):
    """The variance of one value is 0, not the 0 / 0 of an unbiased one."""
    fused, plain = (step(layer, IMAGES[:1, :2, :1], True) for layer in pair())
    assert_equal(fused, plain, "float32")
    images = np.full(shape, 3.0)
    fused, plain = (step(layer, images, True) for layer in pair())
    for a, b in zip(fused[2], plain[2], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "shape"),
    [
        ({}, (6, 8)),
        ({}, (2, 3, 5, 4, 8)),
        ({"axis": 1}, (6, 8, 5, 4)),
        ({"synchronized": True}, IMAGES.shape),
        ({"dtype": "float64"}, IMAGES.shape),
        ({"dtype": "float16"}, IMAGES.shape),
    ],
    ids=str,
)
def test_other_inputs_are_left_to_keras(arguments, shape):
    images = np.random.default_rng(0).normal(size=shape)
    results = []
    for layer in (
        FusedBatchNormalization(**arguments),
        keras.layers.BatchNormalization(**arguments),
    ):
        layer.build(shape)
        results.append(step(layer, images, True))
    assert "FusedBatchNormV3" not in results[0][3]
    assert results[0][3] == results[1][3]
    np.testing.assert_array_equal(results[0][0], results[1][0])
    for a, b in zip(results[0][2], results[1][2], strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_mask_is_left_to_keras():
    mask = np.random.default_rng(3).integers(2, size=IMAGES.shape[:-1]) > 0
    fused, plain = (
        step(layer, IMAGES, True, mask=tf.constant(mask)) for layer in pair()
    )
    assert "FusedBatchNormV3" not in fused[3]
    np.testing.assert_array_equal(fused[0], plain[0])


def test_xla_compiles_the_layer_of_keras():
    fused, plain = (step(layer, IMAGES, True, True) for layer in pair())
    assert "FusedBatchNormV3" not in fused[3]
    assert_equal(fused, plain, "float32")


def test_eager_mode():
    fused, plain = pair()
    for layer in fused, plain:
        layer(tf.constant(IMAGES, tf.float32), training=True)
    for a, b in zip(fused.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_images_of_any_size():
    """The number of values per channel is not known when it is traced."""
    layers = pair()
    results = []
    for layer in layers:
        inputs = keras.Input((None, None, 8))
        model = keras.Model(inputs, layer(inputs))
        model.compile("sgd", "mse")
        for size in 3, 4:
            images = IMAGES[:size, :size]
            model.train_on_batch(images, np.zeros_like(images))
        results.append(layer.get_weights())
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def model_with(layer):
    return keras.Sequential(
        [keras.Input((5, 4, 8)), layer, keras.layers.Flatten()]
    )


def test_a_saved_file_is_one_of_keras_alone(tmp_path):
    fused, plain = (model_with(layer) for layer in pair(name="bn"))
    first, second = (model.get_layer("bn") for model in (fused, plain))
    assert keras.saving.serialize_keras_object(
        first
    ) == keras.saving.serialize_keras_object(second)
    fused.save(tmp_path / "model.keras")
    np.save(tmp_path / "images.npy", IMAGES)
    script = (
        "import sys, keras, numpy as np\n"
        "model = keras.models.load_model('model.keras')\n"
        "np.save('outputs.npy', model.predict(np.load('images.npy')))\n"
        "assert not any(m.startswith('horovod') for m in sys.modules)\n"
    )
    subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=300
    )
    outputs = np.load(tmp_path / "outputs.npy")
    np.testing.assert_allclose(
        outputs, fused.predict(IMAGES), rtol=1e-5, atol=1e-5
    )


def test_on_another_backend(tmp_path):
    script = (
        "import keras, numpy as np\n"
        "from horovod_recipes.models import batch_norm\n"
        "layer = batch_norm.FusedBatchNormalization()\n"
        "outputs = layer(np.load('images.npy'), training=True)\n"
        "np.save('outputs.npy', outputs)\n"
    )
    np.save(tmp_path / "images.npy", IMAGES.astype("float32"))
    subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"KERAS_BACKEND": "jax"},
        check=True,
        timeout=300,
    )
    plain = keras.layers.BatchNormalization()
    np.testing.assert_allclose(
        np.load(tmp_path / "outputs.npy"),
        plain(IMAGES.astype("float32"), training=True),
        atol=1e-5,
    )


def test_fuse_batch_norms_of_a_model():
    class Own(keras.layers.BatchNormalization):
        pass

    inner = model_with(keras.layers.BatchNormalization())
    synchronized = hvd.SyncBatchNormalization()
    layers = [inner, keras.layers.Reshape((5, 4, 8)), synchronized, Own()]
    model = keras.Sequential([keras.Input((5, 4, 8)), *layers])
    fuse_batch_norms(model)
    fuse_batch_norms(model)
    operations = tf.function(lambda x: model(x, training=False))
    graph = operations.get_concrete_function(
        tf.TensorSpec([None, 5, 4, 8])
    ).graph
    types = [operation.type for operation in graph.get_operations()]
    assert types.count("FusedBatchNormV3") == 1
