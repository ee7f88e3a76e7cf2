"""What do `TrustRatioLogger` and `ReplicaCheck` cost in a training?

    horovodrun --gloo -np 2 python -m benchmarks.speed.callbacks

It trains ResNet-50 on generated images of 224 x 224 pixels on two ranks. After
every step both callbacks do their work, and rank 0 times it. The cost of one
call in 100 steps follows from that. Ranks meet before each call, so that the
time has no wait for a slower step of another rank. It takes 2 minutes on 2
cores, which should do nothing else.
"""

import tempfile
import time

import keras
import numpy as np

import horovod_recipes.keras as hvd
from benchmarks import _measure
from benchmarks import _results
from horovod_recipes.models import MODELS
from keras_lars import LARS
from keras_lars.callbacks import TrustRatioLogger

# Steps from one call of a callback to the next, as in a job.
EVERY_N_STEPS = 100
# Height and width of the images, in pixels.
IMAGE_SIZE = 224


class StepTimer(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.seconds = []

    def on_train_batch_begin(self, batch, logs=None):
        self._begin = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self.seconds.append(time.perf_counter() - self._begin)
        hvd.allreduce(0.0, name="meet")


def timed(callback):
    """Times what `callback` does after each step; returns the seconds."""
    seconds = []
    on_train_batch_end = callback.on_train_batch_end

    def timed_on_train_batch_end(batch, logs=None):
        begin = time.perf_counter()
        on_train_batch_end(batch, logs)
        seconds.append(time.perf_counter() - begin)

    callback.on_train_batch_end = timed_on_train_batch_end
    return seconds


def measure(network, micro_batch, steps):
    """Returns the seconds of each step, and of each callback after it."""
    network.compile(
        hvd.DistributedOptimizer(LARS(1.0, weight_decay=1e-4)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    rng = np.random.default_rng(hvd.rank())
    images = rng.integers(
        256, size=(micro_batch * steps, *network.input_shape[1:]), dtype="uint8"
    )
    labels = rng.integers(network.output_shape[-1], size=len(images))
    with tempfile.TemporaryDirectory() as folder:
        # In this order: rank 1 waits for rank 0 in the check, not before it.
        step_timer, check = StepTimer(), hvd.callbacks.ReplicaCheck(1)
        logger = TrustRatioLogger(folder, every_n_steps=1)
        seconds = {
            "TrustRatioLogger": timed(logger),
            "ReplicaCheck": timed(check),
        }
        network.fit(
            images,
            labels,
            batch_size=micro_batch,
            verbose=2 if hvd.rank() == 0 else 0,
            callbacks=[
                hvd.callbacks.BroadcastGlobalVariablesCallback(0),
                step_timer,
                *([logger] if hvd.rank() == 0 else []),
                check,
            ],
        )
    return step_timer.seconds, seconds


def summary(step_seconds, seconds):
    """Returns medians with quartiles in ms, and each callback's share."""
    # The first step and the first calls compile.
    step_ms = _measure.spread([1e3 * s for s in step_seconds[1:]])
    return {
        "step_ms": step_ms,
        "every_n_steps": EVERY_N_STEPS,
        "callbacks": {
            name: {
                "ms": (ms := _measure.spread([1e3 * s for s in own[1:]])),
                "first_ms": round(1e3 * own[0]),
                "cost_percent": round(
                    100 * ms[0] / (EVERY_N_STEPS * step_ms[0]), 4
                ),
            }
            for name, own in seconds.items()
        },
    }


def markdown(result):
    rows = [
        [name, _results.cell(own["ms"]), own["first_ms"], own["cost_percent"]]
        for name, own in result["callbacks"].items()
    ]
    share = f"% of {result['every_n_steps']} steps"
    table = _results.table(["", "ms", "first call, ms", share], rows)
    return f"A step takes {_results.cell(result['step_ms'])} ms.\n\n{table}"


def main():
    parser = _results.parser(__spec__, __doc__, "docs/results/callbacks.json")
    _results.add_integer(parser, "micro_batch", 8, "images per rank and step")
    _results.add_integer(
        parser,
        "steps",
        12,
        "steps to train; the first is not timed",
        at_least=3,
    )
    options = parser.parse_args()
    hvd.init()
    network = MODELS["resnet50"]((IMAGE_SIZE, IMAGE_SIZE, 3), 1000)
    measured = measure(network, options.micro_batch, options.steps)
    if hvd.rank() == 0:
        result = {
            "machine": _measure.machine(),
            "ranks": hvd.size(),
            "variables": len(network.trainable_variables),
            "micro_batch": options.micro_batch,
            **summary(*measured),
        }
        print(markdown(result))
        _results.write_json(options.output, result)


if __name__ == "__main__":
    main()
