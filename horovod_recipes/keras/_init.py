"""init: waits for late ranks, and starts Horovod."""

import itertools
import os
import sys
import time

import horovod.tensorflow

from horovod_recipes.keras import _server
from horovod_recipes.keras._server import HOST

# Seconds that a rank waits for another one. Gloo waits 30 s, and its errors do
# not name the rank.
SECONDS_TO_WAIT = 120
# Seconds until rank 0 prints for whom it waits.
SECONDS_UNTIL_NOTE = 30
# Seconds without an answer of the server, until a rank gives up.
SECONDS_OF_SILENCE = 30
# Seconds between two questions, in a job of up to 38 ranks.
PERIOD_SECONDS = 0.1

_starts = itertools.count()


def init(*args, **kwargs):
    """Initializes Horovod, with the arguments of `horovod.tensorflow.init`.

    Under `horovodrun --gloo`, it waits up to 120 s for ranks that are late, or
    longer if `HOROVOD_GLOO_TIMEOUT_SECONDS` is. `horovodrun` itself waits for
    the ranks of an elastic job.

    Under Open MPI, a rank that waits for the others leaves its core to the
    threads that train. To make it spin instead, set
    `OMPI_MCA_mpi_yield_when_idle=0` in the environment.

    Raises:
        RuntimeError: If a rank has not called `init` in this time, or if
            `horovodrun` cannot be reached for 30 s.
    """
    # Horovod starts MPI in `init`, and MPI reads the variable then.
    os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    is_elastic = os.environ.get("HOROVOD_ELASTIC") == "1"
    if (
        _server.address()
        and not is_elastic
        and not horovod.tensorflow.is_initialized()
    ):
        rank, size = (
            int(os.environ[f"HOROVOD_{name}"]) for name in ("RANK", "SIZE")
        )
        Meeting(rank, size, f"start{next(_starts)}").wait()
    horovod.tensorflow.init(*args, **kwargs)


class Meeting:
    """The ranks wait for each other, through the server of `horovodrun`.

    Rank 0 waits for each of the others, and they wait for its word.

    Args:
        rank: Integer, this rank.
        size: Integer, the number of ranks.
        scope: String, the server's name for this meeting.
    """

    def __init__(self, rank, size, scope):
        self._rank = rank
        self._size = size
        self._scope = scope
        self._period = max(
            PERIOD_SECONDS, size / _server.MAX_REQUESTS_PER_SECOND
        )
        gloo_seconds = os.environ.get("HOROVOD_GLOO_TIMEOUT_SECONDS", 0)
        self._limit = max(SECONDS_TO_WAIT, float(gloo_seconds))
        self._begin = time.monotonic()
        self._is_noted = False

    def wait(self):
        """Waits until all ranks have called this."""
        self._ask("PUT", f"rank{self._rank}", HOST.encode())
        if self._rank == 0:
            for other in range(1, self._size):
                self._wait_for(f"rank{other}")
            self._ask("PUT", "all", b"here")
        else:
            self._wait_for("all")

    def _wait_for(self, key):
        while self._ask("GET", key) is None:
            waited = time.monotonic() - self._begin
            if waited > self._limit:
                raise RuntimeError(
                    f"rank {self._rank} on {HOST} waited {waited:.0f} s for "
                    f"rank {self._first_late_rank()}, which has not called "
                    "hvd.init(); see whether its process runs, and what it "
                    "printed"
                )
            if waited > SECONDS_UNTIL_NOTE and not self._is_noted:
                self._is_noted = True
                self._note()
            time.sleep(self._period)

    def _note(self):
        if self._rank == 0:
            late = self._first_late_rank()
            print(f"rank 0 waits for rank {late}", file=sys.stderr, flush=True)

    def _first_late_rank(self):
        for rank in range(self._size):
            if self._ask("GET", f"rank{rank}") is None:
                return rank
        return 0  # All are here, and rank 0 has not said so yet.

    def _ask(self, method, key, body=None):
        """Asks the server until it answers."""
        begin = time.monotonic()
        while True:
            try:
                return _server.request(method, f"/{self._scope}/{key}", body)
            except _server.NOT_REACHED as error:
                silence = time.monotonic() - begin
                if silence > SECONDS_OF_SILENCE:
                    raise RuntimeError(
                        f"rank {self._rank} on {HOST} has not reached "
                        f"horovodrun at {_server.address()} for "
                        f"{silence:.0f} s: {error}"
                    ) from None
            time.sleep(PERIOD_SECONDS)
