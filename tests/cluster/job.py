"""Jobs on the hosts of a `Cluster`: what they print, and their processes."""

import os
import pathlib
import re
import time

from tests.jobs.launcher import HOROVODRUN
from tests.jobs.launcher import ROOT
from tests.jobs.launcher import limited

LINK = ("--network-interface", "eth0")


class Job:
    """`horovodrun` on h1, which prints to a file."""

    def __init__(self, cluster, folder, *command, seconds=300, env=None):
        self.log = folder / "job.log"
        with self.log.open("wb") as log:
            self.process = cluster.popen(
                "h1",
                *limited([HOROVODRUN, "--gloo", *command], seconds),
                cwd=ROOT,
                env=os.environ | (env or {}),
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


def pid_of_rank(cluster, host, rank=None, seconds=60):
    """Waits for the process of a rank, by default of the host's only one."""
    wanted = "" if rank is None else f"{rank}\0"
    end = time.monotonic() + seconds
    while (pid := _find_rank(cluster, host, wanted)) is None:
        assert time.monotonic() < end, f"no rank on {host}"
        time.sleep(0.2)
    return pid


def _find_rank(cluster, host, wanted):
    for pid in cluster.pids(host):
        process = pathlib.Path("/proc") / str(pid)
        try:
            environment = (process / "environ").read_bytes()
            name = (process / "comm").read_text()
        except OSError:  # The process has ended.
            continue
        if name.startswith("python") and (
            f"\0HOROVOD_RANK={wanted}".encode() in environment
        ):
            return pid
    return None


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
