"""Trains on digits with `fit`, on every rank of a Horovod job.

python -m horovod_recipes.data mnist5k   # prepares the digits, once
horovodrun -np 2 python examples/horovod_fit.py
"""

import keras
import tensorflow as tf
import tensorflow_datasets as tfds
from keras import layers

import horovod_recipes.data.datasets  # noqa: F401  registers mnist5k
import horovod_recipes.keras as hvd
from keras_lars import LARS

hvd.init()
# Each rank takes the GPU of its local rank, if the host has GPUs.
if gpus := tf.config.list_physical_devices("GPU"):
    tf.config.set_visible_devices(gpus[hvd.local_rank()], "GPU")


def load_shard(split):
    """Returns this rank's images and labels; no two ranks share one."""
    data = tfds.load("mnist5k", split=split, batch_size=-1, as_supervised=True)
    return [a[hvd.rank() :: hvd.size()] for a in tfds.as_numpy(data)]


model = keras.Sequential(
    [
        keras.Input((28, 28, 1)),
        layers.Rescaling(1 / 127.5, offset=-1),
        layers.Conv2D(16, 3, strides=2, activation="relu"),
        layers.Conv2D(32, 3, strides=2, activation="relu"),
        layers.Flatten(),
        layers.Dense(10),
    ]
)
model.compile(
    # Averages the gradients of all ranks before each update.
    optimizer=hvd.DistributedOptimizer(LARS(5.0, unadapted_scale=0.01)),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
model.fit(
    *load_shard("train"),
    batch_size=200 // hvd.size(),  # The global batch is 200.
    epochs=8,
    callbacks=[
        # All ranks start from the weights of rank 0.
        hvd.callbacks.BroadcastGlobalVariablesCallback(root_rank=0),
        # The metrics of an epoch count the examples of all ranks.
        hvd.callbacks.ExactMetrics(),
    ],
    verbose=2 if hvd.rank() == 0 else 0,
)
results = hvd.evaluate(model, *load_shard("test"), verbose=0)
if hvd.rank() == 0:
    model.save("horovod_fit.keras")  # It loads without Horovod.
    print(f"test accuracy: {results['accuracy']:.3f}")
