"""Copies of distributed models and optimizers go on averaging."""

import copy
import pickle

import keras
import numpy as np
import pytest

import horovod_recipes.keras as hvd
from tests.parallel.common import assert_same_on_all_ranks
from tests.parallel.common import of_rank


def create_model(**arguments):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    model.compile(hvd.DistributedOptimizer(optimizer, **arguments), "mse")
    return model


def fit(model, *callbacks):
    x = np.random.default_rng(hvd.rank()).normal(size=(8, 3))
    model.fit(x, x[:, :2], batch_size=4, verbose=0, callbacks=callbacks)


def pickled(value):
    return pickle.loads(pickle.dumps(value))


def broadcast(value):
    return hvd.broadcast_object(value, root_rank=1)


WAYS = pytest.mark.parametrize(
    "duplicate",
    [
        pytest.param(copy.copy, marks=pytest.mark.slow),
        copy.deepcopy,
        pytest.param(pickled, marks=pytest.mark.slow),
        broadcast,
    ],
)


@WAYS
def test_copied_model_averages(duplicate):
    model = create_model()
    fit(model)
    copied = duplicate(model)
    fit(copied)
    assert_same_on_all_ranks(copied.weights + copied.optimizer.variables)
    # `broadcast_object` returns the root rank's own object there.
    if duplicate is not broadcast:
        fit(model)
        for a, b in zip(model.weights, copied.weights, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)
    # This callback refuses an optimizer that is not distributed.
    fit(copied, hvd.callbacks.BroadcastGlobalVariablesCallback(0))


@WAYS
def test_copied_optimizer_averages(duplicate):
    optimizer = hvd.DistributedOptimizer(
        keras.optimizers.SGD(1.0), op=hvd.Sum, backward_passes_per_step=2
    )
    copied = duplicate(optimizer)
    variable = keras.Variable([0.0])
    for _ in range(2):
        copied.apply([np.array([of_rank(1.0, 2.0)])], [variable])
    np.testing.assert_array_equal(variable.numpy(), [-6.0])


def test_arguments_survive():
    model = create_model(
        name="mine",
        compression=hvd.Compression.fp16,
        groups=2,
        average_aggregated_gradients=True,
    )
    fit(model)
    groups = create_model()
    kernel, bias = groups.trainable_variables
    groups.compile(
        hvd.DistributedOptimizer(
            keras.optimizers.SGD(), groups=[[kernel], [bias.path]]
        ),
        "mse",
    )
    fit(groups)
    assert pickled(model).optimizer.apply.arguments == (
        model.optimizer.apply.arguments
    )
    assert pickled(groups).optimizer.apply.arguments["groups"] == [
        [kernel.path],
        [bias.path],
    ]


@pytest.mark.slow
def test_under_mixed_precision():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = create_model()
        fit(model)
        model = copy.deepcopy(model)
        fit(model)
    finally:
        keras.config.set_dtype_policy("float32")
    assert_same_on_all_ranks(model.weights)


def test_what_a_copy_would_lose_is_refused():
    model = create_model()
    model.optimizer.register_local_var(model.trainable_variables[0])
    with pytest.raises(ValueError, match=r"local variables.*wrap each copy"):
        copy.deepcopy(model)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["clone", "config", "file"])
def test_what_is_not_copied_must_be_distributed_again(how, tmp_path):
    model = create_model()
    fit(model)
    if how == "file":
        model.save(tmp_path / "model.keras")
        model = keras.saving.load_model(tmp_path / "model.keras")
    else:
        optimizer = type(model.optimizer).from_config(
            model.optimizer.get_config()
        )
        if how == "clone":
            model = keras.models.clone_model(model)
        model.compile(optimizer, "mse")
    with pytest.raises(ValueError, match="must be wrapped again"):
        fit(model, hvd.callbacks.BroadcastGlobalVariablesCallback(0))
    hvd.DistributedOptimizer(model.optimizer)
    fit(model, hvd.callbacks.BroadcastGlobalVariablesCallback(0))
    assert_same_on_all_ranks(model.weights)


@WAYS
def test_copied_model_synchronizes_its_batch_norm(duplicate):
    inside = keras.Sequential(
        [hvd.SyncBatchNormalization(), keras.layers.Dense(2)]
    )
    model = keras.Sequential([keras.Input((3,)), inside])
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
    model.compile(optimizer, "mse")
    copied = duplicate(model)
    fit(copied, hvd.callbacks.BroadcastGlobalVariablesCallback(0))
    # Each rank has other data, so other statistics of its own.
    assert len(copied.non_trainable_weights) == 2
    assert_same_on_all_ranks(copied.weights)
