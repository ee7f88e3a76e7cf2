"""Counts the arithmetic that training a network takes."""

import math


def training_flops(model):
    """Returns the FLOPs of a forward and a backward pass over one image.

    Only convolutions and dense layers count. Their forward pass takes two FLOPs
    per weight and output position, and their backward pass four.
    """
    return 3 * sum(
        2 * math.prod(layer.kernel.shape) * math.prod(layer.output.shape[1:-1])
        for layer in model.layers
        if hasattr(layer, "kernel")
    )
