"""Evaluation in which every example of all ranks counts exactly once."""

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf

from horovod_recipes.keras._variables import sum_over_ranks


def evaluate(model, *args, **kwargs):
    """Evaluates a compiled model on the examples of all ranks together.

    Each rank passes its own examples; their numbers may differ.

    Args:
        model: A compiled `keras.Model` with the same weights on every rank.
        *args: As for `model.evaluate`.
        **kwargs: As for `model.evaluate`.

    Returns:
        `{metric name: value}`, the same on every rank.

    Raises:
        ValueError: As `global_results`.
    """
    model.evaluate(*args, **kwargs)
    return global_results(model)


def global_results(model):
    """Adds up the states of the model's metrics over all ranks.

    The sums are left in the metrics until their next reset.

    Returns:
        `{metric name: value}`, the same on every rank: floats, and NumPy
        arrays where the result has several numbers.

    Raises:
        ValueError: On every rank, if the state of a metric is not known to add
            up over ranks, or the ranks have different states.
    """
    check_metrics(model)
    variables = [v for metric in model.metrics for v in metric.variables]
    # Without this the sum would wait for ever: a rank whose generator had no
    # examples has not made its metrics.
    shapes = hvd.allgather_object([tuple(v.shape) for v in variables])
    if any(other != shapes[0] for other in shapes):
        raise ValueError(
            "The ranks' metrics have different states. Did each rank evaluate "
            "the same model on 1 example or more? Shapes of the states: "
            + "; ".join(f"rank {r}: {s}" for r, s in enumerate(shapes))
        )
    totals = sum_over_ranks(variables)
    for variable, total in zip(variables, totals, strict=True):
        variable.assign(tf.cast(total, variable.dtype))
    return _as_numbers(model.get_metrics_result())


def _as_numbers(results):
    """Returns the results of metrics; those of a metric with several, flat."""
    numbers = {}
    for name, value in results.items():
        if isinstance(value, dict):
            numbers.update(_as_numbers(value))
        else:
            value = np.asarray(value)
            numbers[name] = float(value) if value.ndim == 0 else value
    return numbers


def check_metrics(model):
    """Raises where a metric is not known to have states that add up.

    See `horovod_recipes.keras.callbacks.ExactMetrics`.
    """
    for metric in _leaves(model.metrics):
        if not _adds_up(metric):
            raise ValueError(
                f"The metric {metric.name!r} is a {type(metric).__name__}, "
                "whose states may not add up over ranks as those of Keras's "
                "own metrics do. If they do, give the class the attribute "
                "`states_add_up = True`."
            )


def _adds_up(metric):
    declared = getattr(metric, "states_add_up", None)
    if declared is not None:
        return declared
    if type(metric).__module__.startswith("keras."):
        return True
    # Of a subclass without variables of its own.
    variables = len(metric.variables)
    if isinstance(metric, keras.metrics.Mean):
        return variables == 2
    return isinstance(metric, keras.metrics.Sum) and variables == 1


def _leaves(metrics):
    """Returns the metrics, with those that `compile` was given unwrapped."""
    leaves = []
    for metric in metrics:
        inner = getattr(metric, "metrics", None)
        leaves += [metric] if inner is None else _leaves(inner)
    return leaves
