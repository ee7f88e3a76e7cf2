"""Jobs of which one rank starts late, or never."""

import re
import sys

from tests.jobs.launcher import HOROVODRUN
from tests.jobs.launcher import TWO_RANKS
from tests.jobs.launcher import error_lines
from tests.jobs.launcher import run

AVERAGE_WITH_LATE_RANK = """
import os, time
import horovod_recipes.keras as hvd

time.sleep(15 * int(os.environ["HOROVOD_RANK"]))
hvd.init()
print("mean", float(hvd.allreduce(float(hvd.rank()))))
"""
# The limit of 120 s is too long for a test.
TRAIN_WITHOUT_RANK_1 = """
import os, sys, time
from horovod_recipes import train
from horovod_recipes.keras import _init
from horovod_recipes.training import job

if os.environ["HOROVOD_RANK"] == "1":
    time.sleep(200)

_init.SECONDS_TO_WAIT = 10
sys.exit(train.main(["train", "--config=demo", f"--workdir={sys.argv[1]}"]))
"""


def test_ranks_wait_longer_than_gloo_does():
    result = run(
        *("env", "HOROVOD_GLOO_TIMEOUT_SECONDS=6", *TWO_RANKS),
        *(sys.executable, "-c", AVERAGE_WITH_LATE_RANK),
    )
    assert result.returncode == 0, result.stderr
    assert sorted(re.findall(r"\[(\d)\]<stdout>:mean 0.5", result.stdout)) == [
        "0",
        "1",
    ]


def test_job_ends_without_a_rank_that_never_starts(tmp_path):
    result = run(
        *(HOROVODRUN, "--gloo", "-np", "3"),
        *(sys.executable, "-c", TRAIN_WITHOUT_RANK_1, str(tmp_path / "run")),
        seconds=120,
    )
    assert result.returncode == 1, result.stderr
    ranks = [0, 2]
    for rank, line in zip(ranks, error_lines(result), strict=True):
        assert re.match(
            rf"\[{rank}\]<stderr>:error: rank {rank} on \S+ waited \d+ s for "
            r"rank 1 to call hvd.init\(\)",
            line,
        )
    assert not (tmp_path / "run").exists()
