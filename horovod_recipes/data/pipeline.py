"""The input pipeline of one rank: from images on disk to batches, with tf.data.

Its stages: read the rank's shard, shuffle, decode and crop, batch, prefetch.
The shuffle buffer holds encoded images. Batches are uint8; the model converts
them to floats.
"""

import dataclasses
import re
import socket
import sys

import tensorflow as tf

from horovod_recipes.data.augmentations import AUGMENTATIONS
from horovod_recipes.data.decoding import is_whole_jpeg
from horovod_recipes.data.named_errors import error_if_any
from horovod_recipes.data.named_errors import printable
from horovod_recipes.errors import JobError

# Images that one thread parses and decodes together.
# The fixed cost of a group is negligible at this size.
IMAGES_PER_GROUP = 32
# Batches prepared in advance. The second one absorbs a slow batch.
PREFETCHED_BATCHES = 2
# How the error of a corrupt image begins.
CORRUPT_IMAGE = "corrupt image: "
# The time in which a tf.data service must accept a connection.
SERVICE_SECONDS = 10
LAST_PORT = 65535


class CorruptImages:
    """Handles images that cannot be decoded, and records their names.

    Args:
        action: `"stop"` ends the pipeline at the first corrupt image, with an
            error that names it. `"skip"` leaves corrupt images out, prints one
            warning for each, and collects their names in `names`.
    """

    def __init__(self, action):
        self.action = action
        self.names = set()

    def handle(self, names):
        """Returns the operation that handles the corrupt images of a group.

        Args:
            names: String tensor, the names of the corrupt images; may be empty.
        """
        if self.action == "stop":
            return error_if_any(CORRUPT_IMAGE, names)
        return tf.cond(
            tf.equal(tf.size(names), 0),
            lambda: True,
            lambda: tf.numpy_function(self._skip, [names], tf.bool),
        )

    def _skip(self, names):
        for name in names:
            name = printable(name)
            if name not in self.names:
                self.names.add(name)
                print(f"warning: skipped corrupt image {name}", file=sys.stderr)
        return True


@dataclasses.dataclass(frozen=True)
class RankInput:
    """How one rank reads its images.

    Attributes:
        rank: Integer, this rank.
        ranks: Integer, the number of ranks.
        batch_size: Integer, the images in a batch of one rank.
        threads: Integer, the size of the pipeline's private thread pool.
        corrupt_images: A `CorruptImages`.
    """

    rank: int
    ranks: int
    batch_size: int
    threads: int
    corrupt_images: CorruptImages


def views_of(augmentation, views):
    """Returns an augmentation that gives several random views of an image.

    The result has one more dimension, `[views, height, width, channels]`.
    """

    def several(encoded, seed, shape, is_jpeg=False):
        seeds = tf.unstack(tf.random.split(seed, views))
        return tf.stack(
            [augmentation(encoded, s, shape[1:], is_jpeg) for s in seeds]
        )

    return several


# AutoGraph is slow, and would find no `if` or loop over tensors.
@tf.autograph.experimental.do_not_convert
def training_batches(
    source,
    config,
    rank_input,
    batches_per_epoch,
    first_epoch=0,
    first_batch=0,
    seed=0,
    views=None,
):
    """Returns an endless dataset of batches of this rank's training images.

    Every epoch visits the rank's shard in a new order, with new crops. Both
    depend only on the seed, the rank and the epoch. So a resumed job sees the
    same batches as an uninterrupted one.

    Args:
        source: From `sources.load_source`.
        config: `ConfigDict`, the `dataset` of a recipe's config.
        rank_input: A `RankInput`.
        batches_per_epoch: Integer. Each epoch skips the images that are left
            over; these differ from epoch to epoch.
        first_epoch: Integer, the epoch to begin with, counted from 0. Defaults
            to `0`.
        first_batch: Integer, the batch of that epoch to begin with, counted
            from 0. Defaults to `0`.
        seed: Integer. Defaults to `0`.
        views: Integer, the random views of each image, or None for one image
            without a dimension for its views. Defaults to None.

    Returns:
        A `tf.data.Dataset` of `(images, labels)`: uint8 `[batch, height,
        width, channels]`, or `[batch, views, height, width, channels]`, and
        int64 `[batch]`.
    """
    rank, ranks = rank_input.rank, rank_input.ranks
    corrupt_images = rank_input.corrupt_images
    shape = source.image_shape(config.image_size)
    augmentation, _ = AUGMENTATIONS[config.augmentation]
    if views is not None:
        augmentation = views_of(augmentation, views)
        shape = (views, *shape)
    rank_seed = tf.random.experimental.stateless_fold_in([seed, 0], rank)
    buffer_size = config.shuffle_buffer
    if config.cache:
        cached = source.records(config.train_split, rank, ranks).cache()
        # A buffer of the whole shard only holds references into the cache.
        buffer_size = source.num_examples(config.train_split) // ranks + 1

    def epoch_of_batches(epoch):
        # Otherwise `shuffle` mixes in the global seed, and fails if it is 0.
        tf.compat.v1.set_random_seed(None)
        epoch_seed = tf.random.experimental.stateless_fold_in(rank_seed, epoch)
        order = tf.random.stateless_uniform(
            [], epoch_seed, minval=None, maxval=None, dtype=tf.int64
        )
        if config.cache:
            records = cached
        else:
            records = source.records(config.train_split, rank, ranks, order)
        records = records.shuffle(buffer_size, seed=order)
        done = tf.where(epoch == first_epoch, first_batch, 0)
        done = tf.cast(done, tf.int64)
        if corrupt_images.action == "skip":
            # Images from a second pass replace the skipped ones.
            records = records.repeat(2).enumerate()
        else:
            # Skip finished batches before they are decoded.
            records = records.enumerate().skip(done * rank_input.batch_size)
        # The seed of an image is the pair (key, index of the image).
        key, _ = tf.unstack(
            tf.random.experimental.stateless_fold_in(epoch_seed, 0)
        )
        groups = _decode(records, source, augmentation, key, shape, rank_input)
        batches = groups.rebatch(rank_input.batch_size, drop_remainder=True)
        # Without this error, an epoch without batches would loop forever.
        batches = batches.concatenate(_too_few_images(batches.element_spec))
        if corrupt_images.action == "skip":
            batches = batches.skip(done)
        return batches.take(batches_per_epoch - done)

    # A tf.data service can split a range among its workers, but no counter.
    epochs = tf.data.Dataset.range(first_epoch, tf.int64.max)
    batches = epochs.flat_map(epoch_of_batches)
    if config.service:
        batches = _through_service(batches, config.service)
    return _prefetched(batches, rank_input)


@tf.autograph.experimental.do_not_convert
def evaluation_batches(source, config, rank_input):
    """Returns one pass over this rank's part of the test split.

    The parts of the ranks are disjoint and cover the whole split. The last
    batch may be smaller. `training_batches` describes the arguments.
    """
    shape = source.image_shape(config.image_size)
    _, crop = AUGMENTATIONS[config.augmentation]
    records = source.records(
        config.test_split, rank_input.rank, rank_input.ranks
    ).enumerate()
    groups = _decode(records, source, crop, 0, shape, rank_input)
    return _prefetched(groups.rebatch(rank_input.batch_size), rank_input)


def _decode(records, source, augmentation, key, shape, rank_input):
    """Turns numbered records into groups of images and labels.

    Only decoding and cropping run once per image. Other operations run once per
    group, since they take about as long for one image as for many.
    """

    def decode_group(indices, record):
        example = source.parse(*record)
        encoded, labels, names = (
            example[part] for part in ("image", "label", "name")
        )
        count = tf.size(labels, tf.int64)
        seeds = tf.stack([tf.fill([count], tf.cast(key, tf.int64)), indices], 1)

        def augmented(is_jpeg):
            images = tf.data.Dataset.from_tensor_slices(
                (encoded, seeds, tf.range(count))
            ).map(
                lambda encoded, seed, place: (
                    augmentation(encoded, seed, shape, is_jpeg),
                    place,
                )
            )
            none = (tf.zeros([0, *shape], tf.uint8), tf.zeros([0], tf.int64))
            # A graph cannot catch errors. A dataset can drop a failed element.
            return (
                images.ignore_errors()
                .batch(count)
                .concatenate(tf.data.Dataset.from_tensors(none))
                .take(1)
                .get_single_element()
            )

        images, good = tf.cond(
            tf.reduce_all(is_whole_jpeg(encoded)),
            lambda: augmented(is_jpeg=True),
            lambda: augmented(is_jpeg=False),
        )
        is_good = tf.scatter_nd(
            good[:, tf.newaxis], tf.ones_like(good), [count]
        )
        corrupt = tf.boolean_mask(names, is_good == 0)
        is_known = (labels >= 0) & (labels < source.num_classes)
        unknown = tf.boolean_mask(names, ~is_known)
        with tf.control_dependencies(
            [
                rank_input.corrupt_images.handle(corrupt),
                error_if_any(
                    f"label out of the range 0 to {source.num_classes - 1}: ",
                    unknown,
                ),
            ]
        ):
            return tf.identity(images), tf.gather(labels, good)

    return records.batch(IMAGES_PER_GROUP).map(
        decode_group, num_parallel_calls=rank_input.threads
    )


def _too_few_images(element_spec):
    """Returns a dataset whose only element is an error."""

    def fail(is_reached):
        enough = tf.debugging.Assert(
            tf.logical_not(is_reached), ["too few images can be decoded"]
        )
        with tf.control_dependencies([enough]):
            return tuple(tf.zeros(s.shape, s.dtype) for s in element_spec)

    return tf.data.Dataset.from_tensors(True).map(fail)


def check_service(address):
    """Raises `JobError` unless a server listens at a tf.data service's address.

    TensorFlow itself waits for one, without an error.

    Args:
        address: String, `"grpc://HOST:PORT"`.
    """
    parts = re.fullmatch(r"grpc://\[?(.+?)\]?:(\d+)", address)
    if not parts or int(parts[2]) > LAST_PORT:
        raise JobError(
            f"dataset.service must be grpc://HOST:PORT, but is {address}"
        )
    try:
        socket.create_connection(
            (parts[1], int(parts[2])), SERVICE_SECONDS
        ).close()
    except OSError as error:
        raise JobError(
            f"cannot reach the tf.data service {address} ({error}); start it, "
            "or correct dataset.service"
        ) from error


def _through_service(batches, address):
    """Lets the workers of a tf.data service make the batches.

    The service gives each epoch of the rank to one worker. So no batch is made
    twice, and the job sees every image equally often over many epochs. With
    several workers, batches of different epochs mix in an undetermined order.
    The job is unnamed, so it belongs to one iterator and ends with it.
    """
    return batches.apply(
        tf.data.experimental.service.distribute(
            processing_mode="distributed_epoch", service=address
        )
    )


def _prefetched(batches, rank_input):
    options = tf.data.Options()
    options.deterministic = True
    # Its thread sleeps for up to a minute, and a closing iterator waits for it.
    options.autotune.enabled = False
    options.threading.private_threadpool_size = rank_input.threads
    # Groups are decoded in parallel, so one operation needs one thread.
    options.threading.max_intra_op_parallelism = 1
    return batches.prefetch(PREFETCHED_BATCHES).with_options(options)
