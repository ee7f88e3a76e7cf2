"""TrustRatio against float64 references and its peers, on any Keras backend.

KERAS_BACKEND=jax python -m pytest tests/keras_lars/trust_ratio_test.py
"""

import keras
import numpy as np
import pytest

from keras_lars import LARS
from keras_lars import TrustRatio
from keras_lars.muon import ConvMuon
from keras_lars.schedules import WarmupPolynomialDecay
from tests.keras_lars import reference as inputs
from tests.keras_lars.exactness_test import relative_error
from tests.keras_lars.exactness_test import trained

STEPS = 50
# Which variables of `inputs.SHAPES` are kernels.
KERNELS = [True, False, True]


def sgd(momentum=0.9):
    def update(g, state, w, t):
        state["v"] = momentum * state.get("v", 0) + g
        return state["v"]

    return update


def adam(beta_1=0.9, beta_2=0.999, epsilon=1e-7):
    def update(g, state, w, t):
        m = state["m"] = beta_1 * state.get("m", 0) + (1 - beta_1) * g
        v = state["v"] = beta_2 * state.get("v", 0) + (1 - beta_2) * g**2
        # Keras adds its epsilon before the correction of the variance.
        scale = np.sqrt(1 - beta_2**t) / (1 - beta_1**t)
        return scale * m / (np.sqrt(v) + epsilon)

    return update


def rmsprop(rho=0.9, epsilon=1e-7):
    def update(g, state, w, t):
        v = state["v"] = rho * state.get("v", 0) + (1 - rho) * g**2
        return g / np.sqrt(v + epsilon)

    return update


def lion(beta_1=0.9, beta_2=0.99):
    def update(g, state, w, t):
        m = state.get("m", 0)
        state["m"] = beta_2 * m + (1 - beta_2) * g
        return np.sign(beta_1 * m + (1 - beta_1) * g)

    return update


def nadam(beta_1=0.9, beta_2=0.999, epsilon=1e-7):
    def update(g, state, w, t):
        u = beta_1 * (1 - 0.5 * 0.96**t)
        u_next = beta_1 * (1 - 0.5 * 0.96 ** (t + 1))
        product = state["product"] = state.get("product", 1) * u
        m = state["m"] = beta_1 * state.get("m", 0) + (1 - beta_1) * g
        v = state["v"] = beta_2 * state.get("v", 0) + (1 - beta_2) * g**2
        m_hat = u_next * m / (1 - product * u_next) + (1 - u) * g / (
            1 - product
        )
        return m_hat / (np.sqrt(v / (1 - beta_2**t)) + epsilon)

    return update


def newton_schulz(matrix):
    """Five steps of the iteration with the coefficients of Jordan's Muon."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(5):
        y = x @ x.T
        x = a * x + (b * y + c * y @ y) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


def muon(convolutions, momentum=0.95):
    """Muon with Nesterov momentum; AdamW for what is no matrix."""
    plain = adam()

    def update(g, state, w, t):
        is_matrix = g.ndim == 2 or (convolutions and g.ndim > 2)
        if not is_matrix:
            return plain(g, state, w, t)
        m = state["m"] = momentum * state.get("m", 0) + g
        matrix = (g + momentum * m).reshape(-1, g.shape[-1])
        return newton_schulz(matrix).reshape(g.shape)

    return update


def reference(
    update,
    weights,
    gradients,
    rates,
    trust_coefficient=1.0,
    weight_decay=0.0,
    epsilon=0.0,
    clip=None,
    unadapted_scale=1.0,
    adapted=KERNELS,
    decayed=KERNELS,
    decoupled_decay=0.0,
):
    """Returns the weights and the ratios after all steps, in float64."""
    weights = [w.astype("float64") for w in weights]
    states = [{} for _ in weights]
    ratios = [1.0] * len(weights)
    for t, (grads, rate) in enumerate(
        zip(gradients, rates, strict=True), start=1
    ):
        for i, g in enumerate(grads):
            w = weights[i] * (1 - rate * decoupled_decay)
            d = update(g, states[i], w, t)
            if decayed[i]:
                d = d + weight_decay * w
            r = unadapted_scale
            if adapted[i] and np.linalg.norm(w) and np.linalg.norm(d):
                r = trust_coefficient * np.linalg.norm(w)
                r /= np.linalg.norm(d) + epsilon
                if clip:
                    r = min(max(r, clip[0]), clip[1])
            weights[i], ratios[i] = w - rate * r * d, r
    return weights, ratios


def schedule():
    return WarmupPolynomialDecay(0.02, total_steps=STEPS, warmup_steps=10)


def rates():
    return [float(schedule()(step)) for step in range(STEPS)]


PLAIN_MUON = {"rms_rate": None, "weight_decay": None, "adam_weight_decay": None}
INNER = {
    "sgd": (lambda rate: keras.optimizers.SGD(rate, momentum=0.9), sgd(), {}),
    "adam": (keras.optimizers.Adam, adam(), {}),
    "adamw": (
        lambda rate: keras.optimizers.AdamW(rate, weight_decay=0.1),
        adam(),
        {"decoupled_decay": 0.1},
    ),
    "rmsprop": (keras.optimizers.RMSprop, rmsprop(), {}),
    "nadam": (keras.optimizers.Nadam, nadam(), {}),
    "lion": (keras.optimizers.Lion, lion(), {}),
    "muon": (
        lambda rate: keras.optimizers.Muon(rate, **PLAIN_MUON),
        muon(False),
        {},
    ),
    "conv_muon": (
        lambda rate: ConvMuon(rate, **PLAIN_MUON),
        muon(True),
        {},
    ),
}
ARGUMENTS = {
    "plain": {},
    "decay": {"weight_decay": 0.1, "epsilon": 0.01},
    "clip": {"weight_decay": 0.1, "epsilon": 1e-6, "clip": (0.5, 1.5)},
    "scaled": {"trust_coefficient": 0.5, "unadapted_scale": 0.1},
}


def cases():
    """Every optimizer with and without XLA, and one with all arguments."""
    compiled = {"plain": [False], "decay": [True], "clip": [True]}
    for inner in INNER:
        marks = [inputs.NEEDS_MUON] if "muon" in inner else []
        for arguments in ARGUMENTS:
            ways = compiled.get(arguments, [])
            if inner == "adam":
                ways = [True, False]
            if ways and keras.backend.backend() == "torch":
                # It has no XLA.
                ways = [False]
            for jit_compile in ways:
                yield pytest.param(inner, arguments, jit_compile, marks=marks)


@pytest.mark.parametrize(("inner", "arguments", "jit_compile"), list(cases()))
def test_follows_reference(inner, arguments, jit_compile):
    create, update, more = INNER[inner]
    _, gradients = inputs.variables_and_gradients(STEPS)
    optimizer = TrustRatio(
        create(schedule()), **ARGUMENTS[arguments], jit_compile=jit_compile
    )
    start, weights = trained(optimizer, gradients, jit_compile=jit_compile)
    expected, ratios = reference(
        update, start, gradients, rates(), **ARGUMENTS[arguments], **more
    )
    # Lion takes signs, and Muon's iteration enlarges rounding.
    tolerance = 1e-3 if inner in ("lion", "muon", "conv_muon") else 1e-5
    for value, after, before in zip(weights, expected, start, strict=True):
        assert relative_error(value, after) < tolerance
        assert relative_error(before, after) > 1e-3
    np.testing.assert_allclose(
        list(optimizer.trust_ratios().values()), ratios, rtol=10 * tolerance
    )
    assert int(optimizer.iterations) == STEPS


def weights_after(optimizer):
    _, gradients = inputs.variables_and_gradients(STEPS)
    return trained(optimizer, gradients)[1]


@pytest.mark.parametrize("nesterov", [False, True])
def test_around_sgd_it_is_lars_in_the_popular_style(nesterov):
    inner = keras.optimizers.SGD(schedule(), momentum=0.9, nesterov=nesterov)
    ours = weights_after(TrustRatio(inner, trust_coefficient=0.01))
    theirs = weights_after(
        LARS(
            schedule(),
            nesterov=nesterov,
            trust_coefficient=0.01,
            momentum_style="popular",
        )
    )
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_around_adam_it_is_the_lamb_of_optax(decay):
    jax = pytest.importorskip("jax")
    optax = pytest.importorskip("optax")
    inner = keras.optimizers.Adam(schedule(), epsilon=1e-6)
    ours = weights_after(
        TrustRatio(
            inner,
            weight_decay=decay,
            exclude_from_layer_adaptation=[],
            exclude_from_weight_decay=[],
        )
    )
    learning_rates = jax.numpy.asarray(rates())
    theirs = weights_after_optax(
        optax.lamb(
            lambda step: learning_rates[step],
            weight_decay=decay,
            eps=1e-6,
        )
    )
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(a, b) < 1e-4


@pytest.mark.parametrize("nesterov", [False, True])
def test_around_sgd_it_is_a_chain_of_optax(nesterov):
    jax = pytest.importorskip("jax")
    optax = pytest.importorskip("optax")
    inner = keras.optimizers.SGD(schedule(), momentum=0.9, nesterov=nesterov)
    ours = weights_after(
        TrustRatio(
            inner,
            trust_coefficient=0.5,
            weight_decay=0.1,
            epsilon=0.01,
            exclude_from_layer_adaptation=[],
            exclude_from_weight_decay=[],
        )
    )
    learning_rates = jax.numpy.asarray(rates())
    theirs = weights_after_optax(
        optax.chain(
            optax.trace(0.9, nesterov=nesterov),
            optax.add_decayed_weights(0.1),
            optax.scale_by_trust_ratio(trust_coefficient=0.5, eps=0.01),
            optax.scale_by_learning_rate(lambda step: learning_rates[step]),
        )
    )
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(a, b) < 1e-5


def weights_after_optax(transformation):
    import jax
    import optax

    variables, gradients = inputs.variables_and_gradients(STEPS)
    values = [jax.numpy.asarray(v.numpy()) for v in variables]
    state = transformation.init(values)
    update = jax.jit(transformation.update)
    for grads in gradients:
        grads = [jax.numpy.asarray(g, "float32") for g in grads]
        updates, state = update(grads, state, values)
        values = optax.apply_updates(values, updates)
    return [np.asarray(value) for value in values]


def test_lists_of_patterns_select_the_variables():
    _, gradients = inputs.variables_and_gradients(STEPS)
    arguments = {"weight_decay": 0.1, "unadapted_scale": 0.5}
    optimizer = TrustRatio(
        keras.optimizers.Adam(schedule()),
        exclude_from_layer_adaptation=["conv"],
        exclude_from_weight_decay=["dense"],
        **arguments,
    )
    start, weights = trained(optimizer, gradients)
    expected, ratios = reference(
        adam(),
        start,
        gradients,
        rates(),
        adapted=[False, False, True],
        decayed=[True, True, False],
        **arguments,
    )
    for value, after in zip(weights, expected, strict=True):
        assert relative_error(value, after) < 1e-5
    np.testing.assert_allclose(
        list(optimizer.trust_ratios().values()), ratios, rtol=1e-4
    )


@inputs.NEEDS_MUON
def test_conv_muon_moves_a_kernel_as_muon_moves_its_matrix():
    _, gradients = inputs.variables_and_gradients(3)
    kernel = keras.Variable(np.ones((3, 3, 2, 4), "float32"), name="kernel")
    matrix = keras.Variable(np.ones((18, 4), "float32"), name="matrix")
    for optimizer, variable in (
        (ConvMuon(0.1), kernel),
        (keras.optimizers.Muon(0.1), matrix),
    ):
        for gradient, *_ in gradients:
            gradient = np.reshape(gradient, variable.shape).astype("float32")
            optimizer.apply([keras.ops.convert_to_tensor(gradient)], [variable])
    kernel = keras.ops.convert_to_numpy(kernel.value)
    matrix = keras.ops.convert_to_numpy(matrix.value)
    assert np.abs(matrix - 1).max() > 0.01
    np.testing.assert_allclose(kernel.reshape(18, 4), matrix, rtol=1e-5)


@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [
        (LARS(), "has a trust ratio already"),
        (TrustRatio(keras.optimizers.SGD()), "has a trust ratio already"),
        (keras.optimizers.Lamb(), "use Adam"),
        (keras.optimizers.Ftrl(), "not proportional to its learning rate"),
        (keras.optimizers.Adafactor(), "already scales its step"),
        (
            keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()),
            "put it around TrustRatio",
        ),
        ("adam", "must be a keras.optimizers.Optimizer"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_inner_optimizers_without_a_meaning_are_refused(optimizer, reason):
    with pytest.raises(ValueError, match=f"`optimizer`.*{reason}"):
        TrustRatio(optimizer)


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        (
            "MultiOptimizer",
            [lambda variable: keras.optimizers.SGD()],
            "put a TrustRatio around each optimizer inside it",
        ),
        ("ScheduleFreeAdamW", [], "updates other variables than the weights"),
    ],
)
def test_inner_optimizers_of_newer_keras_are_refused(name, arguments, reason):
    if not hasattr(keras.optimizers, name):
        pytest.skip(f"this Keras has no {name}")
    optimizer = getattr(keras.optimizers, name)(*arguments)
    with pytest.raises(ValueError, match=f"cannot be {name}: .*{reason}"):
        TrustRatio(optimizer)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("trust_coefficient", v) for v in (0.0, -1, "1")],
        *[("weight_decay", v) for v in (-1e-4, float("inf"))],
        ("epsilon", -1e-8),
        *[("clip", v) for v in (1.0, (1.0, 0.5), (-1, 1), (0.5,), "ab")],
        ("unadapted_scale", -1),
        ("jit_compile", "auto"),
        ("exclude_from_layer_adaptation", "bias"),
        ("exclude_from_weight_decay", ["(unclosed"]),
    ],
)
def test_bad_argument_is_named(name, value):
    with pytest.raises(ValueError, match=rf"`{name}` must .*Received: "):
        TrustRatio(keras.optimizers.SGD(), **{name: value})


class DecayApart(keras.optimizers.SGD):
    """Changes the variable in two steps."""

    def update_step(self, gradient, variable, learning_rate):
        self.assign_sub(variable, learning_rate * 0.1 * variable)
        self.assign_add(variable, -learning_rate * gradient)


def test_changes_of_one_step_are_added():
    together = weights_after(
        TrustRatio(
            keras.optimizers.SGD(schedule()),
            weight_decay=0.1,
            exclude_from_weight_decay=[],
        )
    )
    apart = weights_after(TrustRatio(DecayApart(schedule())))
    for a, b in zip(apart, together, strict=True):
        assert relative_error(a, b) < 1e-5


class Direct(keras.optimizers.Optimizer):
    """Changes the variable by itself."""

    def update_step(self, gradient, variable, learning_rate):
        variable.assign(variable - learning_rate * gradient)

    def get_config(self):
        return super().get_config()


def test_optimizer_that_assigns_by_itself_is_refused():
    variables, [gradients] = inputs.variables_and_gradients(1)
    optimizer = TrustRatio(Direct(0.1))
    with pytest.raises(ValueError, match="Direct cannot be inside TrustRatio"):
        optimizer.apply(
            [keras.ops.convert_to_tensor(g, "float32") for g in gradients],
            variables,
        )
