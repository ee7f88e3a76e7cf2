"""Which way to sum the squares of a variable is the fastest under XLA?

    python -m benchmarks.speed.norm

It computes the norm of every kernel of ResNet-50 in one XLA program of
TensorFlow, in each way that was tried for LARS. These are 54 arrays with 25.5
million numbers together. `keras_lars.lars` uses "16 rows". The error is the
largest of the 54 relative errors, compared with float64. It takes 1 minute on 2
cores.
"""

import math

import numpy as np
import tensorflow as tf

from benchmarks import _measure
from benchmarks import _results
from horovod_recipes.models import MODELS


def plain(x):
    """XLA stores the squares first, then makes a tree of windowed sums."""
    return tf.reduce_sum(tf.square(x))


def flat_plain(x):
    return tf.reduce_sum(tf.square(tf.reshape(x, [-1])))


def product_with_ones(x):
    """A matrix product with a vector of ones; XLA stores the squares first."""
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
    """The sum of a few long rows, then the sum of the result."""

    def sum_of_squares(x):
        number = math.gcd(x.shape.num_elements(), count)
        squares = tf.square(tf.reshape(x, [number, -1]))
        return tf.reduce_sum(tf.maximum(tf.reduce_sum(squares, axis=0), 0.0))

    return sum_of_squares


def rows_folded(x):
    """As `rows`, without the maximum: XLA folds both sums into one."""
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


def measure(rounds):
    """Returns each way's time and error, the fastest first."""
    arrays = kernels()
    functions = {
        name: norms_function(way, arrays) for name, way in WAYS.items()
    }
    # TensorFlow's own kernel, to compare XLA with.
    functions["l2_loss, no XLA"] = tf.function(
        lambda: tf.sqrt([2 * tf.nn.l2_loss(x) for x in arrays])
    )
    expected = np.array(
        [np.linalg.norm(x.numpy().astype("float64")) for x in arrays]
    )
    errors = {
        name: float(np.max(np.abs(function().numpy() / expected - 1)))
        for name, function in functions.items()
    }
    times = _measure.interleaved_times(functions, rounds)
    results = [
        {
            "way": name,
            "ms": _measure.spread([1e3 * s for s in seconds]),
            "relative_error": errors[name],
        }
        for name, seconds in times.items()
    ]
    return {
        "machine": _measure.machine(),
        "results": sorted(results, key=lambda result: result["ms"][0]),
    }


def kernels():
    """Returns random arrays with the shapes of ResNet-50's kernels."""
    network = MODELS["resnet50"]((224, 224, 3), 1000)
    shapes = [v.shape for v in network.trainable_variables if len(v.shape) > 1]
    rng = np.random.default_rng(0)
    return [tf.constant(rng.normal(size=s).astype("float32")) for s in shapes]


def norms_function(sum_of_squares, arrays):
    @tf.function(jit_compile=True, autograph=False)
    def norms(arrays):
        return tf.sqrt([sum_of_squares(x) for x in arrays])

    return lambda: norms(arrays)


def markdown(result):
    rows = [
        [
            line["way"],
            _results.cell(line["ms"], ".3g"),
            f"{line['relative_error']:.1g}",
        ]
        for line in result["results"]
    ]
    return _results.table(["way", "ms", "largest relative error"], rows)


def main():
    parser = _results.parser(__spec__, __doc__, "docs/results/norm.json")
    _results.add_rounds(parser, 15)
    options = parser.parse_args()
    tf.get_logger().setLevel("ERROR")
    result = measure(options.rounds)
    print(markdown(result))
    _results.write_json(options.output, result)


if __name__ == "__main__":
    main()
