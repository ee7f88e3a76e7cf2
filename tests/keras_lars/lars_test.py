"""One update of LARS: its values, for all kinds of variables and gradients."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_lars import LARS
from keras_lars import TrustRatio
from keras_lars.schedules import WarmupPolynomialDecay
from tests.keras_lars.common import KERNELS
from tests.keras_lars.common import apply
from tests.keras_lars.common import assert_close
from tests.keras_lars.common import fitted_model
from tests.keras_lars.common import one_step
from tests.keras_lars.common import small_model
from tests.keras_lars.reference import reference
from tests.keras_lars.reference import variables_and_gradients


def test_one_step_by_hand():
    # ||w|| = 5, ||g|| = 10: r = 0.1 * 5 / (10 + 0.2 * 5) = 1 / 22.
    optimizer = LARS(2.0, trust_coefficient=0.1, weight_decay=0.2)
    stepped = one_step(optimizer, [[3.0, 4.0]], [[6.0, 8.0]])
    expected = [[3 - 2 / 22 * 6.6, 4 - 2 / 22 * 8.8]]
    np.testing.assert_allclose(stepped, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("weights", "gradient"),
    [([[0.0, 0.0]], [[1.0, 2.0]]), ([[1.0, 2.0]], [[0.0, 0.0]])],
)
def test_zero_norm_uses_unadapted_scale(weights, gradient):
    optimizer = LARS(0.5, unadapted_scale=0.1)
    stepped = one_step(optimizer, weights, gradient)
    expected = np.array(weights) - 0.5 * 0.1 * np.array(gradient)
    np.testing.assert_allclose(stepped, expected, rtol=1e-6)
    assert list(optimizer.trust_ratios().values()) == pytest.approx([0.1])


@pytest.mark.parametrize(
    ("adaptation", "decay", "adapted", "decayed"),
    [
        (None, None, [1, 0, 1], [1, 0, 1]),
        ([], [], [1, 1, 1], [1, 1, 1]),
        (["conv/"], None, [0, 0, 1], [1, 0, 1]),
        (None, ["kernel$"], [1, 0, 1], [0, 1, 0]),
        (["dense/kernel", "bias"], ["conv"], [1, 0, 0], [0, 0, 1]),
    ],
)
def test_exclusions_are_independent(adaptation, decay, adapted, decayed):
    variables, gradients = variables_and_gradients(steps=3)
    expected, _ = reference(
        [v.numpy() for v in variables],
        gradients,
        [1.0] * 3,
        weight_decay=0.1,
        adapted=adapted,
        decayed=decayed,
    )
    optimizer = LARS(
        weight_decay=0.1,
        exclude_from_layer_adaptation=adaptation,
        exclude_from_weight_decay=decay,
    )
    apply(optimizer, gradients, variables)
    assert_close([v.numpy() for v in variables], expected, rtol=1e-5)


def test_keras_method_excludes_from_weight_decay():
    variables, gradients = variables_and_gradients(steps=1)
    expected, _ = reference(
        [v.numpy() for v in variables],
        gradients,
        [1.0],
        weight_decay=0.1,
        adapted=KERNELS,
        decayed=[False, False, True],
    )
    optimizer = LARS(weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_list=[variables[0]])
    apply(optimizer, gradients, variables)
    assert_close([v.numpy() for v in variables], expected, rtol=1e-5)


def test_decay_is_not_keras_decoupled_decay():
    # With a zero gradient and no adaptation, w - lr * b * w.
    optimizer = LARS(
        0.5,
        momentum=0.0,
        weight_decay=0.1,
        exclude_from_layer_adaptation=["kernel"],
        exclude_from_weight_decay=[],
    )
    stepped = one_step(optimizer, [[1.0, 2.0]], [[0.0, 0.0]])
    np.testing.assert_allclose(stepped, [[0.95, 1.9]], rtol=1e-6)


@pytest.mark.parametrize("jit_compile", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_dtypes_move_as_float32_does(dtype, jit_compile):
    variables, gradients = variables_and_gradients(steps=5, dtype=dtype)
    before = [v.numpy().astype("float64") for v in variables]
    expected, _ = reference(
        before,
        gradients,
        [30.0] * 5,
        adapted=KERNELS,
        decayed=KERNELS,
    )
    apply(LARS(30.0, jit_compile=jit_compile), gradients, variables, dtype)
    tolerance = {"float16": 2e-2, "bfloat16": 0.1, "float64": 1e-5}[dtype]
    after = [v.numpy().astype("float64") for v in variables]
    assert_close(after, expected, rtol=tolerance, atol=tolerance)


def test_half_precision_norms_do_not_overflow():
    # The sum of squares is 1e7, and float16 ends at 65504.
    value = np.full((1000, 1), 100.0, "float16")
    variable = keras.Variable(value, dtype="float16", name="kernel")
    optimizer = LARS(1.0, trust_coefficient=0.1, momentum=0.0)
    optimizer.apply([tf.constant(value)], [variable])
    np.testing.assert_allclose(variable.numpy(), 0.9 * value, rtol=1e-3)


SPARSE = tf.IndexedSlices(
    tf.constant([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]),
    tf.constant([2, 0, 2]),
    tf.constant([4, 2]),
)


DENSE = tf.constant([[3.0, 4.0], [0.0, 0.0], [6.0, 8.0], [0.0, 0.0]])


def stepped_table(gradient, jit_compile, in_function, **arguments):
    """Returns a table of embeddings after two steps."""
    table = keras.Variable(np.ones((4, 2), "float32"), name="embeddings")
    optimizer = LARS(
        2.0, weight_decay=0.1, jit_compile=jit_compile, **arguments
    )
    optimizer.build([table])

    # While a tf.function is traced, a sparse argument has an unknown shape.
    def step(gradient):
        optimizer.apply([gradient], [table])

    if in_function:
        step = tf.function(step)
    for _ in range(2):
        step(gradient)
    return table.numpy()


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        dict(clipnorm=1.0),
        dict(clipvalue=5.5),
        dict(global_clipnorm=1.0),
        dict(loss_scale_factor=4.0),
        dict(gradient_accumulation_steps=2),
    ],
    ids=lambda arguments: next(iter(arguments), "plain"),
)
def test_sparse_gradient_equals_dense(arguments):
    dense = stepped_table(DENSE, False, False, **arguments)
    assert np.abs(dense - 1).max() > 1e-4
    for jit_compile in (True, False):
        for in_function in (True, False):
            sparse = stepped_table(
                SPARSE, jit_compile, in_function, **arguments
            )
            np.testing.assert_allclose(sparse, dense, rtol=1e-6)


@pytest.mark.parametrize("jit_compile", [True, False])
def test_nan_in_a_gradient_is_not_hidden(jit_compile):
    kernel = keras.Variable([[1.0, 2.0]], name="kernel")
    optimizer = LARS(jit_compile=jit_compile)
    optimizer.apply([tf.constant([[1.0, float("nan")]])], [kernel])
    assert np.isnan(kernel.numpy()).all()
    assert np.isnan(list(optimizer.trust_ratios().values())).all()


def test_paths_that_variables_share_are_numbered():
    variables = [keras.Variable([[1.0]], name="kernel") for _ in range(3)]
    optimizer = LARS()
    optimizer.build(variables)
    assert list(optimizer.trust_ratios()) == ["kernel", "kernel_1", "kernel_2"]


def test_number_of_a_shared_path_is_free():
    names = ["kernel", "kernel", "kernel_1", "kernel_1"]
    optimizer = LARS()
    optimizer.build([keras.Variable([[1.0]], name=name) for name in names])
    assert list(optimizer.trust_ratios()) == [
        "kernel",
        "kernel_2",
        "kernel_1",
        "kernel_1_1",
    ]


@pytest.mark.parametrize("jit_compile", [True, False])
@pytest.mark.parametrize("in_function", [True, False])
def test_variable_without_gradient_stays(in_function, jit_compile):
    variables, gradients = variables_and_gradients(steps=2)
    before = [v.numpy() for v in variables]
    expected, _ = reference(
        before,
        gradients,
        [1.0, 1.0],
        adapted=KERNELS,
        decayed=KERNELS,
    )
    optimizer = LARS(1.0, jit_compile=jit_compile)
    optimizer.build(variables)

    # Without the first one, the places of the others are not their indices.
    def step(*grads):
        optimizer.apply([None, *grads], variables)

    if in_function:
        step = tf.function(step)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Gradients do not exist")
        for grads in gradients:
            step(*[tf.constant(g, "float32") for g in grads[1:]])
    after = [v.numpy() for v in variables]
    np.testing.assert_array_equal(after[0], before[0])
    assert_close(after[1:], expected[1:], rtol=1e-5)


def test_accumulated_micro_batches_follow_the_schedule_by_updates():
    schedule = WarmupPolynomialDecay(3.0, total_steps=4, warmup_steps=1)
    variables, gradients = variables_and_gradients(steps=8)
    expected, _ = reference(
        [v.numpy() for v in variables],
        [
            [(a + b) / 2 for a, b in zip(*pair, strict=True)]
            for pair in zip(gradients[::2], gradients[1::2], strict=True)
        ],
        [float(schedule(update)) for update in range(4)],
        adapted=KERNELS,
        decayed=KERNELS,
    )
    optimizer = LARS(schedule, gradient_accumulation_steps=2)
    apply(optimizer, gradients, variables)
    assert_close([v.numpy() for v in variables], expected, rtol=1e-5)


def test_gradients_are_clipped_before_the_ratio():
    # Clipped to norm 1: r = 0.1 * 5 / 1.
    optimizer = LARS(1.0, momentum=0.0, trust_coefficient=0.1, clipnorm=1.0)
    stepped = one_step(optimizer, [[3.0, 4.0]], [[60.0, 80.0]])
    np.testing.assert_allclose(stepped, [[2.7, 3.6]], rtol=1e-5)


@pytest.fixture(scope="module")
def float32_weights():
    return fitted_model(LARS(4.0, weight_decay=1e-3)).get_weights()


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_follows_float32(policy, float32_weights):
    start = small_model().get_weights()
    keras.config.set_dtype_policy(policy)
    try:
        mixed = fitted_model(LARS(4.0, weight_decay=1e-3)).get_weights()
    finally:
        keras.config.set_dtype_policy("float32")
    for kernel in (0, 6):
        a, b = mixed[kernel], float32_weights[kernel]
        assert a.dtype == "float32"
        moved = np.linalg.norm(b - start[kernel])
        assert np.linalg.norm(a - b) < 0.2 * moved


def test_frozen_layer_stays():
    model = small_model()
    model.layers[0].trainable = False
    frozen = model.layers[0].get_weights()
    trained = model.layers[-1].get_weights()
    model.compile(LARS(4.0), "mse")
    x = np.random.default_rng(0).normal(size=(32, 8))
    model.fit(x, x[:, :3], verbose=0)
    for a, b in zip(model.layers[0].get_weights(), frozen, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (model.layers[-1].get_weights()[0] != trained[0]).any()


@pytest.mark.parametrize("jit_compile", [True, False])
def test_ratio_of_variables_of_any_shape(jit_compile):
    shapes = [(), (7, 11), (48, 5), (64, 64), (4096, 4096), (0,), (2, 0)]
    rng = np.random.default_rng(0)
    weights, gradients = (
        [100 * rng.standard_normal(s, "float32") for s in shapes]
        for _ in range(2)
    )
    expected = [
        np.linalg.norm(w.astype("float64"))
        / np.linalg.norm(g.astype("float64"))
        for w, g in zip(weights[:5], gradients[:5], strict=True)
    ]
    optimizer = LARS(
        trust_coefficient=1.0,
        unadapted_scale=0.5,
        exclude_from_layer_adaptation=[],
        jit_compile=jit_compile,
    )
    variables = [keras.Variable(w, name="kernel") for w in weights]
    apply(optimizer, [gradients], variables)
    ratios = list(optimizer.trust_ratios().values())
    np.testing.assert_allclose(ratios, [*expected, 0.5, 0.5], rtol=1e-5)


@pytest.mark.parametrize("jit_compile", [True, False])
@pytest.mark.parametrize("kind", ["lars", "trust_ratio"])
@pytest.mark.parametrize("shape", [(3, 2), (1, 3), (), (2, 3, 1)])
def test_gradient_of_another_shape_is_refused(shape, kind, jit_compile):
    """Otherwise it might be broadcast."""
    optimizer = made(kind, jit_compile)
    variables = [keras.Variable(np.ones((2, 3))) for _ in range(2)]
    with pytest.raises(ValueError, match=r"the shape of the variable, \(2, 3"):
        optimizer.apply([tf.ones(shape), tf.ones((2, 3))], variables)

    @tf.function(input_signature=[tf.TensorSpec(None)])
    def of_unknown_shape(gradient):
        optimizer.apply([gradient, tf.ones((2, 3))], variables)

    with pytest.raises(tf.errors.InvalidArgumentError, match="shape"):
        of_unknown_shape(tf.ones(shape))
    assert all((v.numpy() == 1).all() for v in variables)
    of_unknown_shape(tf.ones((2, 3)))
    assert all((v.numpy() != 1).all() for v in variables)


@pytest.mark.parametrize("kind", ["lars", "trust_ratio"])
def test_missing_gradient(kind):
    """None leaves a variable as it is. A list that is too short is refused."""
    optimizer = made(kind)
    variables = [keras.Variable(np.ones((2, 3))) for _ in range(2)]
    with pytest.raises(ValueError, match="1 gradients for 2 variables"):
        optimizer.apply([tf.ones((2, 3))], variables)
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        optimizer.apply([None, tf.ones((2, 3))], variables)
    assert (variables[0].numpy() == 1).all()
    assert (variables[1].numpy() != 1).all()


@pytest.mark.parametrize("kind", ["lars", "trust_ratio"])
def test_exclusions_may_be_set_before_the_first_step(kind):
    optimizer = made(kind)
    optimizer.exclude_from_weight_decay = ["kernel"]
    assert optimizer.get_config()["exclude_from_weight_decay"] == ["kernel"]
    # Zero gradients leave only the decay.
    [kernel] = variables = [keras.Variable(np.ones((2, 3)), name="kernel")]
    optimizer.apply([tf.zeros((2, 3))], variables)
    assert (kernel.numpy() == 1).all()


def made(kind, jit_compile=True):
    if kind == "lars":
        return LARS(0.1, weight_decay=0.1, jit_compile=jit_compile)
    inner = keras.optimizers.SGD(0.1)
    return TrustRatio(inner, weight_decay=0.1, jit_compile=jit_compile)


def step_of(optimizer, variables):
    return lambda *grads: optimizer.apply(grads, variables)


@pytest.mark.parametrize("jit_compile", [True, False])
@pytest.mark.parametrize("in_function", [True, False])
@pytest.mark.parametrize("built", [True, False])
def test_variables_of_tensorflow(built, in_function, jit_compile):
    """They may be mixed with Keras's, as for `keras.optimizers.SGD`."""
    keras_variables, gradients = variables_and_gradients(steps=2)
    mixed = [
        tf.Variable(v.numpy(), name=v.path.replace("/", "_")) if i else v
        for i, v in enumerate(variables_and_gradients(steps=0)[0])
    ]
    for variables in (keras_variables, mixed):
        arguments = dict(
            weight_decay=0.1,
            exclude_from_layer_adaptation=["bias"],
            jit_compile=jit_compile,
        )
        optimizer = LARS(1.0, **arguments)
        if built or in_function:
            optimizer.build(variables)
        step = step_of(optimizer, variables)
        if in_function:
            step = tf.function(step)
        for grads in gradients:
            step(*[tf.constant(g, "float32") for g in grads])
    assert list(optimizer.trust_ratios()) == [
        keras_variables[0].path,
        "conv_bias",
        "dense_kernel",
    ]
    assert_close(
        [v.numpy() for v in mixed], [v.numpy() for v in keras_variables], 1e-6
    )


@pytest.mark.parametrize("jit_compile", [True, False])
@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
def test_ratio_of_complex_variables(dtype, jit_compile):
    rng = np.random.default_rng(0)
    w, g = (
        (rng.normal(size=(3, 4)) + 1j * rng.normal(size=(3, 4))).astype(dtype)
        for _ in range(2)
    )
    variable = tf.Variable(w, name="kernel")
    optimizer = LARS(0.5, weight_decay=0.1, jit_compile=jit_compile)
    optimizer.apply([tf.constant(g)], [variable])
    ratio = 0.001 * np.linalg.norm(w)
    ratio /= np.linalg.norm(g) + 0.1 * np.linalg.norm(w)
    np.testing.assert_allclose(
        optimizer.trust_ratios()["kernel"], ratio, rtol=1e-5
    )
    expected = w - 0.5 * ratio * (g + 0.1 * w)
    np.testing.assert_allclose(variable.numpy(), expected, rtol=1e-5)


def test_trust_ratios_before_build():
    with pytest.raises(ValueError, match="build"):
        LARS().trust_ratios()


def test_trust_ratio_variables_are_those_of_adapted_variables():
    variables, gradients = variables_and_gradients(steps=2)
    optimizer = LARS()
    apply(optimizer, gradients, variables)
    ratios = optimizer.trust_ratios()
    assert ratios["conv/bias"] == 1.0
    assert {
        path: float(variable.numpy())
        for path, variable in optimizer.trust_ratio_variables().items()
    } == {path: ratios[path] for path in ("conv/kernel", "dense/kernel")}
