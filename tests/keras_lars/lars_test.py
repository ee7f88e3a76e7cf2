"""LARS against a float64 reference, and in the ways it is used."""

import itertools
import json
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_lars import LARS
from keras_lars.schedules import WarmupPolynomialDecay

SHAPES = {
    "conv/kernel": (3, 3, 2, 4),
    "conv/bias": (4,),
    "dense/kernel": (4, 5),
}


def variables_and_gradients(steps, seed=0, dtype="float32"):
    rng = np.random.default_rng(seed)
    variables = []
    for path, shape in SHAPES.items():
        layer, name = path.split("/")
        with keras.name_scope(layer):
            value = rng.normal(size=shape)
            variables.append(keras.Variable(value, dtype=dtype, name=name))
    gradients = [
        [rng.normal(size=shape) * 0.1 for shape in SHAPES.values()]
        for _ in range(steps)
    ]
    return variables, gradients


def reference(
    weights,
    gradients,
    learning_rates,
    momentum=0.9,
    nesterov=False,
    weight_decay=0.0,
    trust_coefficient=0.001,
    epsilon=0.0,
    trust_ratio_norm=None,
    momentum_style="paper",
    trust_clip=False,
    unadapted_scale=1.0,
    adapted=None,
    decayed=None,
):
    """Steps through the formulas in float64, from one variable to the next."""
    joint = trust_ratio_norm == "joint"
    weights = [w.astype("float64") for w in weights]
    velocities = [np.zeros_like(w) for w in weights]
    ratios = [1.0] * len(weights)
    for grads, lr in zip(gradients, learning_rates, strict=True):
        for i, g in enumerate(grads):
            w, v = weights[i], velocities[i]
            beta = weight_decay if decayed[i] else 0.0
            d = g + beta * w
            if momentum_style == "popular":
                v = momentum * v + d
                u = momentum * v + d if nesterov else v
                parts = [np.linalg.norm(u)]
            elif joint:
                parts = [np.linalg.norm(d)]
            else:
                parts = [np.linalg.norm(g), beta * np.linalg.norm(w)]
            r = unadapted_scale
            if adapted[i] and np.linalg.norm(w) > 0 and parts[0] > 0:
                r = trust_coefficient * np.linalg.norm(w)
                r /= sum(parts) + epsilon
                if trust_clip:
                    r = min(r / lr, 1.0) if lr > 0 else 1.0
            if momentum_style == "popular":
                w = w - lr * r * u
            elif momentum_style == "paper":
                v = momentum * v + lr * r * d
                w = w - (momentum * v + lr * r * d if nesterov else v)
            else:
                v = momentum * v + r * d
                w = w - lr * (momentum * v + r * d if nesterov else v)
            weights[i], velocities[i], ratios[i] = w, v, r
    return weights, ratios


@pytest.mark.parametrize("jit_compile", [True, False])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("trust_clip", [True, False])
@pytest.mark.parametrize(
    ("momentum_style", "trust_ratio_norm"),
    [
        ("paper", None),
        ("paper", "joint"),
        ("pytorch", "separate"),
        ("pytorch", "joint"),
        ("popular", None),
    ],
)
def test_follows_reference(
    momentum_style, trust_ratio_norm, trust_clip, nesterov, jit_compile
):
    variables, gradients = variables_and_gradients(steps=12)
    arguments = dict(
        momentum_style=momentum_style,
        trust_ratio_norm=trust_ratio_norm,
        trust_clip=trust_clip,
        nesterov=nesterov,
        weight_decay=0.02,
        trust_coefficient=0.01,
        epsilon=1e-3,
        unadapted_scale=0.05,
    )
    schedule = WarmupPolynomialDecay(3.0, total_steps=12, warmup_steps=4)
    optimizer = LARS(schedule, jit_compile=jit_compile, **arguments)
    expected, ratios = reference(
        [v.numpy() for v in variables],
        gradients,
        [float(schedule(step)) for step in range(12)],
        adapted=[True, False, True],
        decayed=[True, False, True],
        **arguments,
    )
    for grads in gradients:
        grads = [tf.constant(g, "float32") for g in grads]
        optimizer.apply_gradients(zip(grads, variables, strict=True))
    for variable, value in zip(variables, expected, strict=True):
        np.testing.assert_allclose(
            variable.numpy(), value, rtol=1e-5, atol=1e-6
        )
    np.testing.assert_allclose(
        list(optimizer.trust_ratios().values()), ratios, rtol=1e-4
    )


def one_step(optimizer, value, gradient):
    variable = keras.Variable(value, name="kernel")
    optimizer.apply([tf.constant(gradient, "float32")], [variable])
    return variable.numpy()


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
    for grads in gradients:
        optimizer.apply([tf.constant(g, "float32") for g in grads], variables)
    for variable, value in zip(variables, expected, strict=True):
        np.testing.assert_allclose(variable.numpy(), value, rtol=1e-5)


def test_keras_method_excludes_from_weight_decay():
    variables, gradients = variables_and_gradients(steps=1)
    expected, _ = reference(
        [v.numpy() for v in variables],
        gradients,
        [1.0],
        weight_decay=0.1,
        adapted=[True, False, True],
        decayed=[False, False, True],
    )
    optimizer = LARS(weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_list=[variables[0]])
    optimizer.apply(
        [tf.constant(g, "float32") for g in gradients[0]], variables
    )
    for variable, value in zip(variables, expected, strict=True):
        np.testing.assert_allclose(variable.numpy(), value, rtol=1e-5)


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


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_dtypes_move_as_float32_does(dtype):
    variables, gradients = variables_and_gradients(steps=5, dtype=dtype)
    before = [v.numpy().astype("float64") for v in variables]
    expected, _ = reference(
        before,
        gradients,
        [30.0] * 5,
        adapted=[True, False, True],
        decayed=[True, False, True],
    )
    optimizer = LARS(30.0)
    for grads in gradients:
        optimizer.apply([tf.constant(g, dtype) for g in grads], variables)
    tolerance = {"float16": 2e-2, "bfloat16": 0.1, "float64": 1e-5}[dtype]
    for variable, value in zip(variables, expected, strict=True):
        np.testing.assert_allclose(
            variable.numpy().astype("float64"),
            value,
            rtol=tolerance,
            atol=tolerance,
        )


def test_half_precision_norms_do_not_overflow():
    # The sum of squares, 1e7, is more than float16 can hold.
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
def test_model_fit_gives_the_same_weights(how, update_compiled):
    def lars(jit_compile):
        schedule = WarmupPolynomialDecay(4.0, total_steps=12, warmup_steps=3)
        return LARS(schedule, weight_decay=1e-3, jit_compile=jit_compile)

    plain = fitted_model(lars(False), run_eagerly=True)
    model = fitted_model(lars(update_compiled), **how)
    for a, b in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_update_is_traced_once():
    optimizer = LARS(1.0)
    variables, gradients = variables_and_gradients(steps=4)
    for step, grads in enumerate(gradients):
        optimizer.learning_rate = 0.1 * (step + 1)
        optimizer.apply([tf.constant(g, "float32") for g in grads], variables)
    assert optimizer._compiled_update.experimental_get_tracing_count() == 1


def test_sparse_gradient_equals_dense():
    def step(gradient):
        table = keras.Variable(np.ones((4, 2), "float32"), name="embeddings")
        LARS(2.0, weight_decay=0.1).apply([gradient], [table])
        return table.numpy()

    rows = tf.constant([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    sparse = tf.IndexedSlices(rows, tf.constant([2, 0, 2]), tf.constant([4, 2]))
    dense = tf.constant([[3.0, 4.0], [0.0, 0.0], [6.0, 8.0], [0.0, 0.0]])
    np.testing.assert_allclose(step(sparse), step(dense), rtol=1e-6)


def test_variable_without_gradient_stays():
    variables, gradients = variables_and_gradients(steps=2)
    before = variables[2].numpy()
    optimizer = LARS(1.0)
    for grads in gradients:
        grads = [tf.constant(g, "float32") for g in grads]
        with pytest.warns(UserWarning, match="Gradients do not exist"):
            optimizer.apply([grads[0], grads[1], None], variables)
    np.testing.assert_array_equal(variables[2].numpy(), before)


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
        adapted=[True, False, True],
        decayed=[True, False, True],
    )
    optimizer = LARS(schedule, gradient_accumulation_steps=2)
    for grads in gradients:
        optimizer.apply([tf.constant(g, "float32") for g in grads], variables)
    for variable, value in zip(variables, expected, strict=True):
        np.testing.assert_allclose(variable.numpy(), value, rtol=1e-5)


def test_gradients_are_clipped_before_the_ratio():
    # Clipped to norm 1: r = 0.1 * 5 / 1.
    optimizer = LARS(1.0, momentum=0.0, trust_coefficient=0.1, clipnorm=1.0)
    stepped = one_step(optimizer, [[3.0, 4.0]], [[60.0, 80.0]])
    np.testing.assert_allclose(stepped, [[2.7, 3.6]], rtol=1e-5)


def stepped(optimizer, in_function, wrap=lambda optimizer: optimizer):
    """Returns the variables after six steps, eager or in a tf.function."""
    variables, gradients = variables_and_gradients(steps=6)
    variables[0].constraint = keras.constraints.NonNeg()
    # A scalar and an empty variable belong to what must not break.
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
        dict(clipvalue=0.1),
        dict(global_clipnorm=0.5),
        dict(use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=3),
        dict(gradient_accumulation_steps=3),
        dict(loss_scale_factor=8.0),
    ],
    ids=lambda arguments: next(iter(arguments), "plain"),
)
@pytest.mark.parametrize("in_function", [True, False])
def test_compiled_update_equals_the_plain_eager_one(arguments, in_function):
    arguments = {"learning_rate": 2.0, "weight_decay": 0.01} | arguments
    plain = stepped(LARS(jit_compile=False, **arguments), in_function=False)
    compiled = stepped(LARS(jit_compile=True, **arguments), in_function)
    start, _ = variables_and_gradients(steps=0)
    assert np.abs(plain[2] - start[2].numpy()).max() > 1e-4
    # The average of the weights includes the first ones, before the constraint.
    assert (plain[0] >= 0).all() or "use_ema" in arguments
    for a, b in zip(compiled, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("in_function", [True, False])
def test_loss_scale_optimizer_around_it(in_function):
    def scaled(optimizer):
        return keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=4.0)

    inside = stepped(LARS(2.0), in_function, wrap=scaled)
    # The same gradients, divided by the scale.
    plain = stepped(LARS(2.0, loss_scale_factor=4.0), in_function=False)
    for a, b in zip(inside, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_follows_float32(policy):
    plain = fitted_model(LARS(0.5, weight_decay=1e-3))
    keras.config.set_dtype_policy(policy)
    try:
        mixed = fitted_model(LARS(0.5, weight_decay=1e-3))
    finally:
        keras.config.set_dtype_policy("float32")
    for a, b in zip(mixed.get_weights(), plain.get_weights(), strict=True):
        assert a.dtype == "float32"
        np.testing.assert_allclose(a, b, atol=0.1)


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


def test_mirrored_strategy_equals_one_device():
    # In a process of its own: devices are set up before TensorFlow starts.
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


def test_saved_model_goes_on_bit_for_bit(tmp_path):
    schedule = WarmupPolynomialDecay(4.0, total_steps=24, warmup_steps=3)
    model = fitted_model(LARS(schedule, weight_decay=1e-3))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    x = np.random.default_rng(1).normal(size=(32, 8)).astype("float32")
    y = np.zeros(32, "int64")
    for m in (model, loaded):
        m.fit(x, y, batch_size=32, epochs=3, shuffle=False, verbose=0)
    for a, b in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("name", "value"),
    list(
        itertools.chain(
            [("learning_rate", v) for v in (-1.0, float("nan"), "fast", True)],
            [("momentum", v) for v in (-0.1, 1.0, None)],
            [("weight_decay", v) for v in (-1e-4, float("inf"))],
            [("trust_coefficient", v) for v in (0.0, -1)],
            [("epsilon", v) for v in (-1e-8, "0")],
            [("unadapted_scale", v) for v in (-1, True)],
            [("nesterov", 1), ("trust_clip", None), ("jit_compile", "auto")],
            [("momentum_style", "tensorflow"), ("trust_ratio_norm", "max")],
            [("exclude_from_layer_adaptation", v) for v in ("bias", [1])],
            [("exclude_from_weight_decay", ["(unclosed"])],
        )
    ),
)
def test_bad_argument_is_named(name, value):
    with pytest.raises(ValueError, match=name):
        LARS(**{name: value})


def test_contradictions_are_named():
    with pytest.raises(ValueError, match="trust_ratio_norm"):
        LARS(momentum_style="popular", trust_ratio_norm="separate")
    with pytest.raises(ValueError, match="momentum"):
        LARS(nesterov=True, momentum=0.0)


def test_pattern_without_a_match_is_an_error():
    variables, _ = variables_and_gradients(steps=0)
    optimizer = LARS(exclude_from_layer_adaptation=["dense/kernal"])
    with pytest.raises(ValueError, match=r"'dense/kernal'.*dense/kernel"):
        optimizer.build(variables)


def test_horovods_own_keras_binding_is_refused():
    stock = pytest.importorskip("horovod.tensorflow.keras")
    with pytest.raises(ValueError, match=r"import horovod_recipes\.keras"):
        stock.DistributedOptimizer(LARS())


def test_integer_learning_rate_is_accepted():
    assert float(LARS(learning_rate=2).learning_rate) == 2.0


def test_trust_ratios_before_build():
    with pytest.raises(ValueError, match="build"):
        LARS().trust_ratios()
