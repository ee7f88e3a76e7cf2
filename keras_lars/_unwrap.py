"""Finding the optimizer inside wrappers, such as LossScaleOptimizer."""


def innermost(optimizer):
    """Returns the optimizer inside all wrappers, or `optimizer` itself."""
    while hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer
    return optimizer
