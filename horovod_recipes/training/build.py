"""Builds the learning-rate schedule, optimizer and network of a config."""

import contextlib

import keras

from horovod_recipes.models import MODELS
from keras_lars import LARS
from keras_lars.schedules import WarmupPolynomialDecay

# Arguments that turn LARS into SGD with momentum and L2 decay.
WITHOUT_ADAPTATION = {
    "exclude_from_layer_adaptation": [".*"],
    "unadapted_scale": 1.0,
}


def create_schedule(config, size):
    """Returns the learning rate as a function of the update's number.

    Args:
        config: The recipe's `ConfigDict`.
        size: The `JobSize`.
    """
    arguments = dict(config.schedule)
    warmup_epochs = arguments.pop("warmup_epochs")
    return WarmupPolynomialDecay(
        total_steps=size.steps,
        warmup_steps=round(warmup_epochs * size.steps_per_epoch),
        **arguments,
    )


def create_optimizer(config, schedule):
    """Returns the optimizer before `hvd.DistributedOptimizer` wraps it."""
    arguments = dict(config.optimizer)
    if config.optimizer_name == "sgd":
        arguments |= WITHOUT_ADAPTATION
    optimizer = LARS(schedule, **arguments)
    if config.precision == "mixed_float16":
        # Otherwise `compile` adds it, and loading the saved model needs the
        # same global dtype policy.
        return keras.optimizers.LossScaleOptimizer(optimizer)
    return optimizer


def create_network(config, image_shape):
    """Returns the uncompiled network, in the config's precision.

    Args:
        config: The recipe's `ConfigDict`.
        image_shape: Tuple `(height, width, channels)`.
    """
    arguments = dict(config.model)
    create = MODELS[arguments.pop("name")]
    with _dtype_policy(config.precision):
        return create(
            image_shape=image_shape,
            num_classes=config.dataset.num_classes,
            **arguments,
        )


@contextlib.contextmanager
def _dtype_policy(name):
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(policy)
