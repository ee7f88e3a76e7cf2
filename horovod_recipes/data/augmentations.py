"""From an encoded image to pixels of one size: decode, crop, resize, flip.

A JPEG is decoded only where its crop is. Every function takes an encoded image,
a stateless seed, which is a pair of integers, the shape of the result, and
whether the image is known to be a JPEG, so that there is no need to look; it
returns uint8 `[height, width, channels]`.
"""

import math

import tensorflow as tf

# 224 of 256 pixels: the part of an image that a crop shows (paper, section 5;
# He et al., arXiv 1512.03385, section 3.4).
CROP_FRACTION = 224 / 256


def whole(encoded, seed, shape, is_jpeg=False):
    """The whole image, resized where its size is another."""
    if is_jpeg:
        image = tf.io.decode_jpeg(encoded, channels=shape[-1])
    else:
        image = _decode_any(encoded, shape)
    return _resize(image, shape)


def random_affine(encoded, seed, shape, is_jpeg=False):
    """Turns, scales and moves an image a little, about its centre.

    By up to 10 degrees, 10 % and 2 pixels; black comes in at the edges.
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
    """The paper's: scaled to 256 x 256, a random 224 x 224 of it, flipped.

    The image is not scaled as a whole: what the crop shows of it is decoded
    and resized, which comes to the same. It shows 224 of 256 pixels at other
    sizes too. Half of the images are flipped.
    """
    top, left, flip = tf.unstack(_uniform(seed, 3))

    def window(size):
        extent = CROP_FRACTION * size
        return tf.concat([[top, left] * (size - extent), extent], axis=0)

    return _flip_if(flip < 0.5, _crop(encoded, window, shape, is_jpeg))


def inception(encoded, seed, shape, is_jpeg=False):
    """A crop of 8 to 100 % of the area and 3:4 to 4:3, resized, flipped.

    As Szegedy et al. have it, arXiv 1409.4842, section 6. Where ten tries find
    no such crop, the whole image is used. Half of the images are flipped.
    """
    # One seed for both would have the flip follow the crop's aspect ratio.
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
    """Scaled to 256 x 256, the 224 x 224 in the middle: the paper's test."""

    def window(size):
        extent = CROP_FRACTION * size
        return tf.concat([(size - extent) / 2, extent], axis=0)

    return _crop(encoded, window, shape, is_jpeg)


def centre_square(encoded, seed, shape, is_jpeg=False):
    """The square in the middle, 7/8 of the shorter side wide, resized."""

    def window(size):
        side = CROP_FRACTION * tf.reduce_min(size)
        extent = tf.stack([side, side])
        return tf.concat([(size - extent) / 2, extent], axis=0)

    return _crop(encoded, window, shape, is_jpeg)


def _uniform(seed, count):
    """Returns numbers from 0 to 1, by fewer operations than tf.random has."""
    return tf.raw_ops.StatelessRandomUniform(shape=[count], seed=seed)


def _crop(encoded, window, shape, is_jpeg):
    """Decodes a window of an image, and resizes it.

    Args:
        encoded: String.
        window: Function of the image's height and width, float32 `[2]`, that
            returns top, left, height and width, float32 or int32 `[4]`.
        shape: Tuple of the result.
        is_jpeg: Whether it is known to be a JPEG.
    """

    def rounded(size):
        numbers = tf.cast(window(tf.cast(size, tf.float32)), tf.float32)
        # Top and left down, height and width to the nearest above 0.
        numbers += tf.constant([0.0, 0.0, 0.5, 0.5])
        lowest = tf.constant([0, 0, 1, 1])
        return tf.maximum(tf.cast(numbers, tf.int32), lowest)

    def of_jpeg():
        size = tf.io.extract_jpeg_shape(encoded)[:2]
        return tf.image.decode_and_crop_jpeg(
            encoded, rounded(size), channels=shape[-1]
        )

    def of_others():
        image = _decode_any(encoded, shape)
        top, left, height, width = tf.unstack(rounded(tf.shape(image)[:2]))
        return image[top : top + height, left : left + width]

    if is_jpeg:
        image = of_jpeg()
    else:
        # ImageNet has a PNG under the name of a JPEG.
        image = tf.cond(tf.io.is_jpeg(encoded), of_jpeg, of_others)
    return _resize(image, shape)


def _decode_any(encoded, shape):
    return tf.io.decode_image(
        encoded, channels=shape[-1], expand_animations=False
    )


def _resize(image, shape):
    image.set_shape([None, None, shape[-1]])
    # From float32 it is faster, by more than the cast takes.
    resized = tf.image.resize(tf.cast(image, tf.float32), shape[:2])
    return tf.cast(resized + 0.5, tf.uint8)


def _flip_if(flip, image):
    # Faster than a slice with a step of -1 by as much as resizing takes.
    return tf.cond(flip, lambda: tf.reverse(image, [1]), lambda: image)


# What is done to the images of training, and to those of evaluation.
AUGMENTATIONS = {
    "none": (whole, whole),
    "random_affine": (random_affine, whole),
    "minimal": (minimal, centre_of_scaled),
    "inception": (inception, centre_square),
}
