"""Counts the arithmetic that training a network takes."""

import math


def training_flops(model):
    """Returns the FLOPs of a forward and a backward pass over one image.

    The backward pass takes twice the FLOPs of the forward pass.
    """
    return 3 * sum(forward_flops(layer) for layer in model.layers)


def forward_flops(layer):
    """Returns the FLOPs of a layer's forward pass over one image.

    Only convolutions and dense layers count, with two FLOPs per weight and
    output position.
    """
    if not hasattr(layer, "kernel"):
        return 0
    positions = math.prod(layer.output.shape[1:-1])
    return 2 * math.prod(layer.kernel.shape) * positions
