"""Has `init` wait for late ranks before it starts Horovod."""

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
# What rank 0 writes when all ranks are here.
ALL_HERE = b"all ranks are here"

_starts = 0


def init(*args, **kwargs):
    """Initializes Horovod, with the arguments of `horovod.tensorflow.init`.

    Under `horovodrun --gloo`, ranks wait for a late one for 120 s, or for
    `HOROVOD_GLOO_TIMEOUT_SECONDS` if that is longer. In an elastic job, Gloo
    waits instead: for `HOROVOD_GLOO_TIMEOUT_SECONDS`, by default 30 s.

    Under Open MPI, a rank that waits for the others leaves its core to the
    threads that train. To make it spin instead, set
    `OMPI_MCA_mpi_yield_when_idle=0` in the environment.

    Raises:
        RuntimeError: If a rank has not called `init` in this time, or if
            `horovodrun` cannot be reached for 30 s.
    """
    global _starts
    # Horovod starts MPI in `init`, and MPI reads the variable then.
    os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    size = int(os.environ.get("HOROVOD_SIZE", 1))
    is_elastic = os.environ.get("HOROVOD_ELASTIC") == "1"
    is_started = horovod.tensorflow.is_initialized()
    if _server.address() and size > 1 and not is_elastic and not is_started:
        rank = int(os.environ["HOROVOD_RANK"])
        Meeting(rank, size, f"start{_starts}").wait()
        # After a failure, the next call takes part in the same meeting.
        _starts += 1
    horovod.tensorflow.init(*args, **kwargs)


class Meeting:
    """The ranks wait for each other, through the server of `horovodrun`.

    Rank 0 waits for each of the others. They wait until it writes that all are
    here, or which rank is late.

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
        gloo_seconds = os.environ.get("HOROVOD_GLOO_TIMEOUT_SECONDS") or 0
        self._limit = max(SECONDS_TO_WAIT, float(gloo_seconds))
        self._begin = time.monotonic()
        self._is_noted = False

    def wait(self):
        """Waits until all ranks have called this."""
        self._ask("PUT", f"rank{self._rank}", HOST.encode())
        if self._rank == 0:
            for other in range(1, self._size):
                self._wait_for_rank(other)
            self._ask("PUT", "word", ALL_HERE)
        else:
            self._wait_for_word()

    def _wait_for_rank(self, other):
        while self._ask("GET", f"rank{other}") is None:
            if self._waited() > self._limit:
                self._ask("PUT", "word", str(other).encode())
                self._fail(other)
            if self._waited() > SECONDS_UNTIL_NOTE and not self._is_noted:
                self._is_noted = True
                print(
                    f"rank 0 waits for rank {other}",
                    file=sys.stderr,
                    flush=True,
                )
            time.sleep(self._period)

    def _wait_for_word(self):
        while (word := self._ask("GET", "word")) is None:
            waited = self._waited()
            # If rank 0 is here, it may itself wait so long for the others.
            if waited > 2 * self._limit or (
                waited > self._limit and self._ask("GET", "rank0") is None
            ):
                self._fail(0)
            time.sleep(self._period)
        if word != ALL_HERE:
            self._fail(word.decode(errors="replace"))

    def _waited(self):
        return time.monotonic() - self._begin

    def _fail(self, late):
        raise RuntimeError(
            f"rank {self._rank} on {HOST} waited {self._waited():.0f} s for "
            f"rank {late} to call hvd.init(); see whether its process runs, "
            "and what it printed"
        )

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
