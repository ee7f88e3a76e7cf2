"""Turns an encoded image into pixels: decode, crop, resize, flip.

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

# Fraction of the height and width that a crop shows.
# Source: the LARS paper, section 5; He et al., arXiv 1512.03385, section 3.4.
CROP_FRACTION = 224 / 256


def whole(encoded, seed, shape, is_jpeg=False):
    """Returns the whole image, resized to `shape`."""
    if is_jpeg:
        image = tf.io.decode_jpeg(encoded, channels=shape[-1])
    else:
        image = _decode_any(encoded, shape)
    return _resize(image, shape)


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

    return _flip_if(flip < 0.5, _crop(encoded, window, shape, is_jpeg))


def inception(encoded, seed, shape, is_jpeg=False):
    """Returns the Inception training crop, flipped in half of the cases.

    The crop covers 8 to 100 % of the area, with an aspect ratio from 3:4 to
    4:3. The source is Szegedy et al., arXiv 1409.4842, section 6. If ten
    attempts find no such crop, the function uses the whole image.
    """
    # With a shared seed, the flip would depend on the crop's aspect ratio.
    crop_seed, flip_seed = tf.unstack(tf.random.split(seed))

    def window(size):
        begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
            image_size=tf.concat([tf.cast(size, tf.int32), shape[-1:]], axis=0),
            bounding_boxes=tf.zeros([1, 0, 4]),
            seed=crop_seed,
            min_object_covered=0.0,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(0.08, 1.0),
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        return tf.concat([begin[:2], extent[:2]], axis=0)

    (flip,) = tf.unstack(_uniform(flip_seed, 1))
    return _flip_if(flip < 0.5, _crop(encoded, window, shape, is_jpeg))


def centre_of_scaled(encoded, seed, shape, is_jpeg=False):
    """Returns the paper's test crop: the central 224/256 of each side."""

    def window(size):
        extent = CROP_FRACTION * size
        return tf.concat([(size - extent) / 2, extent], axis=0)

    return _crop(encoded, window, shape, is_jpeg)


def centre_square(encoded, seed, shape, is_jpeg=False):
    """Returns the central square whose side is 7/8 of the shorter side."""

    def window(size):
        side = CROP_FRACTION * tf.reduce_min(size)
        extent = tf.stack([side, side])
        return tf.concat([(size - extent) / 2, extent], axis=0)

    return _crop(encoded, window, shape, is_jpeg)


def _uniform(seed, count):
    """Returns uniform random numbers from 0 to 1.

    `tf.random.stateless_uniform` gives the same with more operations.
    """
    return tf.raw_ops.StatelessRandomUniform(shape=[count], seed=seed)


def _crop(encoded, window, shape, is_jpeg):
    """Decodes a window of an image, and resizes it to `shape`.

    Args:
        encoded: See the module.
        window: Function. It gets the image's height and width, float32 `[2]`,
            and returns top, left, height and width, float32 or int32 `[4]`.
        shape: See the module.
        is_jpeg: See the module.
    """

    def rounded(size):
        numbers = tf.cast(window(tf.cast(size, tf.float32)), tf.float32)
        # Round top and left down. Round height and width to the nearest.
        numbers += tf.constant([0.0, 0.0, 0.5, 0.5])
        lowest = tf.constant([0, 0, 1, 1])
        return tf.maximum(tf.cast(numbers, tf.int32), lowest)

    def crop_jpeg():
        size = tf.io.extract_jpeg_shape(encoded)[:2]
        return tf.image.decode_and_crop_jpeg(
            encoded, rounded(size), channels=shape[-1]
        )

    def crop_other():
        image = _decode_any(encoded, shape)
        top, left, height, width = tf.unstack(rounded(tf.shape(image)[:2]))
        return image[top : top + height, left : left + width]

    if is_jpeg:
        image = crop_jpeg()
    else:
        # One ImageNet file is a PNG although its name ends in .JPEG.
        image = tf.cond(tf.io.is_jpeg(encoded), crop_jpeg, crop_other)
    return _resize(image, shape)


def _decode_any(encoded, shape):
    return tf.io.decode_image(
        encoded, channels=shape[-1], expand_animations=False
    )


def _resize(image, shape):
    image.set_shape([None, None, shape[-1]])
    # Casting to float32 first is faster than resizing uint8.
    resized = tf.image.resize(tf.cast(image, tf.float32), shape[:2])
    return tf.cast(resized + 0.5, tf.uint8)


def _flip_if(flip, image):
    # A slice with a step of -1 would take as long as the resize.
    return tf.cond(flip, lambda: tf.reverse(image, [1]), lambda: image)


# Functions for training images and for evaluation images, by the config's name.
AUGMENTATIONS = {
    "none": (whole, whole),
    "random_affine": (random_affine, whole),
    "minimal": (minimal, centre_of_scaled),
    "inception": (inception, centre_square),
}
