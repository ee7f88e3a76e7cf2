"""Jobs that are killed, or told to stop, and go on as if they had not been."""

import csv
import json
import re
import sys

import keras
import numpy as np

import keras_lars  # noqa: F401  to load its optimizer
from tests.jobs.launcher import HOROVODRUN
from tests.jobs.launcher import TRAIN
from tests.jobs.launcher import run
from tests.jobs.launcher import run_until_sigterm

# With all its filters, as a smaller network is bit-equal in any case.
LONGER = (
    "--config=demo",
    "--config.epochs=3",
    "--config.schedule.warmup_epochs=1",
    "--config.checkpoint_every_epochs=1",
    "--config.deterministic",
)


def table_and_weights(workdir):
    with (workdir / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["images_per_second"]
    path = workdir / "checkpoints" / "step-00000009.keras"
    model = keras.saving.load_model(path)
    return rows, [v.numpy() for v in model.weights + model.optimizer.variables]


def test_killed_while_it_writes_a_checkpoint(tmp_path):
    """Rank 0 is killed with half of a file written; nothing is lost."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    job = [*HOROVODRUN, *TRAIN, *LONGER]
    assert run(*job, f"--workdir={whole}").returncode == 0
    script = (
        "import os, signal, sys, keras; from horovod_recipes import train\n"
        "save = keras.Model.save\n"
        "def half(model, path):\n"
        "    save(model, path)\n"
        "    if 'checkpoints' in str(path) and 'step-00000006' in str(path):\n"
        "        os.truncate(path, os.path.getsize(path) // 2)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "keras.Model.save = half\n"
        "sys.exit(train.main(['train', *sys.argv[1:]]))"
    )
    workdir = f"--workdir={killed}"
    arguments = (*TRAIN[3:], *LONGER, workdir)
    result = run(*HOROVODRUN, sys.executable, "-c", script, *arguments)
    assert result.returncode != 0
    folder = killed / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [
        ".part-step-00000006.keras",
        "step-00000003.json",
        "step-00000003.keras",
        "step-00000006.json",
    ]
    result = run(*job, workdir, "--resume")
    assert result.returncode == 0, result.stderr
    assert "from_step=3 " in result.stdout
    rows, weights = table_and_weights(whole)
    resumed_rows, resumed_weights = table_and_weights(killed)
    assert rows == resumed_rows
    for a, b in zip(weights, resumed_weights, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not list(killed.rglob(".part-*"))


def test_sigterm_then_resume_on_one_rank(tmp_path):
    """The signal comes from outside, to rank 1; the global batch stays."""
    workdir = tmp_path / "run"
    arguments = (*LONGER, "--config.global_batch_size=100")
    # After one epoch of 40 updates.
    metrics = workdir / "metrics.csv"
    job = (*HOROVODRUN, *TRAIN, *arguments, f"--workdir={workdir}")
    status, output = run_until_sigterm(*job, rank=1, path=metrics)
    assert status == 0, output
    step = int(re.search(r"stopped by SIGTERM after step (\d+)", output)[1])
    assert 40 <= step < 120
    latest = workdir / "checkpoints" / f"step-{step:08d}.keras"
    assert latest.exists()
    assert not (workdir / "summary.json").exists()

    # On three ranks it says why not.
    refused = run(
        *(HOROVODRUN[0], "--gloo", "-np", "3", *TRAIN, *arguments),
        *(f"--workdir={workdir}", "--resume"),
    )
    assert refused.returncode == 1
    assert "global_batch_size 100 is not divisible by 3 r" in refused.stderr
    resumed = run(*TRAIN, *arguments, f"--workdir={workdir}", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert f"from_step={step} " in resumed.stdout
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["ranks"] == 1
    assert summary["global_batch_size"] == 100
    assert summary["steps"] == 120
    with metrics.open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == [
            *("40", "80", "120")
        ]
