"""What does a step's communication cost, beside Horovod's bare operation?

    horovodrun --gloo -np 2 python -m benchmarks.speed.allreduce
    horovodrun --mpi -np 2 python -m benchmarks.speed.allreduce

the second where Horovod was built with MPI. On ranks of one thread each it
times, for gradients of the 214 variables of ResNet-50 that take turns in each
round: what `DistributedOptimizer` does until it hands the averaged gradients to
the optimizer; `hvd.grouped_allreduce` of the same, bare; an `hvd.allreduce` for
each variable; and one of as many numbers in a single tensor, which leaves out
to put them together. The first two also in float16. Ratios are of one round
to its bare operation in float32.
"""

import keras
import tensorflow as tf
from absl import flags

import horovod_recipes.keras as hvd
from benchmarks.speed import report
from horovod_recipes.models import MODELS

# Of its own, because tests import all benchmarks into one process.
FLAGS = flags.FlagValues()
_ROUNDS = flags.DEFINE_integer(
    "rounds", 31, "How often each is timed.", lower_bound=2, flag_values=FLAGS
)
_OUTPUT = flags.DEFINE_string(
    "output",
    "docs/results/allreduce.json",
    "JSON to write; results in it of other backends and numbers of ranks stay.",
    flag_values=FLAGS,
)
OURS = "DistributedOptimizer"
BARE = "hvd.grouped_allreduce"


def resnet50_shapes():
    model = MODELS["resnet50"]((64, 64, 3), 1000)
    return [tuple(v.shape) for v in model.trainable_variables]


class Receiver(keras.optimizers.SGD):
    """Keeps the gradients that it is given, in place of an update."""

    def apply(self, grads, trainable_variables=None):
        self.received = list(grads)


def distributed_optimizer(variables, compression):
    """Returns a function of the gradients, to their means over the ranks."""
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
    """Returns the result, on every rank its own."""
    times = report.interleaved_times(contenders(shapes), rounds)
    bare = times[BARE]
    return {
        "machine": report.machine(),
        "variables": len(shapes),
        "parameters": sum(tf.TensorShape(s).num_elements() for s in shapes),
        "ranks": hvd.size(),
        "rounds": rounds,
        "results": [
            {
                "way": name,
                "ms": report.spread([1e3 * s for s in seconds], 1),
                "ratio": report.spread(
                    [a / b for a, b in zip(seconds, bare, strict=True)]
                ),
            }
            for name, seconds in times.items()
        ],
    }


def backend():
    """Returns which library the tensors go through."""
    return "MPI" if hvd.mpi_enabled() else "Gloo"


def markdown(results):
    """Returns the tables of a file of results, of each library."""
    lines = []
    for key, result in results.items():
        rows = [
            [line["way"], report.cell(line["ms"]), report.cell(line["ratio"])]
            for line in result["results"]
        ]
        lines += [
            f"{key}, {result['variables']} variables, "
            f"{result['parameters']:,} parameters, medians of "
            f"{result['rounds']} rounds with quartiles:",
            report.table(["", "ms", "x bare"], rows),
        ]
    return "\n\n".join(lines)


def draw(results, path):
    panels = {
        key: {line["way"]: line["ratio"] for line in result["results"]}
        for key, result in results.items()
    }
    report.draw_bars(panels, f"time over that of {BARE}", path)


def main():
    report.parse_command_line(FLAGS)
    tf.get_logger().setLevel("ERROR")
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    hvd.init()
    # As in a job, whose collectives it takes note of.
    with hvd.callbacks.Watchdog(3600):
        result = measure(resnet50_shapes(), _ROUNDS.value)
    if hvd.rank() > 0:
        return
    key = f"{backend()}, {hvd.size()} ranks"
    print(markdown({key: result}))
    report.add_json(_OUTPUT.value, key, result)


if __name__ == "__main__":
    main()
