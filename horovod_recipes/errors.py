"""Errors that end a job with one clear line, the same on every rank."""

import contextlib

import tensorflow as tf
from horovod.common.exceptions import HorovodInternalError

import horovod_recipes.keras as hvd
from horovod_recipes.keras.watchdog import lost_rank

# What can surface on a rank when another rank has ended.
SHUTDOWN_ERRORS = (tf.errors.OpError, HorovodInternalError)


class JobError(Exception):
    """What is wrong and how to mend it, in one line."""


@contextlib.contextmanager
def raised_on_every_rank():
    """Makes a failure of the block on any rank a `JobError` on every rank.

    The block must not hold collectives: a rank that fails skips the rest.
    """
    failure = None
    try:
        yield
    except JobError as error:
        failure = str(error)
    except Exception as error:
        failure = f"{type(error).__name__}: {one_line(error)}"
    try:
        failures = hvd.allgather_object(failure)
    except SHUTDOWN_ERRORS as error:
        raise another_rank_stopped() from error
    for failed_rank, failure in enumerate(failures):
        if failure is None:
            continue
        if all(other == failure for other in failures):
            raise JobError(failure)
        raise JobError(f"on rank {failed_rank}: {failure}")


def another_rank_stopped():
    cause = lost_rank() or "another rank did; see what that one printed"
    return JobError(f"rank {hvd.rank()} stopped: {cause}")


def one_line(error):
    return " ".join(str(error).split())


def root_cause(error):
    """Returns the line of a TensorFlow error that a person wants to see.

    The message of an error in a graph is a list of places in the code, then
    what happened, then marks in double brackets of the nodes it came through.
    """
    lines = [line.strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line and not line.startswith("[[")]
    return lines[-1] if lines else "no message"
