"""Metrics of all ranks together, on two ranks."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import horovod_recipes.keras as hvd
from tests.parallel.common import of_rank


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
    """Returns 0 to 4 on rank 0, and 5 and 6 on rank 1; targets are 0."""
    numbers = of_rank(np.arange(first), np.arange(first, first + second))
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
    x = np.array(of_rank([[1.0], [3.0]], [[5.0], [7.0]]))
    history = model.fit(
        x,
        0 * x,
        batch_size=1,
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


# Arguments that these metrics require.
ARGUMENTS = {
    "IoU": {"num_classes": 3, "target_class_ids": [0, 2]},
    "MeanIoU": {"num_classes": 3},
    "MeanMetricWrapper": {"fn": keras.losses.mean_absolute_error},
    "OneHotIoU": {"num_classes": 3, "target_class_ids": [0, 2]},
    "OneHotMeanIoU": {"num_classes": 3},
    "PrecisionAtRecall": {"recall": 0.5},
    "RecallAtPrecision": {"precision": 0.5},
    "SensitivityAtSpecificity": {"specificity": 0.5},
    "SpecificityAtSensitivity": {"sensitivity": 0.5},
}
# Mean and Sum do not take targets. Others are their subclasses.
KERAS_METRICS = [
    metric(name=name, **ARGUMENTS.get(name, {}))
    for name, metric in vars(keras.metrics).items()
    if isinstance(metric, type) and name not in ("Metric", "Mean", "Sum")
]


def examples_of(kind):
    """Returns predictions and targets of 40 examples and 3 classes."""
    rng = np.random.default_rng(0)
    predictions = rng.dirichlet([1.0, 1.0, 1.0], size=40)
    labels = rng.integers(3, size=(40, 1))
    if kind == "labels":
        return rng.integers(3, size=(40, 1)).astype("float32"), labels
    if kind == "sparse":
        return predictions, labels
    return predictions, np.eye(3)[labels[:, 0]]


def metrics_of(kind):
    kinds = {"IoU": "labels", "MeanIoU": "labels"}
    return [
        metric
        for metric in KERAS_METRICS
        if kinds.get(
            metric.name,
            "sparse" if metric.name.startswith("Sparse") else "one-hot",
        )
        == kind
    ]


@pytest.mark.parametrize("kind", ["one-hot", "sparse", "labels"])
def test_every_keras_metric_is_that_of_one_process(kind):
    assert len(metrics_of(kind)) >= 2
    predictions, targets = examples_of(kind)
    model = keras.Sequential(
        [keras.Input(predictions.shape[1:]), keras.layers.Identity()]
    )
    model.compile(loss="mse", metrics=metrics_of(kind), jit_compile=False)
    mine = of_rank(slice(0, 27), slice(27, 40))
    results = hvd.evaluate(
        model, predictions[mine], targets[mine], batch_size=4, verbose=0
    )
    expected = model.evaluate(
        predictions, targets, batch_size=4, verbose=0, return_dict=True
    )
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        for on_rank in hvd.allgather_object(results[name]):
            np.testing.assert_allclose(
                on_rank, value, rtol=1e-5, atol=1e-6, err_msg=name
            )


def test_losses_of_several_outputs():
    """Keras's loss of one output is a mean over batches of 2, 2, 1 and 2."""
    inputs = keras.Input((1,))
    model = keras.Model(
        inputs,
        {
            "a": keras.layers.Identity(name="a")(inputs),
            "b": keras.layers.Rescaling(2.0, name="b")(inputs),
        },
    )
    model.compile(loss={"a": "mse", "b": "mae"}, metrics={"b": ["mae"]})
    data = unequal_parts().map(lambda x, y: (x, {"a": y, "b": y}))
    results = hvd.evaluate(model, data, verbose=0)
    expected = {
        "loss": 19.0,
        "a_loss": np.mean([0.5, 6.5, 16.0, 30.5]),
        "b_loss": np.mean([1.0, 5.0, 8.0, 11.0]),
        "b_mae": 6.0,
    }
    assert hvd.allgather_object(results) == [pytest.approx(expected)] * 2


class Largest(keras.metrics.Metric):
    """A metric whose states do not add up."""

    def __init__(self):
        super().__init__(name="largest")
        self.value = self.add_variable((), "zeros", name="value")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.value.assign(tf.maximum(self.value, tf.reduce_max(y_pred)))

    def result(self):
        return self.value


class Total(keras.metrics.Metric):
    """A custom metric that declares that its state adds up."""

    states_add_up = True

    def __init__(self):
        super().__init__(name="total")
        self.value = self.add_variable((), "zeros", name="value")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.value.assign_add(tf.reduce_sum(y_pred))

    def result(self):
        return {"total": self.value, "mean": self.value / 7}


class MeanAndLargest(keras.metrics.Mean):
    """A mean with an additional state, which does not add up."""

    def __init__(self):
        super().__init__(name="mean_and_largest")
        self.largest = self.add_variable((), "zeros", name="largest")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.largest.assign(tf.maximum(self.largest, tf.reduce_max(y_pred)))
        return super().update_state(y_pred)


class Half(keras.metrics.Sum):
    def update_state(self, y_true, y_pred, sample_weight=None):
        return super().update_state(y_pred / 2)


def test_custom_metrics_that_add_up():
    model = create_model([Total(), Half(name="half")])
    results = hvd.evaluate(model, unequal_parts(), verbose=0)
    expected = {"loss": 13.0, "total": 21.0, "mean": 3.0, "half": 10.5}
    assert hvd.allgather_object(results) == [pytest.approx(expected)] * 2


def test_metrics_that_do_not_add_up_are_refused():
    with pytest.raises(ValueError, match="'mean_and_largest' is a MeanAnd"):
        hvd.evaluate(
            create_model([MeanAndLargest()]), unequal_parts(), verbose=0
        )
    with pytest.raises(ValueError, match="'largest' is a Largest"):
        hvd.evaluate(create_model([Largest()]), unequal_parts(), verbose=0)
    with pytest.raises(ValueError, match="'largest' is a Largest"):
        create_model([Largest()]).fit(
            unequal_parts(first=2, second=2),
            verbose=0,
            shuffle=False,
            callbacks=[hvd.callbacks.ExactMetrics()],
        )


def test_a_rank_without_examples():
    """Keras cannot look into a generator before it begins."""

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 1 - hvd.rank()

        def __getitem__(self, index):
            return np.ones((2, 1)), np.zeros((2, 1))

    model = create_model()
    callback = hvd.callbacks.ExactMetrics()
    callback.set_model(model)
    if hvd.rank() == 0:
        model.evaluate(Batches(), verbose=0)
    with pytest.raises(
        ValueError, match=r"1 example or more\?.*rank 1: \[\(\)"
    ):
        callback.on_test_end()


def test_metric_average_counts_ranks_alike():
    logs = of_rank(
        {"b": 1.0, "a": 4.0, "c": np.array([1.0, 2.0])},
        {"a": 6.0, "b": 0.0, "c": np.array([3.0, 5.0])},
    )
    hvd.callbacks.MetricAverageCallback().on_epoch_end(0, logs)
    for on_rank in hvd.allgather_object(logs):
        np.testing.assert_array_equal(on_rank.pop("c"), [2.0, 3.5])
        assert on_rank == {"a": 5.0, "b": 0.5}


def test_metric_average_in_fit():
    """The mean absolute values are 1.5 on rank 0 and 5 on rank 1."""
    history = create_model().fit(
        unequal_parts(first=4, second=3),
        verbose=0,
        shuffle=False,
        callbacks=[
            hvd.callbacks.BroadcastGlobalVariablesCallback(0),
            hvd.callbacks.MetricAverageCallback(),
        ],
    )
    for on_rank in hvd.allgather_object(history.history):
        assert on_rank["mae"] == pytest.approx([(1.5 + 5) / 2])


def test_metric_average_names_logs_that_differ():
    logs = of_rank({"a": 1.0}, {"b": 1.0})
    with pytest.raises(
        ValueError, match=r"rank 0 has \['a'\] and rank 1 has \['b'\]"
    ):
        hvd.callbacks.MetricAverageCallback().on_epoch_end(0, logs)
