"""Faults that `tests.cluster.chaos` does to a job, and what has to follow.

A fault is a context manager: it does harm on entry, and undoes it on exit.
"""

import contextlib
import dataclasses
import os
import pathlib
import re
import signal
import subprocess
import time

from tests.cluster.job import pid_of_rank
from tests.jobs.launcher import HOROVODRUN
from tests.jobs.launcher import ROOT

# In seconds, from the fault to the end of the job; most of it is for two cores
# that four ranks share. Gloo waits 30 s for a silent host, and at the start
# ranks wait 120 s.
SECONDS_TO_END = 90
SECONDS_TO_END_SILENT = 180
# In seconds, until the job has trained on after a fault that it survives.
SECONDS_TO_GO_ON = 90
# In seconds: shorter than Gloo's limit, and longer.
SHORT_STOP = 5
SHORT_CUT = 5
LATE = 20
TROUBLE = 6
CLOCK_JUMP = 3600


@dataclasses.dataclass
class Target:
    """What a fault may touch.

    Attributes:
        cluster: The `Cluster`.
        job: The `Job`, or None before its start.
        rank: Integer, the rank that the fault hits, alone on its host.
        workdir: A `pathlib.Path` on a disk of its own, `disk`.
        disk: A `pathlib.Path`, where that disk is mounted.
        env: Dictionary, the variables of a job that is about to start.
        corrupt_data: String, a data folder with a corrupt image.
        command: Tuple, the training command.
    """

    cluster: object
    job: object
    rank: int
    workdir: pathlib.Path
    disk: pathlib.Path
    env: dict
    corrupt_data: str
    command: tuple

    @property
    def host(self):
        return f"h{self.rank + 1}"

    def signal(self, number):
        os.kill(pid_of_rank(self.cluster, self.host), number)


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault, and its right outcome.

    Attributes:
        harm: The context manager.
        ends: Whether the job has to end; otherwise it has to go on.
        says: Regular expression. Each rank of `speakers` prints a match in an
            `error:` line; `{rank}` and `{host}` are those of the target.
        speakers: The ranks that can speak: "others", "all", "none" or "rank 0".
            When a rank's process ends, `horovodrun` ends its connections to
            ranks of other hosts. Then rank 0 and `horovodrun` itself speak.
        seconds: Float, the time until the outcome.
        status: Integer, the exit status of `horovodrun` if the job ends.
        at_start: Whether the fault comes before the job starts.
        epochs: Integer, the epochs that the job must still have before it.
        ranks: The ranks that it may hit.
    """

    harm: object
    ends: bool = True
    says: str = ""
    speakers: str = "none"
    seconds: float = SECONDS_TO_END
    status: int = 1
    at_start: bool = False
    epochs: int = 10
    ranks: tuple = (0, 1, 2, 3)


@contextlib.contextmanager
def kill_rank(target):
    target.signal(signal.SIGKILL)
    yield


@contextlib.contextmanager
def kill_host(target):
    pid_of_rank(target.cluster, target.host)
    target.cluster.kill(target.host)
    yield


@contextlib.contextmanager
def kill_horovodrun(target):
    (pid,) = [
        pid
        for pid in target.cluster.pids("h1")
        if _command(pid)[1:2] == [HOROVODRUN]
    ]
    os.kill(pid, signal.SIGKILL)
    yield


def _command(pid):
    try:
        text = pathlib.Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:  # The process has ended.
        return []
    return text.split("\0")


@contextlib.contextmanager
def stop_rank(target):
    """Freezes a rank until the job has ended."""
    pid = pid_of_rank(target.cluster, target.host)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        # It may be gone, if it is on the host of `horovodrun`.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def stop_rank_shortly(target):
    target.signal(signal.SIGSTOP)
    time.sleep(SHORT_STOP)
    target.signal(signal.SIGCONT)
    yield


@contextlib.contextmanager
def cut_link(target):
    target.cluster.cut(target.host)
    try:
        yield
    finally:
        target.cluster.mend(target.host)


@contextlib.contextmanager
def cut_link_shortly(target):
    with cut_link(target):
        time.sleep(SHORT_CUT)
    yield


@contextlib.contextmanager
def slow_link(target):
    target.cluster.limit(target.host, "5mbit")
    time.sleep(TROUBLE)
    target.cluster.speed_up(target.host)
    yield


@contextlib.contextmanager
def lose_packets(target):
    target.cluster.lose_packets(target.host, percent=5)
    time.sleep(TROUBLE)
    target.cluster.keep_packets(target.host)
    yield


@contextlib.contextmanager
def sigterm(target):
    target.signal(signal.SIGTERM)
    yield


@contextlib.contextmanager
def full_disk(target):
    filler = target.disk / "filler"
    with filler.open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
    try:
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def read_only_disk(target):
    """Covers the disk with a read-only view, for the processes of the job.

    A disk with open files cannot be made read-only itself.
    """
    pid, disk = pid_of_rank(target.cluster, "h1"), str(target.disk)
    enter = ["nsenter", f"--mount=/proc/{pid}/ns/mnt", "mount"]
    subprocess.run([*enter, "--bind", disk, disk], check=True)
    subprocess.run([*enter, "-o", "remount,bind,ro", disk], check=True)
    yield


@contextlib.contextmanager
def corrupt_image(target):
    target.env["TFDS_DATA_DIR"] = target.corrupt_data
    yield


@contextlib.contextmanager
def late_rank(target):
    target.env["LATE_RANK"] = str(target.rank)
    yield


@contextlib.contextmanager
def clock_jump(target):
    """The clock of the machine, and so of all hosts, is wrong for a moment."""
    begin, wrong = time.monotonic(), time.time()
    try:
        time.clock_settime(time.CLOCK_REALTIME, wrong + CLOCK_JUMP)
        time.sleep(TROUBLE)
    finally:
        right = wrong + time.monotonic() - begin
        time.clock_settime(time.CLOCK_REALTIME, right)
    yield


@contextlib.contextmanager
def second_job(target):
    """Another job resumes from the same workdir; it must be refused."""
    result = subprocess.run(
        [*target.command, "--resume"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=SECONDS_TO_GO_ON,
    )
    assert result.returncode == 1, result.stderr
    assert re.search(r"^error: .*another job uses", result.stderr, re.M), (
        result.stderr
    )
    yield


IS_LOST = r"rank {rank} on {host} (is lost|hangs)"
STATIC = {
    "SIGKILL of a rank": Fault(kill_rank, says=IS_LOST, speakers="rank 0"),
    "SIGKILL of all ranks of a host": Fault(
        kill_host, says=IS_LOST, speakers="rank 0", ranks=(1, 2, 3)
    ),
    "SIGKILL of horovodrun": Fault(
        kill_horovodrun,
        seconds=SECONDS_TO_END_SILENT,
        # `timeout` ends as its command does.
        status=-signal.SIGKILL,
        ranks=(0,),
    ),
    "SIGSTOP of a rank, for good": Fault(
        stop_rank,
        says=IS_LOST,
        speakers="others",
        seconds=SECONDS_TO_END_SILENT,
    ),
    "SIGSTOP of a rank, 5 s": Fault(stop_rank_shortly, ends=False),
    "link cut, for good": Fault(
        cut_link,
        says=IS_LOST,
        speakers="others",
        seconds=SECONDS_TO_END_SILENT,
        ranks=(1, 2, 3),
    ),
    "link cut, 5 s": Fault(cut_link_shortly, ends=False),
    "link at 5 Mbit/s, 6 s": Fault(slow_link, ends=False),
    "5 % of packets lost, 6 s": Fault(lose_packets, ends=False),
    "SIGTERM to a rank": Fault(sigterm, status=0),
    "full disk": Fault(full_disk, says="No space left", speakers="all"),
    "read-only disk": Fault(
        read_only_disk, says="Read-only file system", speakers="all"
    ),
    "corrupt image": Fault(
        corrupt_image, says="mnist5k-train", speakers="all", at_start=True
    ),
    "rank 20 s late": Fault(late_rank, ends=False, at_start=True),
    "clock 1 h ahead, 6 s": Fault(clock_jump, ends=False),
    # The second job takes half a minute to start.
    "second job on the workdir": Fault(second_job, ends=False, epochs=45),
}
ELASTIC = {
    "SIGKILL of a rank": Fault(kill_rank, ends=False),
    "SIGKILL of all ranks of a host": Fault(
        kill_host, ends=False, ranks=(1, 2, 3)
    ),
    "SIGSTOP of a rank, 5 s": Fault(stop_rank_shortly, ends=False),
    "link cut, for good": Fault(cut_link, ends=False, ranks=(1, 2, 3)),
}
