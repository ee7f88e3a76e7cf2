"""What training a network takes in arithmetic."""

import math


def training_flops(model):
    """Returns the FLOPs of a forward and a backward pass over one image.

    Those of convolutions and dense layers: two for each weight and place of
    the output, and twice as many to go back.
    """
    return 3 * sum(
        2 * math.prod(layer.kernel.shape) * math.prod(layer.output.shape[1:-1])
        for layer in model.layers
        if hasattr(layer, "kernel")
    )
