"""What a training job watches and writes while `model.fit` runs."""

import csv
import math
import time

import keras
import matplotlib.figure
import numpy as np
import tensorflow as tf

from horovod_recipes.errors import JobError
from horovod_recipes.files import written_atomically


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

    The first step of a job, which compiles, does not count.
    """

    def __init__(self, global_batch_size):
        super().__init__()
        self._global_batch_size = global_batch_size
        self._seconds = []

    def on_train_batch_begin(self, batch, logs=None):
        self._begin = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self._seconds.append(time.perf_counter() - self._begin)

    def images_per_second(self):
        """Returns the mean so far; None before the first step."""
        if not self._seconds:
            return None
        counted = self._seconds[1:] or self._seconds
        images = self._global_batch_size * len(counted)
        return round(images / sum(counted), 1)


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
