"""Evaluation that counts every example of all ranks exactly once."""

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf

from horovod_recipes.keras._variables import sum_over_ranks


def evaluate(model, *args, **kwargs):
    """Evaluates a compiled model on the examples of all ranks together.

    Each rank passes its own examples. The ranks may have different numbers of
    examples.

    Args:
        model: A compiled `keras.Model` with the same weights on every rank.
        *args: As for `model.evaluate`.
        **kwargs: As for `model.evaluate`.

    Returns:
        `{metric name: value}`, the same on every rank.

    Raises:
        ValueError: On every rank, if the state of a metric may not add up over
            ranks, or if the ranks have different states.
    """
    model.evaluate(*args, **kwargs)
    return global_results(model)


def global_results(model):
    """Adds up the states of the model's metrics over all ranks.

    The metrics hold the sums until their next reset.

    Returns:
        `{metric name: value}`, the same on every rank. A value is a float, or
        a NumPy array if the result has several numbers.

    Raises:
        ValueError: On every rank, if the state of a metric may not add up over
            ranks, or if the ranks have different states.
    """
    check_metrics(model)
    variables = [v for metric in model.metrics for v in metric.variables]
    # A rank without examples has no metric states, and its sum would hang.
    shapes = hvd.allgather_object([tuple(v.shape) for v in variables])
    if any(other != shapes[0] for other in shapes):
        raise ValueError(
            "The ranks' metrics have different states. Does each rank evaluate "
            "the same model on 1 example or more? Shapes of the states: "
            + "; ".join(f"rank {r}: {s}" for r, s in enumerate(shapes))
        )
    totals = sum_over_ranks(variables)
    for variable, total in zip(variables, totals, strict=True):
        variable.assign(tf.cast(total, variable.dtype))
    return _as_numbers(model.get_metrics_result())


def _as_numbers(results):
    """Returns the results of metrics as a flat dictionary of numbers."""
    numbers = {}
    for name, value in results.items():
        if isinstance(value, dict):
            numbers.update(_as_numbers(value))
        else:
            value = np.asarray(value)
            numbers[name] = float(value) if value.ndim == 0 else value
    return numbers


def check_metrics(model):
    """Raises an error if the states of a metric may not add up over ranks.

    See `horovod_recipes.keras.callbacks.ExactMetrics`.
    """
    for metric in _leaves(model.metrics):
        if not _adds_up(metric):
            raise ValueError(
                f"The metric {metric.name!r} is a {type(metric).__name__}, "
                "whose states may not add up over ranks. If they do, as those "
                "of Keras's own metrics, give the class the attribute "
                "`states_add_up = True`."
            )


def _adds_up(metric):
    declared = getattr(metric, "states_add_up", None)
    if declared is not None:
        return declared
    if type(metric).__module__.startswith("keras."):
        return True
    # A subclass adds up if it has no variables besides those of Keras's class.
    variables = len(metric.variables)
    if isinstance(metric, keras.metrics.Mean):
        return variables == 2
    return isinstance(metric, keras.metrics.Sum) and variables == 1


def _leaves(metrics):
    """Returns the metrics, without the wrapper that `compile` adds."""
    leaves = []
    for metric in metrics:
        inner = getattr(metric, "metrics", None)
        leaves += [metric] if inner is None else _leaves(inner)
    return leaves
