"""Images per second are those of whole epochs, without evaluation."""

import types

import keras
import numpy as np
import pytest

from horovod_recipes.training import callbacks
from horovod_recipes.training.callbacks import Throughput

BATCH = 4


class Clock:
    """A clock that only the callbacks of the test move."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


class Work(keras.callbacks.Callback):
    """Takes time after each batch of training, and in what does not count."""

    def __init__(self, clock):
        super().__init__()
        self._clock = clock

    def on_train_batch_end(self, batch, logs=None):
        # The first step compiles.
        first = self.model.optimizer.iterations == 1
        self._clock.now += 100 if first else 0.5

    def on_test_begin(self, logs=None):
        self._clock.now += 8

    def on_epoch_end(self, epoch, logs=None):
        self._clock.now += 16


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("evaluates", [True, False])
def test_callbacks_count_and_evaluation_does_not(steps, evaluates, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(
        callbacks,
        "time",
        types.SimpleNamespace(perf_counter=clock.perf_counter),
    )
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
        callbacks=[throughput, Work(clock)],
        verbose=0,
    )
    assert throughput.images_per_second() == BATCH / 0.5
    # The time that the other callback takes in three evaluations.
    assert throughput.evaluation_seconds == (24 if evaluates else 0)
