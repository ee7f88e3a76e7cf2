"""One update of a job at a global batch of 32,768, on two ranks.

The job's way is micro-batches accumulated in one compiled step, one allreduce,
and LARS. The other way is a gradient tape per micro-batch, sums in float64, and
LARS written out in NumPy. The images are generated and small.
"""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf

import horovod_recipes.keras as hvd
from benchmarks._measure import memory_bytes
from horovod_recipes.configs import resnet50
from horovod_recipes.planning.estimate import activation_bytes
from horovod_recipes.training.build import create_network
from horovod_recipes.training.build import create_schedule
from horovod_recipes.training.job import compile_model
from horovod_recipes.training.job_size import JobSize
from horovod_recipes.training.job_size import job_size
from horovod_recipes.training.tasks import Classification
from tests.parallel.common import assert_same_on_all_ranks

pytestmark = pytest.mark.slow

IMAGE_SHAPE = (16, 16, 3)
NUM_CLASSES = 10


@dataclasses.dataclass
class Update:
    """A model after one update, and what the update took."""

    size: JobSize
    model: keras.Model
    weights_before: list
    python_calls: int
    peak_memory_mb: float


def tiny_config(global_batch_size):
    """Returns `resnet50:32k`, tiny, with its first update at the peak rate."""
    config = resnet50.get_config("32k")
    config.global_batch_size = global_batch_size
    config.max_micro_batch_size = 256
    config.schedule.warmup_epochs = 0
    config.model.update(stage_blocks=(1, 1), width=8, batch_norm="micro_batch")
    config.dataset.num_classes = NUM_CLASSES
    return config


def micro_batches(size):
    """Returns this rank's generated micro-batches, the same in every call."""

    def micro_batch(index):
        seed = tf.stack([tf.cast(hvd.rank(), tf.int64), index])
        images = tf.random.stateless_uniform(
            [size.micro_batch_size, *IMAGE_SHAPE], seed, 0, 256, tf.int32
        )
        labels = tf.random.stateless_uniform(
            [size.micro_batch_size], seed, 0, NUM_CLASSES, tf.int32
        )
        return tf.cast(images, tf.uint8), tf.one_hot(labels, NUM_CLASSES)

    return tf.data.Dataset.range(size.accumulation_steps).map(micro_batch)


class CountCalls(keras.callbacks.Callback):
    """Counts the steps that Keras runs from Python."""

    calls = 0

    def on_train_batch_end(self, batch, logs=None):
        self.calls += 1


def update_of_job(config):
    """Makes one update as a job does; returns the `Update`."""
    size = job_size(config, hvd.size())
    model = create_network(config, IMAGE_SHAPE)
    compile_model(
        model,
        config,
        create_schedule(config, size),
        Classification(config, size, source=None, corrupt_images=None),
    )
    hvd.broadcast_variables(model.weights, root_rank=0)
    weights_before = [v.numpy() for v in model.trainable_variables]
    calls = CountCalls()
    model.fit(
        micro_batches(size),
        steps_per_epoch=size.accumulation_steps,
        callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(0), calls],
        shuffle=False,
        verbose=0,
    )
    return Update(
        size, model, weights_before, calls.calls, memory_bytes("VmHWM") / 1e6
    )


@pytest.fixture(scope="module")
def updates():
    """The updates at 2,048 and at 32,768."""
    return [update_of_job(tiny_config(batch)) for batch in (2048, 32768)]


def mean_gradients(update):
    """Returns the gradients of the global batch at the weights before."""
    # Not a clone: Keras's own batch norm would round the small gradients of a
    # new network differently.
    model = create_network(tiny_config(32768), IMAGE_SHAPE)
    for variable, value in zip(
        model.trainable_variables, update.weights_before, strict=True
    ):
        variable.assign(value)
    sums = [
        tf.Variable(tf.zeros(w.shape, tf.float64))
        for w in update.weights_before
    ]

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

    for images, labels in micro_batches(update.size):
        add_gradients(images, labels)
    number = update.size.accumulation_steps * update.size.ranks
    return [total.numpy() / number for total in hvd.sum_over_ranks(sums)]


def after_lars(w, gradient, config):
    """Returns the weights after a first step, as Algorithm 1 of the paper."""
    rate = config.schedule.peak_learning_rate
    if w.ndim <= 1:
        return w - rate * gradient
    decay = config.optimizer.weight_decay
    norm, gradient_norm = np.linalg.norm(w), np.linalg.norm(gradient)
    eta = config.optimizer.trust_coefficient
    ratio = eta * norm / (gradient_norm + decay * norm) if norm else 1.0
    return w - rate * ratio * (gradient + decay * w)


def largest_relative_difference(update, gradients, config):
    """Returns the largest ratio of a variable's error to its change."""
    return max(
        np.linalg.norm(variable.numpy() - expected)
        / np.linalg.norm(expected - w)
        for variable, w, expected in zip(
            update.model.trainable_variables,
            update.weights_before,
            [
                after_lars(w.astype("float64"), gradient, config)
                for w, gradient in zip(
                    update.weights_before, gradients, strict=True
                )
            ],
            strict=True,
        )
    )


def test_update_equals_another_computation(updates):
    update = updates[1]
    assert update.size.ranks == 2
    assert update.size.accumulation_steps == 64
    assert update.python_calls == 1
    assert int(update.model.optimizer.iterations) == 1
    gradients = mean_gradients(update)
    config = tiny_config(32768)
    assert largest_relative_difference(update, gradients, config) < 1e-4
    # The test would see a wrong decay.
    config.optimizer.weight_decay = 6e-4
    assert largest_relative_difference(update, gradients, config) > 1e-4
    assert_same_on_all_ranks(update.model.trainable_variables)


def test_memory_does_not_grow_with_the_accumulation_steps(updates):
    small, large = updates
    images = large.size.micro_batch_size * large.size.accumulation_steps
    activations_mb = images * activation_bytes(large.model) / 2**20
    # Tracing and compiling a second job takes memory too.
    allowed_mb = 200
    assert activations_mb > 2 * allowed_mb
    assert large.peak_memory_mb - small.peak_memory_mb < allowed_mb
