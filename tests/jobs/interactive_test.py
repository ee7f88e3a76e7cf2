"""horovod.run, from a script and from a notebook.

The example of docs/horovod.md is the job. Each test has a time limit.
"""

import json
import os
import pathlib
import re
import subprocess
import sys

import nbformat
import numpy as np
import psutil

from tests.jobs.launcher import ROOT
from tests.jobs.launcher import limited

JUPYTER_EXECUTE = str(pathlib.Path(sys.executable).with_name("jupyter-execute"))
# Writes what the ranks returned, and then what one process returns.
REPORT = """\
import json
results += [train(0.1)]
with open("results.json", "w") as file:
    json.dump([(n, [w.tolist() for w in ws]) for n, ws in results], file)
"""
# Starts the job before and after `hvd.init` in this process.
CAPTURED_MODEL = """\
import horovod
import keras
import numpy as np
import horovod_recipes.keras as hvd
from keras_lars import LARS

model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
model.compile(hvd.DistributedOptimizer(LARS(0.1)), "mse")
x = np.random.default_rng(0).normal(size=(64, 3))
first = hvd.callbacks.BroadcastGlobalVariablesCallback(0)

def train(_):
    hvd.init()
    mine = x[hvd.rank() :: hvd.size()]
    # So that the ranks start from different weights.
    if hvd.rank() == 1:
        model.set_weights([2 * w for w in model.get_weights()])
    batch = 64 // hvd.size()
    model.fit(mine, mine[:, :2], batch, 5, verbose=0, callbacks=[first])
    return hvd.size(), model.get_weights()

if __name__ == "__main__":
    start = model.get_weights()
    results = horovod.run(train, (0,), num_proc=2, use_gloo=True)
    hvd.init()
    results += horovod.run(train, (0,), num_proc=2, use_gloo=True)
    for a, b in zip(start, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
"""
LAYER = """\
import horovod
import keras
import numpy as np

class Double(keras.layers.Layer):
    def call(self, inputs):
        return 2 * inputs
"""
BUILT_INSIDE = """\
def predict():
    inside = keras.Sequential([keras.Input((1,)), Double()])
    return float(inside(np.ones((1, 1)))[0, 0])

horovod.run(predict, num_proc=2, use_gloo=True)
"""
CAPTURED = """\
outside = keras.Sequential([keras.Input((1,)), Double()])
horovod.run(lambda: outside.summary(), num_proc=2, use_gloo=True)
"""
# `os.kill` does what the button of the notebook does.
INTERRUPTED = """\
import os, pathlib, signal, threading, time

def wait():
    rank = os.environ["HOROVOD_RANK"]
    pathlib.Path(f"starting{rank}").write_text(str(os.getpid()))
    os.rename(f"starting{rank}", f"started{rank}")
    time.sleep(1000)

def interrupt():
    while len(list(pathlib.Path().glob("started?"))) < 2:
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt).start()
horovod.run(wait, num_proc=2, use_gloo=True)
"""


def example():
    """Returns the script of docs/horovod.md."""
    page = (ROOT / "docs/horovod.md").read_text()
    section = page.partition("## Notebooks and horovod.run\n")[2]
    return re.search(r"```python\n(.*?)```", section, re.S)[1]


def indented(code):
    return re.sub("^", "    ", code, flags=re.M)


def start(folder, *command, seconds=300):
    """Runs a command in a folder; returns its result."""
    return subprocess.run(
        limited(command, seconds),
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def run_script(folder, code):
    (folder / "script.py").write_text(code)
    return start(folder, sys.executable, "script.py")


def run_notebook(folder, *cells):
    """Runs cells in a kernel.

    Returns:
        For each cell its standard output, its standard error, its last value or
        `""`, and its error or `""`.
    """
    path = folder / "notebook.ipynb"
    cells = [nbformat.v4.new_code_cell(cell) for cell in cells]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    result = start(
        *(folder, JUPYTER_EXECUTE, "--inplace", "--allow-errors", path.name)
    )
    assert result.returncode == 0, result.stderr
    return [texts_of(cell) for cell in nbformat.read(path, as_version=4).cells]


def texts_of(cell):
    texts = {"stdout": "", "stderr": "", "value": "", "error": ""}
    for output in cell.outputs:
        if output.output_type == "stream":
            texts[output.name] += output.text
        elif output.output_type == "error":
            texts["error"] += f"{output.ename}: {output.evalue}"
        else:
            texts["value"] += output.data["text/plain"]
    return tuple(texts.values())


def check_results(folder, ranks):
    """Checks the ranks' weights against those of one process."""
    *results, (size, expected) = json.loads(
        (folder / "results.json").read_text()
    )
    assert size == 1
    assert [size for size, _ in results] == [2] * ranks
    # Rounding differs between two jobs, which shuffle differently.
    for (_, first), (_, second) in zip(
        results[::2], results[1::2], strict=True
    ):
        for a, b, one in zip(first, second, expected, strict=True):
            np.testing.assert_array_equal(a, b)
            np.testing.assert_allclose(a, one, rtol=1e-5, atol=1e-6)


def check_output(stdout):
    """Checks that the progress bar of rank 0 has come, and no other."""
    assert "[0]<stdout>:Epoch 5/5\n" in stdout
    assert "[1]" not in stdout


def test_script(tmp_path):
    result = run_script(tmp_path, example() + indented(REPORT))
    assert result.returncode == 0, result.stderr
    check_output(result.stdout)
    check_results(tmp_path, ranks=2)


def test_captured_model(tmp_path):
    """A compiled model averages in the ranks, and stays as it was here."""
    result = run_script(tmp_path, CAPTURED_MODEL + indented(REPORT))
    assert result.returncode == 0, result.stderr
    check_results(tmp_path, ranks=4)


def test_notebook(tmp_path):
    job, report = run_notebook(tmp_path, example(), REPORT)
    stdout, _, _, error = job
    assert not error
    check_output(stdout)
    assert not report[-1]
    check_results(tmp_path, ranks=2)


def test_what_fails_in_a_notebook(tmp_path):
    _, inside, captured, interrupted = run_notebook(
        tmp_path, LAYER, BUILT_INSIDE, CAPTURED, INTERRUPTED
    )
    # Functions carry the notebook's classes to the ranks, but models do not.
    assert inside[2:] == ("[2.0, 2.0]", "")
    _, stderr, _, error = captured
    assert error.startswith("RuntimeError: Horovod detected that one or more")
    assert "[0]<stderr>:" in stderr
    assert "Could not locate class 'Double'" in stderr
    _, _, _, error = interrupted
    assert error.startswith("RuntimeError: Horovod detected that one or more")
    # A kernel loses some lines that threads print, so the processes tell.
    for rank in (0, 1):
        assert not psutil.pid_exists(
            int((tmp_path / f"started{rank}").read_text())
        )
