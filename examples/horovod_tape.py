"""Trains on digits on every rank, in a training loop of your own.

python -m horovod_recipes.data mnist5k   # prepares the digits, once
horovodrun -np 2 python examples/horovod_tape.py
"""

import keras
import tensorflow as tf
import tensorflow_datasets as tfds
from keras import layers

import horovod_recipes.data.datasets  # noqa: F401  registers mnist5k
import horovod_recipes.keras as hvd
from keras_lars import LARS

hvd.init()  # With GPUs, choose one per rank, as horovod_fit.py does.
inputs = keras.Input((28, 28, 1))
x = layers.Rescaling(1 / 127.5, offset=-1)(inputs)
x = layers.Conv2D(16, 3, strides=2, activation="relu")(x)
x = layers.Conv2D(32, 3, strides=2, activation="relu")(x)
model = keras.Model(inputs, layers.Dense(10)(layers.Flatten()(x)))
loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
# The tape averages the gradients, so this optimizer is an ordinary one.
optimizer = LARS(5.0, unadapted_scale=0.01)
optimizer.build(model.trainable_variables)
# All ranks start from the weights of rank 0.
hvd.broadcast_variables(model.weights + optimizer.variables, root_rank=0)


def load_shard(split):
    """Returns a dataset of this rank's digits; no two ranks share one."""
    digits = tfds.load("mnist5k", split=split, as_supervised=True)
    return digits.shard(hvd.size(), hvd.rank()).cache()


@tf.function
def train_step(images, labels):
    with tf.GradientTape() as tape:
        loss = loss_of(labels, model(images, training=True))
    tape = hvd.DistributedGradientTape(tape)
    gradients = tape.gradient(loss, model.trainable_variables)
    optimizer.apply(gradients, model.trainable_variables)
    return loss


# Ranks must take equal numbers of steps: each step waits for all ranks.
train = load_shard("train").shuffle(4000)
train = train.batch(200 // hvd.size()).take(20)
for epoch in range(8):
    loss = hvd.allreduce(sum(train_step(*batch) for batch in train) / 20)
    if hvd.rank() == 0:
        print(f"epoch {epoch + 1}: mean training loss {loss:.3f}")
correct = sum(
    tf.reduce_sum(tf.cast(tf.argmax(model(images), 1) == labels, tf.int32))
    for images, labels in load_shard("test").batch(200)
)
correct = hvd.allreduce(correct, op=hvd.Sum)
if hvd.rank() == 0:
    model.save("horovod_tape.keras")
    print(f"test accuracy: {correct / 1000:.3f}")
