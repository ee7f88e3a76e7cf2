"""What commands print in a fresh process, with TensorFlow's default log level.

TensorFlow would print a banner when it is imported.
"""

import os
import pathlib
import subprocess
import sys

import pytest

from horovod_recipes import install_horovod

ROOT = pathlib.Path(__file__).parents[2]
HOROVODRUN = str(pathlib.Path(sys.executable).with_name("horovodrun"))
TINY_JOB = (
    "--config=demo",
    "--config.epochs=1",
    "--config.schedule.warmup_epochs=0",
    "--config.model.filters=2",
)


def run(*command):
    """Runs a command; returns its stdout, and requires an empty stderr."""
    environment = dict(os.environ)
    environment.pop("TF_CPP_MIN_LOG_LEVEL", None)
    result = subprocess.run(
        command,
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.stderr == ""
    assert result.returncode == 0, result.stdout
    return result.stdout


def run_module(name, *arguments):
    return run(sys.executable, "-m", name, *arguments)


@pytest.mark.slow
def test_train(tmp_path):
    printed = run_module(
        "horovod_recipes.train", *TINY_JOB, f"--workdir={tmp_path}"
    )
    first, *progress, last = printed.splitlines()
    assert first.startswith("config=demo ranks=1 ")
    assert "1/3" in "".join(progress)
    assert last.startswith('{"config": "demo"')


@pytest.mark.slow
def test_plan():
    printed = run_module(
        *("horovod_recipes.plan", "--config=demo"),
        *("--ranks=2", "--hardware=cpu"),
    )
    assert printed.startswith("demo on 2 ranks of cpu in float32\n")


@pytest.mark.slow
def test_data(tmp_path):
    printed = run_module(
        "horovod_recipes.data", "mnist5k", f"--data_dir={tmp_path}"
    )
    folder = tmp_path / "mnist5k" / "1.0.0"
    downloading, downloaded, done = printed.splitlines()
    assert downloading.startswith("Downloading and preparing dataset ")
    assert downloaded.startswith("Dataset mnist5k downloaded and prepared ")
    assert done == f"mnist5k/1.0.0 is in {folder}"


@pytest.mark.slow
def test_install_horovod():
    tensorflow = install_horovod.tensorflow_version()
    options = " and ".join(install_horovod.build_options(gpu=False))
    assert run_module("horovod_recipes.install_horovod") == (
        f"Horovod 0.28.1 for TensorFlow {tensorflow} with {options} is "
        "installed\n"
    )


@pytest.mark.slow
def test_benchmark():
    printed = run_module("benchmarks.speed.norm", "--help")
    assert printed.startswith("usage: ")


@pytest.mark.slow
def test_horovodrun():
    """It imports TensorFlow itself, to see what Horovod was built with."""
    assert run(HOROVODRUN, "--gloo", "-np", "1", "true") == ""


@pytest.mark.parametrize(
    "line",
    [
        "WARNING: All log messages before absl::InitializeLog() is called",
        "I0000 port.cc:153] oneDNN custom operations are on. You may see",
    ],
)
def test_only_the_banner_is_filtered(line):
    script = f"""
import os
from horovod_recipes._quiet import without_banner
with without_banner():
    os.write(2, b"before\\n{line}\\nafter\\n")
"""
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.stderr == "before\nafter\n"


def test_lines_after_a_sigterm_to_all_processes():
    """As a cluster sends it; Python notes the signal and goes on."""
    script = """
import os, signal
from horovod_recipes._quiet import without_banner
signal.signal(signal.SIGTERM, lambda number, frame: None)
with without_banner():
    os.killpg(0, signal.SIGTERM)
    os.write(2, b"after\\n")
"""
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        start_new_session=True,
    )
    assert (result.stderr, result.returncode) == ("after\n", 0)
