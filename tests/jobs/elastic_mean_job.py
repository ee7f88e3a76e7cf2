"""An elastic job of one weight, whose updates tell which ranks took part.

    horovodrun ... python -m tests.jobs.elastic_mean_job VICTIM

The gradient of rank 0 is the number of ranks when the step was traced. The
gradient of rank 1 is 3 times that. So their mean is 1 on one rank, and 4 on
two. The worker on the host VICTIM kills itself, once, in the fifth update.
"""

import json
import os
import signal
import sys

import keras
import numpy as np
import tensorflow as tf

import horovod_recipes.keras as hvd

UPDATES_BEFORE_DEATH = 4
# The job ends after so many updates on two ranks, if it had one rank before.
UPDATES_AFTER_RETURN = 3


class DieOnce(keras.callbacks.Callback):
    """Ends the process as suddenly as a loss of power does."""

    def __init__(self, state):
        super().__init__()
        self.state = state

    def on_train_batch_end(self, batch, logs=None):
        if len(self.state.updates) == UPDATES_BEFORE_DEATH:
            os.kill(os.getpid(), signal.SIGKILL)


def traced_loss(target, output):
    return tf.reduce_mean(output) * hvd.size()


def is_done(updates):
    """Whether there were two ranks, then one, then two again."""
    sizes = [ranks for ranks, _ in updates]
    return 1 in sizes and sizes[-UPDATES_AFTER_RETURN:] == [2, 2, 2]


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
