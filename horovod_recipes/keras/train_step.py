"""Training steps that XLA compiles up to the allreduce, which it cannot."""

import warnings

import keras
import tensorflow as tf

from horovod_recipes.keras.sync_batch_norm import is_synchronized


def make_train_function(model):
    """Makes the model's training function anew, as `compile()` asked for it.

    With `jit_compile`, XLA compiles the forward and the backward pass and the
    metrics of each micro-batch into one program, and the optimizer, with its
    allreduce, runs after it. A model that cannot be split so is trained without
    XLA, with a warning.

    Args:
        model: A compiled `keras.Model` with a distributed optimizer.
    """
    obstacle = obstacle_to_xla(model) if model.jit_compile else None
    if obstacle:
        warnings.warn(
            f"The model was compiled with jit_compile on, and is trained "
            f"without XLA: {obstacle}. To silence this: "
            "compile(..., jit_compile=False).",
            stacklevel=4,
        )
        model.jit_compile = False
    if not model.jit_compile:
        model.make_train_function(force=True)
        return
    # The function keeps these two as they are while it is made. XLA goes on
    # compiling evaluation, which has no operations of Horovod.
    model.train_step = split_train_step(model)
    model.jit_compile = False
    try:
        model.make_train_function(force=True)
    finally:
        del model.train_step
        model.jit_compile = True


def obstacle_to_xla(model):
    """Returns why the training step cannot be split; None if it can."""
    # The program would keep the loss scale of an optimizer without variables.
    if not model.built:
        return "it is not built before its first step"
    # The metrics are updated before the weights, which Keras's own step does
    # not notice.
    if type(model).train_step is not keras.Model.train_step:
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
