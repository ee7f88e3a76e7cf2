"""Images from a TFDS dataset to batches on one rank, with tf.data.

Source, shard by rank, shuffle, decode, augment, batch, prefetch. Images stay
encoded until they are decoded one by one, and uint8 until they are in the
model.
"""

import math
import sys

import tensorflow as tf
import tensorflow_datasets as tfds

import horovod_recipes.datasets  # noqa: F401  registers the builders
from horovod_recipes.errors import JobError
from horovod_recipes.errors import one_line

SHUFFLE_BUFFER = 16384


def load_builder(name, data_dir):
    """Returns the TFDS builder of a dataset that is on disk.

    Args:
        name: String, a TFDS name such as `"mnist5k"`.
        data_dir: String, TFDS's data folder, or None for its default.

    Raises:
        JobError: If the dataset is unknown or not on disk.
    """
    flag = f" --data_dir={data_dir}" if data_dir else ""
    builder = find_builder(name, data_dir)
    if not builder.is_prepared():
        raise JobError(
            f"the dataset {name!r} is not in {builder.data_path}; get it with: "
            f"python -m horovod_recipes.datasets {name}{flag} (or set "
            "TFDS_DATA_DIR to where it is)"
        )
    return builder


def find_builder(name, data_dir):
    """Returns the TFDS builder of a dataset, on disk or not."""
    try:
        return tfds.builder(name, data_dir=data_dir)
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        raise JobError(
            f"unknown dataset {name!r}: it is neither a TFDS dataset nor one "
            f"of horovod_recipes.datasets ({one_line(error)})"
        ) from None


class CorruptImages:
    """The images of this rank that could not be decoded, by name.

    Args:
        action: `"stop"` ends the pipeline at the first one with an error;
            `"skip"` leaves them out, and says so once for each.
    """

    def __init__(self, action):
        self.action = action
        self.names = set()

    def report(self, name):
        """Records a name; called by the pipeline, on any thread."""
        name = name.decode()
        if self.action == "stop":
            self.names.add(name)
            raise ValueError(f"corrupt image: {name}")
        if name not in self.names:
            self.names.add(name)
            print(f"warning: skipped corrupt image {name}", file=sys.stderr)
        return False


def training_batches(
    builder,
    rank,
    ranks,
    batch_size,
    batches_per_epoch,
    first_epoch,
    augmentation,
    seed,
    corrupt_images,
):
    """Returns an endless dataset of batches of this rank's training images.

    Every epoch visits the rank's shard in a new order, which depends only on
    the seed, the rank and the epoch, so that a job which resumes at an epoch
    sees what it would have seen.

    Args:
        builder: From `load_builder`, with a split `train`.
        rank: Integer, this rank.
        ranks: Integer, the number of ranks.
        batch_size: Integer, the images in a batch of one rank.
        batches_per_epoch: Integer; the images left over are skipped, others
            in each epoch.
        first_epoch: Integer, the epoch to begin with, from 0.
        augmentation: Function of an image and a stateless seed, or None.
        seed: Integer.
        corrupt_images: A `CorruptImages`.

    Returns:
        A `tf.data.Dataset` of `(images, labels)`: uint8 `[batch, height,
        width, channels]` and int64 `[batch]`.
    """
    examples = _read_shard(builder, "train", rank, ranks)
    rank_seed = tf.random.experimental.stateless_fold_in([seed, 0], rank)

    def epoch_of_batches(epoch):
        # Else `shuffle` mixes in the global seed, and fails where that is 0.
        tf.compat.v1.set_random_seed(None)
        epoch_seed = tf.random.experimental.stateless_fold_in(rank_seed, epoch)
        shuffle_seed = tf.random.stateless_uniform(
            [], epoch_seed, minval=None, maxval=None, dtype=tf.int64
        )
        images = examples.shuffle(SHUFFLE_BUFFER, seed=shuffle_seed)
        images = _decode(images, builder, corrupt_images)
        if augmentation is not None:
            images = images.enumerate().map(
                lambda index, image_and_label: (
                    augmentation(
                        image_and_label[0],
                        tf.random.experimental.stateless_fold_in(
                            epoch_seed, index
                        ),
                    ),
                    image_and_label[1],
                ),
                num_parallel_calls=tf.data.AUTOTUNE,
            )
        # What is skipped is made up for from a second pass over the shard.
        batches = images.repeat(2).batch(batch_size, drop_remainder=True)
        missing = _error_instead_of_a_batch(batches.element_spec)
        return batches.concatenate(missing).take(batches_per_epoch)

    epochs = tf.data.Dataset.counter(first_epoch)
    return epochs.flat_map(epoch_of_batches).prefetch(tf.data.AUTOTUNE)


def evaluation_batches(builder, split, rank, ranks, batch_size, corrupt_images):
    """Returns one pass over this rank's part of a split, without augmentation.

    The ranks' parts are disjoint and together the whole split. The last batch
    may be smaller.
    """
    examples = _read_shard(builder, split, rank, ranks)
    images = _decode(examples, builder, corrupt_images)
    return images.batch(batch_size).prefetch(tf.data.AUTOTUNE)


def _read_shard(builder, split, rank, ranks):
    """Returns this rank's examples, undecoded, each with its `tfds_id`."""
    return builder.as_dataset(
        split=tfds.even_splits(split, ranks)[rank],
        decoders={"image": tfds.decode.SkipDecoding()},
        read_config=tfds.ReadConfig(add_tfds_id=True, try_autocache=False),
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


def _decode(examples, builder, corrupt_images):
    """Decodes each example into an image and a label; finds the corrupt."""
    shape = builder.info.features["image"].shape

    def decode(example):
        image = tf.io.decode_image(
            example["image"], channels=shape[-1], expand_animations=False
        )
        return tf.ensure_shape(image, shape), True

    def decode_or_mark(example):
        # A graph cannot catch an error, but a dataset can drop its element.
        good = tf.data.Dataset.from_tensors(example)
        good = good.map(decode).ignore_errors()
        blank = tf.zeros([d or 1 for d in shape], tf.uint8)
        bad = tf.data.Dataset.from_tensors((blank, False))
        image, is_good = good.concatenate(bad).take(1).get_single_element()
        return image, is_good, example["label"], example["tfds_id"]

    def keep(image, is_good, label, name):
        return tf.cond(
            is_good,
            lambda: True,
            lambda: tf.numpy_function(corrupt_images.report, [name], tf.bool),
        )

    decoded = examples.map(decode_or_mark, num_parallel_calls=tf.data.AUTOTUNE)
    return decoded.filter(keep).map(lambda image, _, label, __: (image, label))


def random_affine(image, seed):
    """Turns, scales and moves an image a little, about its centre.

    By up to 10 degrees, 10 % and 2 pixels; black comes in at the edges.
    """
    height, width, _ = image.shape
    limits = tf.constant([math.radians(10), 0.1, 2.0, 2.0])
    angle, zoom, right, down = tf.unstack(
        limits * tf.random.stateless_uniform([4], seed, -1.0, 1.0)
    )
    cos, sin = (1 + zoom) * tf.cos(angle), (1 + zoom) * tf.sin(angle)
    x, y = (width - 1) / 2, (height - 1) / 2
    transform = [
        cos,
        -sin,
        x - x * cos + y * sin + right,
        sin,
        cos,
        y - x * sin - y * cos + down,
        0.0,
        0.0,
    ]
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=image[tf.newaxis],
        transforms=tf.stack(transform)[tf.newaxis],
        output_shape=[height, width],
        fill_value=0.0,
        interpolation="BILINEAR",
        fill_mode="CONSTANT",
    )[0]


AUGMENTATIONS = {"none": None, "random_affine": random_affine}
