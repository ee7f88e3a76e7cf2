"""The watchdog where nothing hangs; for what does, see whole_jobs/hang_test."""

import keras
import numpy as np
import pytest

import horovod_recipes.keras as hvd
from horovod_recipes.keras import watchdog
from horovod_recipes.keras.callbacks import Watchdog
from keras_lars import LARS


def test_invalid_seconds():
    with pytest.raises(ValueError, match=r"above 0\. Received: seconds=0"):
        Watchdog(seconds=0)


def test_training_goes_on_under_the_watchdog():
    """Longer than `seconds`: each batch is progress."""
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(
        hvd.DistributedOptimizer(LARS(0.1)), loss="mse", jit_compile=False
    )
    x, y = np.ones((80, 3), np.float32), np.ones((80, 1), np.float32)
    with Watchdog(seconds=20) as dog:
        before = watchdog._collectives.entered.numpy()
        model.fit(x, y, batch_size=8, verbose=0, callbacks=[dog])
        entered = watchdog._collectives.entered.numpy()
        assert entered - before == 10
        assert watchdog._collectives.left.numpy() == entered


def test_failure_of_a_rank_is_known_to_the_others():
    """And not any more in the next block."""

    def fail():
        with Watchdog():
            hvd.allgather_object(None)
            if hvd.rank() == 1:
                raise OSError("disk on fire")
            return watchdog.lost_rank()

    if hvd.rank() == 1:
        with pytest.raises(OSError, match="disk on fire"):
            fail()
    else:
        assert fail() == "rank 1 on localhost failed: disk on fire"
    assert watchdog.lost_rank() is None
    with Watchdog():
        hvd.allgather_object(None)
        assert watchdog.lost_rank() is None
        # Neither ends before the other has looked.
        hvd.allgather_object(None)
