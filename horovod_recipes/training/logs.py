"""Writes a job's logs: metrics, plots, TensorBoard's events, MLPerf's log."""

import csv
import itertools
import logging
import sys

import keras
import matplotlib.figure
import numpy as np
from mlperf_logging.mllog import constants
from mlperf_logging.mllog.mllog import MLLogger

from horovod_recipes.errors import one_line
from keras_lars._files import written_atomically


def tensorboard(workdir):
    """Returns the callback that writes TensorBoard's events every epoch."""
    return keras.callbacks.TensorBoard(
        workdir / "tensorboard", write_graph=False
    )


class MetricsTable(keras.callbacks.Callback):
    """Writes metrics.csv, with one row per epoch, and its plot, metrics.png.

    Its columns are `epoch`, `step`, `learning_rate`, the metrics of the task
    and `images_per_second`.

    Args:
        workdir: `pathlib.Path`. The table keeps the rows of earlier epochs, so
            that a resumed run has a complete table.
        steps_per_epoch: Integer, the updates per epoch.
        schedule: The learning-rate schedule, a function of the update's number.
        throughput: The `Throughput` of the same job.
        task: The task of the job.
    """

    def __init__(self, workdir, steps_per_epoch, schedule, throughput, task):
        super().__init__()
        self._path = workdir / "metrics.csv"
        self._steps_per_epoch = steps_per_epoch
        self._schedule = schedule
        self._throughput = throughput
        self._metrics = {
            "train": task.training_metrics,
            "test": task.evaluation_metrics,
        }
        self._rows = _read_table(self._path, self._columns())
        if self._rows and not self._path.exists():
            # The rows before the damage; no epoch may follow.
            self._write()

    def on_epoch_end(self, epoch, logs=None):
        rows = [row for row in self._rows if int(row["epoch"]) <= epoch]
        self._rows = [*rows, self._row(epoch + 1, logs)]
        self._write()

    def _write(self):
        with written_atomically(self._path) as part:
            with part.open("w", newline="") as file:
                writer = csv.DictWriter(file, self._columns())
                writer.writeheader()
                writer.writerows(self._rows)

    def on_train_end(self, logs=None):
        picture = self._path.with_suffix(".png")
        with written_atomically(picture) as part:
            _plot_table(self._rows, self._schedule, self._metrics, part)

    def _columns(self):
        metrics = [
            _column(split, name)
            for split, names in self._metrics.items()
            for name in names
        ]
        return [
            *("epoch", "step", "learning_rate"),
            *metrics,
            "images_per_second",
        ]

    def _row(self, epoch, logs):
        step = epoch * self._steps_per_epoch
        row = {
            "epoch": epoch,
            "step": step,
            # The rate of the epoch's last update. The schedule counts from 0.
            "learning_rate": float(self._schedule(step - 1)),
            "images_per_second": self._throughput.images_per_second(),
        }
        for split, prefix in (("train", ""), ("test", "val_")):
            for name in self._metrics[split]:
                value = logs.get(prefix + name)
                if value is not None and _is_accuracy(name):
                    value = round(100 * value, 4)
                row[_column(split, name)] = value
        return row


def _column(split, name):
    unit = "_percent" if _is_accuracy(name) else ""
    return f"{split}_{name}{unit}"


def _is_accuracy(name):
    return name.endswith("top1")


def _read_table(path, columns):
    """Returns the rows of a metrics.csv. Values that are missing are "".

    A table that cannot be continued must not end the job. It is kept under
    another name, and its rows before the damage are returned.
    """
    if not path.exists():
        return []
    rows = []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            if not set(columns) <= set(reader.fieldnames or ()):
                raise ValueError("it lacks columns")
            for row in reader:
                _check_row(row)
                rows.append({name: row[name] for name in columns})
    except (ValueError, csv.Error) as error:
        copy = _unused_name(path)
        path.replace(copy)
        print(
            f"warning: {path} cannot be continued ({one_line(error)}); it is "
            f"kept as {copy}, and the job goes on with its first {len(rows)} "
            "rows",
            file=sys.stderr,
        )
    return rows


def _unused_name(path):
    numbers = itertools.chain([""], map("-{}".format, itertools.count(1)))
    copies = (path.with_suffix(f".damaged{number}.csv") for number in numbers)
    return next(copy for copy in copies if not copy.exists())


def _check_row(row):
    """Raises `ValueError` unless a row has a number in each column, or ""."""
    if None in row:
        raise ValueError("a row has too many values")
    for name, value in row.items():
        if value is None:
            raise ValueError("a row is cut")
        if name in ("epoch", "step"):
            int(value)
        elif value:
            float(value)


def _plot_table(rows, schedule, metrics, path):
    """Plots the metrics and the learning rate over steps into a PNG file."""
    names = list(dict.fromkeys([*metrics["train"], *metrics["test"]]))
    figure = matplotlib.figure.Figure(
        figsize=(7, 2 + 2 * len(names)), layout="constrained"
    )
    *panels, rate = figure.subplots(len(names) + 1, sharex=True)
    for axes, name in zip(panels, names, strict=True):
        for split in ("train", "test"):
            points = [
                (int(row["step"]), float(row[_column(split, name)]))
                for row in rows
                if row.get(_column(split, name)) not in ("", None)
            ]
            if points:
                axes.plot(*zip(*points, strict=True), marker=".", label=split)
        axes.legend()
        if name.endswith("loss"):
            axes.set_yscale("log")
        label = name.replace("_", " ").replace("top1", "top-1")
        axes.set_ylabel(f"{label}, %" if _is_accuracy(name) else label)
    steps = np.arange(int(rows[-1]["step"]))
    rate.plot(steps, [float(schedule(step)) for step in steps])
    rate.set_ylabel("learning rate")
    rate.set_xlabel("step (update)")
    for axes in (*panels, rate):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


class MLPerfLog(keras.callbacks.Callback):
    """Writes the events that MLPerf requires to `workdir/mlperf.log`.

    The log serves to compare runs. It cannot be submitted to MLPerf, since it
    names neither the submitter nor the hardware.

    List it after `ExactMetrics`. A resumed job appends to the file, and begins
    with another `run_start`.

    Args:
        workdir: `pathlib.Path`.
        config: The recipe's `ConfigDict`.
        size: The `JobSize`.
    """

    def __init__(self, workdir, config, size):
        super().__init__()
        logger = logging.Logger("mlperf")
        logger.addHandler(_AppendToFile(workdir / "mlperf.log"))
        self._log = MLLogger(logger)
        self._log.start(constants.INIT_START)
        for key, value in _mlperf_settings(config, size):
            self._log.event(key, value)
        self._log.end(constants.INIT_STOP)
        self._log.start(constants.RUN_START)

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = {constants.EPOCH_NUM: epoch + 1}
        self._log.start(constants.EPOCH_START, metadata=self._epoch)

    def on_test_begin(self, logs=None):
        self._log.start(constants.EVAL_START, metadata=self._epoch)

    def on_epoch_end(self, epoch, logs=None):
        if "val_top1" in logs:
            self._log.event(
                constants.EVAL_ACCURACY,
                logs["val_top1"],
                metadata=self._epoch,
            )
            self._log.end(constants.EVAL_STOP, metadata=self._epoch)
        self._log.end(constants.EPOCH_STOP, metadata=self._epoch)

    def run_stop(self, reached_target):
        """Writes how the job ended."""
        status = constants.SUCCESS if reached_target else constants.ABORTED
        self._log.end(constants.RUN_STOP, metadata={"status": status})


class _AppendToFile(logging.Handler):
    """Opens the file for each line, so that a killed job loses none."""

    def __init__(self, path):
        super().__init__()
        self._path = path

    def emit(self, record):
        if self._path.is_symlink():
            # In a stranger's folder, it may lead to a file outside of it.
            self._path.unlink()
        with self._path.open("a") as file:
            file.write(f"{record.getMessage()}\n")


def _mlperf_settings(config, size):
    name, schedule = config.optimizer_name, config.schedule
    synchronized = config.model.get("batch_norm") == "synchronized"
    ranks_of_a_norm = size.ranks if synchronized else 1
    return (
        (constants.SUBMISSION_BENCHMARK, config.model.name),
        (constants.SEED, config.seed),
        (constants.GLOBAL_BATCH_SIZE, size.global_batch_size),
        (constants.GRADIENT_ACCUMULATION_STEPS, size.accumulation_steps),
        (constants.MODEL_BN_SPAN, size.micro_batch_size * ranks_of_a_norm),
        (constants.TRAIN_SAMPLES, config.dataset.train_examples),
        (constants.EVAL_SAMPLES, config.dataset.test_examples),
        (constants.OPT_NAME, name),
        (constants.OPT_BASE_LR, schedule.peak_learning_rate),
        (constants.OPT_END_LR, schedule.get("end_learning_rate", 0.0)),
        (constants.OPT_LR_WARMUP_EPOCHS, schedule.warmup_epochs),
        *(_lars_settings(config) if name in ("lars", "sgd") else ()),
    )


def _lars_settings(config):
    optimizer = config.optimizer
    return (
        (constants.LARS_OPT_LR_DECAY_POLY_POWER, config.schedule.power),
        (constants.LARS_OPT_MOMENTUM, optimizer.get("momentum", 0.9)),
        (constants.LARS_OPT_WEIGHT_DECAY, optimizer.get("weight_decay", 0.0)),
        (constants.LARS_EPSILON, optimizer.get("epsilon", 0.0)),
    )
