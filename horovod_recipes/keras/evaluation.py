"""Evaluation in which every example of all ranks counts exactly once."""

import keras
import tensorflow as tf

from horovod_recipes.keras.variables import sum_over_ranks


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
        ValueError: If the state of a metric does not add up over ranks.
    """
    model.evaluate(*args, **kwargs)
    return global_results(model)


def global_results(model):
    """Adds up the states of the model's metrics over all ranks.

    The sums are left in the metrics until their next reset.

    Returns:
        `{metric name: value}`, the same on every rank.

    Raises:
        ValueError: If the state of a metric does not add up over ranks.
    """
    check_metrics(model)
    variables = [v for metric in model.metrics for v in metric.variables]
    totals = sum_over_ranks(variables)
    for variable, total in zip(variables, totals, strict=True):
        variable.assign(tf.cast(total, variable.dtype))
    return {
        name: float(value) for name, value in model.get_metrics_result().items()
    }


def check_metrics(model):
    """Raises where a metric's state cannot be added up over the ranks.

    The states of all of Keras's own metrics are sums.
    """
    for metric in _leaves(model.metrics):
        is_keras = type(metric).__module__.startswith("keras.")
        bases = (keras.metrics.Mean, keras.metrics.Sum)
        if not is_keras and not isinstance(metric, bases):
            raise ValueError(
                f"The metric {metric.name!r} is a {type(metric).__name__}, "
                "whose state may not add up over ranks as those of Keras's "
                "own metrics do. Derive it from keras.metrics.Mean or Sum."
            )


def _leaves(metrics):
    """Returns the metrics, with those that `compile` was given unwrapped."""
    leaves = []
    for metric in metrics:
        inner = getattr(metric, "metrics", None)
        leaves += [metric] if inner is None else _leaves(inner)
    return leaves
