"""Runs the parts that must work in a process that cannot import Horovod."""

import os
import pathlib
import subprocess
import sys

import pytest

CONFIGS = [
    path.stem
    for path in pathlib.Path("horovod_recipes/configs").glob("[!_]*.py")
]
BLOCKED = """
import sys
sys.modules["horovod"] = None
folder = sys.argv[1]  # The plan changes sys.argv.
"""
SCRIPTS = {
    "configs": f"""
import importlib
for name in {CONFIGS}:
    config = importlib.import_module(f"horovod_recipes.configs.{{name}}")
    assert config.get_config().global_batch_size >= 256, name
from horovod_recipes.configs import _config_flag, _check
from horovod_recipes.configs import demo
_check.check_config(demo.get_config())
""",
    "plan": """
from horovod_recipes import plan
status = plan.main(
    ["plan", "--config=resnet50:32k", "--ranks=8", "--hardware=a100"]
)
assert status == 0
status = plan.main(
    ["plan", "--config=simclr:imagenet_4096", "--ranks=8", "--hardware=a100"]
)
assert status == 0
""",
    "data": """
from horovod_recipes.data.__main__ import main
assert main(["mnist5k", f"--data_dir={folder}"]) == 0
from horovod_recipes.data.sources import load_source
source = load_source("mnist5k", folder)
assert source.num_examples("train") == 4000
""",
    "models": """
import numpy as np
from horovod_recipes.models import MODELS
import horovod_recipes.models.losses
network = MODELS["resnet50"]((64, 64, 3), 10, width=4)
assert network(np.zeros((1, 64, 64, 3), "uint8")).shape == (1, 10)
""",
    "keras_lars": """
import keras
import keras_lars
import keras_lars.callbacks
import keras_lars.schedules
optimizer = keras_lars.LARS(keras_lars.schedules.WarmupPolynomialDecay(1.0, 10))
kernel = keras.Variable([[3.0, 4.0]])
optimizer.apply([keras.ops.array([[0.0, 1.0]])], [kernel])
assert kernel.numpy()[0, 1] < 4
""",
    "errors": """
import horovod_recipes.errors
assert "tensorflow" not in sys.modules
assert "keras" not in sys.modules
assert [m for m in sys.modules if m.startswith("horovod_recipes")] == [
    "horovod_recipes", "horovod_recipes.errors"
]
""",
}


# One process for all but the errors, which must import nothing else.
PROCESSES = {
    "errors": SCRIPTS.pop("errors"),
    "others": "\n".join(SCRIPTS.values()),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_works_without_horovod(name, tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", BLOCKED + PROCESSES[name], str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )
    assert result.returncode == 0, result.stderr


def test_the_binding_needs_horovod(tmp_path):
    """Without this failure, the other tests would prove nothing."""
    result = subprocess.run(
        [
            *(sys.executable, "-c"),
            BLOCKED + "import horovod_recipes.keras",
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 1
    assert "ImportError: Horovod is not installed here" in result.stderr
