"""An elastic job of one weight, whose updates tell which ranks took part.

The gradient of rank 0 is 1 x the number of ranks when the step was traced, and
that of rank 1 is 3 x that: the mean is 1 on one rank, 4 on two. The worker on
the host VICTIM kills itself, once, in the fifth update.

    horovodrun ... python -m tests.jobs.launcher.elastic_job VICTIM
"""

import json
import os
import signal
import sys

import keras
import numpy as np
import tensorflow as tf

import horovod_recipes.keras as hvd

UPDATE_TO_DIE_IN = 4
UPDATES_AFTER_A_CHANGE = 3


class DieOnce(keras.callbacks.Callback):
    """Ends the process in the way that a host does which loses its power."""

    def __init__(self, state):
        super().__init__()
        self.state = state

    def on_train_batch_end(self, batch, logs=None):
        if len(self.state.updates) == UPDATE_TO_DIE_IN:
            os.kill(os.getpid(), signal.SIGKILL)


def traced_loss(target, output):
    return tf.reduce_mean(output) * hvd.size()


def is_done(updates):
    """Whether there were two ranks, then one, then two again."""
    sizes = [ranks for ranks, _ in updates]
    lone = sizes.count(1)
    return lone > 0 and sizes[-UPDATES_AFTER_A_CHANGE:] == [2, 2, 2]


@hvd.elastic.run
def train(state):
    callbacks = []
    if os.environ["HOROVOD_HOSTNAME"] == sys.argv[1]:
        callbacks.append(DieOnce(state))
    x = np.full((1, 1), [1.0, 3.0][hvd.rank()])
    while not is_done(state.updates):
        before = state.model.get_weights()[0].item()
        state.model.fit(x, x, verbose=0, callbacks=callbacks)
        after = state.model.get_weights()[0].item()
        state.updates.append((hvd.size(), before - after))
        state.commit()


def main():
    hvd.init()
    model = keras.Sequential(
        [keras.Input((1,)), keras.layers.Dense(1, use_bias=False)]
    )
    model.compile(
        hvd.DistributedOptimizer(keras.optimizers.SGD(1.0)),
        traced_loss,
        jit_compile=False,
    )
    model.set_weights([np.zeros((1, 1))])
    state = hvd.elastic.KerasState(model, updates=[])
    train(state)
    weights = hvd.allgather_object(model.get_weights()[0].item())
    if hvd.rank() == 0:
        print(json.dumps({"updates": state.updates, "weights": weights}))


if __name__ == "__main__":
    main()
