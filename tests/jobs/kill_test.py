"""Jobs that are killed or stopped, and resume as if nothing had happened."""

import re

import keras
import numpy as np

import keras_lars  # noqa: F401  to load its optimizer
from tests.jobs.launcher import TRAIN
from tests.jobs.launcher import TWO_RANKS
from tests.jobs.launcher import python
from tests.jobs.launcher import run
from tests.jobs.launcher import run_until_sigterm
from tests.jobs.results import checkpoint
from tests.jobs.results import read_metrics
from tests.jobs.results import read_summary


def table_and_weights(workdir):
    """Returns what must be the same in two jobs: all but the speed."""
    rows = read_metrics(workdir)
    for row in rows:
        del row["images_per_second"]
    model = keras.saving.load_model(checkpoint(workdir, 9))
    return rows, [v.numpy() for v in model.weights + model.optimizer.variables]


def test_killed_while_it_writes_a_checkpoint(tmp_path, whole_job):
    """Rank 0 dies with half of a file written, and nothing is lost."""
    killed = tmp_path / "killed"
    arguments = (*whole_job.arguments, f"--workdir={killed}")
    result = run(
        *TWO_RANKS,
        *python("tests.jobs.faulty_job", "kill_in_save"),
        *(str(tmp_path / "happened"), *arguments),
    )
    assert result.returncode != 0
    folder = killed / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [
        ".part-step-00000006.keras",
        "step-00000003.json",
        "step-00000003.keras",
        "step-00000006.json",
    ]
    result = run(*TWO_RANKS, *TRAIN, *arguments, "--resume")
    assert result.returncode == 0, result.stderr
    assert "from_step=3 " in result.stdout
    rows, weights = table_and_weights(whole_job.workdir)
    resumed_rows, resumed_weights = table_and_weights(killed)
    assert rows == resumed_rows
    for a, b in zip(weights, resumed_weights, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not list(killed.rglob(".part-*"))


def test_sigterm_to_one_rank_while_it_imports(tmp_path):
    """No rank trains, all exit with status 0, and the job can resume."""
    workdir = tmp_path / "run"
    job = (*TRAIN, "--config=demo", f"--workdir={workdir}")
    status, output = run_until_sigterm(*TWO_RANKS, *job, rank=1)
    assert status == 0, output
    assert (
        "[1]<stderr>:got SIGTERM; the job will stop before its first step\n"
        in output
    )
    assert "[0]<stderr>:got SIGTERM" not in output
    assert output.splitlines()[-1] == (
        "[0]<stdout>:stopped by SIGTERM before the first step; continue with "
        "--resume"
    )
    assert (workdir / "config.json").exists()
    assert not list(workdir.glob("checkpoints/*"))


def test_sigterm_then_resume_on_one_rank(tmp_path):
    """The signal reaches rank 1 alone; the global batch stays the same."""
    workdir = tmp_path / "run"
    # Three epochs of 40 updates.
    job = (
        *TRAIN,
        *("--config=demo", "--config.model.filters=2", "--config.epochs=3"),
        *("--config.schedule.warmup_epochs=1", f"--workdir={workdir}"),
        "--config.global_batch_size=100",
    )
    status, output = run_until_sigterm(
        *TWO_RANKS, *job, rank=1, path=workdir / "metrics.csv"
    )
    assert status == 0, output
    step = int(re.search(r"stopped by SIGTERM after step (\d+)", output)[1])
    assert 40 <= step < 120
    assert checkpoint(workdir, step).exists()
    assert not (workdir / "summary.json").exists()

    resumed = run(*job, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert f"from_step={step} " in resumed.stdout
    summary = read_summary(workdir)
    assert summary["ranks"] == 1
    assert summary["global_batch_size"] == 100
    assert summary["steps"] == 120
    steps = [row["step"] for row in read_metrics(workdir)]
    assert steps == ["40", "80", "120"]
