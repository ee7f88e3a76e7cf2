"""Classifies test images by their nearest training images, over all ranks."""

import dataclasses

import matplotlib.figure
import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

import horovod_recipes.keras as hvd
from horovod_recipes.data.pipeline import CorruptImages
from horovod_recipes.data.pipeline import RankInput
from horovod_recipes.data.pipeline import evaluation_batches

# Wu et al., arXiv 1805.01978, section 3.4.
NEIGHBOURS = 200
TEMPERATURE = 0.1
# Images in one forward pass.
BATCH_SIZE = 256
# Rows and columns of the picture.
PICTURE_QUERIES = 8
PICTURE_NEIGHBOURS = 8


@dataclasses.dataclass
class Nearest:
    """What `find` returns.

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


def find(encoder, config, source, watchdog):
    """Finds the nearest training images of each test image, exactly.

    Each rank has the features of its shard of the training images. All ranks
    see one shard at a time, so a rank needs memory for two shards.

    Args:
        encoder: A Keras model from images to features.
        config: The recipe's `ConfigDict`.
        source: From `data.sources.load_source`.
        watchdog: `hvd.callbacks.Watchdog`.

    Returns:
        `Nearest`.
    """
    shard, labels = features(
        encoder, shard_of(config, source, "train"), watchdog
    )
    test, test_labels = features(
        encoder, shard_of(config, source, "test"), watchdog
    )
    count = min(NEIGHBOURS, config.dataset.train_examples)
    best = np.full((len(test), count), -np.inf, np.float32)
    best_labels = np.zeros((len(test), count), np.int64)
    best_places = np.zeros((len(test), count, 2), np.int64)
    for root in range(hvd.size()):
        others, other_labels = hvd.broadcast_object((shard, labels), root)
        for begin in range(0, len(test), BATCH_SIZE):
            rows = slice(begin, begin + BATCH_SIZE)
            similarity = test[rows] @ others.T
            index = np.arange(len(others))
            places = np.stack([np.full_like(index, root), index], axis=-1)
            all_similar = np.concatenate([best[rows], similarity], axis=1)
            order = np.argsort(-all_similar, axis=1, kind="stable")[:, :count]
            best[rows] = np.take_along_axis(all_similar, order, axis=1)
            new = order - count
            is_new = new >= 0
            new = np.maximum(new, 0)
            old = np.minimum(order, count - 1)
            best_labels[rows] = np.where(
                is_new,
                other_labels[new],
                np.take_along_axis(best_labels[rows], old, axis=1),
            )
            best_places[rows] = np.where(
                is_new[..., np.newaxis],
                places[new],
                np.take_along_axis(
                    best_places[rows], old[..., np.newaxis], axis=1
                ),
            )
    votes = np.zeros((len(test), config.dataset.num_classes), np.float64)
    weights = np.exp(best.astype(np.float64) / TEMPERATURE)
    row = np.repeat(np.arange(len(test)), count)
    np.add.at(votes, (row, best_labels.ravel()), weights.ravel())
    right = np.sum(votes.argmax(axis=1) == test_labels)
    total = hvd.allreduce(tf.constant(float(right), tf.float64), op=hvd.Sum)
    batches = shard_of(config, source, "test")
    queries = next(iter(batches))[0].numpy()[:PICTURE_QUERIES]
    queries, places = hvd.broadcast_object(
        (queries, best_places[:PICTURE_QUERIES, :PICTURE_NEIGHBOURS]), 0
    )
    top1 = float(total) / config.dataset.test_examples
    return Nearest(top1, queries, places)


def shard_of(config, source, split):
    """Returns this rank's images of `"train"` or `"test"`, not augmented."""
    config = ConfigDict(config.to_dict())
    config.dataset.test_split = config.dataset[f"{split}_split"]
    rank_input = RankInput(
        rank=hvd.rank(),
        ranks=hvd.size(),
        batch_size=BATCH_SIZE,
        threads=config.dataset.threads or 1,
        corrupt_images=CorruptImages("stop"),
    )
    return evaluation_batches(source, config.dataset, rank_input)


def features(encoder, batches, watchdog):
    """Returns normalized features `[n, d]` and labels `[n]` of a dataset."""

    @tf.function(reduce_retracing=True, autograph=False)
    def normalized(images):
        found = tf.cast(encoder(images, training=False), tf.float32)
        return tf.math.l2_normalize(found, axis=-1)

    found = []
    for number, (images, labels) in enumerate(batches):
        watchdog.on_predict_batch_begin(number)
        found.append((normalized(images).numpy(), labels.numpy()))
    return [np.concatenate(part) for part in zip(*found, strict=True)]


def images_of(nearest, config, source):
    """Returns the pictures of the queries and of their neighbours.

    Returns:
        List of lists of images. Each begins with a query.
    """
    wanted = {
        int(number)
        for rank, number in nearest.places.reshape(-1, 2)
        if rank == hvd.rank()
    }
    images = {}
    batches = shard_of(config, source, "train").unbatch()
    for number, (image, _) in enumerate(batches):
        if number in wanted:
            images[hvd.rank(), number] = image.numpy()
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
