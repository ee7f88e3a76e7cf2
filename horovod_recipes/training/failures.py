"""Turns a failure on one rank into a clear error on every rank."""

import contextlib

import tensorflow as tf
from horovod.common.exceptions import HorovodInternalError

import horovod_recipes.keras as hvd
from horovod_recipes.data.pipeline import corrupt_image_of
from horovod_recipes.errors import JobError
from horovod_recipes.errors import one_line
from horovod_recipes.errors import root_cause

# Errors that a rank can get when another rank has ended.
SHUTDOWN_ERRORS = (tf.errors.OpError, HorovodInternalError)


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
    except (*SHUTDOWN_ERRORS, OSError) as error:
        raise _stop_reason(error) from error


@contextlib.contextmanager
def damage_named(source, dataset):
    """Turns an error about a damaged record into a `JobError` with its file.

    TensorFlow does not name the file. After such an error, and only then, the
    rank reads its files once more.

    Args:
        source: From `data.sources.load_source`.
        dataset: `ConfigDict`, the `dataset` of a recipe's config.
    """
    try:
        yield
    except tf.errors.DataLossError as error:
        for split in (dataset.train_split, dataset.test_split):
            damage = source.damage(split, hvd.rank(), hvd.size())
            if damage:
                raise JobError(
                    f"rank {hvd.rank()} found a damaged file: {damage}; "
                    "restore it from a copy, or delete its folder and run: "
                    f"python -m horovod_recipes.data {dataset.name}"
                ) from error
        raise


def _stop_reason(error):
    corrupt = corrupt_image_of(error)
    if corrupt:
        return JobError(
            f"rank {hvd.rank()} found a corrupt image: {corrupt}; replace "
            "it, or train without it: --config.dataset.corrupt_images=skip"
        )
    if hvd.callbacks.is_lost_rank(error):
        return another_rank_stopped()
    return JobError(
        f"rank {hvd.rank()} failed: {type(error).__name__}: {root_cause(error)}"
    )


def another_rank_stopped():
    """Returns the error of a rank that stops because another rank stopped."""
    cause = hvd.callbacks.lost_rank() or (
        "another rank stopped; see what that rank printed"
    )
    return JobError(f"rank {hvd.rank()} stopped: {cause}")
