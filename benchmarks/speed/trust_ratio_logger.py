"""What does `TrustRatioLogger` cost in the training of ResNet-50?

    python -m benchmarks.speed.trust_ratio_logger

trains on generated images of 224 x 224, records the ratios of all 54 adapted
variables after every step, and times both. The cost at one record in 100 steps
follows from that.
"""

import statistics
import tempfile
import time

import keras
import numpy as np
from absl import flags

from benchmarks.speed import report
from keras_lars import LARS
from keras_lars.callbacks import TrustRatioLogger

# Of its own, because tests import all benchmarks into one process.
FLAGS = flags.FlagValues()
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 8, "Images in a step.", flag_values=FLAGS
)
_STEPS = flags.DEFINE_integer(
    "steps", 12, "Steps to train.", lower_bound=3, flag_values=FLAGS
)
_OUTPUT = flags.DEFINE_string(
    "output",
    "docs/results/trust_ratio_logger.json",
    "JSON to write.",
    flag_values=FLAGS,
)
EVERY_N_STEPS = 100


class StepTimer(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.seconds = []

    def on_train_batch_begin(self, batch, logs=None):
        self._begin = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self.seconds.append(time.perf_counter() - self._begin)


class TimedLogger(TrustRatioLogger):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.seconds = []

    def on_train_batch_end(self, batch, logs=None):
        begin = time.perf_counter()
        super().on_train_batch_end(batch, logs)
        self.seconds.append(time.perf_counter() - begin)


def measure(batch_size, steps, log_dir):
    """Returns the seconds of each step, and of each record after it."""
    model = keras.applications.ResNet50(weights=None)
    model.compile(
        LARS(1.0, weight_decay=1e-4), "sparse_categorical_crossentropy"
    )
    rng = np.random.default_rng(0)
    images = rng.normal(size=(batch_size * steps, 224, 224, 3))
    labels = rng.integers(1000, size=len(images))
    # First in the list, so that its end of a step is before the record.
    timer, logger = StepTimer(), TimedLogger(log_dir, 1)
    model.fit(
        images.astype("float32"),
        labels,
        batch_size=batch_size,
        callbacks=[timer, logger],
    )
    return timer.seconds, logger.seconds


def main():
    report.parse_command_line(FLAGS)
    with tempfile.TemporaryDirectory() as log_dir:
        steps, records = measure(_BATCH_SIZE.value, _STEPS.value, log_dir)
    # The first of each compiles.
    step = statistics.median(steps[1:])
    record = statistics.median(records[1:])
    result = {
        "machine": report.machine(),
        "batch_size": _BATCH_SIZE.value,
        "step_ms": report.spread([1e3 * s for s in steps[1:]]),
        "record_ms": report.spread([1e3 * s for s in records[1:]]),
        "first_record_ms": round(1e3 * records[0]),
        "every_n_steps": EVERY_N_STEPS,
        "cost_percent": round(100 * record / (EVERY_N_STEPS * step), 4),
    }
    header = ["step, ms", "record, ms", f"% of {EVERY_N_STEPS} steps"]
    row = [result["step_ms"][0], result["record_ms"][0], result["cost_percent"]]
    print(report.table(header, [row]))
    report.write_json(_OUTPUT.value, result)


if __name__ == "__main__":
    main()
