"""Jobs in which a rank dies or hangs: all ranks end soon, and name it."""

import re
import sys
import time

import pytest

from tests.jobs.launcher import HOROVODRUN
from tests.jobs.launcher import ROOT
from tests.jobs.launcher import TWO_RANKS
from tests.jobs.launcher import error_lines
from tests.jobs.launcher import python
from tests.jobs.launcher import run

# In seconds. The first step of a busy machine takes less.
HANG_SECONDS = 30
# In seconds, to notice a fault, to name it, and to be killed; doubled.
SECONDS_TO_END = 30
JOB = (
    "--config=demo",
    "--config.model.filters=2",
    "--config.epochs=100",
    "--config.global_batch_size=96",
    f"--config.hang_seconds={HANG_SECONDS}",
)


def run_faulty(fault, folder, *arguments, ranks=2):
    """Returns the result, and the seconds from the fault to the end."""
    happened = folder / "happened"
    result = run(
        *(HOROVODRUN, "--gloo", "-np", str(ranks)),
        *python("tests.jobs.faulty_job", fault, str(happened), *JOB),
        *(f"--workdir={folder}/run", *arguments),
    )
    assert result.returncode == 1, result.stderr
    return result, time.time() - happened.stat().st_mtime


@pytest.mark.parametrize(
    ("fault", "ranks", "model"),
    [("kill", 3, "small_cnn"), ("kill_in_allreduce", 2, "large_network")],
)
def test_rank_that_is_killed(tmp_path, fault, ranks, model):
    """With three ranks, one watches the killed one and tells the other."""
    result, seconds = run_faulty(
        fault, tmp_path, f"--config.model.name={model}", ranks=ranks
    )
    others = [rank for rank in range(ranks) if rank != 1]
    lines = error_lines(result)
    assert len(lines) == len(others), lines
    for rank, line in zip(others, lines, strict=True):
        assert re.match(
            rf"\[{rank}\]<stderr>:error: rank {rank} (stopped|waited .*): "
            r"rank 1 on localhost is lost: nothing has been heard of it for "
            r"\d s, after step \d of its training",
            line,
        ), line
    assert seconds < SECONDS_TO_END


@pytest.mark.parametrize(
    ("fault", "task"),
    [
        ("hang_in_callback", "classification"),
        ("hang_in_pipeline", "hanging_input"),
    ],
)
def test_rank_that_hangs(tmp_path, fault, task):
    result, seconds = run_faulty(fault, tmp_path, f"--config.task={task}")
    waits, hangs = error_lines(result)
    hanging = r"rank 1 on localhost hangs: no progress for \d+ s after step \d "
    assert re.match(r"\[1\]<stderr>:error: " + hanging, hangs), hangs
    assert re.match(r"\[0\]<stderr>:error: rank 0 waited .*" + hanging, waits)
    in_tensorflow = "inside TensorFlow: the input pipeline or the step" in hangs
    assert in_tensorflow == (fault == "hang_in_pipeline")
    assert HANG_SECONDS <= seconds < HANG_SECONDS + SECONDS_TO_END
    # Each rank prints its stacks: the line that waits and the line that hangs.
    for rank, function in enumerate(("fit", fault)):
        stacks = lines_of_rank(result, rank).partition(
            f"stacks of rank {rank}:"
        )[2]
        assert "(most recent call first)" in stacks
        assert f"in {function}" in stacks


def test_parallel_test_that_hangs(tmp_path):
    """The options are those of `make parallel-tests`, the time is shorter."""
    (tmp_path / "hang_test.py").write_text(
        "import time\n"
        "import horovod_recipes.keras as hvd\n"
        "hvd.init()\n"
        "def test_hang():\n"
        "    if hvd.rank() == 1:\n"
        "        time.sleep(1000)\n"
        "    hvd.allreduce(1.0)\n"
    )
    result = run(
        *(*TWO_RANKS, sys.executable, "-m", "pytest"),
        *("-c", str(ROOT / "pyproject.toml"), "-o", "faulthandler_timeout=10"),
        *("-o", "faulthandler_exit_on_timeout=true", str(tmp_path)),
    )
    assert result.returncode == 1
    for rank in (0, 1):
        lines = lines_of_rank(result, rank)
        assert "Timeout (0:00:10)!" in lines
        assert "in test_hang" in lines


def lines_of_rank(result, rank):
    """Returns what one rank wrote to its standard error."""
    prefix = f"[{rank}]<stderr>:"
    lines = result.stderr.splitlines()
    return "\n".join(line for line in lines if line.startswith(prefix))
