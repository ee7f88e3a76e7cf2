"""Notes a SIGTERM, for jobs that stop after a step or before the first."""

import os
import signal

STARTING = "got SIGTERM; the job will stop before its first step"


class Note:
    """A handler of SIGTERM that only notes the signal.

    Attributes:
        received: Whether the signal has come.
        line: String, what the first signal prints; empty for nothing.
    """

    def __init__(self, line=""):
        self.received = False
        self.line = line

    def __call__(self, number, frame):
        if self.line and not self.received:
            # The signal may have come while Python printed.
            os.write(2, f"{self.line}\n".encode())
        self.received = True


def note_while_starting():
    """Notes a SIGTERM from now on to the end of this process.

    It says at once that the signal has come. horovodrun kills a rank that does
    not end within 5 s, and imports can take longer.
    """
    signal.signal(signal.SIGTERM, Note(STARTING))
