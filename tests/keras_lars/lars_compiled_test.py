"""LARS in `fit` and in functions, with XLA and without."""

import gc
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_lars.lars
from keras_lars import LARS
from keras_lars.schedules import WarmupPolynomialDecay
from tests.keras_lars.common import KERNELS
from tests.keras_lars.common import apply
from tests.keras_lars.common import assert_close
from tests.keras_lars.common import fitted_model
from tests.keras_lars.reference import reference
from tests.keras_lars.reference import variables_and_gradients


def scheduled_lars(jit_compile):
    schedule = WarmupPolynomialDecay(4.0, total_steps=12, warmup_steps=3)
    return LARS(schedule, weight_decay=1e-3, jit_compile=jit_compile)


@pytest.fixture(scope="module")
def eager_weights():
    """The weights after `fit` with neither XLA nor a graph."""
    return fitted_model(scheduled_lars(False), run_eagerly=True).get_weights()


@pytest.mark.parametrize("update_compiled", [True, False])
@pytest.mark.parametrize(
    "how",
    [
        dict(jit_compile=True),
        dict(jit_compile=False),
        dict(jit_compile="auto"),
        dict(run_eagerly=True),
    ],
)
def test_model_fit_gives_the_same_weights(how, update_compiled, eager_weights):
    model = fitted_model(scheduled_lars(update_compiled), **how)
    assert_close(model.get_weights(), eager_weights, rtol=1e-4, atol=1e-5)


@pytest.fixture
def traced(monkeypatch):
    """A list of the rules for which Python has made a program."""
    found = []
    plain = keras_lars.lars.new_values

    def new_values(rule, *arguments, **options):
        found.append(rule)
        return plain(rule, *arguments, **options)

    monkeypatch.setattr(keras_lars.lars, "new_values", new_values)
    return found


def test_rate_may_change_without_another_trace(traced):
    variables, gradients = variables_and_gradients(steps=4)
    rates = [0.1, 5.0, 0.2, 3.0]
    expected, _ = reference(
        [v.numpy() for v in variables],
        gradients,
        rates,
        adapted=KERNELS,
        decayed=KERNELS,
    )
    optimizer = LARS(1.0)
    for rate, grads in zip(rates, gradients, strict=True):
        optimizer.learning_rate = rate
        apply(optimizer, [grads], variables)
    assert_close([v.numpy() for v in variables], expected, rtol=1e-5)
    # One for each variable.
    assert len(traced) == 3


def test_equal_optimizers_share_a_program(traced):
    """TensorFlow keeps each program, also those of optimizers thrown away."""
    for _ in range(3):
        start, [gradients] = variables_and_gradients(steps=1)
        apply(LARS(2.0), [gradients], start)
    assert len(traced) == 3
    apply(LARS(3.0), [gradients], start)
    assert len(traced) == 3
    apply(LARS(2.0, momentum=0.5), [gradients], start)
    assert len(traced) == 6


@pytest.mark.parametrize("momentum_style", ["paper", "pytorch", "popular"])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("trust_clip", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
def test_small_variables_of_one_shape_follow_reference(
    momentum_style, joint, trust_clip, nesterov
):
    """They are stacked, and TensorFlow's own momentum updates them."""
    shapes = [(4, 5), (4, 5), (5,), (4, 5), (5,), (), ()]
    adapted = [len(shape) == 2 for shape in shapes]
    arguments = dict(
        momentum_style=momentum_style,
        trust_ratio_norm="joint"
        if joint or momentum_style == "popular"
        else None,
        trust_clip=trust_clip,
        nesterov=nesterov,
        weight_decay=0.02,
        trust_coefficient=0.01,
        unadapted_scale=0.05,
    )
    rng = np.random.default_rng(0)
    start = [rng.normal(size=shape) for shape in shapes]
    start[1] *= 0  # Its norm is zero.
    gradients = [
        [0.1 * rng.normal(size=shape) for shape in shapes] for _ in range(6)
    ]
    rates = [0.1, 5.0, 0.0, 0.2, 3.0, 1.0]
    variables = [
        keras.Variable(value, name=f"v{i}") for i, value in enumerate(start)
    ]
    optimizer = LARS(1.0, **arguments)
    for rate, grads in zip(rates, gradients, strict=True):
        optimizer.learning_rate = rate
        apply(optimizer, [grads], variables)
    expected, ratios = reference(
        start, gradients, rates, adapted=adapted, decayed=adapted, **arguments
    )
    assert_close([v.numpy() for v in variables], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        list(optimizer.trust_ratios().values()), ratios, rtol=1e-4
    )


def test_program_outlives_the_model_that_it_was_made_for():
    """A sweep builds one model after the other."""
    weights = [fitted_model(scheduled_lars(True)).get_weights()]
    gc.collect()
    weights += [fitted_model(scheduled_lars(True)).get_weights()]
    for first, second in zip(*weights, strict=True):
        np.testing.assert_array_equal(first, second)


class HalvedLARS(LARS):
    """An update of one's own, around that of LARS."""

    def update_step(self, gradient, variable, learning_rate):
        super().update_step(gradient, variable, learning_rate / 2)


def test_update_step_of_a_subclass_is_used():
    expected = stepped(LARS(1.0), in_function=False)
    for in_function in (True, False):
        halved = stepped(HalvedLARS(2.0), in_function)
        assert_close(halved, expected, rtol=1e-5)


def stepped(optimizer, in_function, wrap=lambda optimizer: optimizer):
    """Returns the variables after six steps, eager or in a tf.function."""
    variables, gradients = variables_and_gradients(steps=6)
    variables[0].constraint = keras.constraints.NonNeg()
    # A scalar and an empty variable, because they must work too.
    variables += [
        keras.Variable(0.5, name="scale"),
        keras.Variable(np.zeros(0, "float32"), name="empty"),
    ]
    optimizer = wrap(optimizer)
    optimizer.build(variables)

    def step(*grads):
        optimizer.apply(list(grads), variables)

    if in_function:
        step = tf.function(step)
    for grads in gradients:
        grads = [tf.constant(g, "float32") for g in grads]
        step(*grads, tf.constant(0.1), tf.zeros(0))
    optimizer.finalize_variable_values(variables)
    return [variable.numpy() for variable in variables]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        dict(learning_rate=lambda: 2.0),
        dict(exclude_from_layer_adaptation=[]),
        dict(clipnorm=0.5),
        dict(clipvalue=0.1),
        dict(global_clipnorm=0.5),
        dict(use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=3),
        dict(gradient_accumulation_steps=3),
        dict(loss_scale_factor=8.0),
    ],
    ids=lambda arguments: next(iter(arguments), "plain"),
)
def test_compiled_update_equals_the_plain_eager_one(arguments):
    arguments = {"learning_rate": 2.0, "weight_decay": 0.01} | arguments
    plain = stepped(LARS(jit_compile=False, **arguments), in_function=False)
    start, _ = variables_and_gradients(steps=0)
    assert np.abs(plain[2] - start[2].numpy()).max() > 1e-4
    # An average over steps includes the initial weights, some of them negative.
    assert (plain[0] >= 0).all() or "use_ema" in arguments
    for in_function in (True, False):
        compiled = stepped(LARS(jit_compile=True, **arguments), in_function)
        assert_close(compiled, plain, rtol=1e-5, atol=1e-6)


def test_loss_scale_optimizer_around_it():
    def scaled(optimizer):
        return keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=4.0)

    # LARS divides the same gradients by the same scale.
    plain = stepped(LARS(2.0, loss_scale_factor=4.0), in_function=False)
    for in_function in (True, False):
        inside = stepped(LARS(2.0), in_function, wrap=scaled)
        assert_close(inside, plain, rtol=1e-5, atol=1e-6)


MIRRORED = """
import numpy as np, tensorflow as tf, keras
import keras_lars.lars
from keras_lars import LARS, TrustRatio

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(
    cpu, [tf.config.LogicalDeviceConfiguration()] * 2
)
x = np.random.default_rng(0).normal(size=(64, 8)).astype("float32")
y = np.argmax(x[:, :3], axis=1)


def fitted():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)])
    model.compile(
        OPTIMIZER,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model.fit(x, y, batch_size=32, epochs=3, shuffle=False, verbose=0)
    ratios = list(model.optimizer.trust_ratios().values())
    return [*model.get_weights(), np.array(ratios)]


alone = fitted()
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
assert strategy.num_replicas_in_sync == 2
with strategy.scope():
    mirrored = fitted()
for a, b in zip(alone, mirrored, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
print("equal")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer",
    [
        "LARS(4.0, weight_decay=1e-3)",
        "TrustRatio(keras.optimizers.Adam(0.01), weight_decay=1e-3)",
    ],
)
def test_mirrored_strategy_equals_one_device(optimizer):
    # A new process, because TensorFlow sets up its devices once.
    result = subprocess.run(
        [sys.executable, "-c", MIRRORED.replace("OPTIMIZER", optimizer)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.stdout.splitlines()[-1:] == ["equal"], result.stderr
