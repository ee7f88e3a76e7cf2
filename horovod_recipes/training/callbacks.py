"""Callbacks that watch a job, stop it, and save its checkpoints."""

import contextlib
import math
import signal
import threading
import time

import keras
import numpy as np
import tensorflow as tf

import horovod_recipes.keras as hvd
from horovod_recipes.errors import JobError
from horovod_recipes.training import workdir as run_folder
from horovod_recipes.training.failures import raised_on_every_rank


@contextlib.contextmanager
def sigterm_noted():
    """Yields an event that a SIGTERM sets, instead of ending the process."""
    noted = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda number, frame: noted.set())
    try:
        yield noted
    finally:
        signal.signal(signal.SIGTERM, before)


class StoppedBySigterm(Exception):
    """The job has saved a checkpoint and left training, on all ranks."""

    def __init__(self, steps_done):
        super().__init__(steps_done)
        self.steps_done = steps_done


class StopOnSigterm(keras.callbacks.Callback):
    """Saves and ends training on all ranks at one step, after a SIGTERM to any.

    After the last step of an epoch, its evaluation comes first. List it last.

    Args:
        job: The `Job`.
        sigterm: From `sigterm_noted`.

    Raises:
        StoppedBySigterm: On every rank, after rank 0 has saved.
        JobError: On every rank, if it cannot save.
    """

    def __init__(self, job, sigterm):
        super().__init__()
        self._job = job
        self._steps_done = job.steps_done
        self._sigterm = sigterm

    def on_train_batch_end(self, batch, logs=None):
        self._steps_done += 1
        within_epoch = self._steps_done % self._job.size.steps_per_epoch
        if within_epoch and self._any_rank_got_sigterm():
            hvd.average_variables(self.model.non_trainable_weights)
            sums = hvd.sum_over_ranks(_metric_variables(self))
            self._stop({"metric_sums": [s.numpy().tolist() for s in sums]})

    def on_epoch_end(self, epoch, logs=None):
        if self._any_rank_got_sigterm():
            self._stop({})

    def _any_rank_got_sigterm(self):
        # The signal may reach one rank only, or the ranks at different steps.
        sigterm = tf.constant(float(self._sigterm.is_set()))
        return hvd.allreduce(sigterm, op=hvd.Sum, name="stop_on_sigterm") > 0

    def _stop(self, metrics):
        with raised_on_every_rank():
            if hvd.rank() == 0:
                run_folder.save(
                    self._job.workdir,
                    self.model,
                    self._steps_done,
                    self._job.target.measured() | metrics,
                    self._job.config.keep_checkpoints,
                )
        raise StoppedBySigterm(self._steps_done)


class RestoreMetrics(keras.callbacks.Callback):
    """Goes on with the metrics of an epoch that a job stopped in.

    Args:
        metric_sums: What `StopOnSigterm` saved, for one rank to hold; the
            others begin at 0.
    """

    def __init__(self, metric_sums):
        super().__init__()
        self._metric_sums = metric_sums

    def on_train_batch_end(self, batch, logs=None):
        # Keras makes the metrics in the first step.
        if self._metric_sums:
            for variable, total in zip(
                _metric_variables(self), self._metric_sums, strict=True
            ):
                variable.assign_add(tf.cast(total, variable.dtype))
            self._metric_sums = None


def _metric_variables(callback):
    return [v for metric in callback.model.metrics for v in metric.variables]


class TargetTop1(keras.callbacks.Callback):
    """Notes when the job reaches a target, and ends it there if that is asked.

    List it after `ExactMetrics`, so that all ranks see the same top-1.

    Args:
        target: Float, in percent, or None.
        stop: Whether to end the job when it is reached.
        measured: Dict, what `measured` returned in an earlier part of the job;
            empty at its start.
    """

    def __init__(self, target, stop, measured):
        super().__init__()
        self._target = target
        self._stop = stop
        self._begin = time.time() - measured.get("seconds", 0.0)
        self._reached = {}
        # A resumed job may have been given another target.
        if target is not None and measured.get("target_top1") == target:
            self._reached = {
                key: measured[key]
                for key in (
                    "target_top1",
                    "epochs_to_target",
                    "seconds_to_target",
                )
            }

    def on_epoch_end(self, epoch, logs=None):
        if self._target is None or self._reached or "val_top1" not in logs:
            return
        if 100 * logs["val_top1"] >= self._target:
            self._reached = {
                "target_top1": self._target,
                "epochs_to_target": epoch + 1,
                "seconds_to_target": self._seconds(),
            }
            self.model.stop_training = self._stop

    def is_end(self):
        """Whether the job has reached its target, and is to end there."""
        return self._stop and bool(self._reached)

    def measured(self):
        """Returns the job's seconds so far, and those to the target."""
        return {"seconds": self._seconds(), **self._reached}

    def _seconds(self):
        return round(time.time() - self._begin, 1)


class SaveCheckpoints(keras.callbacks.Callback):
    """Saves every few epochs, after the last, and where top-1 is best.

    Rank 0 writes; list it on all ranks, so that all stop if it cannot.

    Args:
        job: The `Job`, whose `target` is listed before this.
    """

    def __init__(self, job):
        super().__init__()
        self._job = job

    def on_epoch_end(self, epoch, logs=None):
        with raised_on_every_rank():
            if hvd.rank() == 0:
                self._save(epoch + 1, logs)

    def _save(self, epochs_done, logs):
        job, config = self._job, self._job.config
        steps_done = epochs_done * job.size.steps_per_epoch
        if "val_top1" in logs and config.keep_best_checkpoints:
            run_folder.save_if_best(
                job.workdir,
                self.model,
                steps_done,
                100 * logs["val_top1"],
                config.keep_best_checkpoints,
            )
        is_last = epochs_done == config.epochs or self.model.stop_training
        if is_last or epochs_done % config.checkpoint_every_epochs == 0:
            run_folder.save(
                job.workdir,
                self.model,
                steps_done,
                job.target.measured(),
                config.keep_checkpoints,
            )


class StopOnNonFinite(keras.callbacks.Callback):
    """Ends the job after the step that made a weight infinite or NaN.

    A NaN loss on any rank makes the averaged gradients NaN, and so the weights
    of all ranks: looking at these, which are the same everywhere, all ranks
    stop at the same step. A loss that is not finite though the weights are,
    as where a loss scale skips every step, is seen when the epoch ends; for
    that, list this after `ExactMetrics`.

    Raises:
        JobError: Naming the step and the variables, or the epoch.
    """

    def on_train_begin(self, logs=None):
        variables = self.model.trainable_variables

        @tf.function(autograph=False)
        def finite():
            return tf.stack(
                [tf.reduce_all(tf.math.is_finite(v.value)) for v in variables]
            )

        self._finite = finite

    def on_train_batch_end(self, batch, logs=None):
        finite = self._finite().numpy()
        if finite.all():
            return
        variables = self.model.trainable_variables
        paths = [variables[i].path for i in np.flatnonzero(~finite)]
        step = int(self.model.optimizer.iterations)
        named = ", ".join(paths[:3]) + (", ..." if len(paths) > 3 else "")
        raise JobError(
            f"the loss is not finite: step {step} left infinities or NaN in "
            f"{len(paths)} of {len(variables)} variables ({named}); lower the "
            "learning rate or lengthen the warm-up"
        )

    def on_epoch_end(self, epoch, logs=None):
        for name, value in logs.items():
            if not math.isfinite(value):
                raise JobError(
                    f"{name} is {value} after epoch {epoch + 1}, though the "
                    "weights are finite; look for examples or a loss scale "
                    "that make it so"
                )


class Throughput(keras.callbacks.Callback):
    """Measures images per second over all ranks, evaluation left out.

    The first step of a call of `fit`, which compiles, does not count.
    """

    def __init__(self, global_batch_size):
        super().__init__()
        self._global_batch_size = global_batch_size
        self._seconds = []

    def on_train_begin(self, logs=None):
        self._compiles = True

    def on_train_batch_begin(self, batch, logs=None):
        self._begin = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        if not self._compiles:
            self._seconds.append(time.perf_counter() - self._begin)
        self._compiles = False

    def images_per_second(self):
        """Returns the mean so far; None before the second step."""
        if not self._seconds:
            return None
        images = self._global_batch_size * len(self._seconds)
        return round(images / sum(self._seconds), 1)
