"""The arguments of LARS: refused, converted, and changed later."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_lars import LARS
from tests.keras_lars.common import apply
from tests.keras_lars.common import assert_close
from tests.keras_lars.common import one_step
from tests.keras_lars.common import small_model
from tests.keras_lars.reference import variables_and_gradients


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


def test_integer_learning_rate_is_accepted():
    assert float(LARS(learning_rate=2).learning_rate) == 2.0


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


def test_horovods_own_keras_binding_is_refused():
    stock = pytest.importorskip("horovod.tensorflow.keras")
    with pytest.raises(ValueError, match=r"import horovod_recipes\.keras"):
        stock.DistributedOptimizer(LARS())
