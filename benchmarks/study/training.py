"""One training of the studies: a network, a recipe, a batch and a rate."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable

import keras
import numpy as np
from keras import layers

from benchmarks.study import fashion_mnist
from keras_lars import LARS
from keras_lars import TrustRatio
from keras_lars.muon import ConvMuon
from keras_lars.schedules import WarmupPolynomialDecay

# Images per micro-batch.
MICRO_BATCH = 256
# Training images that are held out to choose the rate.
VALIDATION_IMAGES = 5000
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4


@dataclasses.dataclass(frozen=True)
class Recipe:
    title: str
    # The first rate of a search, at batch 256.
    first_rate: float
    # The rule from the best rate at a smaller batch to the next first rate.
    scaling: str | None
    # Whether the rate warms up and decays; otherwise it is fixed.
    scheduled: bool
    # Makes the optimizer from a rate, or a schedule that counts updates, and
    # from the number of micro-batches per update.
    optimizer: Callable


def lars(rate, micro_batches, **arguments):
    return LARS(
        rate,
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
        # For such small networks, compiling takes longer than it saves.
        jit_compile=False,
        gradient_accumulation_steps=accumulation(micro_batches),
        **arguments,
    )


def lamb(rate, micro_batches):
    adam = keras.optimizers.Adam(
        per_update(rate, micro_batches),
        epsilon=1e-6,
        gradient_accumulation_steps=accumulation(micro_batches),
    )
    return TrustRatio(adam, weight_decay=0.01, jit_compile=False)


def orscale(rate, micro_batches):
    muon = ConvMuon(
        per_update(rate, micro_batches),
        rms_rate=None,
        weight_decay=None,
        adam_weight_decay=None,
        # Muon's rates are too high for Adam, which updates biases, scales and
        # offsets.
        adam_lr_ratio=0.1,
        gradient_accumulation_steps=accumulation(micro_batches),
    )
    return TrustRatio(
        muon,
        weight_decay=WEIGHT_DECAY,
        epsilon=1e-6,
        clip=(0.5, 1.5),
        jit_compile=False,
    )


def accumulation(micro_batches):
    """Returns the argument of Keras that accumulates so many micro-batches."""
    return micro_batches if micro_batches > 1 else None


def per_update(rate, micro_batches):
    """Returns a rate for an optimizer whose schedule counts micro-batches."""
    if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
        return PerUpdate(rate, micro_batches)
    return rate


class PerUpdate(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule that counts updates of several micro-batches."""

    def __init__(self, schedule, micro_batches):
        self._schedule, self._micro_batches = schedule, micro_batches

    def __call__(self, step):
        return self._schedule(step // self._micro_batches)


# SGD is LARS that adapts no variable, so all other code is the same.
sgd = functools.partial(lars, exclude_from_layer_adaptation=[".*"])
RECIPES = {
    "sgd": Recipe("SGD, fixed rate", 0.03, None, False, sgd),
    "sgd_linear": Recipe(
        "SGD, linear scaling, warm-up", 0.03, "linear", True, sgd
    ),
    "lars": Recipe("LARS, usual exclusions", 2.0, "sqrt", True, lars),
    "lars_scaled": Recipe(
        "LARS, unadapted_scale 0.003",
        2.0,
        "sqrt",
        True,
        functools.partial(lars, unadapted_scale=0.003),
    ),
    "lamb": Recipe("LAMB", 0.01, "sqrt", True, lamb),
    "orscale": Recipe("OrScale", 0.05, "sqrt", True, orscale),
}


@dataclasses.dataclass(frozen=True)
class Setting:
    batches: tuple
    epochs: int
    warmup_epochs: int
    training_images: int
    tries: int
    seeds: int


SETTINGS = {
    "full": Setting(
        # The most important batches run first.
        batches=(256, 8192, 32768, 1024, 4096, 16384),
        epochs=10,
        warmup_epochs=2,
        training_images=60_000 - VALIDATION_IMAGES,
        tries=4,
        seeds=3,
    ),
    "small": Setting(
        batches=(256, 4096),
        epochs=3,
        warmup_epochs=1,
        training_images=20_000,
        tries=3,
        seeds=2,
    ),
}


@dataclasses.dataclass(frozen=True)
class Run:
    network: str
    recipe: str
    batch: int
    rate: float
    seed: int


def small_alexnet(seed):
    """Returns 5 convolutions and 3 dense layers, without batch norm."""
    initializers = seeded_initializers(seed)

    def convolution(x, filters, size, strides=1):
        return layers.Conv2D(
            filters,
            size,
            strides,
            padding="same",
            activation="relu",
            kernel_initializer=next(initializers),
        )(x)

    def dense(x, units, activation="relu"):
        return layers.Dense(
            units, activation, kernel_initializer=next(initializers)
        )(x)

    inputs = keras.Input((28, 28, 1))
    x = convolution(inputs, 8, 5, strides=2)
    x = convolution(x, 16, 3)
    x = layers.MaxPooling2D(2)(x)
    x = convolution(x, 24, 3)
    x = convolution(x, 24, 3)
    x = convolution(x, 16, 3)
    x = layers.MaxPooling2D(2)(x)
    x = layers.Flatten()(x)
    x = dense(x, 64)
    x = dense(x, 64)
    return keras.Model(inputs, dense(x, 10, activation=None))


def small_resnet(seed):
    """Returns a ResNet of two blocks, with batch norm."""
    initializers = seeded_initializers(seed)

    def convolution(x, filters, size, strides=1):
        x = layers.Conv2D(
            filters,
            size,
            strides,
            padding="same",
            use_bias=False,
            kernel_initializer=next(initializers),
        )(x)
        return layers.BatchNormalization(momentum=0.9)(x)

    def block(x, filters):
        shortcut = convolution(x, filters, 1, strides=2)
        x = layers.ReLU()(convolution(x, filters, 3, strides=2))
        x = layers.Add()([shortcut, convolution(x, filters, 3)])
        return layers.ReLU()(x)

    inputs = keras.Input((28, 28, 1))
    x = layers.ReLU()(convolution(inputs, 8, 3, strides=2))
    x = block(x, 16)
    x = block(x, 32)
    x = layers.GlobalAveragePooling2D()(x)
    logits = layers.Dense(10, kernel_initializer=next(initializers))(x)
    return keras.Model(inputs, logits)


NETWORKS = {"alexnet": small_alexnet, "resnet": small_resnet}
NETWORK_TITLES = {
    "alexnet": "small AlexNet, no batch norm",
    "resnet": "small ResNet, batch norm",
}


def seeded_initializers(seed):
    """Yields He's initializers with different seeds."""
    rng = np.random.default_rng(seed)
    # At least as many as any network has layers.
    for own_seed in rng.integers(2**31, size=100):
        yield keras.initializers.HeNormal(int(own_seed))


class MicroBatches(keras.utils.PyDataset):
    """Micro-batches of whole updates, from shuffled epochs in a row."""

    def __init__(self, images, labels, count, seed):
        super().__init__()
        self._images, self._labels, self._count = images, labels, count
        rng = np.random.default_rng(seed)
        epochs = math.ceil(count * MICRO_BATCH / len(images))
        self._order = np.concatenate(
            [rng.permutation(len(images)) for _ in range(epochs)]
        )

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        order = self._order[index * MICRO_BATCH : (index + 1) * MICRO_BATCH]
        return self._images[order], self._labels[order]


def without_autotuning(batches):
    """Returns the same batches, on TensorFlow as a dataset without autotuning.

    A thread that tunes the input sleeps for up to a minute, and the end of a
    training waits for it.
    """
    if keras.backend.backend() != "tensorflow":
        return batches
    import tensorflow as tf

    dataset = tf.data.Dataset.from_generator(
        lambda: map(batches.__getitem__, range(len(batches))),
        # With a fixed batch size, the dataset would round differently.
        output_signature=tuple(
            tf.TensorSpec((None, *part.shape[1:]), part.dtype)
            for part in batches[0]
        ),
    )
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.apply(
        tf.data.experimental.assert_cardinality(len(batches))
    ).with_options(options)


@functools.cache
def data(training_images):
    """Returns `{part: (images, labels)}`, with pixels from -1 to 1."""
    (images, labels), (test_images, test_labels) = fashion_mnist.load()
    images, test_images = (
        x.astype("float32") / 127.5 - 1 for x in (images, test_images)
    )
    return {
        "training": (images[:training_images], labels[:training_images]),
        "validation": (
            images[-VALIDATION_IMAGES:],
            labels[-VALIDATION_IMAGES:],
        ),
        "test": (test_images, test_labels),
    }


def make_optimizer(run, setting):
    """Returns the optimizer of a run, and its number of updates."""
    recipe = RECIPES[run.recipe]
    updates = round(setting.epochs * setting.training_images / run.batch)
    rate = run.rate
    if recipe.scheduled:
        warmup = warmup_updates(setting, updates)
        rate = WarmupPolynomialDecay(
            run.rate,
            updates,
            warmup,
            # From 0, one of the 17 updates at batch 32K would do nothing.
            warmup_start_learning_rate=run.rate / max(warmup, 1),
        )
    optimizer = recipe.optimizer(rate, run.batch // MICRO_BATCH)
    return optimizer, updates


def warmup_updates(setting, updates):
    return round(setting.warmup_epochs / setting.epochs * updates)


def train(run, setting, callbacks=()):
    """Trains one network; returns its accuracies and time as a dict."""
    begin = time.perf_counter()
    keras.backend.clear_session()
    parts = data(setting.training_images)
    model = NETWORKS[run.network](run.seed)
    optimizer, updates = make_optimizer(run, setting)
    model.compile(
        optimizer,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        # On a CPU, TensorFlow's convolutions are faster than XLA's.
        jit_compile=keras.backend.backend() != "tensorflow",
    )
    count = updates * run.batch // MICRO_BATCH
    model.fit(
        without_autotuning(MicroBatches(*parts["training"], count, run.seed)),
        # Keras would shuffle the micro-batches with its own seed.
        shuffle=False,
        verbose=0,
        callbacks=[keras.callbacks.TerminateOnNaN(), *callbacks],
    )
    accuracies = {
        f"{part}_top1": top1(model, *parts[part])
        for part in ("validation", "test")
    }
    return dataclasses.asdict(run) | {
        "updates": updates,
        **accuracies,
        "seconds": round(time.perf_counter() - begin, 1),
    }


def top1(model, images, labels):
    """Returns the accuracy in percent, or 0 if the network has diverged."""
    logits = model.predict(images, batch_size=1000, verbose=0)
    if not np.isfinite(logits).all():
        return 0.0
    return round(100 * float(np.mean(logits.argmax(-1) == labels)), 2)
