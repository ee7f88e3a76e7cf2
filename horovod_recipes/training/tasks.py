"""Tasks. A task defines a job's batches, its loss and its metrics.

`config.task` names one of `TASKS`. Every task reports a top-1, the accuracy of
its classes.
"""

import os

import keras
import tensorflow as tf

import horovod_recipes.keras as hvd
from horovod_recipes.data.pipeline import RankInput
from horovod_recipes.data.pipeline import evaluation_batches
from horovod_recipes.data.pipeline import training_batches
from horovod_recipes.errors import JobError
from horovod_recipes.models.heads import VIEWS
from horovod_recipes.models.heads import encoder_of
from horovod_recipes.training.simclr import PROBE_METRICS
from horovod_recipes.training.simclr import NTXent
from horovod_recipes.training.simclr import SimCLRModel
from keras_lars._files import written_atomically


class Classification:
    """Predicts one class per image, with cross-entropy and top-1 accuracy.

    Args:
        config: The recipe's `ConfigDict`.
        size: The `JobSize`.
        source: From `data.sources.load_source`.
        corrupt_images: A `data.pipeline.CorruptImages`.
    """

    # The metrics in metrics.csv, from training and from evaluation.
    training_metrics = ("loss", "top1")
    evaluation_metrics = ("loss", "top1")
    # The random views of an image; None for one image.
    views = None

    def __init__(self, config, size, source, corrupt_images):
        self._config = config
        self._size = size
        self._source = source
        self._input = RankInput(
            rank=hvd.rank(),
            ranks=size.ranks,
            batch_size=size.micro_batch_size,
            threads=input_threads(config),
            corrupt_images=corrupt_images,
        )

    @property
    def batches_per_update(self):
        """The batches of `fit` in an update. Each is a micro-batch."""
        return self._size.accumulation_steps

    def model(self, network):
        """Returns the model that `fit` trains."""
        return network

    def loss(self):
        return keras.losses.CategoricalCrossentropy(
            from_logits=True, label_smoothing=self._config.label_smoothing
        )

    def metrics(self):
        return [keras.metrics.CategoricalAccuracy(name="top1")]

    def training_dataset(self, first_epoch, updates_done):
        """Returns this rank's endless batches, with one-hot labels.

        Args:
            first_epoch: Integer, the epoch to begin with, counted from 0.
            updates_done: Integer, the updates of that epoch to skip.
        """
        return self._one_hot(self._micro_batches(first_epoch, updates_done))

    def _micro_batches(self, first_epoch, updates_done):
        return training_batches(
            self._source,
            self._config.dataset,
            self._input,
            batches_per_epoch=self._size.micro_batches_per_epoch,
            first_epoch=first_epoch,
            first_batch=updates_done * self._size.accumulation_steps,
            seed=self._config.seed,
            views=self.views,
        )

    def evaluation_dataset(self):
        """Returns this rank's part of the test split, with one-hot labels."""
        return self._one_hot(self._test_images())

    def _test_images(self):
        return evaluation_batches(
            self._source, self._config.dataset, self._input
        )

    def _one_hot(self, batches):
        num_classes = self._config.dataset.num_classes
        return batches.map(
            lambda images, labels: (images, tf.one_hot(labels, num_classes))
        )

    def save_result(self, model, workdir):
        """Writes what a finished job leaves, besides its checkpoints."""


class SimCLR(Classification):
    """Learns features from two views of each image, by `SimCLRModel`.

    Its top-1 is that of the linear probe.
    """

    training_metrics = (
        "loss",
        "contrastive_top1",
        "alignment",
        "uniformity",
        *PROBE_METRICS,
    )
    evaluation_metrics = PROBE_METRICS
    views = VIEWS
    # The micro-batches of an update are one batch of `fit`.
    batches_per_update = 1

    def model(self, network):
        return SimCLRModel(network.input, network.output, name=network.name)

    def loss(self):
        return NTXent(self._config.simclr.temperature)

    def metrics(self):
        # The model has its own.
        return None

    def training_dataset(self, first_epoch, updates_done):
        """Returns this rank's endless batches for `SimCLRModel`."""
        return (
            self._micro_batches(first_epoch, updates_done)
            .batch(self._size.accumulation_steps, drop_remainder=True)
            .prefetch(1)
        )

    def evaluation_dataset(self):
        """Returns this rank's part of the test split, with integer labels."""
        return self._test_images()

    def save_result(self, model, workdir):
        """Writes encoder.keras, a Keras model from images to features."""
        with written_atomically(workdir / "encoder.keras") as part:
            encoder_of(model).save(part)


TASKS = {"classification": Classification, "simclr": SimCLR}


def find_task(config):
    """Returns the class of the config's task.

    Raises:
        JobError: If `TASKS` does not have it.
    """
    if config.task not in TASKS:
        raise JobError(
            f"task must be one of {', '.join(TASKS)}, but is {config.task}"
        )
    return TASKS[config.task]


def input_threads(config):
    """Returns `dataset.threads`, or this rank's share of its host's cores."""
    cores = len(os.sched_getaffinity(0))
    return config.dataset.threads or max(1, cores // hvd.local_size())
