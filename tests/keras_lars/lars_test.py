"""LARS on TensorFlow: how it is called, saved, compiled and refused."""

import gc
import json
import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.src import testing

import keras_lars.lars
from keras_lars import LARS
from keras_lars.schedules import WarmupPolynomialDecay
from tests.keras_lars.reference import reference
from tests.keras_lars.reference import variables_and_gradients

KERNELS = [True, False, True]  # Which of the variables of `SHAPES` are kernels.


def one_step(optimizer, value, gradient):
    variable = keras.Variable(value, name="kernel")
    optimizer.apply([tf.constant(gradient, "float32")], [variable])
    return variable.numpy()


def apply(optimizer, gradients, variables, dtype="float32"):
    """Makes one update per list of gradients."""
    for grads in gradients:
        optimizer.apply([tf.constant(g, dtype) for g in grads], variables)


def assert_close(values, expected, rtol, atol=0.0):
    for value, wanted in zip(values, expected, strict=True):
        np.testing.assert_allclose(value, wanted, rtol, atol)


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


def small_model():
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(16, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(3),
        ]
    )


def fitted_model(optimizer, jit_compile=False, run_eagerly=False):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(96, 8)).astype("float32")
    y = np.argmax(x[:, :3], axis=1)
    model = small_model()
    model.compile(
        optimizer,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=jit_compile,
        run_eagerly=run_eagerly,
    )
    model.fit(x, y, batch_size=32, epochs=4, shuffle=False, verbose=0)
    return model


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
    # One rule for the kernels, one for the others.
    assert len(traced) == len(set(traced)) == 2


def test_equal_optimizers_share_a_program(traced):
    """TensorFlow keeps each program, also those of optimizers thrown away."""
    for _ in range(3):
        start, [gradients] = variables_and_gradients(steps=1)
        apply(LARS(2.0), [gradients], start)
    assert len(traced) == 2
    apply(LARS(3.0), [gradients], start)
    assert len(traced) == 2
    apply(LARS(2.0, momentum=0.5), [gradients], start)
    assert len(traced) == 4


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


MIRRORED = """
import numpy as np, tensorflow as tf, keras
import keras_lars.lars
from keras_lars import LARS

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
        LARS(4.0, weight_decay=1e-3),
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
def test_mirrored_strategy_equals_one_device():
    # A new process, because TensorFlow sets up its devices once.
    result = subprocess.run(
        [sys.executable, "-c", MIRRORED],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.stdout.splitlines()[-1:] == ["equal"], result.stderr


def test_config_round_trip_of_every_argument():
    arguments = dict(
        learning_rate=0.25,
        momentum=0.8,
        nesterov=True,
        weight_decay=0.01,
        trust_coefficient=0.02,
        epsilon=1e-6,
        trust_ratio_norm="joint",
        momentum_style="pytorch",
        trust_clip=True,
        unadapted_scale=0.3,
        exclude_from_layer_adaptation=["bias"],
        exclude_from_weight_decay=[],
        jit_compile=False,
        name="mine",
        clipnorm=1.0,
        use_ema=True,
    )
    config = json.loads(json.dumps(LARS(**arguments).get_config()))
    again = LARS.from_config(config).get_config()
    assert {key: again[key] for key in arguments} == arguments


def test_keras_own_serialization_test():
    optimizer = LARS(
        WarmupPolynomialDecay(3.0, total_steps=9), exclude_from_weight_decay=[]
    )
    testing.TestCase().run_class_serialization_test(optimizer)


RESUME = """
import sys, keras, numpy as np, keras_lars

model = keras.saving.load_model(sys.argv[1])
data = np.load(sys.argv[2])
model.fit(data["x"], data["y"], batch_size=32, shuffle=False, verbose=0)
np.savez(sys.argv[3], *model.get_weights())
"""


def more_data():
    x = np.random.default_rng(1).normal(size=(96, 8)).astype("float32")
    return x, np.argmax(x[:, 3:6], axis=1)


def test_other_process_resumes_a_saved_model(tmp_path):
    schedule = WarmupPolynomialDecay(4.0, total_steps=24, warmup_steps=3)
    model = fitted_model(LARS(schedule, weight_decay=1e-3))
    model.save(tmp_path / "model.keras")
    x, y = more_data()
    np.savez(tmp_path / "data.npz", x=x, y=y)
    files = [tmp_path / f for f in ("model.keras", "data.npz", "after.npz")]
    subprocess.run(
        [sys.executable, "-c", RESUME, *files], check=True, timeout=300
    )
    model.fit(x, y, batch_size=32, shuffle=False, verbose=0)
    after = np.load(tmp_path / "after.npz")
    for i, a in enumerate(model.get_weights()):
        np.testing.assert_array_equal(a, after[f"arr_{i}"])


def test_weights_only_checkpoint_resumes_bit_for_bit(tmp_path):
    """Keras's .weights.h5 files hold the optimizer's state too."""
    model = fitted_model(LARS(4.0, weight_decay=1e-3))
    model.save_weights(tmp_path / "model.weights.h5")
    loaded = small_model()
    loaded.compile(LARS(4.0, weight_decay=1e-3), model.loss)
    loaded.optimizer.build(loaded.trainable_variables)
    loaded.load_weights(tmp_path / "model.weights.h5")
    x, y = more_data()
    for m in (model, loaded):
        m.fit(x, y, batch_size=32, shuffle=False, verbose=0)
    for a, b in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


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
def test_gradient_of_another_shape_is_refused(jit_compile):
    """Small variables become a vector, which would hide a wrong shape."""
    optimizer = LARS(0.1, jit_compile=jit_compile)
    variables = [keras.Variable(np.ones((2, 3))) for _ in range(2)]
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError)):
        optimizer.apply([tf.ones((3, 2)), tf.ones((2, 3))], variables)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("learning_rate", v) for v in (-1.0, float("nan"), "fast", True)],
        *[("momentum", v) for v in (-0.1, 1.0, None)],
        *[("weight_decay", v) for v in (-1e-4, float("inf"))],
        *[("trust_coefficient", v) for v in (0.0, -1)],
        *[("epsilon", v) for v in (-1e-8, "0")],
        *[("unadapted_scale", v) for v in (-1, True)],
        *[("clipnorm", -1.0), ("clipvalue", 0), ("global_clipnorm", "1")],
        ("loss_scale_factor", -1.0),
        *[("gradient_accumulation_steps", v) for v in (0, 1, 2.5, True)],
        *[("nesterov", 1), ("trust_clip", None), ("jit_compile", "auto")],
        *[("momentum_style", "tensorflow"), ("trust_ratio_norm", "max")],
        *[("exclude_from_layer_adaptation", v) for v in ("bias", [1])],
        ("exclude_from_weight_decay", ["(unclosed"]),
    ],
)
def test_bad_argument_is_named(name, value):
    # Keras's own message about a rate says "Received instead:".
    rule = rf"`{name}` (must|should) .*Received( instead)?: "
    with pytest.raises(ValueError, match=rule):
        LARS(**{name: value})


def test_contradictions_are_named():
    with pytest.raises(ValueError, match="trust_ratio_norm"):
        LARS(momentum_style="popular", trust_ratio_norm="separate")
    with pytest.raises(ValueError, match="momentum"):
        LARS(nesterov=True, momentum=0.0)


def test_pattern_without_a_match_is_an_error():
    variables, _ = variables_and_gradients(steps=0)
    optimizer = LARS(exclude_from_layer_adaptation=["dense/kernal"])
    with pytest.raises(ValueError, match=r"dense/kernel.*'dense/kernal'"):
        optimizer.build(variables)


@pytest.mark.parametrize("loaded", [False, True])
def test_pattern_may_match_frozen_variables_alone(loaded, tmp_path):
    """One pair of lists serves both phases of fine-tuning."""
    patterns = {
        "exclude_from_layer_adaptation": ["bias", "only_frozen"],
        "exclude_from_weight_decay": ["only_frozen"],
    }
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(2, name="only_frozen", trainable=False),
            keras.layers.Dense(2),
        ]
    )
    x, y = np.ones((4, 3)), np.ones((4, 2))
    model.compile(LARS(1.0, **patterns), "mse")
    model.fit(x, y, verbose=0)
    if loaded:
        model.save(tmp_path / "model.keras")
        model = keras.saving.load_model(tmp_path / "model.keras")
        model.fit(x, y, verbose=0)
    model.layers[0].trainable = True
    model.compile(LARS(1.0, **patterns), "mse")
    model.fit(x, y, verbose=0)
    ratios = model.optimizer.trust_ratios()
    assert ratios[model.layers[0].kernel.path] == 1.0


def test_loading_does_not_check_patterns():
    """A process may load an optimizer without the frozen layers."""
    variables, gradients = variables_and_gradients(steps=1)
    config = LARS(exclude_from_weight_decay=["gone"]).get_config()
    apply(LARS.from_config(config), gradients, variables)
    with pytest.raises(ValueError, match=r"frozen.*'gone'"):
        apply(LARS(exclude_from_weight_decay=["gone"]), gradients, variables)


def test_numbers_of_numpy_and_tensors_become_python_numbers():
    optimizer = LARS(
        np.float32(0.5),
        momentum=np.float64(0.5),
        weight_decay=np.float32(0.25),
        trust_coefficient=tf.constant(0.5),
        epsilon=np.int64(0),
        unadapted_scale=np.array(0.5),
        clipnorm=np.float32(2.0),
    )
    config = json.loads(json.dumps(optimizer.get_config()))
    assert config["weight_decay"] == 0.25
    assert config["learning_rate"] == config["trust_coefficient"] == 0.5


def test_no_weight_decay_may_be_none():
    optimizer = LARS(1.0, weight_decay=None)
    assert optimizer.weight_decay == 0.0
    optimizer.weight_decay = None
    one_step(optimizer, [[3.0, 4.0]], [[6.0, 8.0]])


@pytest.mark.parametrize("jit_compile", [True, False])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("momentum", 0.5),
        ("nesterov", True),
        ("weight_decay", 0.5),
        ("trust_coefficient", 0.1),
        ("epsilon", 1.0),
        ("trust_ratio_norm", "joint"),
        ("momentum_style", "pytorch"),
        ("trust_clip", True),
        ("unadapted_scale", 0.1),
        ("learning_rate", 0.5),
    ],
)
def test_argument_that_is_set_later_acts_from_the_next_step(
    name, value, jit_compile
):
    arguments = {"weight_decay": 0.1, "jit_compile": jit_compile}
    variables, gradients = variables_and_gradients(steps=3)
    optimizer = LARS(2.0, **arguments)
    apply(optimizer, gradients[:1], variables)
    setattr(optimizer, name, value)
    middle = [v.numpy() for v in variables]
    state = [v.numpy() for v in optimizer.variables]

    other_variables, _ = variables_and_gradients(steps=0)
    other = LARS(**{"learning_rate": 2.0, **arguments, name: value})
    other.build(other_variables)
    for variable, start in zip(other_variables, middle, strict=True):
        variable.assign(start)
    for variable, start in zip(other.variables, state, strict=True):
        variable.assign(start)
    other.learning_rate = 0.5 if name == "learning_rate" else 2.0

    plain_variables, _ = variables_and_gradients(steps=0)
    plain = LARS(2.0, **arguments)
    for used, theirs in (
        (optimizer, variables),
        (other, other_variables),
    ):
        apply(used, gradients[1:], theirs)
    apply(plain, gradients, plain_variables)
    assert_close(
        [v.numpy() for v in variables],
        [v.numpy() for v in other_variables],
        rtol=1e-6,
    )
    assert any(
        np.abs(a.numpy() - b.numpy()).max() > 1e-6
        for a, b in zip(variables, plain_variables, strict=True)
    )


@pytest.mark.slow
def test_argument_that_is_set_later_acts_after_compiling_again():
    x, y = np.ones((8, 8)), np.zeros((8, 3))
    results = []
    for early in (True, False):
        model = small_model()
        optimizer = LARS(1.0, momentum=0.0 if early else 0.9)
        model.compile(optimizer, "mse")
        model.fit(x, y, epochs=1, verbose=0)
        optimizer.momentum = 0.5
        model.compile(optimizer, "mse")
        model.fit(x, y, epochs=3, verbose=0)
        results.append(model.get_weights())
    # Momentum does not act in the first step.
    assert_close(*results, rtol=1e-6, atol=1e-7)


def test_bad_value_that_is_set_later_is_named():
    optimizer = LARS()
    with pytest.raises(ValueError, match=r"`momentum` must.*momentum=1\.5"):
        optimizer.momentum = 1.5
    assert optimizer.momentum == 0.9
    variables, gradients = variables_and_gradients(steps=1)
    apply(optimizer, gradients, variables)
    for name in (
        "exclude_from_layer_adaptation",
        "exclude_from_weight_decay",
    ):
        with pytest.raises(ValueError, match=f"`{name}` cannot change"):
            setattr(optimizer, name, [])
    optimizer.momentum = 0.0
    optimizer.nesterov = True
    with pytest.raises(ValueError, match="`momentum` must be above 0"):
        apply(optimizer, gradients, variables)


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


def test_horovods_own_keras_binding_is_refused():
    stock = pytest.importorskip("horovod.tensorflow.keras")
    with pytest.raises(ValueError, match=r"import horovod_recipes\.keras"):
        stock.DistributedOptimizer(LARS())


def test_integer_learning_rate_is_accepted():
    assert float(LARS(learning_rate=2).learning_rate) == 2.0


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
