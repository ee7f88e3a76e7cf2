"""A training job that prints a hash of each rank's weights at its end.

The arguments are those of `horovod_recipes.train`.
"""

import json
import sys

import keras

import horovod_recipes.keras as hvd
from horovod_recipes import _sigterm
from horovod_recipes import train
from tests.jobs.results import digest


class PrintWeights(keras.callbacks.Callback):
    """Prints the hashes of weights and optimizer state, on rank 0."""

    def on_train_end(self, logs=None):
        variables = self.model.weights + self.model.optimizer.variables
        digests = hvd.allgather_object(digest(variables))
        if hvd.rank() == 0:
            print(json.dumps({"weights": digests}), flush=True)


if __name__ == "__main__":
    _sigterm.note_while_starting()
    sys.exit(train.main(sys.argv, callbacks=[PrintWeights()]))
