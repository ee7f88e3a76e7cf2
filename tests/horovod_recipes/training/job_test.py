"""Checks which part of a job a resumed session runs, and its dropout masks."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from horovod_recipes.training import job
from horovod_recipes.training.job_size import JobSize

JOB = JobSize(
    ranks=2,
    micro_batch_size=8,
    accumulation_steps=4,
    steps_per_epoch=10,
    epochs=3,
)


@pytest.mark.parametrize(
    ("steps_done", "parts"),
    [
        (0, [(0, 0, 3)]),
        (10, [(1, 0, 3)]),
        (13, [(1, 3, 2), (2, 0, 3)]),
        (25, [(2, 5, 3)]),
        (30, []),
    ],
)
def test_parts_of_job(steps_done, parts):
    assert job.parts_of_job(JOB, steps_done) == parts


def test_resumed_dropout_draws_the_masks_of_an_uninterrupted_job():
    """Each rank and each layer has different masks."""

    def masks(seed, micro_batches_done, count):
        model = keras.Sequential(
            [keras.Input((50,)), keras.layers.Dropout(0.5)]
            + [keras.layers.Dropout(0.5)]
        )
        job.seed_dropout(model, seed, micro_batches_done)
        return [
            [layer(tf.ones((1, 50)), training=True) for layer in model.layers]
            for _ in range(count)
        ]

    whole = masks([0, 1], 0, 5)
    np.testing.assert_array_equal(whole[3:], masks([0, 1], 3, 2))
    for other in (masks([0, 0], 0, 5), masks([1, 1], 0, 5)):
        assert (np.array(whole) != other).any(axis=(2, 3)).all()
    first_layer, second_layer = np.moveaxis(np.array(whole), 1, 0)
    assert (first_layer != second_layer).any(axis=(1, 2)).all()
