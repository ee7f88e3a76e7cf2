"""NT-Xent, the loss of SimCLR, over the views of all ranks."""

import dataclasses

import tensorflow as tf

# Added for an embedding's own view, so that it cannot be chosen.
MASKED = -1e9


@dataclasses.dataclass(frozen=True)
class Contrast:
    """What `contrast` returns: float32 tensors about this rank's embeddings.

    Attributes:
        loss: Scalar, the mean of NT-Xent over this rank's 2n views.
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
    views of all ranks, by cosine similarity. The mean of this loss over the
    ranks is the loss of the global batch, with equal n. With
    `DistributedOptimizer` or `DistributedGradientTape`, so is its gradient.

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
    is_own = tf.one_hot(places, tf.shape(all_first)[0])

    def similarities(views, others):
        return tf.matmul(views, others, transpose_b=True)

    loss, uniformity = [], []
    for views, same, other in (
        (first, all_first, all_second),
        (second, all_second, all_first),
    ):
        to_same = similarities(views, same)
        to_other = similarities(views, other)
        logits = tf.concat(
            [to_other / temperature, to_same / temperature + MASKED * is_own],
            axis=-1,
        )
        loss.append(
            tf.nn.sparse_softmax_cross_entropy_with_logits(places, logits)
        )
        # The squared distance of unit vectors is 2 - 2 * similarity.
        near = tf.exp(4 * tf.concat([to_same, to_other], axis=-1) - 4)
        own = tf.reduce_sum(is_own * tf.exp(4 * to_same - 4), axis=-1)
        count = tf.cast(2 * tf.shape(all_first)[0] - 1, tf.float32)
        uniformity.append((tf.reduce_sum(near, axis=-1) - own) / count)
    nearest = tf.argmax(
        similarities(first, all_second), axis=-1, output_type=tf.int32
    )
    return Contrast(
        loss=tf.reduce_mean(loss),
        hits=tf.cast(tf.equal(nearest, places), tf.float32),
        alignment=2 - 2 * tf.reduce_sum(first * second, axis=-1),
        uniformity=tf.concat(uniformity, axis=0),
    )


def _of_all_ranks(first, second, process_set):
    """Returns both views of all ranks, and the places of this rank's rows."""
    # Importing this module must not need Horovod.
    import horovod_recipes.keras as hvd

    rows, dimensions = tf.unstack(tf.shape(first))
    # One collective takes all: the last column says whose row it is.
    owner = tf.fill([rows, 1], tf.cast(hvd.rank(), tf.float32))
    everything = hvd.differentiable_allgather(
        tf.concat([first, second, owner], axis=-1),
        process_set=process_set or hvd.global_process_set,
    )
    all_first, all_second, owners = tf.split(
        everything, [dimensions, dimensions, 1], axis=-1
    )
    is_before = tf.cast(owners[:, 0] < owner[:1, 0], tf.int32)
    places = tf.reduce_sum(is_before) + tf.range(rows)
    return all_first, all_second, places
