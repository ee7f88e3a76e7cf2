"""load_model on two ranks: training continues from the saved state."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import horovod_recipes.keras as hvd
from tests.parallel.common import assert_same_on_all_ranks


class HalfSGD(keras.optimizers.SGD):
    """An optimizer that Keras does not know."""

    def update_step(self, gradient, variable, learning_rate):
        super().update_step(gradient, variable, learning_rate / 2)


def half_squared_error(labels, outputs):
    return keras.ops.mean((labels - outputs) ** 2, axis=-1) / 2


def examples(part):
    """Returns this rank's 8 of 16 examples. Each part has its own."""
    rng = np.random.default_rng(part)
    x = rng.normal(size=(2, 8, 4)).astype("float32")[hvd.rank()]
    return x, x[:, :2] * (1 + hvd.rank())


def fit(model, part):
    x, y = examples(part)
    model.fit(x, y, batch_size=4, shuffle=False, verbose=0)


def create_model(optimizer, loss=None):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    model.compile(
        hvd.DistributedOptimizer(optimizer),
        loss or keras.losses.MeanSquaredError(),
        jit_compile=False,
    )
    return model


def saved_and_loaded(model, folder, **arguments):
    path = folder / "model.keras"
    model.save(path)
    return hvd.load_model(path, **arguments)


def assert_trains_as(loaded, model):
    """Trains both models, and compares them and the ranks."""
    fit(loaded, part=1)
    fit(model, part=1)
    assert_same_on_all_ranks(loaded.weights)
    for ours, expected in zip(
        loaded.get_weights(), model.get_weights(), strict=True
    ):
        np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_training_continues_with_the_momentum(tmp_path):
    model = create_model(keras.optimizers.SGD(0.1, momentum=0.9))
    fit(model, part=0)
    loaded = saved_and_loaded(model, tmp_path)
    assert type(loaded.optimizer) is keras.optimizers.SGD
    for a, b in zip(
        loaded.optimizer.variables, model.optimizer.variables, strict=True
    ):
        np.testing.assert_array_equal(a.numpy(), b.numpy())
    assert_trains_as(loaded, model)


def test_custom_optimizer_and_loss(tmp_path):
    model = create_model(HalfSGD(0.1, momentum=0.9), half_squared_error)
    fit(model, part=0)
    loaded = saved_and_loaded(
        model,
        tmp_path,
        custom_optimizers=[HalfSGD],
        custom_objects={"half_squared_error": half_squared_error},
    )
    assert type(loaded.optimizer) is HalfSGD
    assert_trains_as(loaded, model)


def test_compression_is_that_of_the_optimizer(tmp_path):
    model = create_model(keras.optimizers.SGD(1.0))
    loaded = saved_and_loaded(model, tmp_path, compression=hvd.Compression.fp16)
    variables = loaded.trainable_variables
    for variable in variables:
        variable.assign(tf.zeros(variable.shape))
    loaded.optimizer.apply([tf.fill(v.shape, 0.1) for v in variables])
    expected = np.float32(np.float16(0.1))
    assert all(np.all(-v.numpy() == expected) for v in variables)


@pytest.mark.usefixtures("_mixed_float16")
def test_mixed_float16(tmp_path):
    model = create_model(keras.optimizers.SGD(0.1))
    fit(model, part=0)
    loaded = saved_and_loaded(model, tmp_path)
    assert type(loaded.optimizer) is keras.optimizers.LossScaleOptimizer
    scale = float(loaded.optimizer.dynamic_scale)
    # An infinity on rank 1 makes both ranks skip and halve the scale.
    x, y = examples(part=0)
    if hvd.rank() == 1:
        x[3, 3] = np.inf
    loaded.fit(x[:4], y[:4], batch_size=4, verbose=0)
    for a, b in zip(loaded.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert float(loaded.optimizer.dynamic_scale) == scale / 2
    fit(loaded, part=1)
    assert_same_on_all_ranks(loaded.weights)


def test_model_that_was_not_compiled(tmp_path):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    loaded = saved_and_loaded(model, tmp_path)
    assert getattr(loaded, "optimizer", None) is None


def test_h5_file_has_no_optimizer_that_keras_restores(tmp_path):
    model = create_model(keras.optimizers.SGD(0.1, momentum=0.9))
    fit(model, part=0)
    model.save(tmp_path / "model.h5")
    with pytest.raises(ValueError, match="compile=False"):
        hvd.load_model(tmp_path / "model.h5")


def test_legacy_optimizers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`legacy_opts`"):
        hvd.load_model(tmp_path / "model.keras", legacy_opts=True)
