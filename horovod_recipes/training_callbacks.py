"""What a training job watches and writes while `model.fit` runs."""

import contextlib
import csv
import math
import signal
import threading
import time

import keras
import matplotlib.figure
import numpy as np
import tensorflow as tf

import horovod_recipes.keras as hvd
from horovod_recipes import checkpoints
from horovod_recipes.errors import JobError
from horovod_recipes.errors import raised_on_every_rank
from horovod_recipes.files import written_atomically
from horovod_recipes.keras.variables import average_variables
from horovod_recipes.keras.variables import sum_over_ranks


@contextlib.contextmanager
def sigterm_noted():
    """Yields an event that a SIGTERM sets, in place of ending the process."""
    asked = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda number, frame: asked.set())
    try:
        yield asked
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
        workdir: `pathlib.Path`.
        steps_per_epoch: Integer, in updates.
        steps_done: Integer, the updates done before training begins.
        target: The `TargetTop1` of the same job.
        keep: Integer, how many checkpoints to keep.
        asked: From `sigterm_noted`.

    Raises:
        StoppedBySigterm: On every rank, after rank 0 has saved.
        JobError: On every rank, if it cannot save.
    """

    def __init__(
        self, workdir, steps_per_epoch, steps_done, target, keep, asked
    ):
        super().__init__()
        self._workdir = workdir
        self._steps_per_epoch = steps_per_epoch
        self._steps_done = steps_done
        self._target = target
        self._keep = keep
        self._asked = asked

    def on_train_batch_end(self, batch, logs=None):
        self._steps_done += 1
        within_epoch = self._steps_done % self._steps_per_epoch
        if within_epoch and self._any_rank_asked():
            average_variables(self.model.non_trainable_weights)
            sums = sum_over_ranks(_metrics(self))
            self._stop({"metric_sums": [s.numpy().tolist() for s in sums]})

    def on_epoch_end(self, epoch, logs=None):
        if self._any_rank_asked():
            self._stop({})

    def _any_rank_asked(self):
        # The signal may reach one rank alone, or the ranks at different steps.
        asked = tf.constant(float(self._asked.is_set()))
        return hvd.allreduce(asked, op=hvd.Sum, name="stop_on_sigterm") > 0

    def _stop(self, metrics):
        with raised_on_every_rank():
            if hvd.rank() == 0:
                checkpoints.save(
                    self._workdir,
                    self.model,
                    self._steps_done,
                    self._target.measured() | metrics,
                    self._keep,
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
                _metrics(self), self._metric_sums, strict=True
            ):
                variable.assign_add(tf.cast(total, variable.dtype))
            self._metric_sums = None


def _metrics(callback):
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
    """Saves after every so many epochs and the last, and where top-1 is best.

    Rank 0 writes; list it on all ranks, so that all stop if it cannot.

    Args:
        workdir: `pathlib.Path`.
        config: The recipe's `ConfigDict`.
        steps_per_epoch: Integer, in updates.
        target: The `TargetTop1` of the same job, listed before this.
    """

    def __init__(self, workdir, config, steps_per_epoch, target):
        super().__init__()
        self._workdir = workdir
        self._config = config
        self._steps_per_epoch = steps_per_epoch
        self._target = target

    def on_epoch_end(self, epoch, logs=None):
        with raised_on_every_rank():
            if hvd.rank() == 0:
                self._save(epoch + 1, logs)

    def _save(self, epochs_done, logs):
        steps_done = epochs_done * self._steps_per_epoch
        if "val_top1" in logs and self._config.keep_best_checkpoints:
            checkpoints.save_if_best(
                self._workdir,
                self.model,
                steps_done,
                100 * logs["val_top1"],
                self._config.keep_best_checkpoints,
            )
        is_last = epochs_done == self._config.epochs or self.model.stop_training
        if is_last or epochs_done % self._config.checkpoint_every_epochs == 0:
            checkpoints.save(
                self._workdir,
                self.model,
                steps_done,
                self._target.measured(),
                self._config.keep_checkpoints,
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


class MetricsTable(keras.callbacks.Callback):
    """Writes metrics.csv, a row an epoch, and its picture, metrics.png.

    Args:
        workdir: `pathlib.Path`. Rows there of earlier epochs are kept, so
            that the table of a resumed run is whole.
        steps_per_epoch: Integer, in updates.
        schedule: The learning-rate schedule, a function of the update.
        throughput: The `Throughput` of the same job.
    """

    COLUMNS = (
        "epoch",
        "step",
        "learning_rate",
        "train_loss",
        "train_top1_percent",
        "test_loss",
        "test_top1_percent",
        "images_per_second",
    )

    def __init__(self, workdir, steps_per_epoch, schedule, throughput):
        super().__init__()
        self._path = workdir / "metrics.csv"
        self._steps_per_epoch = steps_per_epoch
        self._schedule = schedule
        self._throughput = throughput

    def on_epoch_end(self, epoch, logs=None):
        rows = read_table(self._path)
        rows = [row for row in rows if int(row["epoch"]) <= epoch]
        rows.append(self._row(epoch + 1, logs))
        with written_atomically(self._path) as part:
            with part.open("w", newline="") as file:
                writer = csv.DictWriter(file, self.COLUMNS)
                writer.writeheader()
                writer.writerows(rows)

    def on_train_end(self, logs=None):
        picture = self._path.with_suffix(".png")
        with written_atomically(picture) as part:
            plot_table(read_table(self._path), self._schedule, part)

    def _row(self, epoch, logs):
        step = epoch * self._steps_per_epoch
        row = {
            "epoch": epoch,
            "step": step,
            # That of the epoch's last update; the schedule counts from 0.
            "learning_rate": float(self._schedule(step - 1)),
            "train_loss": logs["loss"],
            "train_top1_percent": round(100 * logs["top1"], 4),
            "images_per_second": self._throughput.images_per_second(),
        }
        if "val_loss" in logs:
            row["test_loss"] = logs["val_loss"]
            row["test_top1_percent"] = round(100 * logs["val_top1"], 4)
        return row


def read_table(path):
    """Returns the rows of a metrics.csv, with "" where nothing was measured."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def plot_table(rows, schedule, path):
    """Draws loss, top-1 and learning rate over steps into a PNG file."""
    figure = matplotlib.figure.Figure(figsize=(7, 8), layout="constrained")
    loss, top1, rate = figure.subplots(3, sharex=True)
    for axes, name in ((loss, "loss"), (top1, "top1_percent")):
        for split in ("train", "test"):
            points = [
                (int(row["step"]), float(row[f"{split}_{name}"]))
                for row in rows
                if row[f"{split}_{name}"]
            ]
            axes.plot(*zip(*points, strict=True), marker=".", label=split)
        axes.legend()
    loss.set_yscale("log")
    loss.set_ylabel("loss")
    top1.set_ylabel("top-1, %")
    steps = np.arange(int(rows[-1]["step"]))
    rate.plot(steps, [float(schedule(step)) for step in steps])
    rate.set_ylabel("learning rate")
    rate.set_xlabel("step (update)")
    for axes in (loss, top1, rate):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
