"""Models with two optimizers, or with a tape in a `train_step` of their own."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import horovod_recipes.keras as hvd
from tests.parallel.common import assert_same_on_all_ranks
from tests.parallel.common import of_rank


class Gan(keras.Model):
    """Two networks, each with an optimizer of its own."""

    def __init__(self, wrap=hvd.DistributedOptimizer):
        super().__init__()
        keras.utils.set_random_seed(hvd.rank())
        self.generator = network(2, 3)
        self.discriminator = network(3, 1)
        self.g_optimizer = wrap(keras.optimizers.Adam(0.01))
        self.d_optimizer = wrap(keras.optimizers.SGD(0.01, momentum=0.9))

    def call(self, inputs):
        return self.discriminator(self.generator(inputs))

    def train_step(self, real):
        noise = tf.random.normal((tf.shape(real)[0], 2))
        with tf.GradientTape() as tape:
            fake = self.generator(noise, training=True)
            loss = tf.reduce_mean(self.discriminator(fake))
            loss -= tf.reduce_mean(self.discriminator(real))
        self.update(tape, loss, self.discriminator, self.d_optimizer)
        with tf.GradientTape() as tape:
            loss = -tf.reduce_mean(self(noise))
        self.update(tape, loss, self.generator, self.g_optimizer)
        return {"loss": loss}

    def update(self, tape, loss, part, optimizer):
        variables = part.trainable_variables
        optimizer.apply(tape.gradient(loss, variables), variables)


class GanWithTape(Gan):
    """Its optimizers are ordinary ones."""

    def __init__(self):
        super().__init__(wrap=lambda optimizer: optimizer)

    def update(self, tape, loss, part, optimizer):
        tape = hvd.DistributedGradientTape(tape)
        super().update(tape, loss, part, optimizer)


def network(inputs, outputs):
    return keras.Sequential(
        [keras.Input((inputs,)), keras.layers.Dense(outputs)]
    )


def fit(model, *callbacks, epochs=2):
    data = np.random.default_rng(hvd.rank()).normal(size=(16, 3))
    broadcast = hvd.callbacks.BroadcastGlobalVariablesCallback(0)
    model.fit(
        tf.data.Dataset.from_tensor_slices(data.astype("float32")).batch(4),
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=[broadcast, hvd.callbacks.ReplicaCheck(1), *callbacks],
    )


def assert_trained_alike(model, start):
    states = model.g_optimizer.variables + model.d_optimizer.variables
    assert len(states) > 8
    assert_same_on_all_ranks(model.trainable_variables + states)
    for before, after in zip(start, model.get_weights(), strict=True):
        assert np.abs(before - after).max() > 1e-4


@pytest.mark.parametrize("create", [Gan, GanWithTape])
@pytest.mark.parametrize("arguments", [{}, {"jit_compile": True}])
def test_two_optimizers(create, arguments):
    model = create()
    model.compile(**arguments)
    if create is GanWithTape and arguments:
        with pytest.raises(ValueError, match="jit_compile=False"):
            fit(model)
        return
    if arguments:
        with pytest.warns(UserWarning, match="trained without XLA"):
            fit(model)
    else:
        fit(model)
    start = [w + 1 for w in model.get_weights()]
    assert_trained_alike(model, start)


@pytest.mark.slow
def test_states_of_all_optimizers_are_broadcast():
    """A second `fit` begins with states that differ between the ranks."""
    model = Gan()
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)))
    fit(model, epochs=1)
    for optimizer in (model.g_optimizer, model.d_optimizer):
        for state in optimizer.variables[1:]:
            state.assign(state + hvd.rank())
    fit(model, epochs=1)
    states = model.g_optimizer.variables + model.d_optimizer.variables
    assert_same_on_all_ranks(model.trainable_variables + states)


def test_replica_check_sees_the_second_optimizer():
    model = Gan()
    model.compile()

    class Change(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            state = model.d_optimizer.variables[-1]
            state.assign(state + hvd.rank())

    with pytest.raises(hvd.callbacks.ReplicasDiffer, match="momentum"):
        fit(model, Change())


@pytest.mark.parametrize("place", ["g_optimizer", "d_optimizer"])
def test_optimizer_that_would_not_average_is_named(place, monkeypatch):
    # Another test of this process has used a tape.
    monkeypatch.setattr(
        "horovod_recipes.keras._gradient_tape._has_reduced", False
    )
    model = Gan()
    plain = keras.optimizers.SGD(0.1)
    setattr(model, place, plain)
    model.compile()
    with pytest.raises(ValueError, match=f"{place} is a SGD that does not"):
        fit(model)
    # The other one, of the default "rmsprop" of `compile`, is not used.
    model = Gan()
    model.compile()
    fit(model, epochs=1)


@pytest.mark.slow
def test_learning_rate_of_one_of_two_optimizers():
    model = Gan()
    model.compile()
    schedule = hvd.callbacks.LearningRateScheduleCallback
    with pytest.raises(ValueError, match="g_optimizer, d_optimizer"):
        fit(model, schedule(0.1, 0.5))
    fit(
        model,
        schedule(0.1, 0.5, optimizer=model.g_optimizer),
        hvd.callbacks.LearningRateWarmupCallback(
            0.4, warmup_epochs=1, optimizer=model.d_optimizer
        ),
    )
    rates = [
        float(optimizer.learning_rate)
        for optimizer in (model.g_optimizer, model.d_optimizer)
    ]
    np.testing.assert_allclose(rates, [0.05, 0.4])


def test_elastic_state_holds_both_optimizers():
    model = Gan()
    model.compile()
    with pytest.raises(ValueError, match="must be built first"):
        hvd.elastic.KerasState(build(model))
    model.g_optimizer.build(model.generator.trainable_variables)
    model.d_optimizer.build(model.discriminator.trainable_variables)
    states = model.g_optimizer.variables + model.d_optimizer.variables
    for variable in states[1:]:
        variable.assign(variable + of_rank(1, 2))
    state = hvd.elastic.KerasState(model)
    state.sync()
    assert_same_on_all_ranks(states)
    kept = [v.numpy() for v in states]
    for variable in states:
        variable.assign(variable + 5)
    state.restore()
    for variable, value in zip(states, kept, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


def build(model):
    model(tf.ones((1, 2)))
    return model


@pytest.mark.slow
def test_multi_optimizer_of_keras():
    multi = getattr(keras.optimizers, "MultiOptimizer", None)
    if multi is None:
        pytest.skip("this Keras has no MultiOptimizer")
    keras.utils.set_random_seed(hvd.rank())
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dense(1)]
    )
    first = model.layers[0].name

    def choose(variable):
        if first in variable.path:
            return keras.optimizers.Adam(0.01)
        return keras.optimizers.SGD(0.01)

    model.compile(hvd.DistributedOptimizer(multi(choose)), "mse")
    x = np.random.default_rng(hvd.rank()).normal(size=(16, 3))
    start = model.get_weights()
    model.fit(
        x,
        x[:, :1],
        verbose=0,
        callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(0)],
    )
    assert_same_on_all_ranks(model.trainable_variables)
    assert np.abs(start[0] - model.get_weights()[0]).max() > 1e-3
