"""Trains on digits while ranks come and go (docs/elastic.md).

python -m horovod_recipes.data mnist5k   # prepares the digits, once
horovodrun -np 2 --min-np 1 --host-discovery-script ./discover.sh \
    --network-interface lo python examples/elastic.py   # eth0 between hosts
"""

import keras
import tensorflow as tf
import tensorflow_datasets as tfds
from keras import layers

import horovod_recipes.data.datasets  # noqa: F401  registers mnist5k
import horovod_recipes.keras as hvd
from keras_lars import LARS


def load_digits(split):
    """Returns all images and labels, as any rank may get any of them."""
    data = tfds.load("mnist5k", split=split, batch_size=-1, as_supervised=True)
    return tfds.as_numpy(data)


@hvd.elastic.run
def train(state, images, labels):
    """Trains from the last commit; starts again when the ranks change."""
    batches = state.sampler.dataset()
    state.model.fit(
        batches.map(lambda i: (tf.gather(images, i), tf.gather(labels, i))),
        steps_per_epoch=state.sampler.steps_per_epoch,
        initial_epoch=state.epoch,
        epochs=8,
        callbacks=[
            hvd.elastic.UpdateBatchStateCallback(state),
            hvd.elastic.UpdateEpochStateCallback(state),
            hvd.elastic.CommitStateCallback(state, batches_per_commit=5),
        ],
        verbose=2 if hvd.rank() == 0 else 0,
    )


hvd.init()  # With GPUs, choose one per rank, as horovod_fit.py does.
inputs = keras.Input((28, 28, 1))
x = layers.Rescaling(1 / 127.5, offset=-1)(inputs)
x = layers.Flatten()(layers.Conv2D(32, 5, strides=2, activation="relu")(x))
model = keras.Model(inputs, layers.Dense(10, activation="softmax")(x))
optimizer = hvd.DistributedOptimizer(LARS(5.0, unadapted_scale=0.01))
loss = "sparse_categorical_crossentropy"
model.compile(optimizer, loss, metrics=["accuracy"])
# The global batch is 200, however many ranks share it.
sampler = hvd.elastic.ElasticSampler(4000, global_batch_size=200)
state = hvd.elastic.KerasState(model, batch=0, epoch=0, sampler=sampler)
train(state, *load_digits("train"))
shares = [array[hvd.rank() :: hvd.size()] for array in load_digits("test")]
results = hvd.evaluate(model, *shares, verbose=0)
if hvd.rank() == 0:
    model.save("elastic.keras")
    print(f"test accuracy: {results['accuracy']:.3f}")
