"""Every patch and every private name of Keras, TensorFlow and Horovod.

The other modules of the package reach for them through the functions here.
`PRIVATE_NAMES` lists the names, and a test looks each of them up.
"""

import functools
import typing
from collections.abc import Callable

import horovod.common.elastic
import keras
import tensorflow as tf
from horovod.common.elastic import State
from horovod.common.elastic import notification_manager
from tensorflow.python.ops import control_flow_util

from horovod_recipes._xla import xla_compiles
from keras_lars._unwrap import innermost

__all__ = [
    "PRIVATE_NAMES",
    "Checkpoint",
    "State",
    "check_outside_xla",
    "copy_recording",
    "install",
    "is_seed",
    "layers_of",
    "moments_of",
    "notification_manager",
    "replace_moments",
    "rmsprop_momentums",
    "trained_variables",
]


class PrivateName(typing.NamedTuple):
    """A name that its library does not promise to keep."""

    owner: Callable  # Returns the object that has the name.
    name: str
    why: str


def _built(optimizer):
    optimizer.build([keras.Variable([0.0])])
    return optimizer


PRIVATE_NAMES = [
    PrivateName(
        lambda: keras.Model,
        "make_train_function",
        "Patched: no public hook knows both the optimizer and jit_compile.",
    ),
    PrivateName(
        lambda: keras.optimizers.LossScaleOptimizer,
        "__init__",
        "Patched: compile() makes one, and nothing else sees it.",
    ),
    PrivateName(
        lambda: keras.Model,
        "__reduce__",
        "Patched: a copy of a model would lose its DistributedOptimizer.",
    ),
    PrivateName(
        lambda: keras.optimizers.Optimizer,
        "__reduce__",
        "Patched: a copy of an optimizer would no longer be distributed.",
    ),
    PrivateName(
        lambda: keras.callbacks.CallbackList,
        "on_epoch_end",
        "Patched, with three more: no callback knows that it is the last.",
    ),
    PrivateName(
        lambda: keras.layers.BatchNormalization(),
        "_moments",
        "Saved files would name a subclass, and need Horovod to load.",
    ),
    PrivateName(
        lambda: keras.Model,
        "_flatten_layers",
        "Finds a synchronized batch norm inside of other layers.",
    ),
    PrivateName(
        lambda: keras.callbacks.ModelCheckpoint,
        "_save_model",
        "Both on_epoch_end and on_train_batch_end save through it.",
    ),
    PrivateName(
        lambda: _built(keras.optimizers.SGD()),
        "_trainable_variables",
        "Optimizer.variables holds the state, not what is trained.",
    ),
    PrivateName(
        lambda: _built(keras.optimizers.RMSprop(momentum=0.9)),
        "_momentums",
        "SGD has a public list of its velocities, RMSprop does not.",
    ),
    PrivateName(
        lambda: tf.GradientTape(),
        "_tape",
        "DistributedGradientTape takes over the recording of another tape.",
    ),
    PrivateName(
        lambda: horovod.common.elastic,
        "State",
        "Horovod's own KerasState, which extends it, fails on Keras 3.",
    ),
    PrivateName(
        lambda: horovod.common.elastic,
        "notification_manager",
        "Tells a state of new hosts. Horovod's own `run` uses it.",
    ),
    PrivateName(
        lambda: control_flow_util,
        "GraphOrParentsInXlaContext",
        "TensorFlow has no public way to ask whether XLA compiles a graph.",
    ),
]


# The events whose callbacks a `TrainFunction` must know of.
EVENTS = (
    "on_epoch_begin",
    "on_train_batch_end",
    "on_test_begin",
    "on_epoch_end",
)
_is_installed = False


def install(
    after_loss_scale_init, make_train_function, reduce, around_callbacks
):
    """Patches eight methods of Keras, in the first call alone.

    Args:
        after_loss_scale_init: Function of a new `LossScaleOptimizer` and the
            optimizer inside it.
        make_train_function: Function of a model, `force`, and Keras's own
            `make_train_function`, which it stands in for.
        reduce: Function of a model or an optimizer, and Keras's own
            `__reduce__`, which it stands in for.
        around_callbacks: Function of a `CallbackList`, one of `EVENTS`, and a
            function that calls all callbacks of this event.
    """
    global _is_installed
    if _is_installed:
        return
    _is_installed = True

    loss_scale = keras.optimizers.LossScaleOptimizer
    plain_init = loss_scale.__init__

    @functools.wraps(plain_init)
    def init(self, inner_optimizer, *args, **kwargs):
        plain_init(self, inner_optimizer, *args, **kwargs)
        after_loss_scale_init(self, inner_optimizer)

    loss_scale.__init__ = init

    plain_make = keras.Model.make_train_function

    @functools.wraps(plain_make)
    def make(self, force=False):
        return make_train_function(self, force, plain_make)

    keras.Model.make_train_function = make

    for saveable in (keras.Model, keras.optimizers.Optimizer):
        saveable.__reduce__ = _calling(reduce, saveable.__reduce__)

    for event in EVENTS:
        _around(event, around_callbacks)


def _around(event, around_callbacks):
    """Has `around_callbacks` call one method of `CallbackList`."""
    plain = getattr(keras.callbacks.CallbackList, event)

    @functools.wraps(plain)
    def method(self, *arguments, **logs):
        call = functools.partial(plain, self, *arguments, **logs)
        around_callbacks(self, event, call, *arguments[:1])

    setattr(keras.callbacks.CallbackList, event, method)


def _calling(reduce, plain):
    """Returns a method that calls `reduce` with its object and `plain`."""

    @functools.wraps(plain)
    def method(self):
        return reduce(self, plain)

    return method


class Checkpoint(keras.callbacks.ModelCheckpoint):
    """A `ModelCheckpoint` whose subclasses may change how it saves."""

    def save(self, epoch, batch, logs):
        """Saves the model if the monitored value has improved."""
        super()._save_model(epoch, batch, logs)

    def _save_model(self, epoch, batch, logs):
        self.save(epoch, batch, logs)


def moments_of(layer):
    """Returns the function that computes a batch norm's mean and variance."""
    return layer._moments


def replace_moments(layer, moments):
    """Has one batch norm compute its mean and variance by `moments`."""
    layer._moments = moments


def layers_of(model):
    """Returns the layers of a model, those inside of other layers too."""
    return list(model._flatten_layers(include_self=False))


def trained_variables(optimizer):
    """Returns the variables that a built optimizer trains."""
    # The LossScaleOptimizer of Keras 3.10 does not know them.
    return innermost(optimizer)._trainable_variables


def rmsprop_momentums(optimizer):
    """Returns the velocities of an RMSprop; none before it is built."""
    return getattr(optimizer, "_momentums", [])


def is_seed(variable):
    """Whether a variable is the state of a random generator.

    `keras.random.SeedGenerator` gives its variable this name.
    """
    return variable.name == "seed_generator_state"


def copy_recording(source, tape):
    """Makes `tape` hold what the gradient tape `source` has recorded.

    TensorFlow keeps the recording in private attributes; this copies them all.
    """
    tape.__dict__.update(source.__dict__)


def check_outside_xla(name):
    """Raises an error where XLA would compile the operation `name`.

    Without this check, TensorFlow fails later and does not say what to do.

    Raises:
        ValueError: While the function is traced, on every rank.
    """
    if xla_compiles():
        raise ValueError(
            f"{name} is inside a function with jit_compile=True, and XLA "
            "cannot compile Horovod's operations. For model.fit: "
            "compile(..., jit_compile=False). In a loop of your own, return "
            "the gradients from the function that XLA compiles, and call "
            "optimizer.apply outside of it."
        )
