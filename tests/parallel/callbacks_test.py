"""Callbacks that broadcast and average weights, and simple collectives."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import horovod_recipes.keras as hvd
from tests.parallel.common import arrays_of_ranks
from tests.parallel.common import assert_same_on_all_ranks
from tests.parallel.common import of_rank


def test_broadcast_covers_optimizer_but_not_seeds():
    keras.utils.set_random_seed(hvd.rank())
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dropout(0.5), keras.layers.Dense(1)]
    )
    model.compile(
        hvd.DistributedOptimizer(keras.optimizers.SGD(0.0, momentum=0.9)), "mse"
    )
    model.optimizer.build(model.trainable_variables)
    for variable in model.optimizer.variables:
        variable.assign(tf.fill(variable.shape, hvd.rank() + 3))
    callback = hvd.callbacks.BroadcastGlobalVariablesCallback(root_rank=1)
    callback.set_model(model)
    callback.on_train_begin()

    assert_same_on_all_ranks(model.weights)
    for values in arrays_of_ranks(model.optimizer.variables):
        for value in values:
            np.testing.assert_array_equal(value, np.full(value.shape, 4))
    seeds = [v for v in model.variables if "seed" in v.path]
    assert len(seeds) == 1
    first, second = arrays_of_ranks(seeds)
    assert (first[0] != second[0]).any()


def test_broadcast_waits_for_a_model_without_an_input_shape():
    keras.utils.set_random_seed(hvd.rank())
    model = keras.Sequential([keras.layers.Dense(3), keras.layers.Dense(1)])
    model.compile(
        hvd.DistributedOptimizer(keras.optimizers.SGD(0.1, momentum=0.9)), "mse"
    )
    x = np.full((8, 2), 1.0 + hvd.rank(), "float32")
    model.fit(
        x,
        x[:, :1],
        batch_size=4,
        verbose=0,
        callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(0)],
    )
    variables = model.weights + model.optimizer.variables
    assert len(variables) == 4 + 2 + 4
    assert_same_on_all_ranks(variables)


@pytest.mark.parametrize("as_dataset", [False, True])
def test_unequal_numbers_of_steps_are_an_error_on_every_rank(as_dataset):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), "mse")
    callback = hvd.callbacks.BroadcastGlobalVariablesCallback(0)
    x, y = np.ones((of_rank(9, 8), 2)), np.ones((of_rank(9, 8), 1))
    if as_dataset:
        dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(2)
        data = {"x": dataset, "shuffle": False}
    else:
        data = {"x": x, "y": y, "batch_size": 2}
    match = "rank 0 has 5, rank 1 has 4 steps.* steps_per_epoch"
    with pytest.raises(ValueError, match=match):
        model.fit(**data, verbose=0, callbacks=[callback])
    model.fit(**data, verbose=0, callbacks=[callback], steps_per_epoch=4)


def test_broadcast_leaves_local_variables():
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    optimizer = keras.optimizers.SGD(0.0, momentum=0.9)
    model.compile(hvd.DistributedOptimizer(optimizer), "mse")
    optimizer.build(model.trainable_variables)
    kernel, bias = model.weights
    variables = [kernel, bias, *optimizer.momentums]
    for variable in variables:
        variable.assign(tf.fill(variable.shape, float(hvd.rank())))
    callback = hvd.callbacks.BroadcastGlobalVariablesCallback(
        0, device="CPU:0", local_variables=kernel
    )
    callback.register_local_var(optimizer.momentums[1].value)
    callback.set_model(model)
    callback.on_train_begin()
    values = [float(tf.squeeze(variable.value)) for variable in variables]
    assert hvd.allgather_object(values) == [[0, 0, 0, 0], [1, 0, 0, 1]]

    with pytest.raises(ValueError, match=r"must hold .* Received: 'kernel'"):
        hvd.callbacks.BroadcastGlobalVariablesCallback(0, "", ["kernel"])


def test_collectives_take_numbers_and_arrays():
    rank = hvd.rank()
    assert float(hvd.allreduce(float(rank))) == 0.5
    assert float(hvd.allreduce(float(rank), op=hvd.Sum)) == 1.0
    gathered = hvd.allgather(np.full(1 + rank, rank), name="gather")
    np.testing.assert_array_equal(gathered, [0, 1, 1])
    np.testing.assert_array_equal(hvd.broadcast([rank, 7], 1), [1, 7])
    scattered = hvd.reducescatter(np.array([1.0, 3.0]) * (1 + rank))
    np.testing.assert_array_equal(scattered, of_rank([1.5], [4.5]))


@pytest.mark.parametrize("graph", [False, True])
def test_collectives_of_loops_take_keras_variables(graph):
    rank = hvd.rank()
    one = keras.Variable([float(rank), 2.0], name="one")
    two = tf.Variable([4.0, 8.0 * rank])

    def collectives():
        sent, splits = hvd.alltoall(one, splits=[1, 1])
        return {
            "alltoall": sent,
            "splits": splits,
            "gathered": hvd.grouped_allgather([one, two]),
            "reduced": hvd.grouped_allreduce([one, two], op=hvd.Sum),
            "scattered": hvd.grouped_reducescatter([one, two], op=hvd.Sum),
            "size": hvd.size_op(),
            "rank": hvd.rank_op(),
            "local_rank": hvd.local_rank_op(),
            "local_size": hvd.local_size_op(),
            "included": hvd.process_set_included_op(),
        }

    result = (tf.function(collectives) if graph else collectives)()
    numbers = tf.nest.map_structure(lambda t: t.numpy().tolist(), result)
    assert numbers == {
        "alltoall": of_rank([0.0, 1.0], [2.0, 2.0]),
        "splits": [1, 1],
        "gathered": [[0.0, 2.0, 1.0, 2.0], [4.0, 0.0, 4.0, 8.0]],
        "reduced": [[1.0, 4.0], [8.0, 8.0]],
        "scattered": of_rank([[1.0], [8.0]], [[4.0], [8.0]]),
        "size": 2,
        "rank": rank,
        "local_rank": rank,
        "local_size": 2,
        "included": 1,
    }
    assert hvd.is_homogeneous()
    assert not hvd.gpu_available("tensorflow")
    hvd.broadcast_([one, two], root_rank=1)
    np.testing.assert_array_equal(one.numpy(), [1.0, 2.0])
    np.testing.assert_array_equal(two.numpy(), [4.0, 8.0])


def test_batch_norm_statistics_are_averaged():
    model = keras.Sequential(
        [
            keras.Input((1,)),
            keras.layers.BatchNormalization(momentum=0.0, name="bn"),
            keras.layers.Dense(1),
        ]
    )
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.0)), "mse")
    x = np.array([[1.0], [3.0]], "float32") * (1 + 2 * hvd.rank())
    model.fit(
        x,
        x,
        verbose=0,
        callbacks=[
            hvd.callbacks.BroadcastGlobalVariablesCallback(0),
            hvd.callbacks.AverageNonTrainableWeights(),
        ],
    )
    bn = model.get_layer("bn")
    for values in arrays_of_ranks([bn.moving_mean, bn.moving_variance]):
        np.testing.assert_allclose(values, [[4.0], [5.0]], rtol=1e-6)


def test_averaging_leaves_equal_weights_as_they_are():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(50)])
    model.trainable = False
    before = model.get_weights()
    callback = hvd.callbacks.AverageNonTrainableWeights()
    callback.set_model(model)
    callback.on_test_begin()
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
