"""What does `ReplicaCheck` cost in the training of ResNet-50?

    horovodrun -np 2 python -m benchmarks.speed.replica_check

trains on generated images of 224 x 224, compares the ranks' 161 trainable
variables and the optimizer's after every step, and times both on rank 0. The
cost at one comparison in 100 steps follows from that. Run it alone on a
machine: a comparison waits for the slowest rank.
"""

import statistics

import keras
import numpy as np
from absl import flags

import horovod_recipes.keras as hvd
from benchmarks.speed import report
from benchmarks.speed.trust_ratio_logger import EVERY_N_STEPS
from benchmarks.speed.trust_ratio_logger import StepTimer
from keras_lars import LARS

# Of its own, because tests import all benchmarks into one process.
FLAGS = flags.FlagValues()
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 8, "Images of a rank in a step.", flag_values=FLAGS
)
_STEPS = flags.DEFINE_integer(
    "steps", 12, "Steps to train.", lower_bound=3, flag_values=FLAGS
)
_OUTPUT = flags.DEFINE_string(
    "output",
    "docs/results/replica_check.json",
    "JSON to write.",
    flag_values=FLAGS,
)


class CheckTimer(StepTimer):
    """Times from the end of the callback before it to that of a check.

    The ranks meet first, so that waiting for a slower rank's step, which the
    next step would do anyway, does not count.
    """

    def __init__(self, check):
        super().__init__()
        self._check = check

    def on_train_batch_begin(self, batch, logs=None):
        pass

    def on_train_batch_end(self, batch, logs=None):
        hvd.allreduce(0.0, name="meet")
        super().on_train_batch_begin(batch)
        self._check.on_train_batch_end(batch)
        super().on_train_batch_end(batch)


def measure(batch_size, steps):
    """Returns the seconds of each step, and of each check after it."""
    model = keras.applications.ResNet50(weights=None)
    model.compile(
        hvd.DistributedOptimizer(LARS(1.0, weight_decay=1e-4)),
        "sparse_categorical_crossentropy",
        jit_compile=False,
    )
    rng = np.random.default_rng(hvd.rank())
    images = rng.normal(size=(batch_size * steps, 224, 224, 3))
    labels = rng.integers(1000, size=len(images))
    check = hvd.callbacks.ReplicaCheck(1)
    check.set_model(model)
    check.on_train_begin()
    step_timer, check_timer = StepTimer(), CheckTimer(check)
    model.fit(
        images.astype("float32"),
        labels,
        batch_size=batch_size,
        verbose=2 if hvd.rank() == 0 else 0,
        callbacks=[
            hvd.callbacks.BroadcastGlobalVariablesCallback(0),
            # Before the other, so that its end of a step is before the check.
            step_timer,
            check_timer,
        ],
    )
    return step_timer.seconds, check_timer.seconds


def main():
    report.parse_command_line(FLAGS)
    hvd.init()
    steps, checks = measure(_BATCH_SIZE.value, _STEPS.value)
    if hvd.rank() != 0:
        return
    # The first of each compiles.
    step = statistics.median(steps[1:])
    check = statistics.median(checks[1:])
    result = {
        "machine": report.machine(),
        "ranks": hvd.size(),
        "batch_size": _BATCH_SIZE.value,
        "step_ms": report.spread([1e3 * s for s in steps[1:]]),
        "check_ms": report.spread([1e3 * s for s in checks[1:]]),
        "first_check_ms": round(1e3 * checks[0]),
        "every_n_steps": EVERY_N_STEPS,
        "cost_percent": round(100 * check / (EVERY_N_STEPS * step), 4),
    }
    header = ["step, ms", "check, ms", f"% of {EVERY_N_STEPS} steps"]
    row = [result["step_ms"][0], result["check_ms"][0], result["cost_percent"]]
    print(report.table(header, [row]))
    report.write_json(_OUTPUT.value, result)


if __name__ == "__main__":
    main()
