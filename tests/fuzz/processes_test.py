"""Whole command lines as processes, which see what the fuzzers see in one.

Only `make fuzz` runs them: importing TensorFlow takes longer than the rest.
"""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from tests.fuzz import fuzzing
from tests.fuzz.fuzzing import ERROR
from tests.fuzz.fuzzing import RIGHT

ROOT = pathlib.Path(__file__).parents[2]
TINY = (
    *("--config=demo", "--config.model.filters=2", "--config.epochs=2"),
    *("--config.schedule.warmup_epochs=1", "--config.evaluate_every_epochs=1"),
    "--config.checkpoint_every_epochs=1",
)
PLAN = ("plan", "--config=demo", "--ranks=2", "--hardware=a100")
COMMANDS = [
    ("train", "--config=demo", "--workdir=run", "--flagfile=/nowhere"),
    ("train", "--config=demo", "--workdir=run", "--config.datset.cache=True"),
    ("train", "--config=demo", "--workdir=run", "--config.epochs=1e30"),
    ("train", "--config=demo\n", "--workdir=run"),
    ("train", "--config=mine.py", "--workdir=run"),
    ("train", "--config=demo", "--workdir=/proc/run"),
    (
        "train",
        "--config=demo",
        "--workdir=run",
        "--config.optimizer.momentum=2",
    ),
    (*PLAN, "--config.model.filters=1000000000000"),
    (*PLAN, "--config.schedule.peak_learning_rate=1e308"),
    (*PLAN, "--config.dataset.train_examples=1000000000000"),
    (*PLAN, "--output=/proc/plan"),
    (*PLAN, "--ranks=0"),
    ("evaluate", "--workdir=run"),
    ("evaluate", "--workdir=/proc", "--linear_epochs=0"),
    ("evaluate", "--workdir=run", "--linear_epochs=many"),
]


def run(folder, command):
    """Runs a command; returns its status and the lines of stderr."""
    module, *arguments = command
    result = subprocess.run(
        [sys.executable, "-m", f"horovod_recipes.{module}", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return result.returncode, result.stderr.splitlines()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    (folder / "mine.py").write_text("def get_config():\n    return {}['x']\n")
    return folder


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_command(folder, command):
    status, lines = run(folder, command)
    assert status == (2 if "--linear_epochs=many" in command else 1), lines
    # Python's own parser of arguments prints these first.
    usage = ("usage: ", "  ")
    fuzzing.assert_one_error([x for x in lines if not x.startswith(usage)])
    assert not (folder / "run").exists()
    fuzzing.counts[ERROR] += 1


@pytest.fixture(scope="module")
def finished(folder):
    """The work folder of a finished job, with two checkpoints."""
    status, lines = run(folder, ("train", *TINY, "--workdir=whole"))
    assert status == 0, lines
    return folder / "whole"


@pytest.mark.parametrize("damage", ["cut", "garbled"])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("checkpoints/step-00000006.keras", "step-00000003.keras"),
        ("checkpoints/step-00000006.json", "step-00000003.keras"),
        ("metrics.csv", "goes on with its first"),
    ],
)
def test_damaged_file(finished, name, said, damage):
    """The job resumes, says from where, and ends as one that is whole."""
    workdir = finished.with_name("copy")
    shutil.rmtree(workdir, ignore_errors=True)
    shutil.copytree(finished, workdir)
    (workdir / "summary.json").unlink()
    whole = (workdir / name).read_bytes()
    content = {
        # Within the last row of the table.
        "cut": whole[: len(whole) * 4 // 5],
        "garbled": whole.translate(bytes(range(255, -1, -1))),
    }[damage]
    (workdir / name).write_bytes(content)
    command = ("train", *TINY, "--workdir=copy", "--resume")
    status, lines = run(finished.parent, command)
    assert status == 0, lines
    (line,) = lines
    assert line.startswith("warning: ")
    assert said in line
    assert (workdir / "summary.json").exists()
    rows = {"cut": 1, "garbled": 0}[damage] if "csv" in name else 2
    if rows:
        lines = (workdir / "metrics.csv").read_text().splitlines()
        assert len(lines) == 1 + rows
    kept = {path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    assert name.endswith("json") or content in kept
    fuzzing.counts[RIGHT] += 1


@pytest.mark.parametrize("content", ["", '{"top1": null}'])
def test_damaged_summary(finished, content):
    workdir = finished.with_name("summary")
    shutil.rmtree(workdir, ignore_errors=True)
    shutil.copytree(finished, workdir)
    (workdir / "summary.json").write_text(content)
    before = fuzzing.content_of(workdir)
    command = ("train", *TINY, "--workdir=summary", "--resume")
    status, lines = run(finished.parent, command)
    assert status == 1
    fuzzing.assert_one_error(lines)
    assert fuzzing.content_of(workdir) == before
    fuzzing.counts[ERROR] += 1
