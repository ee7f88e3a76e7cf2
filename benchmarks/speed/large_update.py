"""Is an update at a global batch of 32,768 the right one, on two ranks?

    horovodrun -np 2 python -m benchmarks.speed.large_update

makes one update of a recipe on generated images, small so that CPUs can, by
what a job does: micro-batches accumulated in one compiled step, one allreduce,
LARS. Then it computes the same another way: a gradient tape for each
micro-batch, sums in float64, and LARS written out in NumPy. It also compares
the memory that 2,048 images take with that of 32,768.
"""

import pathlib
import time

import keras
import numpy as np
import tensorflow as tf
from absl import flags

import horovod_recipes.keras as hvd
from benchmarks.speed import report
from horovod_recipes import train
from horovod_recipes.configs import resnet50
from horovod_recipes.configs._check import job_size
from horovod_recipes.keras._variables import sum_over_ranks

# Of its own, because tests import all benchmarks into one process.
FLAGS = flags.FlagValues()
_IMAGE_SIZE = flags.DEFINE_integer(
    "image_size", 16, "Pixels.", flag_values=FLAGS
)
_OUTPUT = flags.DEFINE_string(
    "output",
    "docs/results/large_update.json",
    "JSON to write.",
    flag_values=FLAGS,
)
SMALL_BATCH, LARGE_BATCH = 2048, 32768


class GeneratedImages:
    """Stands in for a source: a shape, and no images on disk."""

    def __init__(self, image_size):
        self._shape = (image_size, image_size, 3)

    def image_shape(self, image_size):
        return self._shape


def small_config(global_batch_size):
    """Returns `resnet50:32k`, to make its first update at the peak rate."""
    config = resnet50.get_config("32k")
    config.global_batch_size = global_batch_size
    config.schedule.warmup_epochs = 0
    return config


def generated_batches(job, shape, num_classes):
    """Returns this rank's micro-batches, the same whenever they are asked."""

    def batch(index):
        seed = tf.stack([tf.cast(hvd.rank(), tf.int64), index])
        images = tf.random.stateless_uniform(
            [job.micro_batch_size, *shape], seed, 0, 256, tf.int32
        )
        labels = tf.random.stateless_uniform(
            [job.micro_batch_size], seed, 0, num_classes, tf.int32
        )
        return tf.cast(images, tf.uint8), tf.one_hot(labels, num_classes)

    return tf.data.Dataset.range(job.accumulation_steps).map(batch)


class CountCalls(keras.callbacks.Callback):
    """Counts what Keras calls from Python for one update."""

    calls = 0

    def on_train_batch_end(self, batch, logs=None):
        self.calls += 1


def update_of_job(config, image_size):
    """Makes one update as a job does.

    Returns:
        Dict: `model`, after it; `before`, the trainable variables before it;
        `calls` of Python; `seconds`; `peak_mb`, the most memory that this
        process has had so far.
    """
    job = job_size(config, hvd.size())
    source = GeneratedImages(image_size)
    schedule = train.create_schedule(config, job)
    model = train.create_model(config, job, schedule, source)
    hvd.broadcast_variables(model.weights, root_rank=0)
    before = [v.numpy() for v in model.trainable_variables]
    calls = CountCalls()
    batches = generated_batches(
        job, source.image_shape(None), config.dataset.num_classes
    )
    begin = time.perf_counter()
    model.fit(
        batches,
        steps_per_epoch=job.accumulation_steps,
        callbacks=[
            hvd.callbacks.BroadcastGlobalVariablesCallback(0),
            hvd.callbacks.AverageNonTrainableWeights(),
            calls,
        ],
        shuffle=False,
        verbose=0,
    )
    return {
        "model": model,
        "before": before,
        "job": job,
        "calls": calls.calls,
        "seconds": time.perf_counter() - begin,
        "peak_mb": peak_memory_mb(),
    }


def update_another_way(config, update):
    """Returns the trainable variables that the update should have left.

    In float64 but for the gradient of each micro-batch.
    """
    job, before = update["job"], update["before"]
    model = keras.models.clone_model(update["model"])
    for variable, value in zip(model.trainable_variables, before, strict=True):
        variable.assign(value)
    sums = [tf.Variable(tf.zeros(w.shape, tf.float64)) for w in before]

    @tf.function(autograph=False)
    def add_gradients(images, labels):
        with tf.GradientTape() as tape:
            losses = tf.nn.softmax_cross_entropy_with_logits(
                labels, model(images, training=True)
            )
            loss = tf.reduce_mean(losses)
        variables = [v.value for v in model.trainable_variables]
        for total, gradient in zip(
            sums, tape.gradient(loss, variables), strict=True
        ):
            total.assign_add(tf.cast(gradient, tf.float64))

    shape = model.input_shape[1:]
    classes = config.dataset.num_classes
    for images, labels in generated_batches(job, shape, classes):
        add_gradients(images, labels)
    totals = sum_over_ranks(sums)
    micro_batches = job.accumulation_steps * job.ranks
    return [
        lars(w.astype("float64"), total.numpy() / micro_batches, config)
        for w, total in zip(before, totals, strict=True)
    ]


def lars(w, gradient, config):
    """Returns the weights after a first step, as Algorithm 1 of the paper."""
    rate = config.schedule.peak_learning_rate
    if w.ndim <= 1:
        return w - rate * gradient
    decay = config.optimizer.weight_decay
    norm, gradient_norm = np.linalg.norm(w), np.linalg.norm(gradient)
    if norm == 0 or gradient_norm == 0:
        ratio = 1.0
    else:
        eta = config.optimizer.trust_coefficient
        ratio = eta * norm / (gradient_norm + decay * norm)
    return w - rate * ratio * (gradient + decay * w)


def largest_difference(update, expected):
    """Returns the largest ratio of a variable's error to its update."""
    return max(
        float(np.linalg.norm(v.numpy() - w) / np.linalg.norm(w - w0))
        for v, w, w0 in zip(
            update["model"].trainable_variables,
            expected,
            update["before"],
            strict=True,
        )
    )


def peak_memory_mb():
    """Returns the most resident memory of this process, in MB."""
    status = pathlib.Path("/proc/self/status").read_text()
    (line,) = [line for line in status.splitlines() if "VmHWM" in line]
    return int(line.split()[1]) / 1024


def main():
    report.parse_command_line(FLAGS)
    hvd.init()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    small = update_of_job(small_config(SMALL_BATCH), _IMAGE_SIZE.value)
    config = small_config(LARGE_BATCH)
    large = update_of_job(config, _IMAGE_SIZE.value)
    expected = update_another_way(config, large)
    difference = largest_difference(large, expected)
    differences = hvd.allgather_object(difference)
    peaks = hvd.allgather_object((small["peak_mb"], large["peak_mb"]))
    if hvd.rank() != 0:
        return
    result = {
        "machine": report.machine(),
        "model": "resnet50",
        "parameters": update_parameters(large),
        "image_size": _IMAGE_SIZE.value,
        "ranks": hvd.size(),
        "micro_batch_size": large["job"].micro_batch_size,
        "accumulation_steps": large["job"].accumulation_steps,
        "python_calls_an_update": large["calls"],
        "seconds": round(large["seconds"], 1),
        "largest_relative_difference_of_each_rank": differences,
        "peak_mb_at_2048_and_32768_of_each_rank": [
            [round(peak) for peak in pair] for pair in peaks
        ],
    }
    header = ["batch", "peak MB", "calls", "seconds"]
    rows = [
        (
            update["job"].global_batch_size,
            round(update["peak_mb"]),
            update["calls"],
            round(update["seconds"], 1),
        )
        for update in (small, large)
    ]
    print(report.table(header, rows))
    print(f"largest relative difference of a variable: {max(differences):.1e}")
    report.write_json(_OUTPUT.value, result)


def update_parameters(update):
    return sum(int(np.prod(w.shape)) for w in update["before"])


if __name__ == "__main__":
    main()
