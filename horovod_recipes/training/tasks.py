"""Tasks. A task defines a job's batches, its loss and its metrics.

`config.task` names one of `TASKS`.
"""

import os

import keras
import tensorflow as tf

import horovod_recipes.keras as hvd
from horovod_recipes.data.pipeline import RankInput
from horovod_recipes.data.pipeline import evaluation_batches
from horovod_recipes.data.pipeline import training_batches
from horovod_recipes.errors import JobError


class Classification:
    """Predicts one class per image, with cross-entropy and top-1 accuracy.

    Args:
        config: The recipe's `ConfigDict`.
        size: The `JobSize`.
        source: From `data.sources.load_source`.
        corrupt_images: A `data.pipeline.CorruptImages`.
    """

    def __init__(self, config, size, source, corrupt_images):
        self._config = config
        self._size = size
        self._source = source
        self._input = RankInput(
            rank=hvd.rank(),
            ranks=size.ranks,
            batch_size=size.micro_batch_size,
            threads=_input_threads(config),
            corrupt_images=corrupt_images,
        )

    def loss(self):
        return keras.losses.CategoricalCrossentropy(
            from_logits=True, label_smoothing=self._config.label_smoothing
        )

    def metrics(self):
        return [keras.metrics.CategoricalAccuracy(name="top1")]

    def training_dataset(self, first_epoch, updates_done):
        """Returns this rank's endless micro-batches, with one-hot labels.

        Args:
            first_epoch: Integer, the epoch to begin with, counted from 0.
            updates_done: Integer, the updates of that epoch to skip.
        """
        batches = training_batches(
            self._source,
            self._config.dataset,
            self._input,
            batches_per_epoch=self._size.micro_batches_per_epoch,
            first_epoch=first_epoch,
            first_batch=updates_done * self._size.accumulation_steps,
            seed=self._config.seed,
        )
        return self._one_hot(batches)

    def evaluation_dataset(self):
        """Returns this rank's part of the test split, with one-hot labels."""
        batches = evaluation_batches(
            self._source, self._config.dataset, self._input
        )
        return self._one_hot(batches)

    def _one_hot(self, batches):
        num_classes = self._config.dataset.num_classes
        return batches.map(
            lambda images, labels: (images, tf.one_hot(labels, num_classes))
        )


TASKS = {"classification": Classification}


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


def _input_threads(config):
    """Returns `dataset.threads`, or this rank's share of its host's cores."""
    cores = len(os.sched_getaffinity(0))
    return config.dataset.threads or max(1, cores // hvd.local_size())
