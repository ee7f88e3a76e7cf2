"""Keeps copies of a model or an optimizer distributed.

`copy`, `pickle` and `hvd.broadcast_object` rebuild a Keras object from its
saved form, which says nothing of Horovod.
"""

import horovod.tensorflow as hvd
import keras

from horovod_recipes.keras._distributed_apply import is_distributed
from horovod_recipes.keras._keras_hooks import layers_of
from horovod_recipes.keras._optimizers_of import optimizers_of
from horovod_recipes.keras.layers import is_synchronized
from horovod_recipes.keras.layers import synchronize


def reduce(saveable, plain):
    """Stands in for the method `__reduce__` of Keras's models and optimizers.

    Args:
        saveable: A `keras.Model` or `keras.optimizers.Optimizer`.
        plain: Keras's own method.
    """
    unpickle, arguments = plain(saveable)
    distributed = {
        place: _arguments(optimizer)
        for place, optimizer in _optimizers(saveable).items()
        if is_distributed(optimizer)
    }
    synchronized = [
        place
        for place, layer in enumerate(_layers(saveable))
        if is_synchronized(layer)
    ]
    if not distributed and not synchronized:
        return unpickle, arguments
    return (
        unpickle_distributed,
        (unpickle, arguments, distributed, synchronized),
    )


def unpickle_distributed(unpickle, arguments, distributed, synchronized):
    """Returns a copy, with optimizers and batch norms over the ranks."""
    # Imported here, because both modules import this one.
    from horovod_recipes.keras._install_hooks import install_hooks
    from horovod_recipes.keras._optimizer import DistributedOptimizer

    install_hooks()
    copied = unpickle(*arguments)
    for place, optimizer in _optimizers(copied).items():
        if place in distributed and not is_distributed(optimizer):
            DistributedOptimizer(optimizer, **distributed[place])
    layers = _layers(copied)
    for place in synchronized:
        synchronize(layers[place])
        copied.jit_compile = False
    return copied


def _layers(saveable):
    """Returns the layers of a model, those inside of other layers too."""
    if isinstance(saveable, keras.optimizers.Optimizer):
        return []
    return layers_of(saveable)


def _optimizers(saveable):
    """Returns the optimizers by the name of the attribute that holds them."""
    if isinstance(saveable, keras.optimizers.Optimizer):
        return {"": saveable}
    return optimizers_of(saveable)


def _arguments(optimizer):
    """Returns the arguments of `DistributedOptimizer` for the copy."""
    arguments = dict(optimizer.apply.arguments)
    if arguments["process_set"] is not hvd.global_process_set:
        raise ValueError(
            "A copy would not know the process set of its optimizer. Copy the "
            "model before DistributedOptimizer, and wrap each copy's optimizer."
        )
    del arguments["process_set"]
    if optimizer.apply.has_local_variables():
        raise ValueError(
            "A copy would not know the local variables of its optimizer. Copy "
            "the model before DistributedOptimizer, and wrap each copy's "
            "optimizer."
        )
    if isinstance(arguments["groups"], (list, tuple)):
        arguments["groups"] = [
            [v if isinstance(v, str) else v.path for v in group]
            for group in arguments["groups"]
        ]
    return arguments
