"""Stacks: small variables of one shape, whose gradients are scaled together.

A program spends more time on calling an operation than on a small variable. So
one operation serves many of them.
"""

import collections
import math
import typing

# The largest number of elements of a small variable.
SMALL = 4096


class Stack(typing.NamedTuple):
    """Variables of one rule, shape and dtype, by their places among all."""

    rule: tuple
    places: list

    def of(self, items):
        """Returns the items of these variables from a list for all."""
        return [items[place] for place in self.places]


def stack_variables(rules, variable_specs, velocity_specs):
    """Returns a `Stack` for each kind of small variable that there are two of.

    TensorFlow's own momentum updates the variables of a stack. It knows no norm
    of the velocity, which the popular style needs.

    Args:
        rules: List of hashable rules, one per variable.
        variable_specs: List of `(shape, dtype)`, one per variable.
        velocity_specs: List of `(shape, dtype)` of their velocities.
    """
    members = collections.defaultdict(list)
    specs = zip(rules, variable_specs, velocity_specs, strict=True)
    for place, (rule, spec, velocity_spec) in enumerate(specs):
        shape, dtype = spec
        if (
            0 < math.prod(shape) <= SMALL
            and dtype in ("float32", "float64")
            and velocity_spec == spec
            and rule.momentum_style != "popular"
        ):
            members[rule, spec].append(place)
    return [
        Stack(rule, places)
        for (rule, _), places in members.items()
        if len(places) > 1
    ]
