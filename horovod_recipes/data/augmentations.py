"""Crops, flips and distorts images at random, for training and evaluation.

Only the cropped part of a JPEG is decoded. Every public function takes

- `encoded`: the encoded image;
- `seed`: a stateless seed, a pair of integers;
- `shape`: the `(height, width, channels)` of the result;
- `is_jpeg`: True if the caller knows that the image is a JPEG. Defaults to
  `False`: the function then checks.

It returns uint8 pixels of that shape.
"""

import math

import tensorflow as tf

from horovod_recipes.data import colours
from horovod_recipes.data.decoding import decode_whole
from horovod_recipes.data.decoding import decode_window

# Fraction of the height and width that a crop shows.
# Source: the LARS paper, section 5; He et al., arXiv 1512.03385, section 3.4.
CROP_FRACTION = 224 / 256


def whole(encoded, seed, shape, is_jpeg=False):
    """Returns the whole image, resized to `shape`."""
    return decode_whole(encoded, shape, is_jpeg)


def random_affine(encoded, seed, shape, is_jpeg=False):
    """Rotates, scales and shifts an image at random.

    It rotates by up to 10 degrees, scales by up to 10 % and shifts by up to 2
    pixels. Pixels from outside the image are black.
    """
    height, width, _ = shape
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
        images=whole(encoded, seed, shape, is_jpeg)[tf.newaxis],
        transforms=tf.stack(transform)[tf.newaxis],
        output_shape=[height, width],
        fill_value=0.0,
        interpolation="BILINEAR",
        fill_mode="CONSTANT",
    )[0]


def minimal(encoded, seed, shape, is_jpeg=False):
    """Returns the paper's training crop, flipped in half of the cases.

    The paper scales the image to 256 x 256 and takes a random 224 x 224 crop.
    This function gives the same result faster: it decodes and resizes only the
    cropped part. The crop shows 224/256 of each side for every `shape`.
    """
    top, left, flip = tf.unstack(_uniform(seed, 3))

    def window(size):
        extent = CROP_FRACTION * size
        return tf.concat([[top, left] * (size - extent), extent], axis=0)

    return _flip_if(flip < 0.5, decode_window(encoded, window, shape, is_jpeg))


def inception(encoded, seed, shape, is_jpeg=False):
    """Returns the Inception training crop, flipped in half of the cases.

    The crop covers 8 to 100 % of the area, with an aspect ratio from 3:4 to
    4:3. The source is Szegedy et al., arXiv 1409.4842, section 6. If ten
    attempts find no such crop, the function uses the whole image.
    """
    return _crop_and_flip(encoded, seed, shape, is_jpeg, smallest_area=0.08)


def _crop_and_flip(encoded, seed, shape, is_jpeg, smallest_area):
    # With a shared seed, the flip would depend on the crop's aspect ratio.
    crop_seed, flip_seed = tf.unstack(tf.random.split(seed))

    window = random_window(crop_seed, shape, smallest_area)
    (flip,) = tf.unstack(_uniform(flip_seed, 1))
    return _flip_if(flip < 0.5, decode_window(encoded, window, shape, is_jpeg))


def large_crop(encoded, seed, shape, is_jpeg=False):
    """Returns a crop for small images, flipped in half of the cases.

    It is `inception` with a crop of 30 to 100 % of the area: a smaller part of
    28 x 28 pixels fits many classes.
    """
    return _crop_and_flip(encoded, seed, shape, is_jpeg, smallest_area=0.3)


def simclr(encoded, seed, shape, is_jpeg=False):
    """Returns a random view of SimCLR for images as large as ImageNet's.

    It is an Inception crop and flip, with colours distorted at full strength,
    and blurred in half of the cases.
    """
    crop_seed, colour_seed, blur_seed = tf.unstack(tf.random.split(seed, 3))
    image = _to_float(inception(encoded, crop_seed, shape, is_jpeg))
    image = colours.distort(image, colour_seed, strength=1.0)
    return _to_uint8(colours.blur(image, blur_seed))


def simclr_small(encoded, seed, shape, is_jpeg=False):
    """Returns a random view of SimCLR for images of about 32 x 32.

    Colours are distorted at half strength, and nothing is blurred. Grey images
    change in brightness and contrast alone.
    """
    crop_seed, colour_seed = tf.unstack(tf.random.split(seed))
    image = _to_float(inception(encoded, crop_seed, shape, is_jpeg))
    return _to_uint8(colours.distort(image, colour_seed, strength=0.5))


def simclr_grey(encoded, seed, shape, is_jpeg=False):
    """Returns a random view of a small grey image, such as Fashion-MNIST's.

    It is `simclr_small` with `large_crop`, and distorts at full strength.
    """
    crop_seed, colour_seed = tf.unstack(tf.random.split(seed))
    image = _to_float(large_crop(encoded, crop_seed, shape, is_jpeg))
    return _to_uint8(colours.distort(image, colour_seed, strength=1.0))


def simclr_digits(encoded, seed, shape, is_jpeg=False):
    """Returns a random view of a digit: a larger crop, and no flip.

    A mirrored digit is not a digit, and a small part fits many digits. The crop
    covers 40 to 100 % of the area.
    """
    crop_seed, colour_seed = tf.unstack(tf.random.split(seed))
    crop = random_window(crop_seed, shape, smallest_area=0.4)
    image = _to_float(decode_window(encoded, crop, shape, is_jpeg))
    return _to_uint8(colours.distort(image, colour_seed, strength=0.5))


def _to_float(image):
    return tf.cast(image, tf.float32) / 255


def _to_uint8(image):
    return tf.cast(tf.round(image * 255), tf.uint8)


def random_window(seed, shape, smallest_area):
    """Returns a function of an image's size that chooses a window at random.

    The window has an aspect ratio from 3:4 to 4:3.

    Args:
        seed: A stateless seed.
        shape: Tuple `(height, width, channels)` of the result.
        smallest_area: Float, the smallest share of the image's area.
    """

    def window(size):
        begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
            image_size=tf.concat([tf.cast(size, tf.int32), shape[-1:]], axis=0),
            bounding_boxes=tf.zeros([1, 0, 4]),
            seed=seed,
            min_object_covered=0.0,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(smallest_area, 1.0),
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        return tf.concat([begin[:2], extent[:2]], axis=0)

    return window


def centre_of_scaled(encoded, seed, shape, is_jpeg=False):
    """Returns the paper's test crop: the central 224/256 of each side."""

    def window(size):
        extent = CROP_FRACTION * size
        return tf.concat([(size - extent) / 2, extent], axis=0)

    return decode_window(encoded, window, shape, is_jpeg)


def centre_square(encoded, seed, shape, is_jpeg=False):
    """Returns the central square whose side is 7/8 of the shorter side."""

    def window(size):
        side = CROP_FRACTION * tf.reduce_min(size)
        extent = tf.stack([side, side])
        return tf.concat([(size - extent) / 2, extent], axis=0)

    return decode_window(encoded, window, shape, is_jpeg)


def _uniform(seed, count):
    """Returns uniform random numbers from 0 to 1.

    `tf.random.stateless_uniform` gives the same with more operations.
    """
    return tf.raw_ops.StatelessRandomUniform(shape=[count], seed=seed)


def _flip_if(flip, image):
    # A slice with a step of -1 would take as long as the resize.
    return tf.cond(flip, lambda: tf.reverse(image, [1]), lambda: image)


# Functions for training images and for evaluation images, by the config's name.
AUGMENTATIONS = {
    "none": (whole, whole),
    "random_affine": (random_affine, whole),
    "minimal": (minimal, centre_of_scaled),
    "inception": (inception, centre_square),
    # Small images are tested whole.
    "inception_small": (inception, whole),
    "large_crop": (large_crop, whole),
    "simclr": (simclr, centre_square),
    "simclr_small": (simclr_small, whole),
    "simclr_grey": (simclr_grey, whole),
    "simclr_digits": (simclr_digits, whole),
}
# Augmentations that make the views of SimCLR.
AUGMENTATIONS_OF_VIEWS = (
    "simclr",
    "simclr_small",
    "simclr_grey",
    "simclr_digits",
)
