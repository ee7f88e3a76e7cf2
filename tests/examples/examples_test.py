"""Each example runs as its docstring says, and learns to read digits."""

import json
import os
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow_datasets as tfds

import horovod_recipes.data.datasets  # noqa: F401  registers mnist5k
import keras_lars  # noqa: F401  to load its optimizer
from tests.jobs.launcher import HOROVODRUN
from tests.jobs.launcher import ROOT
from tests.jobs.launcher import TWO_RANKS
from tests.jobs.launcher import limited
from tests.jobs.launcher import python

EXAMPLES = ROOT / "examples"
MAX_LINES = 60


def run_example(folder, name, launcher):
    """Runs an example in a folder; returns the lines of its first rank."""
    path = str(EXAMPLES / f"{name}.py")
    if launcher:
        command = (*launcher, *python("tests.examples.compared", path))
    else:
        command = (sys.executable, path)
    result = subprocess.run(
        limited(command, 300),
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert not [line for line in lines if line.startswith("[1]")]
    lines = [line.removeprefix("[0]<stdout>:") for line in lines]
    if launcher:
        compared = json.loads(lines.pop())
        assert compared == {"ranks": 2, "different_weights": 1}
    return lines


def check_accuracy(lines, path, lowest):
    """Checks the last line of an example against the model that it saved."""
    accuracy = float(re.search(r"test accuracy: ([\d.]+)$", lines[-1])[1])
    images, labels = tfds.as_numpy(
        tfds.load("mnist5k", split="test", batch_size=-1, as_supervised=True)
    )
    model = keras.saving.load_model(path)
    predicted = model.predict(images, verbose=0).argmax(axis=1)
    assert np.mean(predicted == labels) == pytest.approx(accuracy)
    assert accuracy >= lowest


@pytest.mark.parametrize(
    ("name", "launcher", "lowest"),
    [
        ("lars", (), 0.9),
        ("horovod_fit", TWO_RANKS, 0.9),
        ("horovod_tape", TWO_RANKS, 0.9),
    ],
)
def test_example(tmp_path, name, launcher, lowest):
    lines = run_example(tmp_path, name, launcher)
    check_accuracy(lines, tmp_path / f"{name}.keras", lowest)


def test_elastic(tmp_path):
    discover = tmp_path / "discover.sh"
    discover.write_text("#!/bin/sh\necho localhost:2\n")
    discover.chmod(0o755)
    launcher = (
        *(HOROVODRUN, "-np", "2", "--min-np", "1"),
        *("--host-discovery-script", str(discover)),
        *("--network-interface", "lo"),
    )
    lines = run_example(tmp_path, "elastic", launcher)
    assert [line for line in lines if line == "Epoch 8/8"]
    check_accuracy(lines, tmp_path / "elastic.keras", 0.9)


def test_fine_tuning(tmp_path):
    lines = run_example(tmp_path, "fine_tuning", TWO_RANKS)
    frozen, whole = (float(line.rpartition(" ")[2]) for line in lines)
    assert lines[0].startswith("frozen, test accuracy: ")
    assert frozen < whole
    check_accuracy(lines, tmp_path / "fine_tuning.keras", 0.9)


def test_examples_are_short():
    paths = list(EXAMPLES.glob("*.py"))
    assert len(paths) == 5
    for path in paths:
        assert len(path.read_text().splitlines()) <= MAX_LINES, path
