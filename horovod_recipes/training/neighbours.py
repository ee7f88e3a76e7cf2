"""Classifies test images by their nearest training images, over all ranks."""

import dataclasses

import matplotlib.figure
import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

import horovod_recipes.keras as hvd
from horovod_recipes.data.pipeline import RankInput
from horovod_recipes.data.pipeline import evaluation_batches
from horovod_recipes.training.tasks import input_threads

# Wu et al., arXiv 1805.01978, section 3.4.
NEIGHBOURS = 200
TEMPERATURE = 0.1
# Images in one forward pass, and test images that are compared at once.
BATCH_SIZE = 256
# Training images that are compared at once, which limits the memory.
BLOCK = 16384
# Rows and columns of the picture.
PICTURE_QUERIES = 8
PICTURE_NEIGHBOURS = 8


@dataclasses.dataclass
class Nearest:
    """The accuracy by nearest neighbours, and examples of neighbours.

    Attributes:
        top1: Float from 0 to 1, over the test images of all ranks.
        queries: uint8 `[n, height, width, channels]`, the first test images of
            rank 0; the same on all ranks.
        places: int `[n, m, 2]`, the rank and the number in its shard of each
            query's nearest training images, the nearest first.
    """

    top1: float
    queries: np.ndarray
    places: np.ndarray


def find(train, test, config, source, corrupt_images, watchdog):
    """Finds the nearest training images of each test image, exactly.

    Each rank has the features of its shard of the training images. All ranks
    see one shard at a time.

    Args:
        train: This rank's features and labels of training images.
        test: The same of test images.
        config: The recipe's `ConfigDict`.
        source: From `data.sources.load_source`.
        corrupt_images: A `data.pipeline.CorruptImages`.
        watchdog: `hvd.callbacks.Watchdog`.

    Returns:
        `Nearest`.
    """
    (mine, labels), (test, test_labels) = (
        (tf.math.l2_normalize(part, axis=-1).numpy(), part_labels)
        for part, part_labels in (train, test)
    )
    best = _Best(len(test), min(NEIGHBOURS, int(sum_over_ranks(len(mine)))))
    for root in range(hvd.size()):
        others, other_labels = hvd.broadcast_object((mine, labels), root)
        for begin in range(0, len(others), BLOCK):
            block = slice(begin, begin + BLOCK)
            for row in range(0, len(test), BATCH_SIZE):
                rows = slice(row, row + BATCH_SIZE)
                similarity = test[rows] @ others[block].T
                numbers = begin + np.arange(similarity.shape[1])
                best.merge(rows, similarity, other_labels[block], root, numbers)
                watchdog.progress()
    classes = best.classes(config.dataset.num_classes)
    right = sum_over_ranks(np.sum(classes == test_labels))
    queries = []
    if hvd.rank() == 0:
        batches = shard_of(config, source, "test", corrupt_images)
        queries = next(iter(batches))[0].numpy()[:PICTURE_QUERIES]
    queries, places = hvd.broadcast_object(
        (queries, best.places[:PICTURE_QUERIES, :PICTURE_NEIGHBOURS]), 0
    )
    return Nearest(float(right / sum_over_ranks(len(test))), queries, places)


class _Best:
    """The most similar training images so far, the most similar first."""

    def __init__(self, rows, count):
        self._similarity = np.full((rows, count), -np.inf, np.float32)
        self._labels = np.zeros((rows, count), np.int64)
        # The rank of each image, and its number in that rank's shard.
        self.places = np.zeros((rows, count, 2), np.int64)

    def merge(self, rows, similarity, labels, rank, numbers):
        """Takes over images of a rank that are nearer to some rows."""
        count = self._similarity.shape[1]
        places = np.stack([np.full_like(numbers, rank), numbers], axis=-1)
        shape = similarity.shape
        candidates = (
            np.concatenate([self._similarity[rows], similarity], axis=1),
            np.concatenate(
                [self._labels[rows], np.broadcast_to(labels, shape)], axis=1
            ),
            np.concatenate(
                [self.places[rows], np.broadcast_to(places, (*shape, 2))],
                axis=1,
            ),
        )
        kept = np.argpartition(-candidates[0], count - 1, axis=1)[:, :count]
        order = np.argsort(
            -np.take_along_axis(candidates[0], kept, axis=1), axis=1
        )
        kept = np.take_along_axis(kept, order, axis=1)
        self._similarity[rows] = np.take_along_axis(candidates[0], kept, axis=1)
        self._labels[rows] = np.take_along_axis(candidates[1], kept, axis=1)
        self.places[rows] = np.take_along_axis(
            candidates[2], kept[..., np.newaxis], axis=1
        )

    def classes(self, num_classes):
        """Returns the class with the most votes for each row."""
        votes = np.zeros((len(self._labels), num_classes))
        weights = np.exp(self._similarity.astype(np.float64) / TEMPERATURE)
        for vote, labels, weight in zip(
            votes, self._labels, weights, strict=True
        ):
            vote += np.bincount(labels, weight, minlength=num_classes)
        return votes.argmax(axis=1)


def sum_over_ranks(values):
    """Returns the sum of a number or an array over all ranks, with NumPy."""
    return hvd.allreduce(tf.constant(values), op=hvd.Sum).numpy()


def shard_of(config, source, split, corrupt_images):
    """Returns this rank's images of `"train"` or `"test"`, not augmented."""
    config = ConfigDict(config.to_dict())
    config.dataset.test_split = config.dataset[f"{split}_split"]
    rank_input = RankInput(
        rank=hvd.rank(),
        ranks=hvd.size(),
        batch_size=BATCH_SIZE,
        threads=input_threads(config),
        corrupt_images=corrupt_images,
    )
    return evaluation_batches(source, config.dataset, rank_input)


def features_of_splits(encoder, config, source, corrupt_images, watchdog):
    """Returns this rank's `features` of training images and of test images."""
    return [
        features(
            encoder, shard_of(config, source, split, corrupt_images), watchdog
        )
        for split in ("train", "test")
    ]


def features(encoder, batches, watchdog):
    """Returns float32 features `[n, d]` and labels `[n]` of a dataset."""

    @tf.function(reduce_retracing=True, autograph=False)
    def encoded(images):
        return tf.cast(encoder(images, training=False), tf.float32)

    found = []
    for images, labels in batches:
        found.append((encoded(images).numpy(), labels.numpy()))
        watchdog.progress()
    return [np.concatenate(part) for part in zip(*found, strict=True)]


def images_of(nearest, config, source, corrupt_images, watchdog):
    """Returns the pictures of the queries and of their neighbours.

    Returns:
        List of lists of images. Each begins with a query.
    """
    wanted = {
        int(number)
        for rank, number in nearest.places.reshape(-1, 2)
        if rank == hvd.rank()
    }
    images, number = {}, 0
    for batch, _ in shard_of(config, source, "train", corrupt_images):
        for image in batch.numpy():
            if number in wanted:
                images[hvd.rank(), number] = image
            number += 1
        watchdog.progress()
        if len(images) == len(wanted):
            break
    found = {}
    for part in hvd.allgather_object(images):
        found |= part
    return [
        [query, *(found[tuple(map(int, place))] for place in places)]
        for query, places in zip(nearest.queries, nearest.places, strict=True)
    ]


def draw(rows, path):
    """Draws each query, and its neighbours to the right, into a PNG file."""
    columns = len(rows[0])
    figure = matplotlib.figure.Figure(
        figsize=(columns, len(rows) + 0.5), layout="constrained"
    )
    panels = figure.subplots(len(rows), columns, squeeze=False)
    for line, images in zip(panels, rows, strict=True):
        for axes, image in zip(line, images, strict=True):
            axes.imshow(image.squeeze(), cmap="gray")
            axes.set_axis_off()
    figure.suptitle(
        "left: test images; right: their nearest training images", fontsize=10
    )
    figure.savefig(path, dpi=120, format="png")
