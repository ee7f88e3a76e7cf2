"""Hosts for the tests of jobs on several hosts."""

import signal

import pytest

from tests.cluster.hosts import Cluster


@pytest.fixture(scope="session")
def _cluster():
    # SIGTERM then acts as Ctrl-C: pytest removes the hosts before it ends.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    cluster = Cluster(2)
    yield cluster
    cluster.remove()
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def cluster(_cluster):
    """Two hosts, `h1` and `h2`, without processes."""
    for host in _cluster.hosts:
        # The sshd of an earlier connection takes a moment to end.
        _cluster.kill(host)
    yield _cluster
    for host in _cluster.hosts:
        _cluster.mend(host)
        _cluster.kill(host)
