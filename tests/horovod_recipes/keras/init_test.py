"""Ranks, as threads of one process, meet before Horovod starts."""

import concurrent.futures
import socket
import time

import horovod.tensorflow
import pytest

from horovod_recipes.keras import _init
from horovod_recipes.keras._server import HOST


def meet(seconds_late, absent=()):
    """Lets ranks meet, and returns the time or the error of each.

    Args:
        seconds_late: List of floats, when each rank comes.
        absent: The ranks that never come.
    """
    size = len(seconds_late)

    def come(rank):
        time.sleep(seconds_late[rank])
        _init.Meeting(rank, size, "start0").wait()
        return time.monotonic()

    with concurrent.futures.ThreadPoolExecutor() as threads:
        results = {
            rank: threads.submit(come, rank)
            for rank in range(size)
            if rank not in absent
        }
    return [r.exception() or r.result() for r in results.values()]


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("late", [0, 1, 3])
def test_no_rank_starts_before_the_last(late):
    begin = time.monotonic()
    starts = meet([0.6 if rank == late else 0.0 for rank in range(4)])
    assert min(starts) - begin >= 0.6


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("late", [0, 1, 3])
def test_every_rank_names_the_one_that_does_not_come(monkeypatch, late):
    monkeypatch.setattr(_init, "SECONDS_TO_WAIT", 0.5)
    errors = meet([0.0] * 4, absent=[late])
    others = [rank for rank in range(4) if rank != late]
    for rank, error in zip(others, errors, strict=True):
        assert isinstance(error, RuntimeError)
        assert str(error).startswith(f"rank {rank} on {HOST} waited ")
        assert f"s for rank {late} to call hvd.init()" in str(error)


@pytest.mark.usefixtures("server")
def test_frozen_rank_0_is_not_waited_for_without_end(monkeypatch):
    monkeypatch.setattr(_init, "SECONDS_TO_WAIT", 0.3)
    _init.Meeting(0, 2, "start0")._ask("PUT", "rank0", b"h1")
    (error,) = meet([0.0, 0.0], absent=[0])
    assert "s for rank 0 to call hvd.init()" in str(error)


@pytest.mark.usefixtures("server")
def test_ranks_meet_again_after_one_that_failed(monkeypatch):
    """A rank that failed before tries the same meeting as the others."""
    monkeypatch.setenv("HOROVOD_SIZE", "2")
    monkeypatch.setenv("HOROVOD_RANK", "1")
    monkeypatch.setattr(horovod.tensorflow, "is_initialized", lambda: False)
    monkeypatch.setattr(horovod.tensorflow, "init", lambda: None)
    monkeypatch.setattr(_init, "_starts", 0)
    monkeypatch.setattr(_init, "SECONDS_TO_WAIT", 0.3)
    with pytest.raises(RuntimeError, match="rank 0 to call"):
        _init.init()
    with concurrent.futures.ThreadPoolExecutor() as threads:
        other = threads.submit(_init.Meeting(0, 2, "start0").wait)
        _init.init()
    assert other.result() is None


@pytest.mark.usefixtures("server")
def test_one_process_beside_a_server_meets_nobody(monkeypatch):
    """Horovod then takes it for rank 0 of 1."""
    for name in ("HOROVOD_RANK", "HOROVOD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(horovod.tensorflow, "is_initialized", lambda: False)
    started = []
    monkeypatch.setattr(horovod.tensorflow, "init", lambda: started.append(1))
    _init.init()
    assert started == [1]


@pytest.mark.usefixtures("server")
def test_rank_0_says_for_whom_it_waits(monkeypatch, capsys):
    monkeypatch.setattr(_init, "SECONDS_UNTIL_NOTE", 0.5)
    meet([0.0, 0.0, 1.5])
    assert capsys.readouterr().err == "rank 0 waits for rank 2\n"


@pytest.mark.usefixtures("server")
def test_longer_limit_of_gloo_holds(monkeypatch):
    monkeypatch.setattr(_init, "SECONDS_TO_WAIT", 0.1)
    monkeypatch.setenv("HOROVOD_GLOO_TIMEOUT_SECONDS", "60")
    begin = time.monotonic()
    assert min(meet([0.0, 0.6])) - begin >= 0.6


def test_lost_horovodrun_is_named(monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_ADDR", "127.0.0.1")
    monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_PORT", str(port))
    monkeypatch.setattr(_init, "SECONDS_OF_SILENCE", 0.3)
    for rank, error in enumerate(meet([0.0, 0.0])):
        assert str(error).startswith(
            f"rank {rank} on {HOST} has not reached horovodrun at 127.0.0.1"
        )
