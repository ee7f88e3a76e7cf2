"""Jobs on two hosts, while a link is cut, slowed down, and mended.

Run it as root: make test-cluster.
"""

import json
import os
import pathlib
import re
import signal
import time

import pytest

from tests.jobs.launcher import HOROVODRUN
from tests.jobs.launcher import ROOT
from tests.jobs.launcher import limited
from tests.jobs.launcher import python
from tests.jobs.results import read_summary

LINK = ("--network-interface", "eth0")
BOTH = ("-np", "2", "-H", "h1:1,h2:1", *LINK)
DEMO = ("--config=demo", "--config.model.filters=2")
# This job trains until something ends it.
ENDLESS = (
    *DEMO,
    "--config.epochs=100000",
    "--config.evaluate_every_epochs=100000",
    "--config.checkpoint_every_epochs=100000",
)
# In seconds, from the kill to the end; half of it is for a busy machine.
KILL_SECONDS = 40
# In seconds, from the cut to the end; Gloo's own time limit is 30 of it.
CUT_SECONDS = 90


class Job:
    """`horovodrun` on h1, which prints to a file."""

    def __init__(self, cluster, folder, *command, seconds=300):
        self.log = folder / "job.log"
        with self.log.open("wb") as log:
            self.process = cluster.popen(
                "h1",
                *limited([HOROVODRUN, "--gloo", *command], seconds),
                cwd=ROOT,
                stdout=log,
                stderr=log,
            )

    def output(self):
        # A progress bar ends its lines with carriage returns.
        text = self.log.read_bytes().decode(errors="replace")
        return text.replace("\r", "\n")

    def wait_for(self, pattern, seconds=200):
        """Waits until the job has printed a match; returns it."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            if match := re.search(pattern, self.output()):
                return match
            time.sleep(0.2)
        match = re.search(pattern, self.output())
        assert match, f"no {pattern!r} in:\n{self.output()}"
        return match

    def wait(self):
        """Waits for the end; returns the status and the ranks' errors."""
        status = self.process.wait()
        errors = re.findall(r"error: (.*)", self.output())
        return status, errors


def pid_of_rank(cluster, host, rank):
    for pid in cluster.pids(host):
        process = pathlib.Path("/proc") / str(pid)
        try:
            environment = (process / "environ").read_bytes().split(b"\0")
            name = (process / "comm").read_text()
        except OSError:  # The process has ended.
            continue
        if name.startswith("python") and b"HOROVOD_RANK=%d" % rank in (
            environment
        ):
            return pid
    raise AssertionError(f"no rank {rank} on {host}")


def assert_nothing_runs(cluster, seconds, besides=None):
    """Checks that the job leaves no process on any host.

    Args:
        cluster: The `Cluster`.
        seconds: Float, the time that the processes have to end.
        besides: Bytes, the beginning of the commands that may stay.
    """
    end = time.monotonic() + seconds
    while left := commands_left(cluster, besides):
        assert time.monotonic() < end, left
        time.sleep(0.5)


def commands_left(cluster, besides):
    commands = {}
    for pid in (pid for host in cluster.hosts for pid in cluster.pids(host)):
        try:
            command = (
                pathlib.Path("/proc") / str(pid) / "cmdline"
            ).read_bytes()
        except OSError:  # The process has ended.
            continue
        if besides is None or not command.startswith(besides):
            commands[pid] = command
    return commands


def test_demo_trains_over_the_link_as_on_one_host(cluster, tmp_path):
    results = {}
    for name, hosts in (("two", BOTH), ("one", ("-np", "2"))):
        workdir = tmp_path / name
        job = Job(
            cluster,
            tmp_path,
            *hosts,
            *python("tests.cluster.compared_job", "--config=demo"),
            *("--config.model.filters=8", "--config.epochs=8"),
            *("--config.schedule.warmup_epochs=2", "--config.deterministic"),
            f"--workdir={workdir}",
        )
        status, _ = job.wait()
        assert status == 0, job.output()
        (line,) = re.findall(r'\{"weights": .*', job.output())
        top1 = read_summary(workdir)["top1"]
        results[name] = (*json.loads(line)["weights"], top1)
        assert_nothing_runs(cluster, seconds=10)
    first, second, top1 = results["two"]
    assert first == second
    # It was 66.1, and chance is 10.
    assert top1 > 50
    assert results["one"] == results["two"]


def test_killed_rank_on_another_host(cluster, tmp_path):
    workdir = f"--workdir={tmp_path}/run"
    command = python("horovod_recipes.train", *ENDLESS, workdir)
    job = Job(cluster, tmp_path, *BOTH, *command)
    job.wait_for("Epoch 3/")
    os.kill(pid_of_rank(cluster, "h2", rank=1), signal.SIGKILL)
    begin = time.monotonic()
    status, errors = job.wait()
    seconds = time.monotonic() - begin
    assert status == 1, job.output()
    assert seconds < KILL_SECONDS
    assert "rank 0 stopped: rank 1 on h2 is lost: nothing" in errors[0]
    assert_nothing_runs(cluster, seconds=20)
    print(f"a killed rank ended the job in {seconds:.1f} s")


def test_cut_link(cluster, tmp_path):
    """Both ranks end, and each says what it knows."""
    workdir = f"--workdir={tmp_path}/run"
    command = python("horovod_recipes.train", *ENDLESS, workdir)
    job = Job(cluster, tmp_path, *BOTH, *command)
    job.wait_for("Epoch 3/")
    cluster.cut("h2")
    begin = time.monotonic()
    status, errors = job.wait()
    seconds = time.monotonic() - begin
    assert status == 1, job.output()
    assert seconds < CUT_SECONDS
    assert "rank 0 stopped: rank 1 on h2 is lost: nothing" in errors[0]
    # Nobody can tell the other host: its rank gives up by itself. Its sshd
    # waits on, which is not the job's.
    assert_nothing_runs(cluster, seconds=60, besides=b"sshd")
    print(f"a cut link ended the job in {seconds:.1f} s")


def test_slow_link_gives_the_same_result(cluster, tmp_path):
    changed = tmp_path / "changed"
    command = python("tests.cluster.allreduce_job", str(changed))
    job = Job(cluster, tmp_path, *BOTH, *command)
    job.wait_for("fast done")
    kinds = [cluster.slow_down(host) for host in cluster.hosts]
    try:
        changed.touch()
        status, _ = job.wait()
    finally:
        for host in cluster.hosts:
            cluster.speed_up(host)
    assert status == 0, job.output()
    results = [json.loads(r) for r in re.findall(r"\{.*\}", job.output())]
    assert len(results) == 2
    for result in results:
        assert result["is_right"]
        # 4 MB each way take 0.8 s at 40 Mbit/s.
        assert result["slow"] > 0.6
        assert result["slow"] > 3 * result["fast"]
    print(f"with {kinds[0]}: {results}")


def test_elastic_job_loses_a_host_and_takes_it_back(cluster, tmp_path):
    """The discovery script finds the hosts whose sshd answers."""
    discover = tmp_path / "discover.sh"
    discover.write_text(
        "#!/bin/bash\n"
        "for host in h1 h2; do\n"
        '  timeout 1 bash -c "< /dev/tcp/$host/22" && echo $host:1\n'
        "done 2> /dev/null\n"
    )
    discover.chmod(0o755)
    job = Job(
        cluster,
        tmp_path,
        *("-np", "2", "--min-np", "1", "--max-np", "2", *LINK),
        *("--host-discovery-script", str(discover)),
        *("--blacklist-cooldown-range", "2", "4"),
        *("--gloo-timeout-seconds", "60"),
        *python("tests.jobs.elastic_digits_job", "--epochs=8", "--pause=0.7"),
        seconds=600,
    )
    job.wait_for('"epoch": 1, "batch": 2')
    cluster.cut("h2")
    job.wait_for('"start", "ranks": 1', seconds=200)
    cluster.mend("h2")
    job.wait_for('"ranks": 1.*(?s:.*)"start", "ranks": 2', seconds=300)
    status, _ = job.wait()
    assert status == 0, job.output()
    events = [json.loads(e) for e in re.findall(r'\{"event".*\}', job.output())]
    epochs = [e for e in events if e["event"] == "epoch"]
    assert {e["used_once"] for e in epochs} == {4000}
    assert {e["different_weights"] for e in epochs} == {1}
    (summary,) = [e for e in events if e["event"] == "summary"]
    assert summary["each_example_once"]
    assert summary["updates"] == 8 * 8
    assert summary["ranks"] == 2
    # An undisturbed job on one rank has 96.4.
    assert summary["top1"] == pytest.approx(96.4, abs=1.5)
    assert_nothing_runs(cluster, seconds=60)
