"""The ranks of a `fit` stop in the same step, and notice the end of data."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf

import horovod_recipes.keras as hvd
from tests.parallel.common import assert_same_on_all_ranks
from tests.parallel.common import of_rank
from tests.parallel.several_optimizers_test import Gan
from tests.parallel.several_optimizers_test import GanWithTape

pytestmark = pytest.mark.filterwarnings("ignore:Your input ran out of data")

# What the error is in eager mode, and in a graph.
ERRORS = (ValueError, tf.errors.InvalidArgumentError)


@pytest.fixture(autouse=True)
def _is_alive_afterwards():
    """The ranks leave `fit` together, and Horovod goes on."""
    yield
    assert len(hvd.allgather_object(None)) == 2


class Counter(keras.callbacks.Callback):
    """Counts batches and epochs, and asks to stop after a batch or an epoch."""

    def __init__(self, stop_after_batch=None, stop_after_epoch=None):
        super().__init__()
        self.batches, self.epochs = 0, 0
        self.stopped_at_epoch_end = []
        self._after_batch = stop_after_batch
        self._after_epoch = stop_after_epoch

    def on_train_batch_end(self, batch, logs=None):
        self.batches += 1
        if self.batches == self._after_batch:
            self.model.stop_training = True

    def on_epoch_end(self, epoch, logs=None):
        self.epochs += 1
        self.stopped_at_epoch_end.append(self.model.stop_training)
        if self.epochs == self._after_epoch:
            self.model.stop_training = True


def on_rank_1(**arguments):
    """Returns a `Counter` that stops on rank 1 and only counts on rank 0."""
    return Counter(**of_rank({}, arguments))


def regression(passes=1, synchronized=False, **compile_arguments):
    model = keras.Sequential([keras.Input((3,))])
    if synchronized:
        model.add(hvd.SyncBatchNormalization())
    model.add(keras.layers.Dense(1))
    optimizer = keras.optimizers.SGD(0.01)
    model.compile(
        optimizer=hvd.DistributedOptimizer(
            optimizer, backward_passes_per_step=passes
        ),
        loss="mse",
        **compile_arguments,
    )
    return model


def batches(number, known=True):
    """Returns a dataset of a number of batches, which Keras knows or not."""
    examples = np.random.default_rng(hvd.rank()).normal(size=(2 * number, 3))
    data = tf.data.Dataset.from_tensor_slices(examples.astype("float32"))
    data = data.map(lambda x: (x, tf.reduce_sum(x, keepdims=True))).batch(2)
    return data if known else data.filter(lambda x, y: True)


def fit(model, data, *callbacks, **arguments):
    broadcast = hvd.callbacks.BroadcastGlobalVariablesCallback(0)
    arguments = {"shuffle": False, "verbose": 0} | arguments
    model.fit(data, callbacks=[broadcast, *callbacks], **arguments)


def both(value):
    return hvd.allgather_object(value)


def warns_of_rank_1():
    """Rank 0 is told why it stops; rank 1 has asked for it."""
    return of_rank(
        pytest.warns(UserWarning, match="a callback of rank 1 asked for it"),
        contextlib.nullcontext(),
    )


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        pytest.param({"run_eagerly": True}, marks=pytest.mark.slow),
        pytest.param({"jit_compile": True}, marks=pytest.mark.slow),
        {"passes": 2},
        {"synchronized": True},
        pytest.param(
            {"synchronized": True, "run_eagerly": True}, marks=pytest.mark.slow
        ),
        pytest.param(
            {"synchronized": True, "passes": 2}, marks=pytest.mark.slow
        ),
    ],
)
def test_stop_of_one_rank_stops_all_after_the_next_step(arguments):
    model = regression(**arguments)
    counter = on_rank_1(stop_after_batch=2)
    with warns_of_rank_1():
        fit(model, batches(8), counter, epochs=3)
    assert both((counter.batches, counter.epochs)) == [(3, 1)] * 2
    assert counter.stopped_at_epoch_end == [True]
    assert_same_on_all_ranks(model.weights)


def test_stop_within_an_execution_of_several_steps():
    model = regression(steps_per_execution=2)
    counter = on_rank_1(stop_after_batch=1)
    with warns_of_rank_1():
        fit(model, batches(8), counter)
    assert both(int(model.optimizer.iterations)) == [4, 4]
    assert both(counter.epochs) == [1, 1]


@pytest.mark.parametrize("known", [True, False])
def test_stop_after_the_last_batch_of_an_epoch(known):
    model = regression()
    counter = on_rank_1(stop_after_batch=4)
    data = batches(4, known)
    with warns_of_rank_1():
        fit(model, data, counter, epochs=3, validation_data=data)
    assert both((counter.batches, counter.epochs)) == [(4, 1)] * 2
    # A callback that saves the last model sees that this is the last epoch.
    assert both(counter.stopped_at_epoch_end) == [[True]] * 2


def test_stop_after_an_epoch():
    model = regression()
    counter = on_rank_1(stop_after_epoch=2)
    with warns_of_rank_1():
        fit(model, batches(4), counter, epochs=5)
    assert both((counter.batches, counter.epochs)) == [(8, 2)] * 2


@pytest.mark.parametrize("batch", [2, 4])
def test_ranks_that_agree_stop_at_once(batch):
    """As with Keras alone, and without a warning."""
    model = regression()
    counter = Counter(stop_after_batch=batch)
    fit(model, batches(4), counter, epochs=5)
    assert both((counter.batches, counter.epochs)) == [(batch, 1)] * 2
    assert both(int(model.optimizer.iterations)) == [batch, batch]


def test_training_goes_on_after_a_stop():
    model = regression()
    with warns_of_rank_1():
        fit(model, batches(8), on_rank_1(stop_after_batch=2))
    counter = Counter()
    fit(model, batches(4), counter)
    assert both((counter.batches, counter.epochs)) == [(4, 1)] * 2


@pytest.mark.parametrize("passes", [1, 3])
def test_terminate_on_nan(passes):
    """The loss stays NaN, so that the callback asks after every batch."""
    model = regression(passes)
    counter = Counter()
    data = batches(8)
    if hvd.rank() == 1:
        data = data.enumerate().map(
            lambda n, xy: (xy[0], tf.where(n == 2, np.nan, 1.0) * xy[1])
        )
    terminate = keras.callbacks.TerminateOnNaN()
    fit(model, data, counter, terminate, epochs=3)
    assert both(counter.batches) == [4, 4]


def test_stop_between_two_updates():
    """Gradients of the last batch wait on both ranks for the next `fit`."""
    model = regression(passes=2)
    counter = on_rank_1(stop_after_batch=4)
    check = hvd.callbacks.ReplicaCheck(3)
    with warns_of_rank_1():
        fit(model, batches(8), check, counter)
    assert both(counter.batches) == [5, 5]
    fit(model, batches(5), check)
    assert both(int(model.optimizer.iterations)) == [5, 5]
    assert_same_on_all_ranks(model.weights)


def test_stop_in_an_elastic_job():
    model = regression()
    state = hvd.elastic.KerasState(model, batch=0, epoch=0)
    callbacks = [
        hvd.elastic.UpdateBatchStateCallback(state),
        hvd.elastic.UpdateEpochStateCallback(state),
        on_rank_1(stop_after_batch=2),
        hvd.elastic.CommitStateCallback(state),
    ]
    with warns_of_rank_1():
        fit(model, batches(8), *callbacks, epochs=3, steps_per_epoch=8)
    assert both((state.epoch, int(model.optimizer.iterations))) == [(1, 3)] * 2


@pytest.mark.parametrize("after", [1, 3])
def test_callback_that_trains_another_model(after):
    """Its stop is its own, and that of the outer model is not forgotten."""

    class Train(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch + 1 == after:
                inner = on_rank_1(stop_after_batch=1)
                with warns_of_rank_1():
                    fit(regression(), batches(4), inner)
                assert both(inner.batches) == [2, 2]

    counter = on_rank_1(stop_after_batch=2)
    with warns_of_rank_1():
        fit(regression(), batches(8), Train(), counter, epochs=2)
    assert both((counter.batches, counter.epochs)) == [(3, 1)] * 2


@pytest.mark.parametrize("wrap", [Gan, GanWithTape])
def test_stop_with_two_optimizers(wrap):
    model = wrap()
    model.compile()
    counter = on_rank_1(stop_after_batch=2)
    with warns_of_rank_1():
        fit(model, batches(8).map(lambda x, y: x), counter)
    assert both(counter.batches) == [3, 3]


@pytest.mark.parametrize("base", [Gan, GanWithTape])
def test_updates_in_functions_of_their_own(base):
    class GanOfFunctions(base):
        def __init__(self):
            super().__init__()
            self.update_discriminator = tf.function(self.update_discriminator)
            self.update_generator = tf.function(self.update_generator)

        def train_step(self, real):
            self.update_discriminator(real)
            return {"loss": self.update_generator(real)}

        def update_discriminator(self, real):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(self.discriminator(real))
            self.update(tape, loss, self.discriminator, self.d_optimizer)

        def update_generator(self, real):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(self(real[:, :2]))
            self.update(tape, loss, self.generator, self.g_optimizer)
            return loss

    model = GanOfFunctions()
    model.compile()
    counter = Counter()
    data = batches(4, known=False).map(lambda x, y: x)
    fit(model, data, counter, epochs=2)
    assert both((counter.batches, counter.epochs)) == [(8, 2)] * 2
    assert_same_on_all_ranks(model.trainable_weights)


def test_process_set_of_one_rank_stops_at_once(rank_0_alone):
    """As with Keras alone: there is nobody to wait for, nor outside of it."""
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    optimizer = hvd.DistributedOptimizer(
        keras.optimizers.SGD(0.01), process_set=rank_0_alone
    )
    model.compile(optimizer=optimizer, loss="mse")
    counter = Counter(stop_after_batch=of_rank(2, 4))
    data = batches(of_rank(5, 6), known=False)
    model.fit(data, callbacks=[counter], shuffle=False, verbose=0)
    assert counter.batches == of_rank(2, 4)


def test_plain_model_of_one_rank():
    """Its training has nothing to do with that of other ranks."""
    fit(regression(), batches(2))
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    if hvd.rank() == 0:
        counter = Counter(stop_after_batch=3)
        data = batches(5, known=False)
        model.fit(data, callbacks=[counter], shuffle=False, verbose=0)
        assert counter.batches == 3


def check_end_of_data(model, data, message, callbacks=(), **arguments):
    with pytest.raises(ERRORS) as info:
        fit(model, data, *callbacks, **arguments)
    expected = (
        "The ranks have different numbers of steps in an epoch: "
        f"{message}, and other ranks have."
    )
    assert expected in str(info.value)
    assert "steps_per_epoch" in str(info.value)


@pytest.mark.parametrize(
    ("numbers", "arguments"),
    [
        ((5, 3), {}),
        ((3, 4), {"passes": 2}),
        pytest.param((3, 4), {"passes": 4}, marks=pytest.mark.slow),
        ((5, 3), {"synchronized": True}),
        pytest.param(
            (5, 3),
            {"synchronized": True, "run_eagerly": True},
            marks=pytest.mark.slow,
        ),
        pytest.param((3, 4), {"run_eagerly": True}, marks=pytest.mark.slow),
        pytest.param((5, 3), {"jit_compile": True}, marks=pytest.mark.slow),
    ],
)
def test_data_of_unknown_length_that_end_earlier(numbers, arguments):
    check_end_of_data(
        regression(**arguments),
        batches(of_rank(*numbers), known=False),
        f"rank {np.argmin(numbers)} has no batch left after step 3",
    )


def test_data_that_end_within_an_execution_of_several_steps():
    check_end_of_data(
        regression(steps_per_execution=4),
        batches(of_rank(5, 7), known=False),
        "rank 0 has no batch left after step 5",
    )


def test_data_that_end_in_a_later_epoch():
    model = regression()
    fit(model, batches(4, known=False))
    check_end_of_data(
        model,
        batches(of_rank(6, 5), known=False),
        "rank 1 has no batch left after step 1",
        epochs=2,
        steps_per_epoch=4,
    )


def test_only_one_rank_knows_its_length():
    data = batches(of_rank(4, 3), known=hvd.rank() == 1)
    message = "rank 1 has no batch left after step 3"
    check_end_of_data(regression(), data, message)


def test_data_of_a_rank_that_has_asked_to_stop_end():
    check_end_of_data(
        regression(),
        batches(of_rank(5, 3), known=False),
        "rank 1 has no batch left after step 3",
        callbacks=[on_rank_1(stop_after_batch=3)],
    )


@pytest.mark.parametrize("wrap", [Gan, GanWithTape])
def test_data_that_end_earlier_with_two_optimizers(wrap):
    model = wrap()
    model.compile()
    data = batches(of_rank(4, 3), known=False).map(lambda x, y: x)
    check_end_of_data(model, data, "rank 1 has no batch left after step 3")


def test_different_numbers_of_epochs():
    with pytest.raises(
        ValueError, match=r"numbers of epochs left: \d on rank \d"
    ):
        fit(regression(), batches(2), epochs=of_rank(2, 3))


def test_optimizers_of_different_process_sets(rank_0_alone):
    """They train as before; the ranks do not shake hands."""
    model = Gan()
    model.d_optimizer = hvd.DistributedOptimizer(
        keras.optimizers.SGD(0.01), process_set=rank_0_alone
    )
    model.compile()
    counter = Counter()
    data = batches(4, known=False).map(lambda x, y: x)
    fit(model, data, counter, epochs=2)
    assert both((counter.batches, counter.epochs)) == [(8, 2)] * 2
    assert_same_on_all_ranks(model.generator.weights)


@pytest.mark.parametrize("passes", [1, 3])
def test_equal_data_of_unknown_length_train(passes):
    """Evaluation may take another number of steps on each rank."""
    model = regression(passes)
    counter = Counter()
    fit(
        model,
        batches(4, known=False),
        counter,
        epochs=3,
        validation_data=batches(of_rank(2, 5), known=False),
    )
    assert both((counter.batches, counter.epochs)) == [(12, 3)] * 2
    assert both(int(model.optimizer.iterations)) == [12 // passes] * 2
    assert_same_on_all_ranks(model.weights)


def test_callback_that_evaluates_within_an_epoch():
    class Evaluate(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if hvd.rank() == 0:
                self.model.evaluate(batches(2), verbose=0)

    counter = Counter()
    fit(regression(), batches(4), Evaluate(), counter, epochs=2)
    assert both((counter.batches, counter.epochs)) == [(8, 2)] * 2
