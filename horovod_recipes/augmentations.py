"""From an encoded image to pixels of one size: decode, crop, resize, flip.

A JPEG is decoded only where its crop is. Every function returns uint8
`[height, width, channels]`; random ones take a stateless seed, a pair of
integers.
"""

import math

import tensorflow as tf

# 224 of 256 pixels: the part of an image that a crop shows (paper, section 5;
# He et al., arXiv 1512.03385, section 3.4).
CROP_FRACTION = 224 / 256


def whole(encoded, seed, shape):
    """The whole image, resized where its size is another."""
    return _resize(_decode_any(encoded, shape), shape)


def random_affine(encoded, seed, shape):
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
        images=whole(encoded, seed, shape)[tf.newaxis],
        transforms=tf.stack(transform)[tf.newaxis],
        output_shape=[height, width],
        fill_value=0.0,
        interpolation="BILINEAR",
        fill_mode="CONSTANT",
    )[0]


def minimal(encoded, seed, shape):
    """The paper's: scaled to 256 x 256, a random 224 x 224 of it, flipped.

    The image is not scaled as a whole: what the crop shows of it is decoded
    and resized, which comes to the same. Half of the images are flipped.
    """
    top, left, flip = tf.unstack(tf.random.stateless_uniform([3], seed))
    size = tf.cast(_image_size(encoded, shape), tf.float32)
    room = (1 - CROP_FRACTION) * size
    window = tf.concat(
        [tf.stack([top, left]) * room, CROP_FRACTION * size], axis=0
    )
    return _flip_if(flip < 0.5, _decode_window(encoded, window, shape))


def inception(encoded, seed, shape):
    """A crop of 8 to 100 % of the area and 3:4 to 4:3, resized, flipped.

    As Szegedy et al. have it, arXiv 1409.4842, section 6. Where ten tries find
    no such crop, the whole image is used. Half of the images are flipped.
    """
    size = _image_size(encoded, shape)
    begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
        image_size=tf.concat([size, shape[-1:]], axis=0),
        bounding_boxes=tf.zeros([1, 0, 4]),
        seed=seed,
        min_object_covered=0.0,
        aspect_ratio_range=(3 / 4, 4 / 3),
        area_range=(0.08, 1.0),
        max_attempts=10,
        use_image_if_no_bounding_boxes=True,
    )
    window = tf.cast(tf.concat([begin[:2], extent[:2]], axis=0), tf.float32)
    flip = tf.random.stateless_uniform([], seed) < 0.5
    return _flip_if(flip, _decode_window(encoded, window, shape))


def centre_of_scaled(encoded, seed, shape):
    """Scaled to 256 x 256, the 224 x 224 in the middle: the paper's test."""
    size = tf.cast(_image_size(encoded, shape), tf.float32)
    return _decode_centre(encoded, size, CROP_FRACTION * size, shape)


def centre_square(encoded, seed, shape):
    """The square in the middle, 7/8 of the shorter side wide, resized."""
    size = tf.cast(_image_size(encoded, shape), tf.float32)
    side = CROP_FRACTION * tf.reduce_min(size)
    return _decode_centre(encoded, size, tf.stack([side, side]), shape)


def _decode_centre(encoded, size, extent, shape):
    window = tf.concat([(size - extent) / 2, extent], axis=0)
    return _decode_window(encoded, window, shape)


def _image_size(encoded, shape):
    """Returns height and width, from the header alone if it is a JPEG."""
    return tf.cond(
        tf.io.is_jpeg(encoded),
        lambda: tf.io.extract_jpeg_shape(encoded)[:2],
        lambda: tf.shape(_decode_any(encoded, shape))[:2],
    )


def _decode_any(encoded, shape):
    return tf.io.decode_image(
        encoded, channels=shape[-1], expand_animations=False
    )


def _decode_window(encoded, window, shape):
    """Decodes a window (top, left, height, width) and resizes it to `shape`."""
    top_left = tf.cast(window[:2], tf.int32)
    extent = tf.maximum(tf.cast(tf.round(window[2:]), tf.int32), 1)
    window = tf.concat([top_left, extent], axis=0)

    def of_jpeg():
        return tf.image.decode_and_crop_jpeg(
            encoded, window, channels=shape[-1]
        )

    def of_others():
        return tf.slice(
            _decode_any(encoded, shape),
            tf.concat([top_left, [0]], axis=0),
            tf.concat([extent, [-1]], axis=0),
        )

    # ImageNet has a PNG under the name of a JPEG.
    image = tf.cond(tf.io.is_jpeg(encoded), of_jpeg, of_others)
    return _resize(image, shape)


def _resize(image, shape):
    image.set_shape([None, None, shape[-1]])
    resized = tf.image.resize(image, shape[:2])
    return tf.cast(tf.round(resized), tf.uint8)


def _flip_if(flip, image):
    return tf.cond(flip, lambda: image[:, ::-1], lambda: image)


# What is done to the images of training, and to those of evaluation.
AUGMENTATIONS = {
    "none": (whole, whole),
    "random_affine": (random_affine, whole),
    "minimal": (minimal, centre_of_scaled),
    "inception": (inception, centre_square),
}
