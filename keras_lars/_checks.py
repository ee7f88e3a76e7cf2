"""Checks of arguments: each error names the argument, the rule, the value."""

import difflib
import math
import os
import re

MOMENTUM_STYLES = ("paper", "pytorch", "popular")
TRUST_RATIO_NORMS = ("separate", "joint")


def check_lars(optimizer, exclusions):
    """Raises where an attribute or an exclusion list of a LARS is wrong."""
    check_number("momentum", optimizer.momentum, below=1)
    check_number("weight_decay", optimizer.weight_decay)
    check_number(
        "trust_coefficient", optimizer.trust_coefficient, positive=True
    )
    check_number("epsilon", optimizer.epsilon)
    check_number("unadapted_scale", optimizer.unadapted_scale)
    for name in ("nesterov", "trust_clip", "jit_compile"):
        check_bool(name, getattr(optimizer, name))
    style, norm = optimizer.momentum_style, optimizer.trust_ratio_norm
    check_choice("momentum_style", style, MOMENTUM_STYLES)
    if norm is not None:
        check_choice("trust_ratio_norm", norm, TRUST_RATIO_NORMS)
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
    for name, patterns in exclusions.items():
        check_patterns(name, patterns)


def check_keras_arguments(learning_rate, arguments):
    """Raises where an argument that Keras does not check is out of range."""
    if isinstance(learning_rate, float):
        check_number("learning_rate", learning_rate)
    for name in (
        "clipnorm",
        "clipvalue",
        "global_clipnorm",
        "loss_scale_factor",
    ):
        if arguments.get(name) is not None:
            check_number(name, arguments[name], positive=True)
    name = "gradient_accumulation_steps"
    if arguments.get(name) is not None:
        check_integer(name, arguments[name], at_least=2)


def check_not_wrapped_by_horovod(optimizer):
    """Raises where Horovod's own Keras binding makes the optimizer."""
    # Only the subclass that Horovod makes has this attribute.
    if hasattr(optimizer, "_HAS_AGGREGATE_GRAD"):
        raise ValueError(
            "horovod.tensorflow.keras.DistributedOptimizer does not "
            "average gradients on Keras 3. Use DistributedOptimizer of: "
            "import horovod_recipes.keras as hvd"
        )


def check_range(name, value, below=math.inf, positive=False):
    """Raises unless the number is finite, not negative and under `below`."""
    rule = "above 0" if positive else "0 or more"
    if below < math.inf:
        rule += f" and below {below}"
    if not (value > 0 if positive else value >= 0) or not value < below:
        raise ValueError(
            f"Argument `{name}` must be a finite number {rule}. "
            f"Received: {name}={value!r}"
        )


def check_number(name, value, **limits):
    """Checks the range and the type, which JSON must be able to hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(
            f"Argument `{name}` must be a Python number. "
            f"Received: {name}={value!r}"
        )
    check_range(name, value, **limits)


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
    """Raises where a pattern matches no variable, so that it has no effect."""
    paths = [variable.path for variable in variables]
    for name, patterns in exclusions.items():
        for pattern in patterns or []:
            if any(re.search(pattern, path) for path in paths):
                continue
            near = difflib.get_close_matches(pattern, paths, n=5, cutoff=0.0)
            raise ValueError(
                f"Argument `{name}` has a pattern that matches no variable's "
                f"path. The nearest paths are: {', '.join(near)}. "
                f"Received: {pattern!r}"
            )
