"""Decodes an image, or only the window of it that is used, and resizes it."""

import tensorflow as tf

# The first bytes of every JPEG, and the last ones unless something follows it.
JPEG_BEGIN = b"\xff\xd8\xff"
JPEG_END = b"\xff\xd9"


def is_whole_jpeg(encoded):
    """Whether an image, or each of several, begins and ends as a JPEG.

    One that does not end so may have been cut.
    """
    length = tf.strings.length(encoded)
    begin = tf.strings.substr(encoded, 0, 3)
    two = 2 * tf.ones_like(length)
    end = tf.strings.substr(encoded, tf.maximum(length - 2, 0), two)
    return (begin == JPEG_BEGIN) & (end == JPEG_END)


def decode_whole(encoded, shape, is_jpeg):
    """Returns the whole image as uint8 pixels of `shape`.

    Args:
        encoded: String.
        shape: Tuple `(height, width, channels)` of the result.
        is_jpeg: Whether the caller knows that the image is a whole JPEG.
    """
    if is_jpeg:
        image = tf.io.decode_jpeg(encoded, channels=shape[-1])
    else:
        image = _decode_any(encoded, shape)
    return _resize(image, shape)


def decode_window(encoded, window, shape, is_jpeg):
    """Decodes a window of an image, and resizes it to `shape`.

    Args:
        encoded: String.
        window: Function. It gets the image's height and width, float32 `[2]`,
            and returns top, left, height and width, float32 or int32 `[4]`.
        shape: Tuple `(height, width, channels)` of the result.
        is_jpeg: Whether the caller knows that the image is a whole JPEG.
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

    def crop_cut_jpeg():
        # A window above the place where the file was cut would hide the cut.
        with tf.control_dependencies([tf.io.decode_jpeg(encoded)]):
            return crop_jpeg()

    def crop_other():
        image = _decode_any(encoded, shape)
        top, left, height, width = tf.unstack(rounded(tf.shape(image)[:2]))
        return image[top : top + height, left : left + width]

    if is_jpeg:
        image = crop_jpeg()
    else:
        # One ImageNet file is a PNG although its name ends in .JPEG.
        image = tf.cond(
            is_whole_jpeg(encoded),
            crop_jpeg,
            lambda: tf.cond(tf.io.is_jpeg(encoded), crop_cut_jpeg, crop_other),
        )
    return _resize(image, shape)


def _decode_any(encoded, shape):
    with tf.control_dependencies([_check_bitmap(encoded)]):
        return tf.io.decode_image(
            encoded, channels=shape[-1], expand_animations=False
        )


def _check_bitmap(encoded):
    """Fails for a bitmap with a palette: TensorFlow ignores the palette."""
    is_bitmap = tf.strings.substr(encoded, 0, 2) == b"BM"
    bits_per_pixel = tf.cond(
        is_bitmap, lambda: tf.strings.substr(encoded, 28, 2), lambda: b""
    )
    return tf.debugging.Assert(
        bits_per_pixel != b"\x08\x00", ["a bitmap with a palette"]
    )


def _resize(image, shape):
    image.set_shape([None, None, shape[-1]])
    # Casting to float32 first is faster than resizing uint8.
    resized = tf.image.resize(tf.cast(image, tf.float32), shape[:2])
    return tf.cast(resized + 0.5, tf.uint8)
