"""Builds the learning-rate schedule, optimizer and network of a config."""

import contextlib
import inspect

import keras
import tensorflow as tf

from horovod_recipes.errors import JobError
from horovod_recipes.errors import root_cause
from horovod_recipes.models import MODELS
from horovod_recipes.models.heads import simclr_network
from keras_lars import LARS
from keras_lars import TrustRatio
from keras_lars.muon import ConvMuon
from keras_lars.schedules import WarmupCosineDecay
from keras_lars.schedules import WarmupPolynomialDecay

# Arguments that turn LARS into SGD with momentum and L2 decay.
WITHOUT_ADAPTATION = {
    "exclude_from_layer_adaptation": [".*"],
    "unadapted_scale": 1.0,
}
# Added to the root of the variance in the paper on LAMB, arXiv 1904.00962.
LAMB_EPSILON = 1e-6


def create_schedule(config, size):
    """Returns the learning rate as a function of the update's number.

    Args:
        config: The recipe's `ConfigDict`.
        size: The `JobSize`.
    """
    arguments = dict(config.schedule)
    warmup_epochs = arguments.pop("warmup_epochs")
    schedule = WarmupPolynomialDecay
    if arguments.pop("decay") == "cosine":
        schedule = WarmupCosineDecay
        del arguments["power"]
    return schedule(
        total_steps=size.steps,
        warmup_steps=round(warmup_epochs * size.steps_per_epoch),
        **arguments,
    )


def create_optimizer(config, schedule):
    """Returns the optimizer before `hvd.DistributedOptimizer` wraps it.

    Raises:
        JobError: If `optimizer_name` is no optimizer of Keras, or if an
            argument in `config.optimizer` is not one of it.
    """
    name, _, inner_name = config.optimizer_name.partition(":")
    arguments = config.optimizer.to_dict()
    if name == "lars":
        optimizer = LARS(schedule, **arguments)
    elif name == "sgd":
        optimizer = LARS(schedule, **arguments | WITHOUT_ADAPTATION)
    elif name == "lamb":
        inner = keras.optimizers.Adam(schedule, epsilon=LAMB_EPSILON)
        optimizer = _trust_ratio(inner, arguments)
    else:
        inner_class = _optimizer_class(inner_name)
        inner = inner_class(schedule, **arguments.pop("inner", {}))
        optimizer = _trust_ratio(inner, arguments)
    if config.precision == "mixed_float16":
        # Otherwise `compile` adds it, and loading the saved model needs the
        # same global dtype policy.
        return keras.optimizers.LossScaleOptimizer(optimizer)
    return optimizer


def _optimizer_class(name):
    # `keras.optimizers.get` does not know Lamb.
    classes = {
        c.__name__.lower(): c
        for c in vars(keras.optimizers).values()
        if isinstance(c, type) and c is not keras.optimizers.Optimizer
    }
    classes["conv_muon"] = ConvMuon
    if name not in classes:
        raise JobError(
            f"optimizer_name=trust_ratio:{name} names no optimizer of Keras; "
            "use the name of its class in small letters, such as "
            "trust_ratio:adamw, or trust_ratio:conv_muon"
        )
    return classes[name]


def _trust_ratio(inner, arguments):
    known = list(inspect.signature(TrustRatio).parameters)[1:]
    for key in arguments:
        if key not in known:
            raise JobError(
                f"the config has optimizer.{key}, but TrustRatio takes "
                f"{', '.join(known)}; put arguments of the optimizer inside "
                "it into optimizer.inner of trust_ratio:NAME"
            )
    return TrustRatio(inner, **arguments)


def create_network(config, image_shape):
    """Returns the uncompiled network of a task, in the config's precision.

    Args:
        config: The recipe's `ConfigDict`.
        image_shape: Tuple `(height, width, channels)`.

    Raises:
        JobError: If it does not fit into the memory of this process.
    """
    arguments = dict(config.model)
    create = MODELS[arguments.pop("name")]
    with _dtype_policy(config.precision), _network_that_fits(config.model):
        network = create(
            image_shape=image_shape,
            num_classes=config.dataset.num_classes,
            **arguments,
        )
        if config.task != "simclr":
            return network
        return simclr_network(
            network,
            config.simclr.projection_layers,
            config.simclr.embedding_size,
            arguments.get("batch_norm", "micro_batch"),
        )


@contextlib.contextmanager
def _network_that_fits(arguments):
    try:
        yield
    except tf.errors.OpError as error:
        raise JobError(
            f"cannot make the network of model.name={arguments.name} "
            f"({root_cause(error)}); lower its arguments, dataset.image_size "
            "or dataset.num_classes"
        ) from error


@contextlib.contextmanager
def _dtype_policy(name):
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(policy)
