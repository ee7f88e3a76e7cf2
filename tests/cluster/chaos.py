"""Does to jobs, at random moments, what clusters do, and checks what follows.

    python -m tests.cluster.chaos --seed=0

Four hosts, with one rank each, train the demo's network. `tests/cluster/faults`
has the faults. A job that ends by one is resumed, until it has trained to its
end. Its weights must then be those of a job that nobody disturbed, to the bit.
Elastic jobs go on without the rank or host that they lose. They must count each
example once per epoch, and reach the accuracy of an undisturbed job.

Needs root, and what `tests/cluster/hosts` needs. One fault sets this machine's
clock, for six seconds.
"""

import argparse
import contextlib
import json
import os
import pathlib
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import zipfile

from keras_lars._files import written_atomically
from tests.cluster.faults import ELASTIC
from tests.cluster.faults import LATE
from tests.cluster.faults import STATIC
from tests.cluster.faults import Target
from tests.cluster.hosts import Cluster
from tests.cluster.job import LINK
from tests.cluster.job import Job
from tests.cluster.job import assert_nothing_runs
from tests.corrupt_dataset import write_corrupt_copy
from tests.jobs.launcher import python

RANKS = 4
HOSTS = ("-np", "4", "-H", "h1:1,h2:1,h3:1,h4:1", *LINK)
TRAIN = (
    "--config=demo",
    "--config.model.filters=2",
    "--config.deterministic",
    "--config.checkpoint_every_epochs=2",
    "--config.evaluate_every_epochs=25",
    "--config.hang_seconds=100",
)
# The rank whose number is in LATE_RANK starts late.
START = f'test "$HOROVOD_RANK" != "$LATE_RANK" || sleep {LATE}; exec "$@"'
# In seconds, for four ranks that share two cores.
SECONDS_TO_START = 200
SECONDS_PER_JOB = 1000
# In seconds: a fault comes at a random moment so long after the first epoch of
# a start, or, one time in four, after the start itself.
LATEST_MOMENT = 6
LATEST_MOMENT_OF_START = 20
ELASTIC_EPOCHS = 12
# An undisturbed elastic job, of two or of four ranks, has 96.4.
ELASTIC_TOP1 = 96.4
TOP1_NOISE = 1.5


class Chaos:
    """Faults done to jobs, and the table of what followed."""

    def __init__(self, cluster, folder, disk, seed, epochs, output):
        self.cluster = cluster
        self.folder = folder
        self.disk = disk
        self.random = random.Random(seed)
        self.seed = seed
        self.epochs = epochs
        self.output = output
        self.rows = []
        self.jobs = 0
        self.corrupt_data, _ = write_corrupt_copy(folder / "data", "train", [7])

    def record(self, **row):
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        if self.output:
            result = {
                "command": f"python -m tests.cluster.chaos --seed={self.seed}",
                "kernel": platform.release(),
                "cores": os.cpu_count(),
                "faults": self.rows,
            }
            with written_atomically(self.output) as path:
                path.write_text(json.dumps(result, indent=1) + "\n")

    def trouble(self, names):
        """Does static faults, in this order where a job allows it."""
        names = list(names)
        expected = self.train("undisturbed", [])
        while names:
            self.jobs += 1
            weights = self.train(f"job{self.jobs}", names)
            assert weights == expected, "the weights differ from undisturbed"

    def train(self, name, names):
        """Trains to the end, while it takes faults from `names`.

        Returns:
            The hash of the weights, which is the same on all ranks.
        """
        workdir = self.disk / name
        command = (
            *python("tests.cluster.compared_job", *TRAIN),
            *(f"--config.epochs={self.epochs}", f"--workdir={workdir}"),
        )
        while True:
            job = self.start(workdir, command, names)
            if job is None:
                continue
            if not self.disturb(job, workdir, command, names):
                continue
            assert job.process.wait() == 0, job.output()
            assert_nothing_runs(self.cluster, seconds=30)
            check_files(workdir, killed=False)
            assert (workdir / "summary.json").exists()
            # A job that resumes within an epoch ends that epoch first.
            *_, line = re.findall(r'\{"weights": .*', job.output())
            (digest,) = set(json.loads(line)["weights"])
            return digest

    def start(self, workdir, command, names):
        """Starts or resumes a job, with the next fault of the start.

        Returns:
            The `Job`, or None if the fault has ended it.
        """
        name = next((n for n in names if STATIC[n].at_start), None)
        if name is None or not workdir.exists():
            return self.launch(self.target(None, None, workdir, command))
        names.remove(name)
        rank = self.random.choice(STATIC[name].ranks)
        target = self.target(None, rank, workdir, command)
        goes_on = self.do(name, STATIC[name], target, "before the start")
        return target.job if goes_on else None

    def launch(self, target):
        target.job = Job(
            self.cluster,
            self.folder,
            *(*HOSTS, "bash", "-c", START, "bash", *target.command),
            *(("--resume",) if target.workdir.exists() else ()),
            seconds=SECONDS_PER_JOB,
            env=target.env,
        )
        return target.job

    def disturb(self, job, workdir, command, names):
        """Does faults until one ends the job, or the job is about to end.

        Returns:
            Whether the job trains to its end.
        """
        while name := next((n for n in names if not STATIC[n].at_start), None):
            fault = STATIC[name]
            moment = self.wait_for_moment(job, fault)
            # A short job has to take every fault in its first half.
            epochs = min(fault.epochs, self.epochs // 2)
            ended = job.process.poll() is not None
            if ended or epoch(job) > self.epochs - epochs:
                return True
            names.remove(name)
            rank = self.random.choice(fault.ranks)
            target = self.target(job, rank, workdir, command)
            if not self.do(name, fault, target, moment):
                return False
        return True

    def wait_for_moment(self, job, fault):
        """Waits for a random moment; returns its name."""
        if fault.ends and self.random.random() < 0.25:
            time.sleep(self.random.uniform(2, LATEST_MOMENT_OF_START))
        else:
            # A job that had trained to its end before prints only its summary.
            job.wait_for(r'Epoch \d+/|"steps": ', SECONDS_TO_START)
            time.sleep(self.random.uniform(0, LATEST_MOMENT))
        return f"epoch {epoch(job)}" if epoch(job) else "the start"

    def target(self, job, rank, workdir, command):
        env = {"LATE_RANK": "none"}
        return Target(
            *(self.cluster, job, rank, workdir, self.disk),
            *(env, self.corrupt_data, command),
        )

    def do(self, name, fault, target, moment):
        """Does a fault, checks what follows, and records it.

        Returns:
            Whether the job goes on.
        """
        outcome, failure = ("ended" if fault.ends else "went on"), None
        begin = time.monotonic()
        try:
            with fault.harm(target):
                if fault.at_start:
                    self.launch(target)
                if fault.ends:
                    self.check_end(fault, target, moment)
                else:
                    self.check_progress(fault, target)
            if fault.ends:
                assert_nothing_runs(self.cluster, seconds=60)
            seconds = time.monotonic() - begin
            if fault.ends:
                check_files(target.workdir, killed=True)
        except AssertionError as error:
            # The other faults are tried all the same, on the resumed job.
            outcome, failure = "FAILED", str(error)
            seconds = time.monotonic() - begin
            for host in self.cluster.hosts:
                self.cluster.kill(host)
            target.job.process.wait()
        self.record(
            job="static",
            fault=name,
            hit=f"rank {target.rank} on {target.host}",
            moment=moment,
            outcome=outcome,
            seconds=round(seconds, 1),
            **({"failure": failure} if failure else {}),
        )
        return outcome == "went on"

    def check_end(self, fault, target, moment):
        job = target.job
        seconds = fault.seconds + SECONDS_TO_START * fault.at_start
        try:
            status = job.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end in time:\n{job.output()}") from None
        trains = moment.startswith("epoch")
        # While the ranks start, the launcher's status is 1 for most faults.
        expected = {fault.status} if trains else {fault.status, 1}
        assert status in expected, f"status {status}:\n{job.output()}"
        if trains or fault.at_start:
            check_errors(fault, target, job.output())

    def check_progress(self, fault, target):
        job = target.job
        before = epoch(job)
        end = (
            time.monotonic() + fault.seconds + SECONDS_TO_START * (before == 0)
        )
        while epoch(job) < min(before + 2, self.epochs):
            assert job.process.poll() is None, f"ended:\n{job.output()}"
            assert time.monotonic() < end, f"no progress:\n{job.output()}"
            time.sleep(0.2)


def epoch(job):
    """Returns the newest epoch that rank 0 has begun, from 1; or 0."""
    found = re.findall(r"Epoch (\d+)/\d+\n", job.output())
    return int(found[-1]) if found else 0


def check_errors(fault, target, output):
    """Checks that each rank that can speak says who, and why."""
    says = fault.says.format(rank=target.rank, host=target.host)
    others = [rank for rank in range(RANKS) if rank != target.rank]
    speakers = {
        "none": [],
        "all": range(RANKS),
        "others": others,
        "rank 0": others[:1] if target.rank else [],
    }[fault.speakers]
    if fault.speakers == "rank 0":
        assert f"\nProcess name: {target.rank}\n" in output, output
    for rank in speakers:
        lines = re.findall(
            rf"^\[{rank}\]<stderr>:.*error: .*", output, flags=re.M
        )
        assert lines, f"rank {rank} gives no reason:\n{output}"
        assert re.search(says, "\n".join(lines)), (
            f"rank {rank} does not say {says!r}:\n{output}"
        )


def check_files(workdir, killed):
    """Checks that every file is whole; a killed job may leave a `.part-`."""
    for path in workdir.rglob("*"):
        if path.name.startswith(".part-"):
            assert killed, f"{path} is left over"
        elif path.suffix == ".keras":
            with zipfile.ZipFile(path) as archive:
                assert archive.testzip() is None, path
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".csv":
            header, *rows = path.read_text().splitlines()
            commas = {row.count(",") for row in rows}
            assert commas <= {header.count(",")}, path


class ElasticJob:
    """An elastic job of the digits on all hosts."""

    def __init__(self, cluster, folder):
        discover = folder / "discover.sh"
        discover.write_text(
            "#!/bin/bash\n"
            "for host in h1 h2 h3 h4; do\n"
            '  timeout 1 bash -c "< /dev/tcp/$host/22" && echo $host:1\n'
            "done 2> /dev/null\n"
        )
        discover.chmod(0o755)
        self.job = Job(
            cluster,
            folder,
            *("-np", "4", "--min-np", "1", "--max-np", "4", *LINK),
            *("--host-discovery-script", str(discover)),
            *("--blacklist-cooldown-range", "2", "4"),
            *("--gloo-timeout-seconds", "60"),
            *python("tests.jobs.elastic_digits_job"),
            *(f"--epochs={ELASTIC_EPOCHS}", "--pause=0.7"),
            seconds=SECONDS_PER_JOB,
        )

    def events(self):
        lines = re.findall(r'\{"event".*\}', self.job.output())
        return [json.loads(line) for line in lines]

    def wait_for_batches(self, after, ranks=range(1, 5), seconds=300):
        """Waits until two batches are trained on so many ranks.

        Args:
            after: Integer, the number of events to skip.
            ranks: The allowed numbers of ranks.
            seconds: Float, the time limit.
        """
        end = time.monotonic() + seconds
        while True:
            ranks_now, batches = None, 0
            for index, event in enumerate(self.events()):
                if event["event"] == "start":
                    ranks_now, batches = event["ranks"], 0
                if event["event"] == "batch" and index >= after:
                    batches += 1
            if ranks_now in ranks and batches >= 2:
                return
            assert self.job.process.poll() is None, self.job.output()
            assert time.monotonic() < end, self.job.output()
            time.sleep(0.3)


def trouble_elastic(chaos, names):
    """Does elastic faults, one at a time, two to a job."""
    names = list(names)
    while names:
        chaos.jobs += 1
        elastic = ElasticJob(chaos.cluster, chaos.folder)
        for name in names[:2]:
            elastic.wait_for_batches(0, ranks=[RANKS])
            time.sleep(chaos.random.uniform(0, 2))
            fault = ELASTIC[name]
            rank = chaos.random.choice(fault.ranks)
            target = chaos.target(elastic.job, rank, None, None)
            before, begin = len(elastic.events()), time.monotonic()
            with fault.harm(target):
                elastic.wait_for_batches(before)
                seconds = time.monotonic() - begin
            chaos.record(
                job="elastic",
                fault=name,
                hit=f"rank {rank} on {target.host}",
                moment=f"batch {elastic.events()[before - 1].get('batch')}",
                outcome="went on",
                seconds=round(seconds, 1),
            )
        del names[:2]
        check_elastic_end(chaos.cluster, elastic)


def check_elastic_end(cluster, elastic):
    assert elastic.job.process.wait() == 0, elastic.job.output()
    events = elastic.events()
    epochs = [event for event in events if event["event"] == "epoch"]
    assert {event["used_once"] for event in epochs} == {4000}
    assert {event["different_weights"] for event in epochs} == {1}
    (summary,) = [event for event in events if event["event"] == "summary"]
    assert summary["each_example_once"]
    assert summary["updates"] == 8 * ELASTIC_EPOCHS
    assert abs(summary["top1"] - ELASTIC_TOP1) < TOP1_NOISE, summary
    assert_nothing_runs(cluster, seconds=60)


@contextlib.contextmanager
def small_disk(path):
    """Mounts a disk of 64 MB, which faults fill and make read-only."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "chaos", str(path)]
    subprocess.run(mount, check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def run(seed, static, elastic, epochs=100, output=None):
    """Does faults on new hosts.

    Args:
        seed: Integer, which determines the moments and the ranks.
        static: Names of faults of `STATIC`, in order.
        elastic: Names of faults of `ELASTIC`.
        epochs: Integer, the length of a static job.
        output: `pathlib.Path` of the table, or None.

    Returns:
        The rows of the table.
    """
    with contextlib.ExitStack() as stack:
        # SIGTERM then acts as Ctrl-C, so that hosts and disk are removed.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        stack.callback(signal.signal, signal.SIGTERM, before)
        folder = pathlib.Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-"))
        )
        # Hosts see disks that were mounted before them.
        disk = stack.enter_context(small_disk(folder / "disk"))
        cluster = Cluster(RANKS)
        stack.callback(cluster.remove)
        chaos = Chaos(cluster, folder, disk, seed, epochs, output)
        if static:
            chaos.trouble(static)
        if elastic:
            trouble_elastic(chaos, elastic)
    return chaos.rows


def repeats(fault, elastic):
    """Returns how often to do a fault; a job that has ended has to start."""
    return 2 if fault.ends or elastic else 5


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", help="a part of the names of the faults to do"
    )
    parser.add_argument("--output", type=pathlib.Path)
    arguments = parser.parse_args()
    order = random.Random(arguments.seed)
    plans = []
    for faults in (STATIC, ELASTIC):
        names = [
            name
            for name, fault in faults.items()
            for _ in range(repeats(fault, elastic=faults is ELASTIC))
            if (arguments.only or "") in name
        ]
        order.shuffle(names)
        plans.append(names)
    rows = run(arguments.seed, *plans, output=arguments.output)
    sys.exit(any(row["outcome"] == "FAILED" for row in rows))


if __name__ == "__main__":
    main()
