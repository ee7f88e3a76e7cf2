"""NT-Xent, the loss of SimCLR, over the views of all ranks."""

import dataclasses
import math

import tensorflow as tf

# Added for an embedding's own view, so that it cannot be chosen.
MASKED = -1e9


@dataclasses.dataclass(frozen=True)
class Contrast:
    """Float32 tensors about this rank's embeddings.

    Attributes:
        loss: Scalar, the mean of NT-Xent over this rank's 2n views; 0 without
            views.
        hits: `[n]`, 1.0 where the first view's nearest second view, of all
            ranks, is its own.
        alignment: `[n]`, the squared distance of an image's two views.
        uniformity: `[2n]`, the mean over all other views of
            `exp(-2 * squared distance)`.
    """

    loss: tf.Tensor
    hits: tf.Tensor
    alignment: tf.Tensor
    uniformity: tf.Tensor


def nt_xent(first, second, temperature=0.1, process_set=None):
    """Returns NT-Xent, the contrastive loss of SimCLR, of this rank's views.

    Each view has to find the other view of its image among the 2N - 1 other
    views of all ranks, by cosine similarity. If all ranks have the same n, the
    mean of this loss over the ranks is the loss of the global batch. The same
    holds for its gradient, with `DistributedOptimizer` or
    `DistributedGradientTape`. It needs memory for about four matrices of 2n x
    2N numbers.

    Args:
        first: Float `[n, d]`, the embeddings of this rank's first views. They
            need not be normalized.
        second: Float `[n, d]`, those of the second views of the same images.
        temperature: Float > 0, which divides the similarities. Defaults to
            `0.1`.
        process_set: The `hvd.ProcessSet` of the ranks that call it. Defaults
            to all ranks.

    Returns:
        Float32 scalar, the mean over this rank's 2n views.

    Raises:
        ValueError: If `temperature` is not above 0.

    References:
        - [Chen et al., 2020](https://arxiv.org/abs/2002.05709), Section 2.1
    """
    return contrast(first, second, temperature, process_set).loss


def contrast(first, second, temperature=0.1, process_set=None):
    """Returns the loss of `nt_xent` and what one watches, as a `Contrast`."""
    if not temperature > 0:
        raise ValueError(
            "Argument `temperature` must be above 0. Received: "
            f"temperature={temperature!r}"
        )
    first, second = (
        tf.math.l2_normalize(tf.cast(views, tf.float32), axis=-1)
        for views in (first, second)
    )
    all_first, all_second, places = _of_all_ranks(first, second, process_set)
    images = tf.shape(all_first)[0]
    # Rows are this rank's views, and columns those of all ranks. Passes over
    # this matrix are slow, so embeddings are divided by the temperature.
    scaled_similarity = tf.matmul(
        tf.concat([first, second], axis=0) / temperature,
        tf.concat([all_first, all_second], axis=0),
        transpose_b=True,
    )
    own = tf.concat([places, images + places], axis=0)
    pair = tf.concat([images + places, places], axis=0)
    logits = scaled_similarity + tf.one_hot(own, 2 * images, MASKED, 0.0)
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(pair, logits)
    # What one watches has no gradient.
    scaled_similarity = tf.stop_gradient(scaled_similarity)
    nearest = tf.argmax(
        scaled_similarity[: tf.size(places), images:],
        axis=-1,
        output_type=tf.int32,
    )
    # The squared distance of unit vectors is 2 - 2 * similarity.
    near = math.exp(-4) * tf.reduce_sum(
        tf.exp(4 * temperature * scaled_similarity), axis=-1
    )
    return Contrast(
        loss=tf.math.divide_no_nan(
            tf.reduce_sum(losses), tf.cast(tf.size(losses), tf.float32)
        ),
        hits=tf.cast(tf.equal(nearest, places), tf.float32),
        alignment=2 - 2 * tf.stop_gradient(tf.reduce_sum(first * second, -1)),
        # A view has no distance to itself.
        uniformity=(near - 1) / tf.cast(2 * images - 1, tf.float32),
    )


def _of_all_ranks(first, second, process_set):
    """Returns both views of all ranks, and the places of this rank's rows."""
    # Importing this module must not need Horovod.
    import horovod_recipes.keras as hvd

    rows, dimensions = tf.unstack(tf.shape(first))
    rank = tf.constant(hvd.rank(), tf.float32)
    # One collective takes all: the last column says whose row it is.
    everything = hvd.differentiable_allgather(
        tf.concat([first, second, tf.fill([rows, 1], rank)], axis=-1),
        process_set=process_set or hvd.global_process_set,
    )
    all_first, all_second, owners = tf.split(
        everything, [dimensions, dimensions, 1], axis=-1
    )
    rows_before = tf.reduce_sum(tf.cast(owners < rank, tf.int32))
    places = rows_before + tf.range(rows)
    return all_first, all_second, places
