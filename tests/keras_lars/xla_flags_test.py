"""The update where XLA may write two outputs in one pass."""

import itertools
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_lars import LARS
from keras_lars import _xla_flags
from keras_lars.lars import new_values
from tests.keras_lars.reference import reference

FLAG = f"--xla_backend_extra_options={_xla_flags.OPTION}"
# Too large to be updated together with others.
SHAPES = [(72, 64), (3, 3, 16, 40)]
RATES = [2.0, 1.0, 0.5, 0.1]


def run(code, xla_flags=FLAG):
    """Runs Python code in a process of its own; returns what it prints."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"XLA_FLAGS": xla_flags},
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    ).stdout


def check_against_reference():
    """Updates variables by the program of this process."""
    combinations = itertools.product(
        ("paper", "pytorch"), (0.0, 0.9), (False, True), (0.0, 0.02)
    )
    for style, momentum, nesterov, weight_decay in combinations:
        if nesterov and not momentum:
            continue
        arguments = dict(
            momentum_style=style,
            momentum=momentum,
            nesterov=nesterov,
            weight_decay=weight_decay,
            trust_coefficient=0.01,
        )
        rng = np.random.default_rng(0)
        weights = [rng.normal(size=shape) for shape in SHAPES]
        gradients = [
            [0.1 * rng.normal(size=shape) for shape in SHAPES] for _ in RATES
        ]
        variables = [keras.Variable(w) for w in weights]
        optimizer = LARS(**arguments)
        for rate, grads in zip(RATES, gradients, strict=True):
            optimizer.learning_rate = rate
            optimizer.apply(
                [tf.constant(g, "float32") for g in grads], variables
            )
        expected, ratios = reference(
            [v.astype("float32") for v in weights],
            gradients,
            RATES,
            adapted=[True, True],
            decayed=[True, True],
            **arguments,
        )
        for variable, value in zip(variables, expected, strict=True):
            np.testing.assert_allclose(variable.numpy(), value, 1e-4, 1e-6)
        np.testing.assert_allclose(
            list(optimizer.trust_ratios().values()), ratios, rtol=1e-4
        )


def kernels_with_two_outputs():
    """Counts them in the compiled update of one variable."""
    optimizer = LARS(weight_decay=0.1)
    variable = keras.Variable(np.ones(SHAPES[0]))
    optimizer.build([variable])

    @tf.function(jit_compile=True)
    def update(gradient, variable, velocity):
        return new_values(
            optimizer._rule(0), gradient, variable, velocity, 0.5, apart=True
        )

    tensor = tf.ones(SHAPES[0])
    hlo = update.experimental_get_compiler_ir(tensor, tensor, tensor)(
        stage="optimized_hlo"
    )
    output = f"f32[{','.join(map(str, SHAPES[0]))}]"
    kernels = [line for line in hlo.splitlines() if " fusion(" in line]
    return sum(
        kernel.split(" fusion(")[0].count(output) == 2 for kernel in kernels
    )


def test_update_follows_reference():
    run(
        "from tests.keras_lars import xla_flags_test\n"
        "xla_flags_test.check_against_reference()\n"
    )


@pytest.mark.skipif(
    not _xla_flags._is_known(), reason="this TensorFlow lacks the option"
)
def test_xla_writes_both_outputs_in_one_kernel():
    code = (
        "from tests.keras_lars import xla_flags_test\n"
        "print('kernels:', xla_flags_test.kernels_with_two_outputs())"
    )
    assert run(code).splitlines()[-1] == "kernels: 1"
    assert run(code, xla_flags="").splitlines()[-1] == "kernels: 0"


def test_flag_is_added_to_those_of_the_user(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/tmp/dump")
    monkeypatch.setattr(_xla_flags, "_is_known", lambda: True)
    _xla_flags.allow_two_outputs()
    assert os.environ["XLA_FLAGS"] == f"--xla_dump_to=/tmp/dump {FLAG}"
    # XLA would take only one list of options.
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_extra_options=other")
    _xla_flags.allow_two_outputs()
    assert os.environ["XLA_FLAGS"] == "--xla_backend_extra_options=other"


def test_older_tensorflow_updates_without_it_and_says_so():
    printed = run(
        "import tensorflow as tf\n"
        "tf.__version__ = '2.20.0'\n"
        "from keras_lars import _xla_flags\n"
        "print(_xla_flags.writes_two_outputs())\n"
        "print(_xla_flags.writes_two_outputs())\n"
    )
    assert printed.splitlines()[-3:] == [
        f"XLA_FLAGS has {_xla_flags.OPTION}, which needs TensorFlow 2.21. "
        "LARS updates without it.",
        "False",
        "False",
    ]
