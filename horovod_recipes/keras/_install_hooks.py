"""Installs the hooks in Keras that the binding needs, at its first use."""

from horovod_recipes.keras import _keras_hooks
from horovod_recipes.keras._copying import reduce
from horovod_recipes.keras._distributed_apply import distribute_loss_scale
from horovod_recipes.keras._lockstep import around_callbacks
from horovod_recipes.keras._train_step import make_train_function


def install_hooks():
    """Installs them, in the first call of the process alone."""
    _keras_hooks.install(
        distribute_loss_scale, make_train_function, reduce, around_callbacks
    )
