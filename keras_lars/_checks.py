"""Checks of arguments: each error names the argument, the rule, the value."""

import difflib
import gc
import math
import numbers
import os
import re

import keras
import numpy as np

from keras_lars._paths import path_of

MOMENTUM_STYLES = ("paper", "pytorch", "popular")
TRUST_RATIO_NORMS = ("separate", "joint")


# The range of each argument that is a number.
NUMBERS = {
    "momentum": {"below": 1},
    "weight_decay": {},
    "trust_coefficient": {"positive": True},
    "epsilon": {},
    "unadapted_scale": {},
}
SWITCHES = ("nesterov", "trust_clip", "jit_compile")
# Optimizers of Keras that cannot be inside `TrustRatio`, and why.
REFUSED_INSIDE = {
    "Adafactor": "it already scales its step by the size of the weights",
    "Ftrl": "its update is not proportional to its learning rate",
    "Lamb": "it has a trust ratio already; use Adam",
    "LossScaleOptimizer": "put it around TrustRatio",
    "MultiOptimizer": "put a TrustRatio around each optimizer inside it",
    "ScheduleFreeAdamW": "it updates other variables than the weights",
}
# Arguments of Keras's optimizers that `TrustRatio` leaves to the one inside.
SET_INSIDE = (
    "clipnorm",
    "clipvalue",
    "global_clipnorm",
    "use_ema",
    "ema_momentum",
    "ema_overwrite_frequency",
    "gradient_accumulation_steps",
)
EXCLUSIONS = ("exclude_from_layer_adaptation", "exclude_from_weight_decay")


def checked(name, value):
    """Returns the value of one argument of an optimizer, checked by itself.

    A number becomes a Python number, which a saved file can hold. No weight
    decay may also be None, as for Keras's optimizers.
    """
    if name == "weight_decay" and value is None:
        return 0.0
    if name in NUMBERS:
        return check_number(name, value, **NUMBERS[name])
    if name in SWITCHES:
        check_bool(name, value)
    elif name == "momentum_style":
        check_choice(name, value, MOMENTUM_STYLES)
    elif name == "trust_ratio_norm" and value is not None:
        check_choice(name, value, TRUST_RATIO_NORMS)
    elif name == "clip" and value is not None:
        return _checked_bounds(name, value)
    elif name in EXCLUSIONS:
        check_patterns(name, value)
    return value


def _checked_bounds(name, value):
    if isinstance(value, (list, tuple)) and len(value) == 2:
        low, high = map(_python_number, value)
        if None not in (low, high) and 0 <= low < high:
            return low, high
    raise ValueError(
        f"Argument `{name}` must be None or two numbers (low, high) with "
        f"0 <= low < high. Received: {name}={value!r}"
    )


def check_inner_optimizer(optimizer):
    """Raises unless an optimizer may be inside `TrustRatio`."""
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ValueError(
            "Argument `optimizer` must be a keras.optimizers.Optimizer. "
            f"Received: optimizer={optimizer!r}"
        )
    check_not_wrapped_by_horovod(optimizer)
    reasons = {
        name: reason
        for name, reason in REFUSED_INSIDE.items()
        if isinstance(optimizer, getattr(keras.optimizers, name, ()))
    }
    if hasattr(optimizer, "trust_ratios"):
        reasons[type(optimizer).__name__] = "it has a trust ratio already"
    if "apply" in vars(optimizer):
        reasons[type(optimizer).__name__] = (
            "it averages gradients already; put DistributedOptimizer around "
            "TrustRatio"
        )
    for name, reason in reasons.items():
        raise ValueError(
            f"Argument `optimizer` of TrustRatio cannot be {name}: {reason}. "
            f"Received: optimizer={optimizer!r}"
        )


def check_gradients(gradients, variables):
    """Raises unless each gradient is None or has its variable's shape."""
    if len(gradients) != len(variables):
        raise ValueError(
            "Each variable needs a gradient or None. Received: "
            f"{len(gradients)} gradients for {len(variables)} variables"
        )
    for gradient, variable in zip(gradients, variables, strict=True):
        if gradient is None or _fits(gradient.shape, variable.shape):
            continue
        raise ValueError(
            f"The gradient of {path_of(variable)} must have the shape of the "
            f"variable, {tuple(variable.shape)}. Received: {gradient.shape}"
        )


def _fits(shape, expected):
    if hasattr(shape, "is_compatible_with"):
        # TensorFlow may know some sizes only when it runs.
        return shape.is_compatible_with(expected)
    return tuple(shape) == tuple(expected)


def check_together(optimizer):
    """Raises where two arguments of a LARS do not fit together."""
    style, norm = optimizer.momentum_style, optimizer.trust_ratio_norm
    if style == "popular" and norm == "separate":
        raise ValueError(
            'Argument `trust_ratio_norm` must be "joint" or None when '
            '`momentum_style` is "popular", which divides by the norm of the '
            f"velocity. Received: trust_ratio_norm={norm}"
        )
    if optimizer.nesterov and optimizer.momentum == 0:
        raise ValueError(
            "Argument `momentum` must be above 0 when `nesterov` is True. "
            f"Received: momentum={optimizer.momentum}"
        )


def checked_keras_arguments(arguments):
    """Returns the arguments, where Keras does not check the range of all."""
    arguments = dict(arguments)
    for name in (
        "clipnorm",
        "clipvalue",
        "global_clipnorm",
        "loss_scale_factor",
    ):
        if arguments.get(name) is not None:
            value = arguments[name]
            arguments[name] = check_number(name, value, positive=True)
    name = "gradient_accumulation_steps"
    if arguments.get(name) is not None:
        check_integer(name, arguments[name], at_least=2)
    return arguments


def checked_learning_rate(learning_rate):
    """Returns a number as the float that Keras wants; a schedule unchanged."""
    if callable(learning_rate):
        return learning_rate
    return float(check_number("learning_rate", learning_rate))


def check_not_wrapped_by_horovod(optimizer):
    """Raises where Horovod's own Keras binding makes the optimizer."""
    # Only the subclass that Horovod makes has this attribute.
    if hasattr(optimizer, "_HAS_AGGREGATE_GRAD"):
        raise ValueError(
            "horovod.tensorflow.keras.DistributedOptimizer does not "
            "average gradients on Keras 3. Use DistributedOptimizer of: "
            "import horovod_recipes.keras as hvd"
        )


def check_number(name, value, below=math.inf, positive=False):
    """Returns the Python number in a number, NumPy number or tensor of one.

    Raises:
        ValueError: Unless it is finite, not negative and under `below`.
    """
    rule = "above 0" if positive else "0 or more"
    if below < math.inf:
        rule += f" and below {below}"
    number = _python_number(value)
    if number is None or not (
        (number > 0 if positive else number >= 0) and number < below
    ):
        raise ValueError(
            f"Argument `{name}` must be a finite number {rule}. "
            f"Received: {name}={value!r}"
        )
    return number


def _python_number(value):
    """Returns an int or a float, or None for anything else."""
    if isinstance(value, keras.Variable):
        # It would not follow the variable.
        return None
    if not isinstance(value, numbers.Real):
        try:
            value = np.asarray(value)[()]
        except Exception:  # A symbolic tensor has no value.
            return None
    if isinstance(value, np.number):
        value = value.item()
    is_number = type(value) in (int, float)
    return value if is_number else None


def check_integer(name, value, at_least):
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or value < at_least
    ):
        raise ValueError(
            f"Argument `{name}` must be an integer {at_least} or more. "
            f"Received: {name}={value!r}"
        )


def check_bool(name, value):
    if not isinstance(value, bool):
        raise ValueError(
            f"Argument `{name}` must be True or False. "
            f"Received: {name}={value!r}"
        )


def check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(
            f"Argument `{name}` must be one of {choices}. "
            f"Received: {name}={value!r}"
        )


def check_path(name, value):
    if not isinstance(value, (str, os.PathLike)) or not str(value):
        raise ValueError(
            f"Argument `{name}` must be a non-empty string or a path. "
            f"Received: {name}={value!r}"
        )


def check_patterns(name, patterns):
    """Raises unless `patterns` is None or a list of regular expressions."""
    if patterns is None:
        return
    if not isinstance(patterns, (list, tuple)) or not all(
        isinstance(pattern, str) for pattern in patterns
    ):
        raise ValueError(
            f"Argument `{name}` must be None or a list of regular "
            f"expressions. Received: {name}={patterns!r}"
        )
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"Argument `{name}` must hold valid regular expressions: "
                f"{error}. Received: {pattern!r}"
            ) from None


def check_patterns_match(exclusions, variables):
    """Raises where a pattern matches no variable, so that it has no effect.

    One list serves both phases of fine-tuning: a pattern may match only frozen
    variables, which an optimizer is not told of.
    """
    paths = [path_of(variable) for variable in variables]
    for name, patterns in exclusions.items():
        for pattern in patterns or []:
            if any(re.search(pattern, path) for path in paths):
                continue
            if any(re.search(pattern, path) for path in _frozen_paths()):
                continue
            near = difflib.get_close_matches(pattern, paths, n=5, cutoff=0.0)
            raise ValueError(
                f"Argument `{name}` has a pattern that matches no variable's "
                "path, neither of a trained one nor of a frozen one. The "
                f"nearest paths are: {', '.join(near)}. Received: {pattern!r}"
            )


def _frozen_paths():
    """Yields the paths of the Keras variables that are not trained."""
    for thing in gc.get_objects():
        if issubclass(type(thing), keras.Variable) and not thing.trainable:
            yield thing.path
