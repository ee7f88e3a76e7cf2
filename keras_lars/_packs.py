"""Packs: small variables that LARS updates together, as one vector.

A program spends more time on calling an operation than on a small variable. So
one operation serves many of them.
"""

import collections
import math

# The largest number of elements of a small variable.
SMALL = 4096


def pack_variables(rules, variable_specs, velocity_specs):
    """Returns a `Pack` for each rule and dtype that several variables share.

    Args:
        rules: List of hashable rules, one per variable.
        variable_specs: List of `(shape, dtype)`, one per variable.
        velocity_specs: List of `(shape, dtype)` of their velocities.
    """
    members = collections.defaultdict(list)
    for i, (shape, dtype) in enumerate(variable_specs):
        if 0 < math.prod(shape) <= SMALL and "float" in dtype:
            members[rules[i], dtype, velocity_specs[i][1]].append(i)
    return [
        Pack(rule, dtype, indices, [variable_specs[i][0] for i in indices])
        for (rule, dtype, _), indices in members.items()
        if len(indices) > 1
    ]


class Pack:
    """Variables of one rule and one dtype.

    Args:
        rule: Their rule.
        dtype: String, their dtype.
        indices: List of integers, their places among all variables.
        shapes: List of tuples, their shapes.
    """

    def __init__(self, rule, dtype, indices, shapes):
        self.rule = rule
        self.compute_dtype = "float64" if dtype == "float64" else "float32"
        self.indices = indices
        self._shapes = shapes
        self._sizes = [math.prod(shape) for shape in shapes]

    def of(self, items):
        """Returns the items of these variables from a list for all."""
        return [items[i] for i in self.indices]

    def join(self, tensors):
        """Returns the elements of one tensor per variable as one vector."""
        import tensorflow as tf

        return tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], 0)

    def split(self, vector):
        """Returns the tensors that `join` has joined."""
        import tensorflow as tf

        parts = tf.split(vector, self._sizes)
        shaped = zip(parts, self._shapes, strict=True)
        return [tf.reshape(part, shape) for part, shape in shaped]

    def norm(self, vector, size):
        """Returns a vector of norms: each element's is that of its variable."""
        import tensorflow as tf

        del size  # Of all variables together.
        variables = tf.repeat(tf.range(len(self._sizes)), self._sizes)
        squares = tf.square(tf.cast(vector, tf.float32))
        sums = tf.math.unsorted_segment_sum(
            squares, variables, len(self._sizes)
        )
        return tf.gather(tf.sqrt(sums), variables)

    def one_each(self, vector):
        """Returns the first element of each variable."""
        import tensorflow as tf

        return tf.gather(vector, tf.cumsum(self._sizes, exclusive=True))
