"""Images per second are those of whole epochs, without evaluation."""

import time

import keras
import numpy as np
import pytest

from horovod_recipes.training.callbacks import Throughput

BATCH = 4


class Sleep(keras.callbacks.Callback):
    """Sleeps after each batch of training, and in what does not count."""

    def on_train_batch_end(self, batch, logs=None):
        time.sleep(0.05)

    def on_test_begin(self, logs=None):
        time.sleep(1)

    def on_epoch_end(self, epoch, logs=None):
        time.sleep(1)


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("evaluates", [True, False])
def test_callbacks_count_and_evaluation_does_not(steps, evaluates):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    x, y = np.zeros((steps * BATCH, 2)), np.zeros(steps * BATCH)
    throughput = Throughput(BATCH)
    assert throughput.images_per_second() is None
    model.fit(
        x,
        y,
        batch_size=BATCH,
        epochs=3,
        validation_data=(x, y) if evaluates else None,
        callbacks=[throughput, Sleep()],
        verbose=0,
    )
    # A step takes 50 ms and more, and 1 s if other sleeps count.
    assert BATCH / 0.9 < throughput.images_per_second() < BATCH / 0.05
    # The sleep of the other callback, in three evaluations.
    assert throughput.evaluation_seconds >= (3 if evaluates else 0)
