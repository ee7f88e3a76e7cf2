"""Fine-tunes a network of keras.applications on every rank, in two phases.

python -m horovod_recipes.data mnist5k   # prepares the digits, once
horovodrun -np 2 python examples/fine_tuning.py
"""

import keras
import tensorflow_datasets as tfds
from keras import layers

import horovod_recipes.data.datasets  # noqa: F401  registers mnist5k
import horovod_recipes.keras as hvd

hvd.init()  # With GPUs, choose one per rank, as horovod_fit.py does.
base = keras.applications.ResNet50V2(
    input_shape=(32, 32, 3),
    include_top=False,
    # With internet access: weights="imagenet" if hvd.rank() == 0 else None.
    # Rank 0 alone downloads them, and broadcasts them below.
    weights=None,
)
# Small images need only the first layers.
features = keras.Model(base.input, base.get_layer("conv2_block1_out").output)
inputs = keras.Input((28, 28, 1))
x = layers.Rescaling(1 / 127.5, offset=-1)(layers.Resizing(32, 32)(inputs))
x = features(layers.Concatenate()([x, x, x]))
x = layers.GlobalMaxPooling2D()(x)
model = keras.Model(inputs, layers.Dense(10)(x))


def load_shard(split):
    """Returns this rank's images and labels; no two ranks share one."""
    data = tfds.load("mnist5k", split=split, batch_size=-1, as_supervised=True)
    return [a[hvd.rank() :: hvd.size()] for a in tfds.as_numpy(data)]


for phase, rate in (("frozen", 0.01), ("whole", 0.001)):
    for layer in features.layers:
        # A batch norm keeps its statistics only while it is not trainable:
        # Keras 3's `fit` overrides `training=False` of an inner model.
        is_batch_norm = isinstance(layer, layers.BatchNormalization)
        layer.trainable = phase == "whole" and not is_batch_norm
    # Keras reads `trainable` when it compiles, so each phase compiles again.
    model.compile(
        optimizer=hvd.DistributedOptimizer(keras.optimizers.Adam(rate)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(
        *load_shard("train"),
        batch_size=100 // hvd.size(),  # The global batch is 100.
        epochs=3,
        callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(root_rank=0)],
        verbose=0,
    )
    results = hvd.evaluate(model, *load_shard("test"), verbose=0)
    if hvd.rank() == 0:
        model.save("fine_tuning.keras")
        print(f"{phase}, test accuracy: {results['accuracy']:.3f}")
