"""A callback that records what the trust ratios of LARS do in `model.fit`."""

import csv
import importlib.util
import math
import os
import pathlib

import keras
import numpy as np
from keras import ops

from keras_lars.lars import LARS

# With more rows the picture stops growing and leaves labels out.
MAX_LABELS = 200


class TrustRatioLogger(keras.callbacks.Callback):
    """Records the trust ratio of every adapted variable during training.

    It writes into `log_dir`:

    - `trust_ratios.csv`: the column `step`, counted in updates, and for each
        variable, named by its path, one of ratios, which have no unit. Each
        row is on disk once recorded. A `fit` that begins at a step above 0,
        as in a resumed job, keeps the rows up to there and goes on, if they
        are of the same variables; otherwise the table starts anew.
    - TensorBoard events, a file for each `fit`: scalars `trust_ratio/<path>`
        and one histogram `log10_trust_ratio` over all variables.
    - `trust_ratios.png`, when training ends: the whole table as a heat map,
        grey where a ratio is 0 or not finite.

    Variables that are not adapted have a constant ratio and are left out.
    Under Horovod pass it on rank 0 alone: ratios are the same on all ranks.

    Args:
        log_dir: String or `os.PathLike`, the folder to write to.
        every_n_steps: Integer >= 1, in updates. With `steps_per_execution`
            the first step seen past a multiple is recorded. Defaults to `100`.

    Raises:
        ValueError: If an argument is out of its range; when training begins,
            if the optimizer is not LARS; after the first batch, if LARS adapts
            no variable.
        ImportError: If a package to write with is not installed.

    Example:

    >>> import pathlib, tempfile, numpy as np
    >>> from keras_lars import LARS
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> model.compile(optimizer=LARS(learning_rate=0.1), loss="mse")
    >>> log_dir = tempfile.TemporaryDirectory()
    >>> history = model.fit(
    ...     np.ones((8, 4)), np.ones((8, 2)), batch_size=2, verbose=0,
    ...     callbacks=[TrustRatioLogger(log_dir.name, every_n_steps=2)],
    ... )
    >>> table = pathlib.Path(log_dir.name, "trust_ratios.csv").read_text()
    >>> [row.split(",")[0] for row in table.splitlines()]
    ['step', '2', '4']
    >>> log_dir.cleanup()
    """

    def __init__(self, log_dir, every_n_steps=100):
        super().__init__()
        if not isinstance(log_dir, (str, os.PathLike)) or not str(log_dir):
            raise ValueError(
                "Argument `log_dir` must be a non-empty string or a path. "
                f"Received: log_dir={log_dir!r}"
            )
        if (
            isinstance(every_n_steps, bool)
            or not isinstance(every_n_steps, int)
            or every_n_steps < 1
        ):
            raise ValueError(
                "Argument `every_n_steps` must be an integer 1 or more. "
                f"Received: every_n_steps={every_n_steps!r}"
            )
        packages = ("tensorflow", "tensorboard", "matplotlib")
        missing = [p for p in packages if importlib.util.find_spec(p) is None]
        if missing:
            raise ImportError(
                "TrustRatioLogger needs packages that are not installed: "
                f"pip install {' '.join(missing)}"
            )
        self._log_dir = pathlib.Path(log_dir)
        self._table = self._log_dir / "trust_ratios.csv"
        self._every_n_steps = every_n_steps

    def on_train_begin(self, logs=None):
        self._lars()
        self._step = None
        self._events = None

    def on_epoch_begin(self, epoch, logs=None):
        # Not in `on_train_begin`: a callback later in the list may restore the
        # optimizer there.
        if self._step is None:
            self._seen(int(self._lars().iterations))

    def on_train_batch_end(self, batch, logs=None):
        if self._events is None:
            # Not before: until then the optimizer may not be built.
            self._open()
        # Reading the counter waits for the device and, on JAX, moves the whole
        # state, so it is read only when a multiple can have been reached.
        self._batches_to_wait -= self._batches_per_call
        if self._batches_to_wait > 0:
            return
        step = int(self._lars().iterations)
        if step // self._every_n_steps > self._step // self._every_n_steps:
            self._record(step)
        self._seen(step)

    def on_train_end(self, logs=None):
        if self._events is None:
            return
        self._events.close()
        header, rows = _read_table(self._table)
        if rows:
            picture = self._table.with_suffix(".png")
            table = np.array(rows, "float64")
            _draw(header[1:], table, self._every_n_steps, picture)

    def _lars(self):
        # On JAX, Keras's `self.model` first puts the state of the training
        # loop back into the variables.
        optimizer = self.model.optimizer
        optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        if not isinstance(optimizer, LARS):
            raise ValueError(
                "TrustRatioLogger needs a model that was compiled with LARS. "
                f"Received: optimizer={type(optimizer).__name__}. Pass "
                "`optimizer=keras_lars.LARS(...)` to `model.compile`, or leave "
                "TrustRatioLogger out of `callbacks`."
            )
        return optimizer

    def _seen(self, step):
        self._step = step
        self._batches_to_wait = self._every_n_steps - step % self._every_n_steps

    def _open(self):
        import tensorflow as tf

        optimizer = self._lars()
        paths, ratios = optimizer._unique_paths, optimizer._trust_ratios
        named = zip(paths, ratios, strict=True)
        adapted = {path: ratio for path, ratio in named if ratio is not None}
        if not adapted:
            raise ValueError(
                "TrustRatioLogger has nothing to record, because LARS adapts "
                "no variable of this model. Received: "
                "exclude_from_layer_adaptation="
                f"{optimizer.exclude_from_layer_adaptation}"
            )
        self._batches_per_call = self.model.steps_per_execution
        self._ratios = list(adapted.values())
        self._log_dir.mkdir(parents=True, exist_ok=True)
        _start_table(self._table, ["step", *adapted], self._step)
        self._events = tf.summary.create_file_writer(str(self._log_dir))
        self._write_events = _events_function(self._events, adapted)

    def _record(self, step):
        # Stacked first, because each read waits for the device.
        stacked = ops.stack([ratio.value for ratio in self._ratios])
        ratios = ops.convert_to_numpy(stacked)
        with self._table.open("a", newline="") as file:
            csv.writer(file).writerow([step, *ratios.tolist()])
        self._write_events(step, ratios)


def _start_table(path, header, step):
    """Writes the header and, where it was the same, the rows up to `step`."""
    old_header, rows = _read_table(path)
    part = path.with_name(f".part-{path.name}")
    with part.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        if old_header == header:
            writer.writerows(row for row in rows if int(row[0]) <= step)
    os.replace(part, path)


def _read_table(path):
    """Returns the header and the rows as strings; `[]` where there are none."""
    if not path.exists():
        return [], []
    with path.open(newline="") as file:
        # A job killed while it wrote leaves a last line without an end.
        lines = list(csv.reader(line for line in file if line.endswith("\n")))
    return (lines[0], lines[1:]) if lines else ([], [])


def _events_function(events, paths):
    """Returns a function of step and ratios that writes TensorBoard events."""
    import tensorflow as tf

    step_spec = tf.TensorSpec((), tf.int64)
    ratios_spec = tf.TensorSpec((len(paths),), tf.float32)

    # Traced, because outside a graph each scalar takes 0.2 ms.
    @tf.function(input_signature=[step_spec, ratios_spec], autograph=False)
    def write(step, ratios):
        # Keras's TensorBoard callback holds back the summaries of everyone
        # between its own steps: `record_if` undoes that.
        with events.as_default(step), tf.summary.record_if(True):
            for path, ratio in zip(paths, tf.unstack(ratios), strict=True):
                tf.summary.scalar(f"trust_ratio/{path}", ratio)
            usable = ratios[(ratios > 0) & tf.math.is_finite(ratios)]
            tf.summary.histogram(
                "log10_trust_ratio", tf.math.log(usable) / np.log(10)
            )

    return write


def _draw(labels, table, every_n_steps, path):
    """Draws a PNG of ratios over layers, the input side on top, and steps."""
    import matplotlib.colors
    import matplotlib.figure

    steps, ratios = table[:, 0], table[:, 1:].T
    usable = np.isfinite(ratios) & (ratios > 0)
    middles = (steps[1:] + steps[:-1]) / 2
    half = every_n_steps / 2
    height = 2.0 + 0.16 * min(len(labels), MAX_LABELS)
    width = 6.5 + 0.07 * max(map(len, labels))
    figure = matplotlib.figure.Figure((width, height), layout="constrained")
    axes = figure.subplots()
    image = axes.pcolormesh(
        [steps[0] - half, *middles, steps[-1] + half],
        np.arange(len(labels) + 1),
        np.ma.masked_where(~usable, ratios),
        # It refuses a table of which nothing is usable.
        norm=matplotlib.colors.LogNorm() if usable.any() else None,
    )
    axes.set_facecolor("0.8")
    axes.invert_yaxis()
    axes.set_xlabel("step")
    rows = np.arange(0, len(labels), math.ceil(len(labels) / MAX_LABELS))
    axes.set_yticks(rows + 0.5, [labels[row] for row in rows], fontsize=7)
    # On top, where it is in sight however tall the picture is.
    figure.colorbar(
        image,
        location="top",
        aspect=40,
        pad=0.2 / height,
        label="trust ratio",
    )
    part = path.with_name(f".part-{path.name}")
    figure.savefig(part, dpi=120, format="png")
    os.replace(part, path)
