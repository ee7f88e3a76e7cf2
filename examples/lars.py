"""Trains on digits with LARS in plain Keras: large batches and a warm-up.

python -m horovod_recipes.data mnist5k   # prepares the digits, once
python examples/lars.py
"""

import keras
import tensorflow_datasets as tfds
from keras import layers

import horovod_recipes.data.datasets  # noqa: F401  registers mnist5k
from keras_lars import LARS
from keras_lars.schedules import WarmupPolynomialDecay

BATCH_SIZE = 500
EPOCHS = 8


def load_digits(split):
    """Returns the images and labels of a split as arrays."""
    data = tfds.load("mnist5k", split=split, batch_size=-1, as_supervised=True)
    return tfds.as_numpy(data)


images, labels = load_digits("train")
steps = EPOCHS * (len(images) // BATCH_SIZE)
# Large batches need a high peak rate, and a warm-up to reach it safely.
schedule = WarmupPolynomialDecay(
    peak_learning_rate=10.0, total_steps=steps, warmup_steps=steps // 4
)

keras.utils.set_random_seed(0)
model = keras.Sequential(
    [
        keras.Input(images.shape[1:]),
        layers.Rescaling(1 / 127.5, offset=-1),
        layers.Conv2D(16, 3, strides=2, use_bias=False),
        layers.BatchNormalization(momentum=0.9),
        layers.ReLU(),
        layers.Conv2D(32, 3, strides=2, use_bias=False),
        layers.BatchNormalization(momentum=0.9),
        layers.ReLU(),
        layers.Flatten(),
        layers.Dense(10),
    ]
)
model.compile(
    # LARS adapts the kernels. Scales and biases get 0.05 times the rate.
    optimizer=LARS(schedule, weight_decay=5e-4, unadapted_scale=0.05),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
model.fit(images, labels, batch_size=BATCH_SIZE, epochs=EPOCHS, verbose=2)
model.save("lars.keras")  # Loading it needs `import keras_lars`.
results = model.evaluate(*load_digits("test"), verbose=0, return_dict=True)
print(f"test accuracy: {results['accuracy']:.3f}")
