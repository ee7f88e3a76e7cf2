"""Trains on digits while hosts come and go, and accounts for every example.

    python -m tests.jobs.elastic_digits_job --epochs=6 --pause=0.3

Prints lines of JSON: one for each start of training, one for each batch and
each epoch, and a summary with the top-1.
"""

import argparse
import json
import time

import keras
import numpy as np
import tensorflow as tf
from absl import logging

import horovod_recipes.keras as hvd
from horovod_recipes.data.sources import load_source
from horovod_recipes.models.small_cnn import small_cnn
from keras_lars import LARS
from keras_lars.schedules import WarmupPolynomialDecay
from tests.jobs.results import digest

GLOBAL_BATCH_SIZE = 500
NUM_CLASSES = 10
SEED = 0


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument(
        "--pause", type=float, required=True, help="seconds after each batch"
    )
    arguments = parser.parse_args()
    tf.get_logger().setLevel("ERROR")
    logging.set_verbosity(logging.ERROR)
    hvd.init()
    images, labels = load_digits("train")
    sampler = hvd.elastic.ElasticSampler(
        len(images), GLOBAL_BATCH_SIZE, seed=SEED
    )
    steps = arguments.epochs * sampler.steps_per_epoch
    model = create_model(images.shape[1:], steps, warmup_steps=steps // 4)
    state = hvd.elastic.KerasState(model, batch=0, epoch=0, sampler=sampler)
    train(state, images, labels, arguments)
    mine = slice(hvd.rank(), None, hvd.size())
    images, labels = load_digits("test")
    results = hvd.evaluate(model, images[mine], labels[mine], verbose=0)
    log(
        "summary",
        ranks=hvd.size(),
        epochs=len(sampler.reports),
        each_example_once=all(
            report["used_once"] == 4000 for report in sampler.reports
        ),
        updates=int(model.optimizer.iterations),
        top1=round(100 * results["top1"], 2),
    )


def load_digits(split):
    """Returns the images and labels of a split of mnist5k as arrays."""
    source = load_source("mnist5k", None)
    records = source.records(split, rank=0, ranks=1)
    (digits,) = records.batch(source.num_examples(split)).map(source.parse)
    images = [tf.io.decode_png(image).numpy() for image in digits["image"]]
    return np.stack(images), digits["label"].numpy()


def create_model(image_shape, steps, warmup_steps):
    """Returns the compiled network; its rate depends on the update alone."""
    keras.utils.set_random_seed(SEED)
    model = small_cnn(image_shape, NUM_CLASSES, filters=16)
    schedule = WarmupPolynomialDecay(10.0, steps, warmup_steps)
    model.compile(
        optimizer=hvd.DistributedOptimizer(
            LARS(schedule, weight_decay=5e-4, unadapted_scale=0.05)
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[keras.metrics.SparseCategoricalAccuracy(name="top1")],
        jit_compile=False,
    )
    return model


@hvd.elastic.run
def train(state, images, labels, arguments):
    """Trains what is left to do, on the ranks that there are now."""
    log("start", ranks=hvd.size(), epoch=state.epoch, batch=state.batch)
    dataset = state.sampler.dataset().map(
        lambda indices: (tf.gather(images, indices), tf.gather(labels, indices))
    )
    state.model.fit(
        dataset.prefetch(2),
        steps_per_epoch=state.sampler.steps_per_epoch,
        initial_epoch=state.epoch,
        epochs=arguments.epochs,
        shuffle=False,
        verbose=0,
        callbacks=[
            hvd.callbacks.BroadcastGlobalVariablesCallback(0),
            hvd.callbacks.AverageNonTrainableWeights(),
            hvd.callbacks.ExactMetrics(),
            hvd.elastic.UpdateBatchStateCallback(state),
            hvd.elastic.UpdateEpochStateCallback(state),
            Log(state, arguments.pause),
            hvd.elastic.CommitStateCallback(state),
        ],
    )


class Log(keras.callbacks.Callback):
    """Prints each batch and epoch, and whether all ranks have equal weights."""

    def __init__(self, state, pause):
        super().__init__()
        self.state = state
        self.pause = pause

    def on_train_batch_end(self, batch, logs=None):
        log("batch", epoch=self.state.epoch, batch=self.state.batch)
        time.sleep(self.pause)

    def on_epoch_end(self, epoch, logs=None):
        digests = hvd.allgather_object(digest(self.model.get_weights()))
        log(
            "epoch",
            **self.state.sampler.reports[-1],
            ranks=hvd.size(),
            different_weights=len(set(digests)),
            top1=round(100 * logs["top1"], 2),
        )


def log(event, **values):
    """Prints a line of JSON, on rank 0 alone."""
    if hvd.rank() == 0:
        print(json.dumps({"event": event, **values}), flush=True)


if __name__ == "__main__":
    main()
