"""What does a training job cost beside a bare `fit`?

    horovodrun --gloo -np 2 python -m benchmarks.speed.job

It trains the demo's network on generated images, on two ranks with one thread
each: by `fit` with the callbacks of a job and its progress bar, by a bare `fit`
with a `DistributedOptimizer`, and by a bare `fit` with one of the callbacks. It
also leaves out the handshake with which each step begins, and the comparison of
the ranks' gradients. All take turns. The time is that of an epoch after the
first, without evaluation. On 2 cores, four rounds take 20 minutes.
"""

import contextlib
import os
import pathlib
import tempfile
import time
from unittest import mock

import keras
import tensorflow as tf

import horovod_recipes.keras as hvd
from benchmarks import _measure
from benchmarks import _results
from benchmarks.speed import _ranks
from horovod_recipes.configs import demo
from horovod_recipes.training import callbacks as job_callbacks
from horovod_recipes.training import job as training_job

# Images per rank and update; an update took 29 and 63 ms on two cores.
MICRO_BATCHES = (20, 120)
# Seconds of an epoch, about, and its least number of steps. In the first epoch,
# each callback must do its work once, and compile.
EPOCH_SECONDS = 2
MIN_STEPS = 101
# The callbacks that do something at every step.
EVERY_STEP = (
    "Watchdog",
    "Throughput",
    "StopOnSigterm",
    "StopOnNonFinite",
    "ReplicaCheck",
    "TrustRatioLogger",
)
# What is left out by replacing a function while the step is traced.
LEFT_OUT = {
    "handshake": (
        "horovod_recipes.keras._train_step.with_handshake",
        lambda function, train_step: train_step,
    ),
    "comparison": (
        "horovod_recipes.keras._reduction.check_agreement",
        lambda *arguments: [],
    ),
}


class EpochTimer(keras.callbacks.Callback):
    """Times the epochs of a `fit`; it does nothing within them."""

    def __init__(self):
        super().__init__()
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        self._begin = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(time.perf_counter() - self._begin)


def measure(micro_batch, rounds, folder, watchdog):
    """Returns the seconds of a step in each round, for each way to train."""
    batches = generated_batches(micro_batch)
    job = create_job(micro_batch, folder)
    steps = steps_of_an_epoch(job.model, batches)
    ways = {}
    for name, target in LEFT_OUT.items():
        with mock.patch(*target):
            model = create_job(micro_batch, folder).model
            fit(model, batches, 1, [])  # Traces.
        ways[f"without the {name}"] = model, []
    with job_callbacks.sigterm_noted() as sigterm:
        callbacks = job_callbacks.all_callbacks(job, watchdog, sigterm, ())
        ways |= {"bare fit": (job.model, []), "job": (job.model, callbacks)}
        for name in EVERY_STEP:
            # Only rank 0 has the callbacks that report.
            one = [c for c in callbacks if type(c).__name__ == name]
            ways[name] = job.model, one
        times = {name: [] for name in ways}
        for _ in range(rounds):
            for name, (model, own) in ways.items():
                times[name].append(fit(model, batches, steps, own))
    return times


def generated_batches(micro_batch):
    images = tf.random.uniform([micro_batch, 28, 28, 1], 0, 256, tf.int32)
    labels = tf.random.uniform([micro_batch], 0, 10, tf.int32)
    batch = tf.cast(images, tf.uint8), tf.one_hot(labels, 10)
    return tf.data.Dataset.from_tensors(batch).repeat()


def create_job(micro_batch, folder):
    """Returns a `Job` whose reports come as often as in a long job."""
    config = demo.get_config()
    config.global_batch_size = micro_batch * hvd.size()
    config.max_micro_batch_size = micro_batch
    config.log_trust_ratios_every_steps = 100
    job = training_job.prepare(config, "demo", pathlib.Path(folder))
    training_job.restore(job, "overwrite")
    if job.lock:
        job.lock.release()  # The next job has the same folder.
    job.target = job_callbacks.TargetTop1(None, False, {})
    return job


def steps_of_an_epoch(model, batches):
    """Returns a number of steps that take `EPOCH_SECONDS` or more."""
    seconds = fit(model, batches, 10, [])
    steps = max(MIN_STEPS, round(EPOCH_SECONDS / seconds))
    return hvd.broadcast_object(steps, 0)


def fit(model, batches, steps, callbacks):
    """Returns the mean seconds of a step in the second epoch."""
    timer = EpochTimer()
    with (
        open(os.devnull, "w") as null,
        contextlib.redirect_stdout(null),  # The progress bar.
    ):
        model.fit(
            batches,
            steps_per_epoch=steps,
            epochs=2,
            callbacks=[timer, *callbacks],
            shuffle=False,
            verbose=1 if callbacks and hvd.rank() == 0 else 0,
        )
    return timer.seconds[1] / steps


def summary(times):
    """Returns the milliseconds of each way, and its speed beside `fit`."""
    bare = times["bare fit"]
    return {
        name: {
            "ms": _measure.spread([1e3 * s for s in seconds]),
            "speed": _measure.spread_of_ratios(bare, seconds),
        }
        for name, seconds in times.items()
    }


def markdown(result):
    tables = []
    for micro_batch, ways in result["results"].items():
        rows = [
            [
                name,
                _results.cell(way["ms"], ".2f"),
                _results.cell(way["speed"], ".3f"),
            ]
            for name, way in ways.items()
        ]
        header = [f"{micro_batch} images", "ms an update", "x bare fit"]
        tables.append(_results.table(header, rows))
    return "\n\n".join(tables)


def main():
    parser = _results.parser(__spec__, __doc__, "docs/results/job.json")
    _results.add_rounds(parser, 4)
    options = parser.parse_args()
    with _ranks.start() as watchdog:
        results = {}
        for micro_batch in MICRO_BATCHES:
            # Only rank 0 writes; the others may be on another host.
            with tempfile.TemporaryDirectory() as folder:
                times = measure(micro_batch, options.rounds, folder, watchdog)
            results[micro_batch] = summary(times)
    if hvd.rank() == 0:
        result = {
            "machine": _measure.machine(),
            "ranks": hvd.size(),
            "rounds": options.rounds,
            "results": results,
        }
        print(markdown(result))
        _results.write_json(options.output, result)


if __name__ == "__main__":
    main()
