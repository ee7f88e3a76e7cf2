"""The watchdog in jobs that do not hang.

Jobs that hang are in tests/jobs/hang_test.py.
"""

import time

import keras
import numpy as np
import pytest

import horovod_recipes.keras as hvd
from horovod_recipes.keras import _watchdog
from horovod_recipes.keras.callbacks import Watchdog
from keras_lars import LARS


def test_invalid_seconds():
    with pytest.raises(ValueError, match=r"above 0\. Received: seconds=0"):
        Watchdog(seconds=0)


@pytest.mark.slow
def test_training_may_take_longer_than_the_limit():
    """Each batch is progress."""
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(
        hvd.DistributedOptimizer(LARS(0.1)), loss="mse", jit_compile=False
    )
    x, y = np.ones((8, 3), np.float32), np.ones((8, 1), np.float32)
    with Watchdog(seconds=60):
        # This compiles the step.
        model.fit(x, y, verbose=0)
    wait = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: time.sleep(1)
    )
    with Watchdog(seconds=5) as dog:
        begin = time.monotonic()
        model.fit(x, y, batch_size=1, verbose=0, callbacks=[dog, wait])
        assert time.monotonic() - begin > 7
        # Each step has a handshake, compares the ranks, and reduces the
        # gradients. The end of the epoch has a handshake.
        assert _watchdog._collectives.entered.numpy() == 3 * 8 + 1
        assert _watchdog._collectives.left.numpy() == 3 * 8 + 1


def test_failure_of_a_rank_is_known_to_the_others():
    """The next block does not know it any more. Under MPI no block does."""

    def fail():
        with Watchdog():
            hvd.allgather_object(None)
            if hvd.rank() == 1:
                raise OSError("disk on fire")
            return hvd.callbacks.lost_rank()

    if hvd.rank() == 1:
        with pytest.raises(OSError, match="disk on fire"):
            fail()
    else:
        told = "rank 1 on localhost failed: disk on fire"
        assert fail() == (told if hvd.gloo_enabled() else None)
    assert hvd.callbacks.lost_rank() is None
    with Watchdog():
        hvd.allgather_object(None)
        assert hvd.callbacks.lost_rank() is None
        # Neither rank ends before the other has asked.
        hvd.allgather_object(None)


def test_ranks_share_a_key_that_each_block_makes_anew():
    """Under MPI they exchange no messages."""
    keys = []
    for _ in range(2):
        with Watchdog() as dog:
            keys.append(dog._peers.key)
            assert hvd.allgather_object(keys[-1]) == 2 * keys[-1:]
    if hvd.gloo_enabled():
        assert len(keys[0]) == len(keys[1]) == _watchdog.KEY_BYTES
        assert keys[0] != keys[1]
    else:
        assert keys == [None, None]
