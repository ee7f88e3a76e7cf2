"""Broadcast, exact metrics and averaged statistics, on two ranks."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import horovod_recipes.keras as hvd


def values_of_all_ranks(variables):
    return hvd.allgather_object([np.asarray(v.numpy()) for v in variables])


def test_broadcast_of_every_dtype():
    dtypes = ["float32", "float16", "bfloat16", "int64", "uint32", "bool"]
    variables = [
        keras.Variable([hvd.rank(), 1], dtype=dtype, trainable=False)
        for dtype in dtypes
    ]
    hvd.broadcast_variables(variables, root_rank=1)
    for variable, dtype in zip(variables, dtypes, strict=True):
        assert variable.dtype == dtype
        np.testing.assert_array_equal(variable.numpy().astype(int), [1, 1])


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

    first, second = values_of_all_ranks(model.weights)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    for values in values_of_all_ranks(model.optimizer.variables):
        for value in values:
            np.testing.assert_array_equal(value, np.full(value.shape, 4))
    seeds = [v for v in model.variables if "seed" in v.path]
    assert len(seeds) == 1
    first, second = values_of_all_ranks(seeds)
    assert (first[0] != second[0]).any()


def create_model(metrics=("mae",)):
    model = keras.Sequential(
        [
            keras.Input((1,)),
            keras.layers.Dense(
                1, kernel_initializer="ones", bias_initializer="zeros"
            ),
        ]
    )
    model.compile(
        hvd.DistributedOptimizer(keras.optimizers.SGD(0.0)),
        "mse",
        metrics=list(metrics),
    )
    return model


def unequal_parts(first=5, second=2, batch_size=2):
    """Rank 0 holds 0 .. 4, rank 1 holds 5 and 6; targets are 0."""
    numbers = [np.arange(first), np.arange(first, first + second)][hvd.rank()]
    x = numbers.astype("float32")[:, np.newaxis]
    return tf.data.Dataset.from_tensor_slices((x, 0 * x)).batch(batch_size)


def test_evaluate_counts_each_example_once():
    results = hvd.evaluate(create_model(), unequal_parts(), verbose=0)
    expected = {
        "loss": np.mean(np.arange(7.0) ** 2),
        "mae": np.mean(np.arange(7.0)),
    }
    assert hvd.allgather_object(results) == [pytest.approx(expected)] * 2


def test_evaluate_with_a_rank_that_has_one_example():
    results = hvd.evaluate(
        create_model(), unequal_parts(first=6, second=1), verbose=0
    )
    assert results["mae"] == pytest.approx(3.0)


def test_exact_metrics_in_fit():
    model = create_model()
    training = [
        tf.data.Dataset.from_tensor_slices(([[1.0], [3.0]], [[0.0], [0.0]])),
        tf.data.Dataset.from_tensor_slices(([[5.0], [7.0]], [[0.0], [0.0]])),
    ][hvd.rank()].batch(1)
    history = model.fit(
        training,
        validation_data=unequal_parts(),
        validation_freq=2,
        epochs=2,
        shuffle=False,
        verbose=0,
        callbacks=[
            hvd.callbacks.BroadcastGlobalVariablesCallback(0),
            hvd.callbacks.ExactMetrics(),
        ],
    ).history
    for ranks_history in hvd.allgather_object(history):
        assert ranks_history["mae"] == pytest.approx([4.0, 4.0])
        assert ranks_history["loss"] == pytest.approx([21.0, 21.0])
        assert ranks_history["val_mae"] == pytest.approx([3.0])
        assert ranks_history["val_loss"] == pytest.approx([13.0])


def test_states_of_keras_metrics_add_up():
    """Predictions 0 .. 6 of targets 0, 2 .. 12."""
    metrics = [
        keras.metrics.RootMeanSquaredError(name="rmse"),
        keras.metrics.R2Score(name="r2"),
    ]
    data = unequal_parts().map(lambda x, _: (x, 2 * x))
    results = hvd.evaluate(create_model(metrics), data, verbose=0)
    assert results["rmse"] == pytest.approx(13**0.5)
    assert results["r2"] == pytest.approx(1 - 91 / 112)


class Largest(keras.metrics.Metric):
    """A metric whose states do not add up."""

    def __init__(self):
        super().__init__(name="largest")
        self.value = self.add_variable((), "zeros", name="value")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.value.assign(tf.maximum(self.value, tf.reduce_max(y_pred)))

    def result(self):
        return self.value


def test_metrics_that_do_not_add_up_are_refused():
    with pytest.raises(ValueError, match="'largest' is a Largest"):
        hvd.evaluate(create_model([Largest()]), unequal_parts(), verbose=0)
    with pytest.raises(ValueError, match="'largest' is a Largest"):
        create_model([Largest()]).fit(
            unequal_parts(first=2, second=2),
            verbose=0,
            shuffle=False,
            callbacks=[hvd.callbacks.ExactMetrics()],
        )


def test_collectives_take_numbers_and_arrays():
    rank = hvd.rank()
    assert float(hvd.allreduce(float(rank))) == 0.5
    assert float(hvd.allreduce(float(rank), op=hvd.Sum)) == 1.0
    gathered = hvd.allgather(np.full(1 + rank, rank), name="gather")
    np.testing.assert_array_equal(gathered, [0, 1, 1])
    np.testing.assert_array_equal(hvd.broadcast([rank, 7], 1), [1, 7])
    scattered = hvd.reducescatter(np.array([1.0, 3.0]) * (1 + rank))
    np.testing.assert_array_equal(scattered, [[1.5], [4.5]][rank])


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
    for values in values_of_all_ranks([bn.moving_mean, bn.moving_variance]):
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
