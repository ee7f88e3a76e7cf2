"""The watchdog in one process, with the beats of other ranks simulated."""

import contextlib
import http.client
import itertools
import os
import pathlib
import threading
import time

import keras
import pytest
import tensorflow as tf

import horovod_recipes.keras as hvd
from horovod_recipes.errors import JobError
from horovod_recipes.keras import _watchdog
from horovod_recipes.keras._server import HOST
from horovod_recipes.keras._server import MAX_ANSWER_BYTES
from horovod_recipes.keras._watchdog import SECONDS_TO_SAY_WHY
from horovod_recipes.keras.callbacks import Watchdog
from horovod_recipes.training.failures import explained

# The error on one of two ranks when the other dies during an allreduce.
IN_FLIGHT = tf.errors.UnknownError(
    None,
    None,
    "[external/gloo/transport/tcp/pair.cc:589] Read error [127.0.0.1]:1: "
    "Connection reset by peer\n\t [[{{node "
    "DistributedOptimizer_float32/HorovodGroupedAllreduce}}]]",
)
# Signs the messages of the ranks.
KEY = b"known to the ranks alone"


class Clock:
    """Replaces `time`: sleeping takes no time."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture(autouse=True)
def _one_block(monkeypatch):
    """All peers are in one block."""
    monkeypatch.setattr(_watchdog, "_blocks", itertools.repeat(0))


@pytest.fixture
def _alone(monkeypatch):
    """One process without a server, as under MPI."""
    monkeypatch.delenv("HOROVOD_GLOO_RENDEZVOUS_ADDR", raising=False)
    hvd.init()


def dog_of_rank(rank, size):
    dog = Watchdog()
    dog._rank, dog._steps = rank, 0
    dog._peers = _watchdog.Peers(rank, size, KEY)
    return dog


@pytest.mark.parametrize("size", [2, 64, 512])
def test_names_a_silent_rank_in_a_job_of_any_size(server, monkeypatch, size):
    monkeypatch.setattr(_watchdog, "time", Clock())
    dog = dog_of_rank(0, size)
    _watchdog.Peers(1, size, KEY).beat(steps=7)
    assert dog.lost_rank().startswith(
        f"rank 1 on {HOST} is lost: nothing has been heard of it for "
    )
    assert "after step 7 of its training" in dog.lost_rank()
    # All other ranks know it too.
    last = _watchdog.Peers(size - 1, size, KEY)
    last.beat(steps=7)
    assert last.find_problem() == dog._peers.find_problem()
    # A rank that ends with an error waits until all ranks have read it.
    assert last.delay < last.period < SECONDS_TO_SAY_WHY
    # One Python process answers them all.
    assert 3 * size / last.period <= 384


@pytest.mark.parametrize("size", [2, 64, 512])
def test_names_no_rank_that_lives(server, monkeypatch, size):
    """One of its beats is lost, and the next one is a second late."""
    clock = Clock()
    monkeypatch.setattr(_watchdog, "time", clock)
    peers, other = (_watchdog.Peers(rank, size, KEY) for rank in (0, 1))
    other.beat(steps=1)
    peers.beat(steps=1)
    clock.sleep(2 * peers.period + 1)
    assert peers.find_problem() is None
    other.beat(steps=1)
    peers.beat(steps=1)
    clock.sleep(2 * peers.period + 1)
    assert peers.find_problem() is None
    clock.sleep(1)
    # This rank no longer reaches the server either.
    assert peers.find_problem().startswith(
        f"rank 0 on {HOST} is cut off: it has not"
    )


@pytest.mark.usefixtures("_alone")
def test_without_a_server_none_is_found_at_once():
    with Watchdog() as dog:
        begin = time.monotonic()
        assert _watchdog.lost_rank() is None
        assert time.monotonic() - begin < _watchdog.BEAT_PERIOD_SECONDS
    dog._peers.report("nobody reads this")
    assert dog._peers.find_problem() is None


def ask_server(method, path, body=None):
    """Sends a request to the server, as a stranger can."""
    connection = http.client.HTTPConnection(
        "127.0.0.1", int(os.environ["HOROVOD_GLOO_RENDEZVOUS_PORT"])
    )
    with contextlib.closing(connection):
        connection.request(method, path, body)
        return connection.getresponse().read()


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"rank 1 on h2 hangs",
        b"\xff\xfe \xff",
        b"0" * 64 + b" rank 1 on h2 hangs",
        b"x" * 2 * MAX_ANSWER_BYTES,
        None,
    ],
    ids=["empty", "text", "bytes", "signature", "long", "other_key"],
)
def test_problem_of_a_stranger_is_ignored(server, message):
    """Without the key it cannot sign, and so cannot end the job."""
    stranger, peers, other = (
        _watchdog.Peers(rank, 2, key)
        for rank, key in ((1, b"a guess"), (0, KEY), (1, KEY))
    )
    if message is None:
        stranger.report("rank 1 on h2 hangs")
    else:
        ask_server("PUT", "/watchdog0/problem", message)
    assert ask_server("GET", "/watchdog0/problem") != b"" or message == b""
    peers.beat(steps=1)
    assert peers.find_problem() is None
    other.report("rank 1 on h2 failed: ü")
    peers.beat(steps=1)
    assert peers.find_problem() == "rank 1 on h2 failed: ü"
    ask_server("PUT", "/watchdog0/problem", b"")
    peers.beat(steps=1)
    assert peers.find_problem() == "rank 1 on h2 failed: ü"


def test_stranger_cannot_feign_the_beat_of_a_lost_rank(server, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(_watchdog, "time", clock)
    peers, other = (_watchdog.Peers(rank, 2, KEY) for rank in (0, 1))
    other.beat(steps=1)
    first = ask_server("GET", "/watchdog0/rank1")
    ask_server("PUT", "/watchdog0/problem", first)
    other.beat(steps=2)
    peers.beat(steps=1)
    assert peers.known_problem is None
    for feigned in (b"1000 h2 1", first):
        clock.sleep(peers.silence / 2 + 0.1)
        ask_server("PUT", "/watchdog0/rank1", feigned)
        peers.beat(steps=1)
    assert peers.find_problem().startswith(f"rank 1 on {HOST} is lost")
    assert "after step 2 of its training" in peers.find_problem()


@pytest.mark.parametrize("wrapped", [False, True])
def test_survivor_does_not_say_that_it_failed(server, monkeypatch, wrapped):
    """Nor does it if a `JobError` was raised from the error."""
    monkeypatch.setattr(_watchdog, "_shared_key", lambda: KEY)
    hvd.init()

    def fail():
        with Watchdog():
            if wrapped:
                raise JobError("a disk") from IN_FLIGHT
            raise IN_FLIGHT

    with pytest.raises(Exception, match=r"reset by peer|a disk"):
        fail()
    other = _watchdog.Peers(1, 2, KEY)
    other.beat(steps=0)
    assert other.find_problem() is None


@pytest.mark.usefixtures("_alone")
def test_error_in_an_allreduce_names_another_rank():
    with pytest.raises(JobError, match="rank 0 stopped: another rank"):
        with explained():
            raise IN_FLIGHT
    with pytest.raises(JobError, match="rank 0 failed: UnknownError: OSErr"):
        with explained():
            raise tf.errors.UnknownError(None, None, "OSError: disk on fire")


@pytest.mark.usefixtures("_alone")
def test_second_block_watches_too():
    dog = Watchdog()
    with dog:
        dog.on_train_batch_end(0)
    assert not dog._thread.is_alive()
    with dog:
        assert dog._steps == 0
        time.sleep(3 * _watchdog.BEAT_PERIOD_SECONDS)
        assert dog._thread.is_alive()


@pytest.mark.usefixtures("_alone")
def test_failed_collective_is_not_waited_for_in_the_next_block():
    def fail(tensors):
        raise IN_FLIGHT

    with Watchdog() as dog:
        with pytest.raises(tf.errors.UnknownError):
            _watchdog.tracked(fail)([tf.ones(3)])
        assert dog._waits()
    with Watchdog() as dog:
        assert not dog._waits()


def test_installed_packages_are_no_libraries():
    """They may be in a folder inside the standard library's."""
    standard = pathlib.Path(os.__file__).parent
    for folder in ("site-packages", "dist-packages"):
        path = standard / folder / "theirs" / "model.py"
        assert not _watchdog.is_library(str(path))
    keras_lars = pathlib.Path(keras.__file__).parent.with_name("keras_lars")
    assert not _watchdog.is_library(str(keras_lars / "lars.py"))
    for module in (threading, keras, tf):
        assert _watchdog.is_library(module.__file__)
