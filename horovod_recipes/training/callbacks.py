"""Keras callbacks that watch a job, stop it, and save its checkpoints."""

import contextlib
import math
import signal
import time

import keras
import numpy as np
import tensorflow as tf

import horovod_recipes.keras as hvd
from horovod_recipes import _sigterm
from horovod_recipes.errors import JobError
from horovod_recipes.training import checkpoints
from horovod_recipes.training import logs
from horovod_recipes.training.failures import raised_on_every_rank
from keras_lars.callbacks import TrustRatioLogger

# A job notes at each step whether its weights are finite.
READ_NOTES_EVERY_STEPS = 10


def all_callbacks(job, watchdog, sigterm, others):
    """Returns the callbacks of a job on this rank, in the order that they need.

    Args:
        job: The `Job`.
        watchdog: `hvd.callbacks.Watchdog`.
        sigterm: From `sigterm_noted`.
        others: List of callbacks, the argument of `train_and_evaluate`.
    """
    not_finite = StopOnNonFinite()
    return [
        watchdog,
        job.throughput,
        StopOnSigterm(job, sigterm, not_finite),
        hvd.callbacks.BroadcastGlobalVariablesCallback(root_rank=0),
        hvd.callbacks.AverageNonTrainableWeights(),
        hvd.callbacks.ExactMetrics(),
        RestoreMetrics(
            job.measured.get("metric_sums") if hvd.rank() == 0 else None
        ),
        *others,
        not_finite,
        hvd.callbacks.ReplicaCheck(job.config.check_replicas_every_steps),
        job.target,
        *report_callbacks(job),
        SaveCheckpoints(job),
    ]


def report_callbacks(job):
    """Returns the callbacks that write to the work folder, on rank 0 only.

    Raises:
        JobError: On every rank, if rank 0 cannot write.
    """
    with raised_on_every_rank():
        if hvd.rank() != 0:
            return []
        job.mlperf_log = logs.MLPerfLog(job.workdir, job.config, job.size)
        reports = [
            job.mlperf_log,
            logs.MetricsTable(
                job.workdir,
                job.size.steps_per_epoch,
                job.schedule,
                job.throughput,
                job.task,
            ),
            logs.tensorboard(job.workdir),
        ]
        if job.config.optimizer_name != "sgd":
            every = job.config.log_trust_ratios_every_steps
            reports.append(
                TrustRatioLogger(job.workdir / "trust_ratios", every)
            )
        return reports


@contextlib.contextmanager
def sigterm_noted():
    """Yields a `Note`. In the block, a SIGTERM is only noted there.

    A command notes the signal from its first moment. Then this is its `Note`.
    """
    before = signal.getsignal(signal.SIGTERM)
    note = before if isinstance(before, _sigterm.Note) else _sigterm.Note()
    # From here on, the job says itself after which step it stops.
    note.line = ""
    signal.signal(signal.SIGTERM, note)
    try:
        yield note
    finally:
        signal.signal(signal.SIGTERM, before)


def any_rank_received(sigterm):
    """Returns whether the signal has come to any rank; call it on all ranks.

    Args:
        sigterm: From `sigterm_noted`.
    """
    received = tf.constant(float(sigterm.received))
    return hvd.allreduce(received, op=hvd.Sum, name="stop_on_sigterm") > 0


class StoppedBySigterm(Exception):
    """Raised on all ranks by a job that can resume after `steps_done`."""

    def __init__(self, steps_done):
        super().__init__(steps_done)
        self.steps_done = steps_done


class StopOnSigterm(keras.callbacks.Callback):
    """Saves and stops all ranks after the same step, after a SIGTERM to any.

    It asks `fit` to stop, which stops all ranks together: after this step if
    all ranks ask for it, otherwise after the next. If that is the last step of
    an epoch, the epoch ends as others do, with its evaluation. List this
    callback before those that work at the end of an epoch.

    Args:
        job: The `Job`.
        sigterm: From `sigterm_noted`.
        not_finite: The `StopOnNonFinite` of the job.

    Raises:
        StoppedBySigterm: On every rank, after rank 0 has saved a checkpoint.
        JobError: On every rank, if the weights are not finite, or rank 0 cannot
            save them.
    """

    def __init__(self, job, sigterm, not_finite):
        super().__init__()
        self._job = job
        self._steps_done = job.steps_done
        self._sigterm = sigterm
        self._not_finite = not_finite

    def on_train_batch_end(self, batch, logs=None):
        self._steps_done += 1
        self._ask_to_stop()

    def on_test_begin(self, logs=None):
        self._stop_within_epoch()

    def on_epoch_end(self, epoch, logs=None):
        self._stop_within_epoch()
        self._ask_to_stop()

    def on_train_end(self, logs=None):
        is_done = self._steps_done == self._job.size.steps
        if not is_done and any_rank_received(self._sigterm):
            self._stop({})

    def _ask_to_stop(self):
        if self._sigterm.received:
            self.model.stop_training = True

    def _stop_within_epoch(self):
        is_within = self._steps_done % self._job.size.steps_per_epoch > 0
        # All ranks have the same `stop_training` now.
        stops = is_within and self.model.stop_training
        if stops and any_rank_received(self._sigterm):
            self._not_finite.check()
            hvd.average_variables(self.model.non_trainable_weights)
            sums = hvd.sum_over_ranks(_metric_variables(self))
            self._stop({"metric_sums": [s.numpy().tolist() for s in sums]})

    def _stop(self, metrics):
        with raised_on_every_rank():
            if hvd.rank() == 0:
                checkpoints.save(
                    self._job.workdir,
                    self.model,
                    self._steps_done,
                    self._job.target.measured() | metrics,
                    self._job.config.keep_checkpoints,
                )
        raise StoppedBySigterm(self._steps_done)


class RestoreMetrics(keras.callbacks.Callback):
    """Resumes the metrics of an epoch that an earlier session did not finish.

    Args:
        metric_sums: The sums that `StopOnSigterm` saved, on one rank; None on
            the other ranks.

    Raises:
        JobError: In the first step, if the model has other metrics.
    """

    def __init__(self, metric_sums):
        super().__init__()
        self._metric_sums = metric_sums

    def on_train_batch_end(self, batch, logs=None):
        # Keras only creates the metrics' variables in the first step.
        if self._metric_sums:
            variables = _metric_variables(self)
            if len(variables) != len(self._metric_sums):
                raise JobError(
                    f"the checkpoint has {len(self._metric_sums)} metric_sums, "
                    f"but the job has {len(variables)}; take them out of the "
                    "JSON file beside it, and the metrics of this epoch begin "
                    "here"
                )
            for variable, total in zip(
                variables, self._metric_sums, strict=True
            ):
                variable.assign_add(tf.cast(total, variable.dtype))
            self._metric_sums = None


def _metric_variables(callback):
    return [v for metric in callback.model.metrics for v in metric.variables]


class TargetTop1(keras.callbacks.Callback):
    """Records when top-1 reaches a target, and can end the job then.

    List it after `ExactMetrics`, so that all ranks see the same top-1.

    Args:
        target: Float, the target in percent, or None.
        stop: Whether to end the job when it reaches the target.
        measured: Dict, the result of `measured` in an earlier session of the
            job; empty in the first session.
    """

    def __init__(self, target, stop, measured):
        super().__init__()
        self._target = target
        self._stop = stop
        self._begin = time.time() - measured.get("seconds", 0.0)
        self._reached = {}
        # A resumed job may have another target.
        if target is not None and measured.get("target_top1") == target:
            self._reached = {
                key: measured[key] for key in checkpoints.TARGET_KEYS
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
        """Returns whether the job has reached a target that ends it."""
        return self._stop and bool(self._reached)

    def measured(self):
        """Returns the job's seconds so far, and when it reached the target."""
        return {"seconds": self._seconds(), **self._reached}

    def _seconds(self):
        return round(time.time() - self._begin, 1)


class SaveCheckpoints(keras.callbacks.Callback):
    """Saves checkpoints: every few epochs, after the last, and the best ones.

    Only rank 0 writes. Use the callback on all ranks, so that all of them stop
    if rank 0 cannot write.

    Args:
        job: The `Job`. List its `target` before this callback.
    """

    def __init__(self, job):
        super().__init__()
        self._job = job

    def on_epoch_end(self, epoch, logs=None):
        begin = time.perf_counter()
        with raised_on_every_rank():
            if hvd.rank() == 0:
                self._save(epoch + 1, logs)
        self._job.checkpoint_seconds += time.perf_counter() - begin

    def _save(self, epochs_done, logs):
        job, config = self._job, self._job.config
        steps_done = epochs_done * job.size.steps_per_epoch
        if "val_top1" in logs and config.keep_best_checkpoints:
            checkpoints.save_if_best(
                job.workdir,
                self.model,
                steps_done,
                100 * logs["val_top1"],
                config.keep_best_checkpoints,
            )
        is_last = epochs_done == config.epochs or self.model.stop_training
        if is_last or epochs_done % config.checkpoint_every_epochs == 0:
            checkpoints.save(
                job.workdir,
                self.model,
                steps_done,
                job.target.measured(),
                config.keep_checkpoints,
            )


class StopOnNonFinite(keras.callbacks.Callback):
    """Ends the job after a step that made a weight infinite or NaN.

    It checks the weights, not the loss. A NaN loss on any rank makes the
    averaged gradients NaN, and so the weights of all ranks. Since all ranks
    have the same weights, they stop at the same step. Each step is checked, but
    reading the results would wait for it. So they are read every few steps.

    The loss can be infinite or NaN while the weights are finite, for example if
    a loss scale skips every step. The callback finds that at the end of an
    epoch. For this, list it after `ExactMetrics`.

    Raises:
        JobError: With the step and the variables, or with the epoch.
    """

    def on_train_begin(self, logs=None):
        variables = self.model.trainable_variables
        # The first step that left each variable not finite; 0 if none did.
        self._steps = tf.Variable(
            np.zeros(len(variables), np.int64), trainable=False
        )
        iterations = self.model.optimizer.iterations

        @tf.function(autograph=False)
        def note():
            finite = [
                tf.reduce_all(tf.math.is_finite(v.value)) for v in variables
            ]
            step = tf.cast(iterations.value, tf.int64)
            is_first = tf.equal(self._steps, 0) & ~tf.stack(finite)
            self._steps.assign(tf.where(is_first, step, self._steps))

        self._note, self._notes = note, 0

    def on_train_batch_end(self, batch, logs=None):
        self._note()
        self._notes += 1
        if self._notes % READ_NOTES_EVERY_STEPS == 0:
            self.check()

    def on_test_begin(self, logs=None):
        self.check()

    def check(self):
        """Raises a `JobError` if a step has left a weight not finite."""
        steps = self._steps.numpy()
        if not steps.any():
            return
        step = steps[steps > 0].min()
        variables = self.model.trainable_variables
        paths = [variables[i].path for i in np.flatnonzero(steps == step)]
        named = ", ".join(paths[:3]) + (", ..." if len(paths) > 3 else "")
        raise JobError(
            f"the loss is not finite: step {step} left infinities or NaN in "
            f"{len(paths)} of {len(variables)} variables ({named}); lower the "
            "learning rate or lengthen the warm-up"
        )

    def on_epoch_end(self, epoch, logs=None):
        self.check()
        for name, value in logs.items():
            if not math.isfinite(value):
                raise JobError(
                    f"{name} is {value} after epoch {epoch + 1}, although the "
                    "weights are finite; lower the learning rate, or look for "
                    "invalid examples and a loss scale that skips every step"
                )


class Throughput(keras.callbacks.Callback):
    """Measures the images per second of training, and the time of evaluation.

    The images are those of all ranks. The time is that of epochs by the clock,
    with their input and callbacks. It leaves out evaluation, what follows the
    last step of an epoch, and the first step of each `fit`, which compiles.
    List this callback before those that work at the end of an epoch.
    """

    def __init__(self, global_batch_size):
        super().__init__()
        self._global_batch_size = global_batch_size
        self._steps = 0
        self._seconds = 0.0
        self.evaluation_seconds = 0.0

    def on_train_begin(self, logs=None):
        self._compiles = True

    def on_epoch_begin(self, epoch, logs=None):
        self._start()

    def on_train_batch_begin(self, batch, logs=None):
        if self._compiles and self._epoch_steps:
            self._compiles = False
            self._start()

    def on_train_batch_end(self, batch, logs=None):
        self._epoch_steps += 1

    def on_test_begin(self, logs=None):
        self._stop()
        self._evaluation_begin = time.perf_counter()

    def on_test_end(self, logs=None):
        now = time.perf_counter()
        self.evaluation_seconds += now - self._evaluation_begin

    def on_epoch_end(self, epoch, logs=None):
        self._stop()

    def images_per_second(self):
        """Returns the mean so far, or None before the second step."""
        if not self._steps:
            return None
        images = self._global_batch_size * self._steps
        return round(images / self._seconds, 1)

    def _start(self):
        self._epoch_steps = 0
        self._begin = time.perf_counter()

    def _stop(self):
        if not self._epoch_steps:
            return
        if not self._compiles:
            self._seconds += time.perf_counter() - self._begin
            self._steps += self._epoch_steps
        self._compiles = False
        self._epoch_steps = 0
