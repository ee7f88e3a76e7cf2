"""What does the communication of a step cost, beside Horovod's operation?

    horovodrun --gloo -np 2 python -m benchmarks.speed.allreduce
    horovodrun --mpi -np 2 python -m benchmarks.speed.allreduce

The second command needs a Horovod built with MPI. Each takes 1 minute on 2
cores. Ranks have one thread each. Each round times all ways to average the
gradients of ResNet-50's 161 variables:

- what `DistributedOptimizer` does before the optimizer gets the gradients;
- `hvd.grouped_allreduce` of the gradients;
- an `hvd.allreduce` of each gradient;
- one `hvd.allreduce` of a tensor with as many numbers.

The first two also run in float16. Ratios are to `hvd.grouped_allreduce` in
float32 in the same round.
"""

import keras
import tensorflow as tf

import horovod_recipes.keras as hvd
from benchmarks import _measure
from benchmarks import _results
from benchmarks.speed import _ranks

OURS = "DistributedOptimizer"
BARE = "hvd.grouped_allreduce"


class Receiver(keras.optimizers.SGD):
    """Keeps the gradients that it gets, and updates nothing."""

    def apply(self, grads, trainable_variables=None):
        self.received = list(grads)


def distributed_optimizer(variables, compression):
    """Returns a function from gradients to their means over the ranks."""
    optimizer = hvd.DistributedOptimizer(Receiver(), compression=compression)
    optimizer.build(variables)

    def average(gradients):
        optimizer.apply(gradients, variables)
        return list(optimizer.received)

    return average


def grouped_allreduce(name, compression):
    def average(gradients):
        return hvd.grouped_allreduce(
            gradients, op=hvd.Average, compression=compression, name=name
        )

    return average


def allreduce_of_each(name):
    def average(gradients):
        return [
            hvd.allreduce(gradient, name=f"{name}_{i}", op=hvd.Average)
            for i, gradient in enumerate(gradients)
        ]

    return average


def contenders(shapes):
    """Returns `{name: function without arguments that averages gradients}`."""
    variables = [keras.Variable(tf.zeros(shape)) for shape in shapes]
    gradients = [tf.random.normal(shape) for shape in shapes]
    flat = [tf.concat([tf.reshape(g, [-1]) for g in gradients], 0)]
    none, fp16 = hvd.Compression.none, hvd.Compression.fp16
    averages = {
        BARE: (grouped_allreduce("bare", none), gradients),
        OURS: (distributed_optimizer(variables, none), gradients),
        f"{BARE}, fp16": (grouped_allreduce("bare_fp16", fp16), gradients),
        f"{OURS}, fp16": (distributed_optimizer(variables, fp16), gradients),
        "hvd.allreduce of each": (allreduce_of_each("each"), gradients),
        "hvd.allreduce of one flat": (allreduce_of_each("flat"), flat),
    }

    def bound(average, arguments):
        compiled = tf.function(average, autograph=False)
        return lambda: compiled(arguments)

    return {name: bound(*pair) for name, pair in averages.items()}


def measure(shapes, rounds):
    """Returns what this rank measured."""
    times = _measure.interleaved_times(contenders(shapes), rounds)
    return {
        "machine": _measure.machine(),
        "variables": len(shapes),
        "parameters": sum(tf.TensorShape(s).num_elements() for s in shapes),
        "ranks": hvd.size(),
        "rounds": rounds,
        "results": [
            {
                "way": name,
                "ms": _measure.spread([1e3 * s for s in seconds], 1),
                "ratio": _measure.spread_of_ratios(seconds, times[BARE]),
            }
            for name, seconds in times.items()
        ],
    }


def markdown(results):
    """Returns the tables of a file of results, one per library."""
    blocks = []
    for key, result in results.items():
        rows = [
            [
                line["way"],
                _results.cell(line["ms"]),
                _results.cell(line["ratio"]),
            ]
            for line in result["results"]
        ]
        blocks += [
            f"{key}, {result['variables']} variables, "
            f"{result['parameters']:,} parameters, medians of "
            f"{result['rounds']} rounds with quartiles:",
            _results.table(["", "ms", "x bare"], rows),
        ]
    return "\n\n".join(blocks)


def draw(results, path):
    panels = {
        key: {line["way"]: line["ratio"] for line in result["results"]}
        for key, result in results.items()
    }
    _results.draw_bars(panels, f"time relative to {BARE}", path)


def main():
    parser = _results.parser(
        __spec__,
        __doc__,
        "docs/results/allreduce.json",
        "JSON file to write; it keeps results of other libraries and numbers "
        "of ranks (default: %(default)s)",
    )
    _results.add_rounds(parser, 31)
    options = parser.parse_args()
    with _ranks.start():
        network = _ranks.resnet50_v1(image_size=64)
        shapes = [tuple(v.shape) for v in network.trainable_variables]
        result = measure(shapes, options.rounds)
    if hvd.rank() == 0:
        print(markdown({_ranks.key(): result}))
        _results.add_json(options.output, _ranks.key(), result)


if __name__ == "__main__":
    main()
