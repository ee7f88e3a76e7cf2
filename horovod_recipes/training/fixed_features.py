"""Trains a linear classifier on all ranks, on features computed once.

The features are those of whole images, without random crops. For a small
dataset this is faster than training on images, and the classifier converges.
"""

import numpy as np
import tensorflow as tf

import horovod_recipes.keras as hvd
from horovod_recipes.training.neighbours import sum_over_ranks

# Passes over all features.
STEPS = 500
# The smallest variance that is scaled to 1, as a share of the largest.
SMALLEST_VARIANCE = 1e-6


def linear_top1(train, test, num_classes, watchdog):
    """Returns the top-1, 0 to 1, of a softmax regression on fixed features.

    It uses neither random numbers nor a learning rate to tune, so the same
    features give the same result, to rounding, on any number of ranks.

    Args:
        train: This rank's features `[n, d]` and labels `[n]` to train on.
        test: The same of test images.
        num_classes: Integer.
        watchdog: `hvd.callbacks.Watchdog`.
    """
    (train, labels), (test, test_labels) = train, test
    mean, whitening = whitening_of(train)
    weights = regression(
        whitened(train, mean, whitening),
        np.eye(num_classes, dtype=np.float32)[labels],
        watchdog,
    )
    classes = (whitened(test, mean, whitening) @ weights).argmax(axis=1)
    right = sum_over_ranks(np.sum(classes == test_labels))
    return float(right / sum_over_ranks(len(test)))


def whitening_of(features):
    """Returns the mean `[d]` of all ranks' features and a matrix `[d, d]`.

    The matrix makes the features uncorrelated, with a variance of 1. Gradient
    descent then converges fast.
    """
    features = features.astype(np.float64)
    count = sum_over_ranks(len(features))
    mean = sum_over_ranks(features.sum(axis=0)) / count
    centred = features - mean
    covariance = sum_over_ranks(centred.T @ centred) / count
    variances, directions = np.linalg.eigh(covariance)
    floor = SMALLEST_VARIANCE * variances[-1] + np.finfo(np.float64).tiny
    return mean, directions / np.sqrt(np.maximum(variances, floor))


def whitened(features, mean, whitening):
    """Returns whitened features `[n, d + 1]`, with a 1 for the bias."""
    scaled = (features - mean) @ whitening
    return np.pad(scaled, ((0, 0), (0, 1)), constant_values=1).astype("float32")


def regression(features, targets, watchdog):
    """Minimizes the mean cross-entropy over all ranks.

    Args:
        features: float32 `[n, d + 1]`, whitened; this rank's part.
        targets: float32 `[n, classes]`, one-hot labels.
        watchdog: `hvd.callbacks.Watchdog`.

    Returns:
        float32 weights `[d + 1, classes]`, the same on every rank.
    """
    features, targets = tf.constant(features), tf.constant(targets)
    count = sum_over_ranks(len(features))

    @tf.function(autograph=False)
    def gradient(weights):
        errors = tf.nn.softmax(features @ weights) - targets
        total = tf.matmul(features, errors, transpose_a=True)
        return hvd.allreduce(total, op=hvd.Sum) / tf.cast(count, tf.float32)

    weights = ahead = np.zeros(
        (features.shape[1], targets.shape[1]), np.float32
    )
    for step in range(1, STEPS + 1):
        # Of whitened features, the second derivative is at most 1/2.
        new = ahead - 2 * gradient(tf.constant(ahead)).numpy()
        # Nesterov's momentum for a convex function.
        ahead = new + step / (step + 3) * (new - weights)
        weights = new
        watchdog.progress()
    return weights
