"""Estimates how much of the allreduce the backward pass hides."""

import math

from horovod_recipes import _groups
from horovod_recipes.models.flops import forward_flops


def gradients_of(model):
    """Returns `(bytes, ready)` of each gradient, in the order of the layers.

    `ready` is the part of the backward pass after which the gradient is
    complete. The pass goes from the last layer to the first. Each layer takes a
    time that is proportional to its FLOPs.
    """
    gradients = []
    flops = [forward_flops(layer) for layer in model.layers]
    for number, layer in enumerate(model.layers):
        ready = sum(flops[number:]) / sum(flops)
        for variable in layer.trainable_variables:
            gradients.append((4 * math.prod(variable.shape), ready))
    return gradients


def allreduce_times(gradients, backward_seconds, seconds_of_message):
    """Returns the seconds of all allreduces, and of those that are exposed.

    A group of gradients leaves when all of them are complete and the network is
    free. Horovod joins the groups that wait then. What follows the backward
    pass is exposed.

    Args:
        gradients: List of `(bytes, ready)`.
        backward_seconds: Float, the seconds of the backward pass in which the
            gradients become complete. With 0 all of them leave at its end.
        seconds_of_message: Function that returns the seconds of the allreduce
            of a number of bytes.
    """
    sizes = [size for size, _ in gradients]
    number = _groups.default_number(sizes)
    # The backward pass ends at second 0.
    groups = [
        (
            sum(sizes[i] for i in places),
            backward_seconds * (max(gradients[i][1] for i in places) - 1),
        )
        for places in _groups.split_by_bytes(sizes, number)
    ]
    busy, now = 0.0, -math.inf
    while groups:
        now = max(now, groups[0][1])
        waiting = [size for size, ready in groups if ready <= now]
        seconds = seconds_of_message(sum(waiting))
        busy, now = busy + seconds, now + seconds
        groups = groups[len(waiting) :]
    return busy, max(now, 0.0)
