"""Has errors inside an input pipeline name the file or the image."""

import base64
import re

import tensorflow as tf


def error_if_any(message, names):
    """Returns an operation that fails and names the first name, if any.

    TensorFlow quotes and cuts text in errors, and needs UTF-8. So the name
    follows once more, in base64.

    Args:
        message: String, for example `"corrupt image: "`.
        names: String tensor `[n]`.
    """
    first = tf.strings.reduce_join(names[:1])
    text = tf.strings.unicode_transcode(first, "UTF-8", "UTF-8")
    encoded = tf.io.encode_base64(first, pad=True)
    return tf.debugging.Assert(
        tf.equal(tf.size(names), 0),
        [tf.strings.join([message, text, " (base64:", encoded, ")"])],
    )


def name_in(error, message):
    """Returns the name in an error of `error_if_any`, or None."""
    found = re.search(
        rf"{message}.*?\(base64:([\w=-]+)\)", str(error), re.DOTALL
    )
    return found and printable(base64.urlsafe_b64decode(found[1]))


def printable(name):
    """Returns the bytes of a name as text of one line."""
    return name.decode(errors="backslashreplace").replace("\n", "\\n")
