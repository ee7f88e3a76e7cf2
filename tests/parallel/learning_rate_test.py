"""Callbacks that set the learning rate, on two ranks."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import horovod_recipes.keras as hvd
from keras_lars import LARS
from tests.parallel.common import of_rank

Schedule = hvd.callbacks.LearningRateScheduleCallback
Warmup = hvd.callbacks.LearningRateWarmupCallback


class Recorder(keras.callbacks.Callback):
    """Records the learning rate and the weights after each step."""

    def __init__(self):
        super().__init__()
        self.rates = []
        self.weights = []

    def on_train_batch_end(self, batch, logs=None):
        self.rates.append(float(self.model.optimizer.learning_rate))
        self.weights.append(self.model.get_weights()[0][:, 0])


# Inputs by step and rank. The gradient of a step is the mean of its inputs.
INPUTS = np.random.default_rng(0).normal(size=(6, 2, 3)).astype("float32")
GRADIENTS = INPUTS.mean(1)
FIRST_WEIGHTS = np.array([0.5, -1.0, 2.0])


def train(optimizer, callback, epochs=1, passes=1, **compile_arguments):
    """Trains 6 steps an epoch; returns the model and a `Recorder`."""
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(1, use_bias=False)]
    )
    model.set_weights([FIRST_WEIGHTS[:, np.newaxis]])
    model.compile(
        hvd.DistributedOptimizer(
            optimizer,
            backward_passes_per_step=passes,
            average_aggregated_gradients=True,
        ),
        loss=lambda y_true, y_pred: tf.reduce_mean(y_pred),
        jit_compile=False,
        **compile_arguments,
    )
    recorder = Recorder()
    history = model.fit(
        INPUTS[:, hvd.rank()],
        np.zeros((6, 1)),
        batch_size=1,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=[
            hvd.callbacks.BroadcastGlobalVariablesCallback(0),
            callback,
            recorder,
        ],
    )
    recorder.logged = history.history["lr"]
    return model, recorder


def assert_on_every_rank(values, expected):
    for of_one_rank in hvd.allgather_object(values):
        np.testing.assert_allclose(of_one_rank, expected, rtol=1e-5, atol=1e-7)


def test_warmup_ends_at_the_initial_rate(capsys):
    callback = Warmup(0.8, warmup_epochs=2, verbose=1)
    _, recorder = train(keras.optimizers.SGD(5.0), callback, epochs=3)
    shares = np.arange(1, 13) / 12
    expected = 0.8 / 2 * (1 + shares)
    assert_on_every_rank(recorder.rates, [*expected, *[0.8] * 6])
    assert_on_every_rank(recorder.logged, [0.6, 0.8, 0.8])
    line = "\nEpoch 2: finished gradual learning rate warmup to 0.8.\n"
    assert capsys.readouterr().out == of_rank(line, "")


def test_warmup_with_several_steps_per_execution():
    _, recorder = train(
        keras.optimizers.SGD(5.0),
        Warmup(0.8, warmup_epochs=1),
        steps_per_execution=4,
    )
    assert_on_every_rank(recorder.rates, [0.4 * (1 + 4 / 6), 0.8])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        # Horovod's code makes a float the base of a power.
        (
            {"multiplier": 0.5, "start_epoch": 1, "end_epoch": 3},
            [5.0] * 6 + [1.0] * 18,
        ),
        (
            {"multiplier": lambda epoch: 1 + epoch, "end_epoch": 2},
            [2.0] * 6 + [4.0] * 18,
        ),
        (
            {
                "multiplier": lambda epoch: 1 + epoch,
                "staircase": False,
                "end_epoch": 1,
            },
            [2 * (1 + step / 6) for step in range(6)] + [2 * 11 / 6] * 18,
        ),
        (
            {
                "multiplier": lambda epoch: 1 + epoch,
                "staircase": False,
                "start_epoch": 3,
                "steps_per_epoch": 12,
            },
            [5.0] * 18 + [2 * (4 + step / 12) for step in range(6)],
        ),
    ],
)
def test_schedule(arguments, expected):
    _, recorder = train(
        keras.optimizers.SGD(5.0), Schedule(2.0, **arguments), epochs=4
    )
    assert_on_every_rank(recorder.rates, expected)
    assert_on_every_rank(recorder.logged, expected[5::6])


RATES = [0.1, 0.4, 0.4, 0.05, 0.2, 0.1]
MOMENTUM = 0.9


def rates_of_steps(epoch):
    return RATES[round(6 * epoch)]


def corrected_momentum(step, passes=1):
    """Returns Horovod's corrected momentum of an update."""
    last = RATES[step * passes - 1] if step else 7.0
    return MOMENTUM * RATES[step * passes + passes - 1] / last


def sgd_by_hand(passes=1, nesterov=False):
    w, v, weights = FIRST_WEIGHTS, 0.0, []
    for step in range(6 // passes):
        gradient = GRADIENTS[step * passes : (step + 1) * passes].mean(0)
        rate = RATES[step * passes + passes - 1]
        v = corrected_momentum(step, passes) * v - rate * gradient
        w = w + (MOMENTUM * v - rate * gradient if nesterov else v)
        weights += [weights[-1] if weights else FIRST_WEIGHTS] * (passes - 1)
        weights.append(w)
    return weights


def lars_by_hand(style="paper"):
    w, v, weights = FIRST_WEIGHTS, 0.0, []
    for step, (gradient, rate) in enumerate(zip(GRADIENTS, RATES, strict=True)):
        ratio = 0.5 * np.linalg.norm(w) / np.linalg.norm(gradient)
        if style == "paper":
            v = corrected_momentum(step) * v + rate * ratio * gradient
            w = w - v
        else:
            v = MOMENTUM * v + ratio * gradient
            w = w - rate * v
        weights.append(w)
    return weights


def rmsprop_by_hand():
    w, v, square, weights = FIRST_WEIGHTS, 0.0, 0.0, []
    for step, (gradient, rate) in enumerate(zip(GRADIENTS, RATES, strict=True)):
        square = 0.9 * square + 0.1 * gradient**2
        increment = rate * gradient / np.sqrt(square + 1e-7)
        v = corrected_momentum(step) * v + increment
        w = w - v
        weights.append(w)
    return weights


def sgd(**arguments):
    return keras.optimizers.SGD(7.0, momentum=MOMENTUM, **arguments)


def lars(**arguments):
    return LARS(7.0, momentum=MOMENTUM, trust_coefficient=0.5, **arguments)


@pytest.mark.parametrize(
    ("optimizer", "arguments", "expected"),
    [
        (sgd, {}, sgd_by_hand()),
        (sgd, {"run_eagerly": True}, sgd_by_hand()),
        (lambda: sgd(nesterov=True), {}, sgd_by_hand(nesterov=True)),
        (sgd, {"passes": 2}, sgd_by_hand(passes=2)),
        (
            lambda: keras.optimizers.LossScaleOptimizer(sgd()),
            {},
            sgd_by_hand(),
        ),
        (
            lambda: keras.optimizers.RMSprop(7.0, momentum=MOMENTUM),
            {},
            rmsprop_by_hand(),
        ),
        (lars, {}, lars_by_hand()),
        (lambda: lars(jit_compile=False), {}, lars_by_hand()),
        # Its velocity does not contain the learning rate.
        (
            lambda: lars(momentum_style="pytorch"),
            {},
            lars_by_hand("pytorch"),
        ),
    ],
    ids=[
        "sgd",
        "eager",
        "nesterov",
        "accumulation",
        "loss scale",
        "rmsprop",
        "lars",
        "lars without XLA",
        "lars of PyTorch's style",
    ],
)
def test_momentum_correction(optimizer, arguments, expected):
    callback = Schedule(1.0, rates_of_steps, staircase=False)
    model, recorder = train(optimizer(), callback, **arguments)
    assert_on_every_rank(recorder.rates, RATES)
    assert_on_every_rank(recorder.weights, expected)
    inner = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    assert inner.momentum == MOMENTUM


def test_without_momentum_correction():
    callback = Schedule(
        1.0, rates_of_steps, staircase=False, momentum_correction=False
    )
    _, recorder = train(sgd(), callback)
    w, v, expected = FIRST_WEIGHTS, 0.0, []
    for gradient, rate in zip(GRADIENTS, RATES, strict=True):
        v = MOMENTUM * v - rate * gradient
        w = w + v
        expected.append(w)
    assert_on_every_rank(recorder.weights, expected)


def test_a_rate_of_zero_leaves_finite_weights():
    def first_and_third_are_zero(epoch):
        return [0.0, 1.0, 0.0, 1.0, 1.0, 1.0][round(6 * epoch)]

    callback = Schedule(0.1, first_and_third_are_zero, staircase=False)
    _, recorder = train(sgd(), callback)
    w, v, expected = FIRST_WEIGHTS, 0.0, []
    for step, gradient in enumerate(GRADIENTS):
        rate = 0.1 * first_and_third_are_zero(step / 6)
        v = (0.0 if step == 2 else MOMENTUM) * v - rate * gradient
        w = w + v
        expected.append(w)
    assert_on_every_rank(recorder.weights, expected)


class Heavy(keras.optimizers.SGD):
    def update_step(self, gradient, variable, learning_rate):
        super().update_step(2 * gradient, variable, learning_rate)


def test_errors_come_before_the_first_step():
    with pytest.raises(
        ValueError, match=r"not known how the momentum of Heavy"
    ):
        train(Heavy(0.1, momentum=0.9), Schedule(1.0, 0.5))
    # Without momentum there is nothing to correct.
    train(Heavy(0.1), Schedule(0.1, 0.5), run_eagerly=True)
    uncorrected = Schedule(0.1, 0.5, momentum_correction=False)
    train(Heavy(0.1, momentum=0.9), uncorrected, run_eagerly=True)

    decay = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)
    with pytest.raises(ValueError, match=r"not a schedule\. Received: SGD\("):
        train(keras.optimizers.SGD(decay), Warmup(0.1))
    with pytest.raises(ValueError, match="`initial_lr`"):
        Schedule(None, 0.5)

    callback = Warmup(0.1)
    callback.set_params({"steps": None})
    callback.set_model(
        keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    )
    callback.model.compile("sgd")
    with pytest.raises(ValueError, match="pass steps_per_epoch"):
        callback.on_train_begin()
