"""LARS is saved and loaded, with its state."""

import json
import subprocess
import sys

import numpy as np
import pytest
from keras.src import testing

from keras_lars import LARS
from keras_lars.schedules import WarmupPolynomialDecay
from tests.keras_lars.common import apply
from tests.keras_lars.common import fitted_model
from tests.keras_lars.common import small_model
from tests.keras_lars.reference import variables_and_gradients


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
        # Rounding may differ between processes. A lost momentum would change
        # the weights far more.
        np.testing.assert_allclose(a, after[f"arr_{i}"], rtol=0, atol=1e-6)


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


def test_loading_does_not_check_patterns():
    """A process may load an optimizer without the frozen layers."""
    variables, gradients = variables_and_gradients(steps=1)
    config = LARS(exclude_from_weight_decay=["gone"]).get_config()
    apply(LARS.from_config(config), gradients, variables)
    with pytest.raises(ValueError, match=r"frozen.*'gone'"):
        apply(LARS(exclude_from_weight_decay=["gone"]), gradients, variables)
