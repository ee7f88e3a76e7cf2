"""Turns a failure on one rank into a clear error on every rank."""

import contextlib

import tensorflow as tf
from horovod.common.exceptions import HorovodInternalError

import horovod_recipes.keras as hvd
from horovod_recipes.data.named_errors import name_in
from horovod_recipes.data.pipeline import CORRUPT_IMAGE
from horovod_recipes.data.sources import DAMAGED_SHARD
from horovod_recipes.errors import JobError
from horovod_recipes.errors import one_line
from horovod_recipes.errors import root_cause

# Errors that a rank can get when another rank has ended.
SHUTDOWN_ERRORS = (tf.errors.OpError, HorovodInternalError)
# Part of the error of a record that TensorFlow cannot parse.
NOT_PARSED = "Could not parse example input"


@contextlib.contextmanager
def raised_on_every_rank():
    """Turns a failure of the block on any rank into a `JobError` on every rank.

    The block must not contain collectives, since a failing rank would skip
    them and leave the other ranks waiting.
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


@contextlib.contextmanager
def explained():
    """Turns errors that end training into a `JobError` that says why."""
    try:
        yield
    except hvd.callbacks.ReplicasDiffer as error:
        raise JobError(str(error)) from error
    except UnicodeDecodeError as error:
        # TensorFlow puts the bytes of the record into its message.
        if NOT_PARSED.encode() not in error.object:
            raise
        raise _record_not_parsed() from error
    except (*SHUTDOWN_ERRORS, OSError) as error:
        raise _stop_reason(error) from error


def _stop_reason(error):
    if NOT_PARSED in str(error):
        return _record_not_parsed()
    if shard := name_in(error, DAMAGED_SHARD):
        return JobError(
            f"rank {hvd.rank()} cannot read all of the shard {shard}: it is "
            "damaged, or not readable; copy it or prepare the dataset again"
        )
    if corrupt := name_in(error, CORRUPT_IMAGE):
        return JobError(
            f"rank {hvd.rank()} found a corrupt image: {corrupt}; replace "
            "it, or train without it: --config.dataset.corrupt_images=skip"
        )
    if hvd.callbacks.is_lost_rank(error):
        return another_rank_stopped()
    return JobError(
        f"rank {hvd.rank()} failed: {type(error).__name__}: {root_cause(error)}"
    )


def _record_not_parsed():
    return JobError(
        f"rank {hvd.rank()} read a record of the dataset that is whole, but "
        "no example of TensorFlow; prepare the dataset again"
    )


def another_rank_stopped():
    """Returns the error of a rank that stops because another rank stopped."""
    cause = hvd.callbacks.lost_rank() or (
        "another rank stopped; see what that rank printed"
    )
    return JobError(f"rank {hvd.rank()} stopped: {cause}")
