"""Imports TensorFlow without its banner, for commands that people run."""

import contextlib
import os
import signal
import subprocess
import sys

# Parts of the lines that TensorFlow prints whatever its log level is.
BANNER = (
    "All log messages before absl::InitializeLog",
    "oneDNN custom operations are on",
)


@contextlib.contextmanager
def without_banner():
    """Removes TensorFlow's banner from the stderr of a block.

    Import TensorFlow in the block. A child process filters the lines: messages
    still arrive if TensorFlow aborts this process. It ignores a SIGTERM to all
    processes, which this process may survive.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.stderr.flush()
    stderr = os.dup(2)
    command = ["sed", "--unbuffered", *(f"--expression=/{b}/d" for b in BANNER)]
    with _sigterm_blocked():
        sed = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stderr)
    with sed:
        os.dup2(sed.stdin.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)


@contextlib.contextmanager
def _sigterm_blocked():
    """Lets SIGTERM wait for the end of a block; its children never get it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
