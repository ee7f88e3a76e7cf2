"""Training steps that XLA compiles up to the allreduce, which it cannot."""

import functools
import warnings

import keras
import tensorflow as tf

from horovod_recipes.keras._optimizer import is_distributed
from horovod_recipes.keras.layers import is_synchronized


def split_train_steps():
    """Has Keras split the steps of models with a distributed optimizer.

    With `jit_compile`, which `compile()` turns on by itself where there is a
    GPU, XLA compiles the forward and the backward pass and the metrics of each
    micro-batch into one program, and the optimizer, with its allreduce, runs
    after it. A model that cannot be split so is trained without XLA, with a
    warning.

    Only the model knows both its optimizer and how it is compiled, and neither
    `fit` nor `compile()` asks the optimizer, so Keras's class is changed.
    """
    plain = keras.Model.make_train_function

    @functools.wraps(plain)
    def make_train_function(self, force=False):
        if self.train_function is not None and not force:
            return self.train_function
        optimizer = getattr(self, "optimizer", None)
        if not is_distributed(optimizer) or not self.jit_compile:
            return plain(self, force)
        obstacle = obstacle_to_xla(self)
        if obstacle:
            warnings.warn(
                "The model was compiled with jit_compile on, and is trained "
                f"without XLA: {obstacle}. To silence this: "
                "compile(..., jit_compile=False).",
                stacklevel=4,
            )
            self.jit_compile = False
            return plain(self, force)
        # XLA would keep the first loss scale of one without variables.
        if not optimizer.built:
            optimizer.build(self.trainable_variables)
        # The function keeps these two as they are while it is made. XLA goes
        # on compiling evaluation, which has no operations of Horovod.
        self.train_step = split_train_step(self)
        self.jit_compile = False
        try:
            return plain(self, force)
        finally:
            del self.train_step
            self.jit_compile = True

    keras.Model.make_train_function = make_train_function


def obstacle_to_xla(model):
    """Returns why the training step cannot be split; None if it can."""
    # Its optimizer has no variables either.
    if not model.built:
        return "it is not built before its first step"
    # The metrics are updated before the weights, which Keras's own step does
    # not notice.
    train_step = getattr(model.train_step, "__func__", None)
    if train_step is not keras.Model.train_step:
        return "it has a train_step of its own"
    for layer in model._flatten_layers():
        if is_synchronized(layer):
            return f"its layer {layer.name!r} needs an allreduce in the step"
    return None


def split_train_step(model):
    """Returns a `train_step` that leaves XLA before the optimizer."""
    optimizer_apply = model.optimizer.apply
    whole_step = model.train_step

    @tf.function(jit_compile=True, reduce_retracing=True, autograph=False)
    def forward_and_backward(data):
        with optimizer_apply.held_back() as gradients:
            logs = whole_step(data)
        return logs, gradients

    def train_step(data):
        logs, gradients = forward_and_backward(data)
        # None where nothing is trainable.
        if gradients:
            optimizer_apply(gradients, model.trainable_weights)
        return logs

    return train_step
