"""How the tests of whole jobs find a rank, also where others look like it."""

import signal
import subprocess
import sys

import psutil

from tests.jobs.launcher import signal_rank

# One child has ended, and its parent has not asked; the other looks like a rank
# until its parent ends.
FORKS = """
import os
import time

rank = os.getpid()
if os.fork() == 0:
    os._exit(0)
child = os.fork()
if child == 0:
    while os.getppid() == rank:
        time.sleep(0.05)
    os._exit(0)
print("ready", flush=True)
os.waitpid(child, 0)
"""


def test_the_rank_is_found_among_its_children(monkeypatch, tmp_path):
    of_any = psutil.Process.environ

    def environ(process):
        # As some kernels say, and others only while a process ends.
        if process.status() == psutil.STATUS_ZOMBIE:
            raise psutil.ZombieProcess(process.pid)
        return of_any(process)

    monkeypatch.setattr(psutil.Process, "environ", environ)
    (tmp_path / "forks.py").write_text(FORKS)
    command = f"NUMBER=1 timeout 60 {sys.executable} -m forks; exit $?"
    with subprocess.Popen(
        ["sh", "-c", command], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as job:
        assert job.stdout.readline() == "ready\n"
        signal_rank(job, signal.SIGTERM, "forks", ["NUMBER"], "1")
    # The rank would end with 0 if its child had the signal.
    assert job.returncode == 128 + signal.SIGTERM
