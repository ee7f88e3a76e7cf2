"""Which way of summing the squares of a variable is the fastest under XLA?

    python -m benchmarks.speed.norm

computes the norm of every kernel of ResNet-50, 54 arrays of 25.5 M numbers in
all, in one XLA program of TensorFlow, in the ways that were tried for LARS. The
one that `keras_lars.lars` has is "16 rows". The error is that of the worst of
the 54, beside float64.
"""

import math

import keras
import numpy as np
import tensorflow as tf
from absl import flags

from benchmarks.speed import report

# Of its own, because tests import all benchmarks into one process.
FLAGS = flags.FlagValues()
_ROUNDS = flags.DEFINE_integer(
    "rounds", 15, "How often each is timed.", lower_bound=2, flag_values=FLAGS
)
_OUTPUT = flags.DEFINE_string(
    "output", "docs/results/norm.json", "JSON to write.", flag_values=FLAGS
)


def plain(x):
    """Becomes a tree of windowed sums over squares that are stored first."""
    return tf.reduce_sum(tf.square(x))


def flat_plain(x):
    return tf.reduce_sum(tf.square(tf.reshape(x, [-1])))


def product_with_ones(x):
    """A matrix product with a vector of ones; the squares are stored first."""
    columns = math.gcd(x.shape.num_elements(), 1024)
    squares = tf.reshape(tf.square(x), [-1, columns])
    return tf.reduce_sum(tf.linalg.matvec(squares, tf.ones([columns])))


def dot_with_itself(x):
    flat = tf.reshape(x, [-1])
    return tf.tensordot(flat, flat, 1)


def gram_matrix(x):
    """The trace of a matrix product, which Eigen computes on all cores."""
    rows = tf.reshape(x, [math.gcd(x.shape.num_elements(), 4), -1])
    return tf.linalg.trace(tf.matmul(rows, rows, transpose_b=True))


def rows(count):
    """The sum of a few long rows, then the sum of what is left."""

    def sum_of_squares(x):
        number = math.gcd(x.shape.num_elements(), count)
        squares = tf.square(tf.reshape(x, [number, -1]))
        return tf.reduce_sum(tf.maximum(tf.reduce_sum(squares, axis=0), 0.0))

    return sum_of_squares


def rows_folded(x):
    """As `rows`, without the maximum: XLA folds both sums back into one."""
    squares = tf.square(
        tf.reshape(x, [math.gcd(x.shape.num_elements(), 16), -1])
    )
    return tf.reduce_sum(tf.reduce_sum(squares, axis=0))


def short_columns(x):
    """As `rows`, in blocks of 16 x 64 numbers that lie side by side."""
    if x.shape.num_elements() % 1024:
        return rows(16)(x)
    sums = tf.reduce_sum(tf.square(tf.reshape(x, [-1, 16, 64])), axis=1)
    return tf.reduce_sum(tf.maximum(sums, 0.0))


WAYS = {
    "plain": plain,
    "plain, flat": flat_plain,
    "product with ones": product_with_ones,
    "dot with itself": dot_with_itself,
    "gram matrix of 4 rows": gram_matrix,
    "16 rows, folded": rows_folded,
    "blocks of 16 x 64": short_columns,
    "4 rows": rows(4),
    "8 rows": rows(8),
    "16 rows": rows(16),
    "32 rows": rows(32),
    "64 rows": rows(64),
}


def kernels():
    network = keras.applications.ResNet50(weights=None)
    shapes = [v.shape for v in network.trainable_variables if len(v.shape) > 1]
    rng = np.random.default_rng(0)
    return [tf.constant(rng.normal(size=s).astype("float32")) for s in shapes]


def norms_function(sum_of_squares, arrays):
    @tf.function(jit_compile=True, autograph=False)
    def norms(arrays):
        return tf.sqrt([sum_of_squares(x) for x in arrays])

    return lambda: norms(arrays)


def main():
    report.parse_command_line(FLAGS)
    tf.get_logger().setLevel("ERROR")
    arrays = kernels()
    functions = {
        name: norms_function(way, arrays) for name, way in WAYS.items()
    }
    expected = [np.linalg.norm(x.numpy().astype("float64")) for x in arrays]
    errors = {
        name: float(np.max(np.abs(function() / np.array(expected) - 1)))
        for name, function in functions.items()
    }

    # What is not XLA, to compare with: TensorFlow's own kernel.
    l2_loss = tf.function(lambda: [tf.nn.l2_loss(x) for x in arrays])
    functions["l2_loss, no XLA"] = l2_loss
    halves = [2 * float(loss) for loss in l2_loss()]
    errors["l2_loss, no XLA"] = float(
        np.max(np.abs(np.sqrt(halves) / np.array(expected) - 1))
    )
    times = report.interleaved_times(functions, _ROUNDS.value)
    results = [
        {
            "way": name,
            "ms": report.spread([1e3 * s for s in seconds]),
            "relative_error": errors[name],
        }
        for name, seconds in times.items()
    ]
    results.sort(key=lambda result: result["ms"][0])
    lines = [
        (
            line["way"],
            "{:.3g} ({:.3g} to {:.3g})".format(*line["ms"]),
            f"{line['relative_error']:.1g}",
        )
        for line in results
    ]
    print(report.table(["way", "ms", "largest relative error"], lines))
    report.write_json(
        _OUTPUT.value, {"machine": report.machine(), "results": results}
    )


if __name__ == "__main__":
    main()
