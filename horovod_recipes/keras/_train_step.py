"""Training steps that XLA compiles up to the allreduce."""

import warnings

import tensorflow as tf

from horovod_recipes.keras._distributed_apply import is_distributed
from horovod_recipes.keras._handshake import with_handshake
from horovod_recipes.keras._lockstep import TrainFunction
from horovod_recipes.keras._optimizers_of import has_own_train_step
from horovod_recipes.keras._optimizers_of import optimizers_of


def make_train_function(model, force, plain):
    """Stands in for `keras.Model.make_train_function`.

    The function keeps the ranks in lockstep.

    Args:
        model: The `keras.Model`.
        force: Whether to make the function again if the model has one.
        plain: Keras's own function of the model and `force`.
    """
    function = model.train_function
    # A model may have been trained before the first DistributedOptimizer.
    if force or not isinstance(function, TrainFunction):
        _make_train_function(model, plain)


def _make_train_function(model, plain):
    """Sets `model.train_function`.

    With `jit_compile`, which `compile()` turns on where there is a GPU, XLA
    compiles the forward pass, the backward pass and the metrics of each
    micro-batch. The optimizer and its allreduce run after that program. A model
    whose step cannot be split is trained without XLA, with a warning.
    """
    optimizers = optimizers_of(model).values()
    is_split = model.jit_compile and any(map(is_distributed, optimizers))
    obstacle = obstacle_to_xla(model) if is_split else None
    if obstacle:
        warnings.warn(
            "The model was compiled with jit_compile on, and is trained "
            f"without XLA: {obstacle}. To silence this: "
            "compile(..., jit_compile=False).",
            stacklevel=6,
        )
        model.jit_compile = is_split = False
    step = model.train_step
    if is_split:
        # XLA would keep the first loss scale of an optimizer without variables.
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        step = split_train_step(model)
        model.jit_compile = False
    # The function keeps both attributes as they are now. XLA still compiles
    # evaluation, which has no operations of Horovod.
    own_step = vars(model).get("train_step")
    function = TrainFunction(model)
    model.train_step = with_handshake(function, step)
    try:
        plain(model, force=True)
        function.plain = model.train_function
        model.train_function = function
    finally:
        del model.train_step
        if own_step is not None:
            model.train_step = own_step
        if is_split:
            model.jit_compile = True


def obstacle_to_xla(model):
    """Returns why the training step cannot be split, or None if it can."""
    # Its optimizer has no variables either.
    if not model.built:
        return "it is not built before its first step"
    # A split step updates the metrics before the weights. Keras's own step
    # gives the same result in either order.
    if has_own_train_step(model):
        return "it has a train_step of its own"
    if not is_distributed(model.optimizer):
        return "its compiled optimizer is not distributed"
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
        # A model without trainable weights has no gradients.
        if gradients:
            optimizer_apply(gradients, model.trainable_weights)
        return logs

    return train_step
