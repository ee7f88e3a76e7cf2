"""The hosts themselves: they reach each other, and leave nothing behind."""

import signal
import subprocess
import sys

import pytest

from tests.cluster import hosts

# A test session that creates hosts, and waits.
SESSION = """
import pytest

def test(cluster):
    print("ready", flush=True)
    input()
"""


def test_hosts_are_three_and_reach_each_other_alone():
    cluster = hosts.Cluster(3)
    try:
        address = cluster.run("h1", "ssh", "h3", "ip", "-brief", "address")
        assert "10.77.0.3/24" in address
        cluster.cut("h3")
        with pytest.raises(subprocess.CalledProcessError):
            cluster.run("h2", *("ssh", "-o", "ConnectTimeout=2", "h3", "true"))
        cluster.mend("h3")
        # The switch needs some seconds before it forwards again.
        cluster.run("h2", *("ssh", "-o", "ConnectionAttempts=20", "h3", "true"))
        # There is no route to any other network.
        for host in cluster.hosts:
            routes = cluster.run(host, "ip", "-brief", "route").split()
            assert routes[0] == "10.77.0.0/24"
            assert "default" not in routes
    finally:
        cluster.remove()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_ended_session_leaves_nothing_behind(tmp_path, number):
    """The ended session runs beside this one."""
    (tmp_path / "session_test.py").write_text(SESSION)
    session = subprocess.Popen(
        [
            *(sys.executable, "-m", "pytest", "-q", "-s", "-p"),
            *("tests.cluster.conftest", str(tmp_path)),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    while "ready" not in (line := session.stdout.readline()):
        assert line
    prefix = f"{hosts.PREFIX}{session.pid}-0-"
    mine = sorted(n for n in hosts.namespaces() if n.startswith(prefix))
    assert mine == [prefix + name for name in ("h1", "h2", "switch")]
    session.send_signal(number)
    session.wait(timeout=60)
    session.stdin.close()
    session.stdout.close()
    if number == signal.SIGKILL:
        hosts.remove_stale()
    assert not [n for n in hosts.namespaces() if n.startswith(prefix)]
    assert not list(hosts.ETC.glob(prefix + "*"))
