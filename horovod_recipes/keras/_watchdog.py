"""The callback `Watchdog` ends ranks when one hangs, and names that one.

Horovod's operations wait for all ranks, without a time limit. While they wait,
ranks exchange messages through the key-value server of `horovodrun`. Gloo's
ranks find each other through the same server.

Anyone who reaches that server can write to it. So the ranks sign what they
write, and ignore the rest (docs/security.md).
"""

import contextlib
import faulthandler
import hmac
import itertools
import os
import pathlib
import re
import sys
import threading
import time

import horovod.tensorflow as hvd
import keras
import tensorflow as tf
from horovod.common.exceptions import HorovodInternalError

from horovod_recipes.keras import _server
from horovod_recipes.keras._server import HOST
from horovod_recipes.keras._server import MAX_REQUESTS_PER_SECOND
from horovod_recipes.keras._server import NOT_REACHED

# Seconds between two beats of a rank, in a job of up to 64 ranks.
BEAT_PERIOD_SECONDS = 0.5
# Bytes of the key that signs messages.
KEY_BYTES = 32
# Seconds between reporting a problem and ending, so that other ranks read it.
SECONDS_TO_SAY_WHY = 5


def _folder(module):
    return f"{pathlib.Path(module.__file__).parent}{os.sep}"


# Library folders to skip when reporting where a rank hangs.
TENSORFLOW = _folder(tf)
LIBRARIES = (TENSORFLOW, _folder(keras))
STANDARD_LIBRARY = _folder(os)
# Installed packages may be in a folder inside the standard library's.
INSTALLED = re.compile(r"[/\\](site|dist)-packages[/\\]")
HOROVOD = _folder(hvd)

# Names of Horovod's operations, as in the message of an UnknownError.
_FROM_HOROVOD = re.compile(
    r"Horovod has been shut down|horovod_?(grouped_?)?"
    r"(allreduce|allgather|broadcast|reducescatter|alltoall|join)",
    re.IGNORECASE,
)

_running = None
_collectives = None
_blocks = itertools.count()


class Watchdog(keras.callbacks.Callback):
    """Ends this rank with status 1 when training makes no progress.

    A thread watches while the block runs. Each call of this callback is
    progress: the begin and the end of each batch of training and evaluation,
    and of each epoch. After `seconds` without progress, the rank writes the
    stacks of its threads and the name of the hanging rank to stderr, and ends.

    A rank that does not wait in a collective names itself. A rank that waits
    names the rank that reported a hang, or whose messages have stopped. If a
    rank is killed or its host is lost, Horovod fails on the other ranks.
    `lost_rank` then returns a sentence that names it.

    Create it after `hvd.init()` and list it first among the callbacks. All
    ranks enter the same blocks in the same order:

    ```python
    with hvd.callbacks.Watchdog(seconds=600) as watchdog:
        model.fit(dataset, callbacks=[watchdog, ...])
    ```

    Under Gloo the ranks know each other's state through the server of
    `horovodrun`. MPI does not have a server. There a hanging rank names itself,
    and the others say that they cannot name the rank they waited for.

    Args:
        seconds: Float, the time without progress. It must be longer than any
            time between two batches on any rank: compiling the first step,
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
        self._peers = Peers(hvd.rank(), hvd.size())
        self._main = threading.get_ident()
        self._thread = threading.Thread(
            target=self._watch, name="watchdog", daemon=True
        )
        self.progress()
        self._thread.start()
        _running = self
        if self._peers.server is not None:
            # If a rank is lost already, the next collective fails and says so.
            with contextlib.suppress(tf.errors.OpError, HorovodInternalError):
                key = _shared_key()
                self._peers = Peers(hvd.rank(), hvd.size(), key)
        return self

    def __exit__(self, kind, error, traceback):
        global _running
        _running = None
        self._stop.set()
        self._thread.join()
        if error is None or _is_of_lost_rank(error):
            return
        if not self._peers.find_problem():
            self._peers.report(f"rank {self._rank} on {HOST} failed: {error}")

    def progress(self):
        """Notes that this rank is not stuck."""
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
        """Returns a sentence that names the lost rank, or None.

        Call it when a collective has failed. It takes up to 5 seconds, or
        longer in jobs of more than 64 ranks. Under MPI it returns None at once.
        """
        if self._peers.key is None:
            return None
        self._asked = True
        time.sleep(self._peers.delay)
        end = time.monotonic() + 2 * self._peers.silence
        while time.monotonic() < end:
            # The watching thread may be the caller, so beat here.
            self._peers.beat(self._steps)
            if problem := self._peers.find_problem():
                return problem
            time.sleep(self._peers.period)
        return None

    def _watch(self):
        self._stop.wait(self._peers.delay)
        beats_in_vain = 0
        while not self._stop.wait(self._peers.period):
            self._peers.beat(self._steps)
            # Horovod fails at once only on ranks that talk to the lost rank.
            # The others end here, at the second beat: Horovod may fail first.
            problem = self._peers.known_problem
            in_vain = problem and not self._asked and self._waits()
            beats_in_vain = beats_in_vain + 1 if in_vain else 0
            idle = time.monotonic() - self._last_progress
            if idle > self._seconds or beats_in_vain == 2:
                self._end(idle)

    def _end(self, idle):
        waits = self._waits()
        where = f"for {idle:.0f} s after step {self._steps} of its training"
        if not waits:
            cause = (
                f"rank {self._rank} on {HOST} hangs: no "
                f"progress {where}, in {self._place()}"
            )
            self._peers.report(cause)
        elif problem := self.lost_rank():
            cause = f"rank {self._rank} waited {where}: {problem}"
        else:
            cause = (
                f"rank {self._rank} waited {where} for one that cannot be "
                "named: none says that it hangs. If all ranks wait, they wait "
                "in different collectives: see the stacks"
            )
        print(f"stacks of rank {self._rank}:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        print(f"error: {cause}", file=sys.stderr, flush=True)
        # The others need time to read this and to name this rank.
        time.sleep(SECONDS_TO_SAY_WHY * (1 if waits else 2))
        os._exit(1)

    def _waits(self):
        """Whether the main thread waits for other ranks in a collective."""
        in_graph = _collectives.entered > _collectives.left
        return in_graph or any(
            frame.f_code.co_filename.startswith(HOROVOD)
            for frame in self._frames()
        )

    def _place(self):
        """Returns where the main thread is, outside of library code."""
        frames = self._frames()
        own = next(
            (f for f in frames if not is_library(f.f_code.co_filename)),
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


def is_library(path):
    in_standard_library = path.startswith(STANDARD_LIBRARY)
    return path.startswith(LIBRARIES) or (
        in_standard_library and not INSTALLED.search(path)
    )


def lost_rank():
    """Returns a sentence that names the lost rank, or None.

    It returns None too if no `Watchdog` runs.
    """
    return _running.lost_rank() if _running else None


def is_lost_rank(error):
    """Whether an error comes from a collective that a rank did not finish."""
    if isinstance(error, HorovodInternalError):
        return True
    return (
        isinstance(error, tf.errors.UnknownError)
        and _FROM_HOROVOD.search(error.message) is not None
    )


def _is_of_lost_rank(error):
    """Whether such an error is this error or one of its causes."""
    while error is not None and not is_lost_rank(error):
        error = error.__cause__
    return error is not None


def tracked(collective):
    """Returns the collective, with counters that the watchdog reads.

    Args:
        collective: A function of a list of tensors. Some may be None.
            It returns such a list when all ranks have called it.
    """

    def tracking(tensors):
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
        # TensorFlow prunes operations that the results do not depend on.
        with tf.control_dependencies([left]):
            return [r if r is None else tf.identity(r) for r in results]

    return tracking


class _Collectives:
    """Counts the collectives that this rank's steps have entered and left."""

    def __init__(self):
        with tf.init_scope(), tf.device("CPU"):
            self.entered = tf.Variable(0, dtype=tf.int64, trainable=False)
            self.left = tf.Variable(0, dtype=tf.int64, trainable=False)

    def reset(self):
        """Forgets collectives that failed, which the rank never left."""
        self.entered.assign(0)
        self.left.assign(0)


def _shared_key():
    """Returns random bytes that rank 0 sends to all ranks."""
    with tf.init_scope(), tf.device("CPU"):
        key = tf.constant(list(os.urandom(KEY_BYTES)), tf.uint8)
        key = hvd.broadcast(key, 0, name="horovod_recipes_watchdog_key")
    return key.numpy().tobytes()


class Peers:
    """The messages between ranks through the server of `horovodrun`.

    Each rank writes its own beats and reads those of the next rank. When it
    finds a problem, it writes it once, for all ranks. `key`, bytes, signs the
    messages. Without a key, the rank neither writes nor reads.
    """

    def __init__(self, rank, size, key=None):
        # Seconds between two beats, of three requests each.
        self.period = max(
            BEAT_PERIOD_SECONDS, 3 * size / MAX_REQUESTS_PER_SECOND
        )
        # Seconds before the first beat, which spread the ranks' requests.
        self.delay = self.period * rank / size
        # Seconds without a beat until a rank is lost: two beats, and a margin.
        self.silence = 2 * self.period + 1.5
        self.server = _server.address()
        self.key = key
        # Each object has its own scope: earlier messages are out of date.
        self._scope = f"watchdog{next(_blocks)}"
        self._rank = rank
        self._next = (rank + 1) % size
        self._beats = 0
        # The number of a beat, the host and the step.
        self._beat_of_next = (0, None, None)
        self._next_heard = self._server_heard = time.monotonic()
        # The problem that any rank has reported, or None.
        self.known_problem = None

    def beat(self, steps):
        """Writes this rank's beat and reads that of the next rank."""
        if self.key is None:
            return
        self._beats += 1
        beat = f"{self._beats} {HOST} {steps}"
        try:
            self._request("PUT", f"rank{self._rank}", beat)
            heard = self._request("GET", f"rank{self._next}")
            # A stranger can overwrite a problem that this rank has read.
            problem = self.known_problem or self._request("GET", "problem")
        except NOT_REACHED:
            return
        self.known_problem = problem
        self._server_heard = time.monotonic()
        if heard is None:
            return
        number, host, steps = heard.split()
        # A stranger can write an old beat again.
        if int(number) > self._beat_of_next[0]:
            self._beat_of_next = (int(number), host, steps)
            self._next_heard = self._server_heard

    def report(self, problem):
        """Writes a problem for all ranks to read."""
        if self.key is None:
            return
        with contextlib.suppress(*NOT_REACHED):
            self._request("PUT", "problem", problem)

    def find_problem(self):
        """Returns the problem that this or another rank has found, or None."""
        if self.key is None or self.known_problem:
            return self.known_problem
        now = time.monotonic()
        if now - self._server_heard > self.silence:
            return (
                f"rank {self._rank} on {HOST} is cut off: it has not reached "
                f"horovodrun at {self.server} for "
                f"{now - self._server_heard:.0f} s"
            )
        number, host, steps = self._beat_of_next
        if number and now - self._next_heard > self.silence:
            problem = (
                f"rank {self._next} on {host} is lost: nothing has been heard "
                f"of it for {now - self._next_heard:.0f} s, after step {steps} "
                "of its training; its process has ended, or its host cannot "
                "be reached"
            )
            self.report(problem)
            return problem
        return None

    def _request(self, method, name, text=None):
        path = f"/{self._scope}/{name}"
        body = None if text is None else self._signed(path, text.encode())
        answer = _server.request(method, path, body)
        if answer is None:
            return None
        _, _, text = answer.partition(b" ")
        # A copy of another message is not signed for this path.
        is_of_a_rank = hmac.compare_digest(answer, self._signed(path, text))
        return " ".join(text.decode().split()) if is_of_a_rank else None

    def _signed(self, path, text):
        message = b" ".join((path.encode(), text))
        digest = hmac.new(self.key, message, "sha256").hexdigest()
        return b" ".join((digest.encode(), text))
