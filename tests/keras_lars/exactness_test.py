"""LARS against the float64 reference and its peers, on any Keras backend.

KERAS_BACKEND=jax python -m pytest tests/keras_lars/exactness_test.py
"""

import keras
import numpy as np
import pytest

from benchmarks.speed.peers import timm_lars
from keras_lars import LARS
from keras_lars.schedules import WarmupPolynomialDecay
from tests.keras_lars.reference import SHAPES
from tests.keras_lars.reference import reference
from tests.keras_lars.reference import variables_and_gradients

STEPS = 50
# An exclusion list, and for each variable of `SHAPES` whether it stays in.
KERNELS = (None, [True, False, True])
ALL = ([], [True, True, True])
DENSE = (["conv/"], [False, False, True])
CONV = (["dense/"], [True, True, False])
XLA = pytest.mark.skipif(
    keras.backend.backend() == "torch", reason="PyTorch has no XLA"
)


def trained(optimizer, gradients, zeros=False, jit_compile=False):
    variables, _ = variables_and_gradients(steps=0)
    if zeros:
        variables[0].assign(np.zeros(variables[0].shape))
    start = [v.numpy() for v in variables]
    optimizer.build(variables)

    def step(grads):
        optimizer.apply(grads, variables)

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        step = tf.function(step)
    elif jit_compile:
        step = jitted_jax_step(optimizer, variables)
    for grads in gradients:
        grads = [keras.ops.convert_to_tensor(g, "float32") for g in grads]
        step(grads)
    return start, [v.numpy() for v in variables]


def jitted_jax_step(optimizer, variables):
    """Returns a step that calls the optimizer as Keras's JAX trainer does."""
    import jax

    update = jax.jit(optimizer.stateless_apply)

    def step(grads):
        values, state = update(
            [v.value for v in optimizer.variables],
            grads,
            [v.value for v in variables],
        )
        for variable, value in zip(
            [*variables, *optimizer.variables], [*values, *state], strict=True
        ):
            variable.assign(value)

    return step


def relative_error(value, expected):
    return np.linalg.norm(value - expected) / np.linalg.norm(expected)


def check_against_reference(
    jit_compile, exclusion, decay_exclusion, zeros=False, **arguments
):
    _, gradients = variables_and_gradients(STEPS)
    schedule = WarmupPolynomialDecay(3.0, total_steps=STEPS, warmup_steps=10)
    optimizer = LARS(
        schedule,
        exclude_from_layer_adaptation=exclusion[0],
        exclude_from_weight_decay=decay_exclusion[0],
        jit_compile=jit_compile,
        **arguments,
    )
    start, weights = trained(optimizer, gradients, zeros, jit_compile)
    expected, ratios = reference(
        start,
        gradients,
        [float(schedule(step)) for step in range(STEPS)],
        adapted=exclusion[1],
        decayed=decay_exclusion[1],
        **arguments,
    )
    for value, after, before in zip(weights, expected, start, strict=True):
        assert relative_error(value, after) < 1e-5
        # The weights moved far enough to tell one formula from another.
        assert relative_error(before, after) > 1e-2
    np.testing.assert_allclose(
        list(optimizer.trust_ratios().values()), ratios, rtol=1e-4
    )


styles = pytest.mark.parametrize(
    ("momentum_style", "trust_ratio_norm"),
    [
        ("paper", None),
        ("paper", "joint"),
        ("pytorch", "separate"),
        ("pytorch", "joint"),
        ("popular", None),
    ],
)
clips = pytest.mark.parametrize("trust_clip", [False, True])
nesterovs = pytest.mark.parametrize("nesterov", [False, True])


@styles
@clips
@nesterovs
@pytest.mark.parametrize(
    ("exclusion", "decay_exclusion", "epsilon"),
    [
        # A kernel has both adaptation and decay, and a bias has neither.
        (KERNELS, KERNELS, 0.0),
        # One kernel has decay alone, and the other adaptation alone.
        (DENSE, CONV, 0.01),
    ],
)
def test_follows_reference(
    momentum_style,
    trust_ratio_norm,
    trust_clip,
    nesterov,
    exclusion,
    decay_exclusion,
    epsilon,
):
    check_against_reference(
        False,
        exclusion,
        decay_exclusion,
        momentum_style=momentum_style,
        trust_ratio_norm=trust_ratio_norm,
        trust_clip=trust_clip,
        nesterov=nesterov,
        weight_decay=0.02,
        trust_coefficient=0.01,
        epsilon=epsilon,
        unadapted_scale=0.05,
    )


@XLA
@styles
@clips
@nesterovs
def test_compiled_update_follows_reference(
    momentum_style, trust_ratio_norm, trust_clip, nesterov
):
    check_against_reference(
        True,
        KERNELS,
        ALL,
        momentum_style=momentum_style,
        trust_ratio_norm=trust_ratio_norm,
        trust_clip=trust_clip,
        nesterov=nesterov,
        weight_decay=0.02,
        trust_coefficient=0.01,
        epsilon=0.01,
        unadapted_scale=0.05,
    )


@styles
@pytest.mark.parametrize(
    ("momentum", "weight_decay"), [(0.0, 0.02), (0.5, 0.0)]
)
def test_zero_weights_and_other_momenta_follow_reference(
    momentum_style, trust_ratio_norm, momentum, weight_decay
):
    check_against_reference(
        False,
        KERNELS,
        KERNELS,
        zeros=True,
        momentum_style=momentum_style,
        trust_ratio_norm=trust_ratio_norm,
        momentum=momentum,
        weight_decay=weight_decay,
        trust_coefficient=0.01,
        unadapted_scale=0.05,
    )


def rates():
    schedule = WarmupPolynomialDecay(
        3.0,
        total_steps=STEPS,
        warmup_steps=10,
        warmup_start_learning_rate=0.1,
    )
    return schedule, [float(schedule(step)) for step in range(STEPS)]


@nesterovs
def test_same_trajectory_as_optax(nesterov):
    optax = pytest.importorskip("optax")
    jax = pytest.importorskip("jax")
    jnp = jax.numpy
    schedule, learning_rates = rates()
    _, gradients = variables_and_gradients(STEPS)
    optimizer = LARS(
        schedule,
        nesterov=nesterov,
        weight_decay=0.02,
        trust_coefficient=0.01,
        epsilon=0.01,
        trust_ratio_norm="joint",
        exclude_from_layer_adaptation=[],
        exclude_from_weight_decay=[],
    )
    start, weights = trained(optimizer, gradients)

    peer = optax.lars(
        lambda step: jnp.asarray(learning_rates)[step],
        weight_decay=0.02,
        trust_coefficient=0.01,
        eps=0.01,
        momentum=0.9,
        nesterov=nesterov,
    )
    params = [jnp.asarray(w) for w in start]
    state = peer.init(params)
    update = jax.jit(peer.update)
    for grads in gradients:
        grads = [jnp.asarray(g, "float32") for g in grads]
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    for value, expected in zip(weights, params, strict=True):
        assert relative_error(value, np.asarray(expected)) < 1e-5


@nesterovs
@clips
def test_same_trajectory_as_timm(nesterov, trust_clip):
    peer_class = timm_lars()
    if peer_class is None:
        pytest.skip("timm and torch are not installed")
    import torch

    schedule, learning_rates = rates()
    _, gradients = variables_and_gradients(STEPS)
    optimizer = LARS(
        schedule,
        nesterov=nesterov,
        weight_decay=0.02,
        # At this value r / lr is above and below 1 in turn, for `trust_clip`.
        trust_coefficient=0.1,
        epsilon=1e-8,
        momentum_style="pytorch",
        trust_clip=trust_clip,
        exclude_from_layer_adaptation=[],
        exclude_from_weight_decay=[],
    )
    start, weights = trained(optimizer, gradients)

    params = [torch.nn.Parameter(torch.tensor(w)) for w in start]
    peer = peer_class(
        params,
        momentum=0.9,
        nesterov=nesterov,
        weight_decay=0.02,
        trust_coeff=0.1,
        eps=1e-8,
        trust_clip=trust_clip,
    )
    for grads, learning_rate in zip(gradients, learning_rates, strict=True):
        for param, grad in zip(params, grads, strict=True):
            param.grad = torch.tensor(grad, dtype=torch.float32)
        peer.param_groups[0]["lr"] = learning_rate
        peer.step()
    for value, expected in zip(weights, params, strict=True):
        assert relative_error(value, expected.detach().numpy()) < 1e-5


def fitted_model(**how):
    keras.utils.set_random_seed(1)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(96, 8)).astype("float32")
    model = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(16, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(3),
        ]
    )
    schedule = WarmupPolynomialDecay(4.0, total_steps=24, warmup_steps=3)
    model.compile(
        LARS(schedule, weight_decay=1e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        **how,
    )
    fit(model, x, np.argmax(x[:, :3], axis=1))
    return model


def fit(model, x, y):
    model.fit(x, y, batch_size=32, epochs=4, shuffle=False, verbose=0)


def test_fit_compiled_equals_eager():
    plain = fitted_model(run_eagerly=True)
    model = fitted_model()
    for a, b in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    ratios, expected = (
        np.array(list(m.optimizer.trust_ratios().values()))
        for m in (model, plain)
    )
    np.testing.assert_allclose(ratios, expected, rtol=1e-3)
    adapted = [0, 4]
    assert ((0 < ratios[adapted]) & (ratios[adapted] < 0.1)).all()
    np.testing.assert_array_equal(np.delete(ratios, adapted), 1.0)


def test_saved_model_resumes_bit_for_bit(tmp_path):
    model = fitted_model()
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    rng = np.random.default_rng(1)
    x = rng.normal(size=(96, 8)).astype("float32")
    for m in (model, loaded):
        fit(m, x, np.zeros(96, "int64"))
    for a, b in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_reference_sees_every_variable():
    variables, _ = variables_and_gradients(steps=0)
    assert [v.path for v in variables] == list(SHAPES)
