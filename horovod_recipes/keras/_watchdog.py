"""Ends a rank that hangs, or that waits for one that does, and names it.

Horovod's operations wait for all ranks, for ever. What a rank needs to know of
the others while they are stuck goes through the key-value server with which
`horovodrun` brings Gloo's ranks together, in a scope of its own.
"""

import contextlib
import faulthandler
import http.client
import itertools
import os
import pathlib
import re
import socket
import sys
import threading
import time

import horovod.tensorflow as hvd
import keras
import tensorflow as tf
from horovod.common.exceptions import HorovodInternalError

# Seconds between two signs of life of a rank, in a job of up to 64 ranks.
PERIOD = 0.5
# In larger ones all ranks together ask the server so often in a second.
REQUESTS = 384
# Seconds that the server may take to answer.
PATIENCE = 1.25
# A rank that knows what is wrong ends so many seconds after it has told the
# others, who ask within a period. Then horovodrun leaves them 5 seconds more.
SECONDS_TO_SAY_WHY = 5


def _folder(module):
    return f"{pathlib.Path(module.__file__).parent}{os.sep}"


# Whose code a hang is not explained by.
TENSORFLOW = _folder(tf)
LIBRARIES = (TENSORFLOW, _folder(keras))
STANDARD_LIBRARY = _folder(os)
# Where installed packages are, within the standard library's folder too.
INSTALLED = re.compile(r"[/\\](site|dist)-packages[/\\]")
HOROVOD = _folder(hvd)

# In the message of an UnknownError that comes from one of Horovod's operations,
# grouped or not, eager or in a graph, where their names are written like this.
_FROM_HOROVOD = re.compile(
    r"Horovod has been shut down|horovod_?(grouped_?)?"
    r"(allreduce|allgather|broadcast|reducescatter|alltoall|join)",
    re.IGNORECASE,
)

NOT_REACHED = (OSError, http.client.HTTPException)
HOST = os.environ.get("HOROVOD_HOSTNAME") or socket.gethostname()

_running = None
_collectives = None
_blocks = itertools.count()


class Watchdog(keras.callbacks.Callback):
    """Ends this rank with status 1 when training stands still for too long.

    A thread watches while the block runs. Progress is every call of this
    callback: the begin and the end of each batch of training and evaluation,
    and of each epoch. Without any for `seconds`, the rank writes the stacks of
    all its threads to stderr, and a line that names the rank that hangs: this
    one, unless it waits for the others in a collective; or the one that says
    of itself that it hangs, or of which nothing is heard any more. Then this
    rank ends. A rank that is killed, or whose host is lost, makes Horovod fail
    on the others; `lost_rank` then tells its name.

    List it first among the callbacks, after `hvd.init()`; all ranks enter the
    same blocks, in the same order:

    ```python
    with hvd.callbacks.Watchdog(seconds=600) as watchdog:
        model.fit(dataset, callbacks=[watchdog, ...])
    ```

    The names of other ranks come from the server of `horovodrun` with Gloo.
    Under MPI there is none: a rank that hangs names itself, and the others
    say that they waited for a rank that they cannot name.

    Args:
        seconds: Float, the time without progress. It must be longer than what
            may pass on any rank between two batches: compiling the first step,
            filling the shuffle buffer, writing a checkpoint. Defaults to `600`.
    """

    def __init__(self, seconds=600):
        super().__init__()
        if seconds <= 0:
            raise ValueError(
                "Argument `seconds` must be above 0. "
                f"Received: seconds={seconds!r}"
            )
        self._seconds = seconds

    def __enter__(self):
        global _running, _collectives
        _collectives = _collectives or _Collectives()
        _collectives.reset()
        self._steps = 0
        self._asked = False
        self._stop = threading.Event()
        self._rank = hvd.rank()
        self._peers = _Peers(hvd.rank(), hvd.size())
        self._main = threading.get_ident()
        self._thread = threading.Thread(
            target=self._watch, name="watchdog", daemon=True
        )
        self.progress()
        self._thread.start()
        _running = self
        return self

    def __exit__(self, kind, error, traceback):
        global _running
        _running = None
        self._stop.set()
        self._thread.join()
        if error is None or _is_of_lost_rank(error):
            return
        if not self._peers.found():
            self._peers.tell(f"rank {self._rank} on {HOST} failed: {error}")

    def progress(self):
        """Says that this rank is not stuck."""
        self._last_progress = time.monotonic()

    def _progress(self, *args, **kwargs):
        self.progress()

    on_train_begin = on_train_end = on_epoch_begin = on_epoch_end = _progress
    on_test_begin = on_test_end = _progress
    on_train_batch_begin = on_test_batch_begin = on_test_batch_end = _progress

    def on_train_batch_end(self, batch, logs=None):
        self._steps += 1
        self.progress()

    def lost_rank(self):
        """Returns which rank is lost, in words, or None where none is found.

        For the moment when a collective has failed. Takes up to 5 seconds, in
        jobs of more than 64 ranks longer; under MPI, where none can be found,
        no time.
        """
        if self._peers.server is None:
            return None
        self._asked = True
        time.sleep(self._peers.delay)
        end = time.monotonic() + 2 * self._peers.silence
        while time.monotonic() < end:
            # The thread that does so may be the one that asks.
            self._peers.beat(self._steps)
            if found := self._peers.found():
                return found
            time.sleep(self._peers.period)
        return None

    def _watch(self):
        self._stop.wait(self._peers.delay)
        in_vain = 0
        while not self._stop.wait(self._peers.period):
            self._peers.beat(self._steps)
            # With three ranks or more, Horovod fails at once only where ranks
            # speak with the lost one; others wait for longer than horovodrun
            # leaves them. The second time, so that Horovod can fail first.
            told = self._peers.told and not self._asked and self._waits()
            in_vain = in_vain + 1 if told else 0
            idle = time.monotonic() - self._last_progress
            if idle > self._seconds or in_vain == 2:
                self._end(idle)

    def _end(self, idle):
        waits = self._waits()
        where = f"for {idle:.0f} s after step {self._steps} of its training"
        if not waits:
            cause = (
                f"rank {self._rank} on {HOST} hangs: no "
                f"progress {where}, in {self._place()}"
            )
            self._peers.tell(cause)
        elif found := self.lost_rank():
            cause = f"rank {self._rank} waited {where}: {found}"
        else:
            cause = (
                f"rank {self._rank} waited {where} for one that cannot be "
                "named: none says that it hangs. Where all ranks wait, it is "
                "for different collectives: see the stacks"
            )
        print(f"stacks of rank {self._rank}:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        print(f"error: {cause}", file=sys.stderr, flush=True)
        # The others may find out a moment later, and are to name this rank.
        time.sleep(SECONDS_TO_SAY_WHY * (1 if waits else 2))
        os._exit(1)

    def _waits(self):
        """Whether the main thread waits for other ranks, in a collective."""
        in_graph = _collectives.entered > _collectives.left
        return in_graph or any(
            frame.f_code.co_filename.startswith(HOROVOD)
            for frame in self._frames()
        )

    def _place(self):
        """Returns where the main thread is, in code that is not a library's."""
        frames = self._frames()
        own = next(
            (f for f in frames if not _is_library(f.f_code.co_filename)),
            frames[0],
        )
        code = own.f_code
        place = f"{code.co_name}, {code.co_filename}:{own.f_lineno}"
        if frames[0].f_code.co_filename.startswith(TENSORFLOW):
            place += (
                ", inside TensorFlow: the input pipeline or the step itself"
            )
        return place

    def _frames(self):
        """Returns the Python frames of the main thread, innermost first."""
        frames = [sys._current_frames()[self._main]]
        while frames[-1].f_back:
            frames.append(frames[-1].f_back)
        return frames


def _is_library(path):
    in_standard_library = path.startswith(STANDARD_LIBRARY)
    return path.startswith(LIBRARIES) or (
        in_standard_library and not INSTALLED.search(path)
    )


def lost_rank():
    """Returns which rank is lost, in words; None without a `Watchdog`, too."""
    return _running.lost_rank() if _running else None


def is_lost_rank(error):
    """Whether an error is that of a collective which a rank did not finish."""
    if isinstance(error, HorovodInternalError):
        return True
    return (
        isinstance(error, tf.errors.UnknownError)
        and _FROM_HOROVOD.search(error.message) is not None
    )


def _is_of_lost_rank(error):
    """Whether an error is such a one, or was raised from such a one."""
    while error is not None and not is_lost_rank(error):
        error = error.__cause__
    return error is not None


def noted(collective):
    """Makes the watchdog see when a step waits inside a collective.

    Args:
        collective: A function of a list of tensors, of which some may be None,
            that returns such a list when all ranks have called it.
    """

    def noting(tensors):
        if _collectives is None:
            return collective(tensors)
        present = [t for t in tensors if t is not None]
        with tf.control_dependencies(present):
            entered = _collectives.entered.assign_add(1)
        with tf.control_dependencies([entered]):
            tensors = [t if t is None else tf.identity(t) for t in tensors]
        results = collective(tensors)
        with tf.control_dependencies([r for r in results if r is not None]):
            left = _collectives.left.assign_add(1)
        # A graph of gradients holds only what its results depend on.
        with tf.control_dependencies([left]):
            return [r if r is None else tf.identity(r) for r in results]

    return noting


class _Collectives:
    """Counts the collectives that this rank's steps have entered and left."""

    def __init__(self):
        with tf.init_scope(), tf.device("CPU"):
            self.entered = tf.Variable(0, dtype=tf.int64, trainable=False)
            self.left = tf.Variable(0, dtype=tf.int64, trainable=False)

    def reset(self):
        """Forgets the collectives that have failed, and were never left."""
        self.entered.assign(0)
        self.left.assign(0)


class _Peers:
    """What ranks tell each other through the server of `horovodrun`.

    Each rank writes that it lives, and reads that the next one does; what one
    finds is written once, for all.
    """

    def __init__(self, rank, size):
        # Seconds between two beats, of three requests each.
        self.period = max(PERIOD, 3 * size / REQUESTS)
        # Before the first one, so that the ranks do not ask all at once.
        self.delay = self.period * rank / size
        # A rank is lost after so long without a beat: one may not get through,
        # and the next one may be late.
        self.silence = 2 * self.period + 1.5
        self.server = os.environ.get("HOROVOD_GLOO_RENDEZVOUS_ADDR")
        # What was written in an earlier block is no longer true.
        self._scope = f"watchdog{next(_blocks)}"
        self._rank = rank
        self._next = (rank + 1) % size
        self._port = os.environ.get("HOROVOD_GLOO_RENDEZVOUS_PORT")
        self._beats = 0
        self._of_next = None
        self._next_heard = self._server_heard = time.monotonic()
        self.told = None

    def beat(self, steps):
        """Says that this rank lives, and hears of the next one."""
        if self.server is None:
            return
        self._beats += 1
        beat = f"{self._beats} {HOST} {steps}"
        try:
            self._request("PUT", f"rank{self._rank}", beat)
            heard = self._request("GET", f"rank{self._next}")
            self.told = self._request("GET", "found")
        except NOT_REACHED:
            return
        self._server_heard = time.monotonic()
        if heard != self._of_next:
            self._of_next, self._next_heard = heard, self._server_heard

    def tell(self, found):
        """Writes what is wrong, for all ranks to read."""
        if self.server is None:
            return
        with contextlib.suppress(*NOT_REACHED):
            self._request("PUT", "found", found)

    def found(self):
        """Returns what any rank has found to be wrong, or None."""
        if self.server is None or self.told:
            return self.told
        now = time.monotonic()
        if now - self._server_heard > self.silence:
            return (
                f"rank {self._rank} on {HOST} is cut off: it "
                f"has not reached horovodrun at {self.server} for "
                f"{now - self._server_heard:.0f} s"
            )
        if self._of_next and now - self._next_heard > self.silence:
            _, host, steps = self._of_next.split()
            found = (
                f"rank {self._next} on {host} is lost: nothing has been heard "
                f"of it for {now - self._next_heard:.0f} s, after step {steps} "
                "of its training; its process has ended, or its host cannot "
                "be reached"
            )
            self.tell(found)
            return found
        return None

    def _request(self, method, key, text=None):
        connection = http.client.HTTPConnection(
            self.server, int(self._port), timeout=PATIENCE
        )
        with contextlib.closing(connection):
            body = None if text is None else text.encode()
            connection.request(method, f"/{self._scope}/{key}", body)
            response = connection.getresponse()
            text = response.read().decode()
            return text if response.status == http.client.OK else None
