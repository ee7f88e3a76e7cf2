"""A callback that records trust ratios during `model.fit`."""

import csv
import importlib.util
import pathlib
import warnings

import keras
import numpy as np
from keras import ops

from keras_lars import _heat_map
from keras_lars._checks import check_integer
from keras_lars._checks import check_path
from keras_lars._files import written_atomically
from keras_lars._ratio import LayerAdaptation
from keras_lars._unwrap import innermost


class TrustRatioLogger(keras.callbacks.Callback):
    """Records the trust ratio of every adapted variable during training.

    It writes into `log_dir`:

    - `trust_ratios.csv`: a column `step`, counted in updates, and a column of
        ratios for each variable, named by its path. Ratios have no unit. Each
        row is on disk once it is recorded. A `fit` that begins at a step above
        0, as in a resumed job, keeps the rows up to that step and appends to
        them. If they belong to other variables, a new table starts.
    - TensorBoard events, one file per `fit`: scalars `trust_ratio/<path>` and
        a histogram `log10_trust_ratio` over all variables.
    - `trust_ratios.png`, when training ends: the whole table as a heat map. A
        ratio of 0 and one that is not finite are grey.

    Variables that are not adapted have a constant ratio and are left out.
    Under Horovod pass this callback on rank 0 only, because all ranks have
    the same ratios.

    Args:
        log_dir: String or `os.PathLike`, the folder to write to.
        every_n_steps: Integer >= 1, the updates from one row to the next. With
            `steps_per_execution` a multiple may be inside an execution, and
            the row is recorded after it. Defaults to `100`.

    Raises:
        ValueError: If an argument is out of its range. When training begins, if
            the optimizer is neither LARS nor TrustRatio. After the first batch,
            if the optimizer adapts no variable.
        ImportError: If TensorFlow, TensorBoard or Matplotlib is not installed.

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
        check_path("log_dir", log_dir)
        check_integer("every_n_steps", every_n_steps, at_least=1)
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
        self._optimizer()
        self._step = None
        self._events = None

    def on_epoch_begin(self, epoch, logs=None):
        # Another callback may restore the optimizer in `on_train_begin`.
        if self._step is None:
            self._seen(int(self._optimizer().iterations))

    def on_train_batch_end(self, batch, logs=None):
        if self._events is None:
            # The first batch may be what builds the optimizer.
            self._open()
        # Reading the counter waits for the device and copies all state on JAX.
        # So it is read only when the step may have passed a multiple.
        self._batches_to_wait -= self._batches_per_call
        if self._batches_to_wait > 0:
            return
        step = int(self._optimizer().iterations)
        if step // self._every_n_steps > self._step // self._every_n_steps:
            self._record(step)
        self._seen(step)

    def on_train_end(self, logs=None):
        if self._events is None:
            return
        self._events.close()
        header, rows, _ = _read_table(self._table)
        if rows:
            _heat_map.draw(
                header[1:],
                np.array(rows, "float64"),
                self._every_n_steps,
                self._table.with_suffix(".png"),
            )

    def _optimizer(self):
        # On JAX, Keras's `self.model` first copies the state of the training
        # loop into the variables.
        optimizer = innermost(self.model.optimizer)
        if not isinstance(optimizer, LayerAdaptation):
            raise ValueError(
                "TrustRatioLogger needs a model that was compiled with LARS "
                "or TrustRatio. Pass `optimizer=keras_lars.LARS(...)` to "
                "`model.compile`, or leave TrustRatioLogger out of "
                "`callbacks`. "
                f"Received: optimizer={type(optimizer).__name__}"
            )
        return optimizer

    def _seen(self, step):
        self._step = step
        self._batches_to_wait = self._every_n_steps - step % self._every_n_steps

    def _open(self):
        import tensorflow as tf

        optimizer = self._optimizer()
        adapted = optimizer.trust_ratio_variables()
        if not adapted:
            raise ValueError(
                "TrustRatioLogger has nothing to record, because the "
                "optimizer adapts no variable of this model. Received: "
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
        # Each read waits for the device, so stack all ratios first.
        stacked = ops.stack([ratio.value for ratio in self._ratios])
        ratios = ops.convert_to_numpy(stacked)
        with self._table.open("a", newline="") as file:
            csv.writer(file).writerow([step, *ratios.tolist()])
        self._write_events(step, ratios)


def _start_table(path, header, step):
    """Writes the header, and keeps the rows up to `step` of the same header.

    Training that goes on keeps a table that is damaged, or of another model,
    under another name.
    """
    old_header, rows, problem = _read_table(path)
    if old_header and old_header != header:
        problem, rows = "it has other columns", []
    if problem and step > 0:
        copy = path.with_suffix(".damaged.csv")
        path.replace(copy)
        warnings.warn(
            f"{path} cannot be continued after {len(rows)} rows: {problem}; "
            f"it is kept as {copy}",
            stacklevel=2,
        )
    with written_atomically(path) as part, part.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(row for row in rows if int(row[0]) <= step)


def _read_table(path):
    """Returns the header, the rows as strings, and what is wrong or None.

    The rows are those before the first damage.
    """
    if not path.exists():
        return [], [], None
    header, rows = [], []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            # A job that was killed may leave half a line at the end.
            lines = csv.reader(line for line in file if line.endswith("\n"))
            header = next(lines, [])
            for row in lines:
                if len(row) != len(header):
                    raise ValueError("a row is cut")
                int(row[0])
                for ratio in row[1:]:
                    float(ratio)
                rows.append(row)
    except (ValueError, csv.Error) as error:
        return header, rows, str(error)
    return header, rows, None


def _events_function(events, paths):
    """Returns a function of step and ratios that writes TensorBoard events."""
    import tensorflow as tf

    step_spec = tf.TensorSpec((), tf.int64)
    ratios_spec = tf.TensorSpec((len(paths),), tf.float32)

    # Outside a graph each scalar takes 0.2 ms.
    @tf.function(input_signature=[step_spec, ratios_spec], autograph=False)
    def write(step, ratios):
        # Keras's TensorBoard callback turns all summaries off between its own
        # steps. `record_if` turns these on again.
        with events.as_default(step), tf.summary.record_if(True):
            for path, ratio in zip(paths, tf.unstack(ratios), strict=True):
                tf.summary.scalar(f"trust_ratio/{path}", ratio)
            usable = ratios[(ratios > 0) & tf.math.is_finite(ratios)]
            tf.summary.histogram(
                "log10_trust_ratio", tf.math.log(usable) / np.log(10)
            )

    return write
