"""Images of one rank from disk to batches, with tf.data.

Source, shard by rank, shuffle, decode and crop, batch, prefetch. Images stay
encoded until they are decoded one by one, and uint8 until they are in the
model.
"""

import dataclasses
import sys

import tensorflow as tf

from horovod_recipes.data.augmentations import AUGMENTATIONS

# Images that are parsed and checked together, and decoded by one thread: so
# many that what is done once for all of them does not count.
GROUP_SIZE = 32
# While one is trained on: the next, and one more, as not all take as long.
BATCHES_AHEAD = 2
# What the data of every JPEG begin with.
JPEG_MARK = b"\xff\xd8\xff"


class CorruptImages:
    """What to do with images that cannot be decoded, and which were met.

    Args:
        action: `"stop"` ends the pipeline at the first one with an error that
            names it; `"skip"` leaves them out, says so once for each, and
            keeps their names.
    """

    def __init__(self, action):
        self.action = action
        self.names = set()

    def handle(self, names):
        """Returns an operation for the pipeline, given the names of a group."""
        if self.action == "stop":
            return _error_if_any("corrupt image: ", names)
        return tf.cond(
            tf.equal(tf.size(names), 0),
            lambda: True,
            lambda: tf.numpy_function(self._skip, [names], tf.bool),
        )

    def _skip(self, names):
        for name in names:
            name = name.decode()
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
        threads: Integer, the threads of this pipeline's own pool.
        corrupt_images: A `CorruptImages`.
    """

    rank: int
    ranks: int
    batch_size: int
    threads: int
    corrupt_images: CorruptImages


def training_batches(
    source,
    config,
    rank_input,
    batches_per_epoch,
    first_epoch=0,
    first_batch=0,
    seed=0,
):
    """Returns an endless dataset of batches of this rank's training images.

    Every epoch visits the rank's shard in a new order, with new crops. Both
    depend only on the seed, the rank and the epoch. So a job that resumes sees
    what it would have seen.

    Args:
        source: From `sources.load_source`.
        config: `ConfigDict`, the `dataset` of a recipe's config.
        rank_input: A `RankInput`.
        batches_per_epoch: Integer; the images left over are skipped, others
            in each epoch.
        first_epoch: Integer, the epoch to begin with, from 0. Defaults to `0`.
        first_batch: Integer, the batch of that epoch to begin with, from 0.
            Defaults to `0`.
        seed: Integer. Defaults to `0`.

    Returns:
        A `tf.data.Dataset` of `(images, labels)`: uint8 `[batch, height,
        width, channels]` and int64 `[batch]`.
    """
    rank, ranks = rank_input.rank, rank_input.ranks
    corrupt_images = rank_input.corrupt_images
    shape = source.image_shape(config.image_size)
    augmentation, _ = AUGMENTATIONS[config.augmentation]
    rank_seed = tf.random.experimental.stateless_fold_in([seed, 0], rank)
    buffer_size = config.shuffle_buffer
    if config.cache:
        cached = source.records(config.train_split, rank, ranks).cache()
        # The buffer holds references to what the cache holds anyway.
        buffer_size = source.num_examples(config.train_split) // ranks + 1

    def epoch_of_batches(epoch):
        # Else `shuffle` mixes in the global seed, and fails where that is 0.
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
            # What is skipped is made up for from a second pass.
            records = records.repeat(2).enumerate()
        else:
            # Batches that are done already are not decoded.
            records = records.enumerate().skip(done * rank_input.batch_size)
        # A seed for each image is this number and the image's index.
        key, _ = tf.unstack(
            tf.random.experimental.stateless_fold_in(epoch_seed, 0)
        )
        groups = _decode(records, source, augmentation, key, shape, rank_input)
        batches = groups.rebatch(rank_input.batch_size, drop_remainder=True)
        missing = _error_instead_of_a_batch(batches.element_spec)
        batches = batches.concatenate(missing)
        if corrupt_images.action == "skip":
            batches = batches.skip(done)
        return batches.take(batches_per_epoch - done)

    # Not a counter: a service can split a range among its workers only.
    epochs = tf.data.Dataset.range(first_epoch, tf.int64.max)
    batches = epochs.flat_map(epoch_of_batches)
    if config.service:
        batches = _through_service(batches, config.service)
    return batches.prefetch(BATCHES_AHEAD).with_options(
        _options(rank_input.threads)
    )


def evaluation_batches(source, config, rank_input):
    """Returns one pass over this rank's part of the test split.

    The ranks' parts are disjoint and together the whole split. The last batch
    may be smaller. Arguments are those of `training_batches`.
    """
    shape = source.image_shape(config.image_size)
    _, crop = AUGMENTATIONS[config.augmentation]
    records = source.records(
        config.test_split, rank_input.rank, rank_input.ranks
    ).enumerate()
    groups = _decode(records, source, crop, 0, shape, rank_input)
    batches = groups.rebatch(rank_input.batch_size)
    return batches.prefetch(BATCHES_AHEAD).with_options(
        _options(rank_input.threads)
    )


def _decode(records, source, augmentation, key, shape, rank_input):
    """Makes numbered records images and labels, in groups; finds the corrupt.

    All but decoding and cropping is done once a group: an operation takes about
    as long for one image as for many.
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
            # A graph cannot catch an error, but a dataset can drop its element.
            return (
                images.ignore_errors()
                .batch(count)
                .concatenate(tf.data.Dataset.from_tensors(none))
                .take(1)
                .get_single_element()
            )

        images, good = tf.cond(
            tf.reduce_all(tf.strings.substr(encoded, 0, 3) == JPEG_MARK),
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
                _error_if_any(
                    f"label out of the range 0 to {source.num_classes - 1}: ",
                    unknown,
                ),
            ]
        ):
            return tf.identity(images), tf.gather(labels, good)

    return records.batch(GROUP_SIZE).map(
        decode_group, num_parallel_calls=rank_input.threads
    )


def _error_if_any(message, names):
    """Returns an operation that fails and names the first, if there is one."""
    first = tf.strings.reduce_join(names[:1])
    return tf.debugging.Assert(
        tf.equal(tf.size(names), 0), [tf.strings.join([message, first])]
    )


def _error_instead_of_a_batch(element_spec):
    """Returns a dataset that fails; one without images would go on for ever."""

    def fail(is_reached):
        enough = tf.debugging.Assert(
            tf.logical_not(is_reached), ["too few images can be decoded"]
        )
        with tf.control_dependencies([enough]):
            return tuple(tf.zeros(s.shape, s.dtype) for s in element_spec)

    return tf.data.Dataset.from_tensors(True).map(fail)


def _through_service(batches, address):
    """Has the workers of a tf.data service make the batches.

    The service hands out the elements of the pipeline's source, which are the
    epochs of the rank, to one worker each. So no batch is made twice, and over
    many epochs every image is seen equally often. With more than one worker,
    the order of the batches, and where an epoch ends, is not determined. The
    service's job has no name: it is this iterator's own, and ends with it.
    """
    return batches.apply(
        tf.data.experimental.service.distribute(
            processing_mode="distributed_epoch", service=address
        )
    )


def _options(threads):
    options = tf.data.Options()
    options.deterministic = True
    # It tunes from a thread that sleeps for up to a minute, and an iterator
    # that ends waits for it.
    options.autotune.enabled = False
    options.threading.private_threadpool_size = threads
    # Images are decoded beside each other, so that one needs one thread.
    options.threading.max_intra_op_parallelism = 1
    return options
