"""Images of one rank from disk to batches, with tf.data.

Source, shard by rank, shuffle, decode and crop, batch, prefetch. Images stay
encoded until they are decoded one by one, and uint8 until they are in the
model.
"""

import sys

import tensorflow as tf

from horovod_recipes.augmentations import AUGMENTATIONS


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

    def skip(self, name):
        """Records a name; called by the pipeline, on any thread."""
        name = name.decode()
        if name not in self.names:
            self.names.add(name)
            print(f"warning: skipped corrupt image {name}", file=sys.stderr)
        return False


def training_batches(
    source,
    config,
    rank,
    ranks,
    batch_size,
    batches_per_epoch,
    first_epoch,
    first_batch,
    seed,
    threads,
    corrupt_images,
):
    """Returns an endless dataset of batches of this rank's training images.

    Every epoch visits the rank's shard in a new order, and crops anew; both
    depend only on the seed, the rank and the epoch, so that a job which
    resumes sees what it would have seen.

    Args:
        source: From `sources.load_source`.
        config: `ConfigDict`, the `dataset` of a recipe's config.
        rank: Integer, this rank.
        ranks: Integer, the number of ranks.
        batch_size: Integer, the images in a batch of one rank.
        batches_per_epoch: Integer; the images left over are skipped, others
            in each epoch.
        first_epoch: Integer, the epoch to begin with, from 0.
        first_batch: Integer, the batch of that epoch to begin with, from 0.
        seed: Integer.
        threads: Integer, of this pipeline's own pool.
        corrupt_images: A `CorruptImages`.

    Returns:
        A `tf.data.Dataset` of `(images, labels)`: uint8 `[batch, height,
        width, channels]` and int64 `[batch]`.
    """
    shape = source.image_shape(config.image_size)
    augmentation, _ = AUGMENTATIONS[config.augmentation]
    rank_seed = tf.random.experimental.stateless_fold_in([seed, 0], rank)
    buffer_size = config.shuffle_buffer
    if config.cache:
        cached = source.examples(config.train_split, rank, ranks).cache()
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
            examples = cached
        else:
            examples = source.examples(config.train_split, rank, ranks, order)
        examples = examples.shuffle(buffer_size, seed=order)
        done = tf.where(epoch == first_epoch, first_batch, 0)
        done = tf.cast(done, tf.int64)
        if corrupt_images.action == "skip":
            # What is skipped is made up for from a second pass.
            examples = examples.repeat(2).enumerate()
        else:
            # Batches that are done already are not decoded.
            examples = examples.enumerate().skip(done * batch_size)
        images = _decode(
            examples,
            lambda index, encoded: augmentation(
                encoded,
                tf.random.experimental.stateless_fold_in(epoch_seed, index),
                shape,
            ),
            shape,
            source.num_classes,
            corrupt_images,
        )
        batches = images.batch(batch_size, drop_remainder=True)
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
    return batches.prefetch(tf.data.AUTOTUNE).with_options(_options(threads))


def evaluation_batches(
    source, config, rank, ranks, batch_size, threads, corrupt_images
):
    """Returns one pass over this rank's part of the test split.

    The ranks' parts are disjoint and together the whole split. The last batch
    may be smaller. Arguments are those of `training_batches`.
    """
    shape = source.image_shape(config.image_size)
    _, crop = AUGMENTATIONS[config.augmentation]
    images = _decode(
        source.examples(config.test_split, rank, ranks).enumerate(),
        lambda index, encoded: crop(encoded, None, shape),
        shape,
        source.num_classes,
        corrupt_images,
    )
    batches = images.batch(batch_size)
    return batches.prefetch(tf.data.AUTOTUNE).with_options(_options(threads))


def _decode(examples, crop, shape, num_classes, corrupt_images):
    """Makes each numbered example an image and a label; finds the corrupt."""

    def decode_or_mark(index, example):
        # A graph cannot catch an error, but a dataset can drop its element.
        good = tf.data.Dataset.from_tensors(example["image"])
        good = good.map(lambda encoded: (crop(index, encoded), True))
        bad = tf.data.Dataset.from_tensors((tf.zeros(shape, tf.uint8), False))
        either = good.ignore_errors().concatenate(bad).take(1)
        image, is_good = either.get_single_element()
        name, label = example["name"], example["label"]
        if corrupt_images.action == "stop":
            image = _or_error(is_good, "corrupt image: ", name, image)
        image = _or_error(
            (label >= 0) & (label < num_classes),
            f"label out of the range 0 to {num_classes - 1}: ",
            name,
            image,
        )
        return image, label, is_good, name

    def keep(image, label, is_good, name):
        return tf.cond(
            is_good,
            lambda: True,
            lambda: tf.numpy_function(corrupt_images.skip, [name], tf.bool),
        )

    decoded = examples.map(decode_or_mark, num_parallel_calls=tf.data.AUTOTUNE)
    if corrupt_images.action == "skip":
        decoded = decoded.filter(keep)
    return decoded.map(lambda image, label, is_good, name: (image, label))


def _or_error(condition, message, name, image):
    """Returns the image, after an error with this message if need be."""
    check = tf.debugging.Assert(condition, [tf.strings.join([message, name])])
    with tf.control_dependencies([check]):
        return tf.identity(image)


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
    options.threading.private_threadpool_size = threads
    # Images are decoded beside each other, so that one needs one thread.
    options.threading.max_intra_op_parallelism = 1
    return options
