"""How long does an allreduce take, and do latency and bandwidth explain it?

    horovodrun -np 2 python -m benchmarks.speed.allreduce_model

times `hvd.allreduce` of float32 tensors of 4 KB to 128 MB on ranks of one
thread each, and fits the latency and the bandwidth of `hardware.ring_seconds`
to the medians by least squares on the relative error. Where each rank has a
core of its own it also measures, in a third of the rounds, what one core can do
while the others do the same: products of matrices, training of ResNet-50,
reading and writing memory. These are the numbers of the entry `cpu` in
`horovod_recipes.planning.hardware`.

With more ranks than cores (`-np 4` on two) the ranks wait for a core, and the
fit says so: its numbers are in no entry.
"""

import json
import pathlib
import statistics

import keras
import numpy as np
import tensorflow as tf
from absl import flags

import horovod_recipes.keras as hvd
from benchmarks.speed import report
from horovod_recipes.models import MODELS
from horovod_recipes.planning import hardware

# Of its own, because tests import all benchmarks into one process.
FLAGS = flags.FlagValues()
_ROUNDS = flags.DEFINE_integer(
    "rounds", 15, "How often each is timed.", lower_bound=2, flag_values=FLAGS
)
_OUTPUT = flags.DEFINE_string(
    "output",
    "docs/results/allreduce_model.json",
    "JSON to write; results of other numbers of ranks in it stay.",
    flag_values=FLAGS,
)
SIZES = [2**power for power in range(12, 28)]
# As micro-batches go on a core; the images are 224 pixels wide and high.
RESNET50_BATCH = 8


def allreduce_function(message_bytes):
    """Returns a function that sums a float32 tensor over the ranks."""
    tensor = tf.random.normal([message_bytes // 4])
    return lambda: hvd.allreduce(tensor, name=str(message_bytes), op=hvd.Sum)


def fit_ring(sizes, seconds, ranks):
    """Returns the latency and the bandwidth that explain the times best.

    Args:
        sizes: List of integers, the messages' bytes.
        seconds: List of floats, what each took.
        ranks: Integer above 1, the ring's.

    Returns:
        Floats, seconds a message and bytes a second, with the least sum of
        squares of relative errors of `hardware.ring_seconds`.
    """
    sizes, seconds = np.array(sizes, float), np.array(seconds)
    steps = 2 * (ranks - 1)
    # A time is linear in the latency and in the inverse of the bandwidth;
    # divided by what was measured, it should be 1.
    columns = [steps / seconds, steps / ranks * sizes / seconds]
    fit, *_ = np.linalg.lstsq(np.stack(columns, 1), np.ones(len(sizes)))
    return float(fit[0]), float(1 / fit[1])


def measure_allreduce(rounds):
    """Returns the fit, and each size's time beside the fitted one."""
    functions = {size: allreduce_function(size) for size in SIZES}
    times = report.interleaved_times(functions, rounds)
    medians = [statistics.median(times[size]) for size in SIZES]
    latency, bandwidth = fit_ring(SIZES, medians, hvd.size())
    results = []
    for size, median in zip(SIZES, medians, strict=True):
        fitted = hardware.ring_seconds(hvd.size(), size, bandwidth, latency)
        results.append(
            {
                "bytes": size,
                "ms": report.spread([1e3 * s for s in times[size]]),
                "fitted_ms": round(1e3 * fitted, 3),
                "error_percent": round(100 * (fitted / median - 1), 1),
            }
        )
    return {
        "latency_us": round(1e6 * latency, 1),
        "bandwidth_gb_per_second": round(bandwidth / 1e9, 3),
        "results": results,
    }


def measure_core(rounds):
    """Returns what one core does in a second, as medians with quartiles."""
    matrix = tf.random.normal([2048, 2048])
    array = np.ones(25_600_000, "float32")
    functions = {
        "matmul_gflops": (
            2 * 2048**3 / 1e9,
            lambda: tf.matmul(matrix, matrix).numpy(),
        ),
        # Read once and written once.
        "memory_gb_per_second": (
            2 * array.nbytes / 1e9,
            lambda: np.negative(array, out=array),
        ),
        "resnet50_images_per_second": (RESNET50_BATCH, resnet50_function()),
    }
    times = report.interleaved_times(
        {name: function for name, (_, function) in functions.items()}, rounds
    )
    return {
        name: report.spread([work / s for s in times[name]])
        for name, (work, _) in functions.items()
    }


def resnet50_function():
    """Returns a function that trains ResNet-50 on one batch of noise."""
    model = MODELS["resnet50"]((224, 224, 3), 1000)
    model.compile(
        keras.optimizers.SGD(momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(RESNET50_BATCH, 224, 224, 3))
    labels = rng.integers(1000, size=RESNET50_BATCH)
    return lambda: model.train_on_batch(images.astype("uint8"), labels)


def print_result(ranks, result):
    print(
        f"{ranks} ranks on {result['machine']['cores']} cores: latency "
        f"{result['latency_us']} us, bandwidth "
        f"{result['bandwidth_gb_per_second']} GB/s"
    )
    lines = [
        (
            f"{line['bytes']:,}",
            "{:.3g} ({:.3g} to {:.3g})".format(*line["ms"]),
            f"{line['fitted_ms']:.3g}",
            f"{line['error_percent']:+.0f}",
        )
        for line in result["results"]
    ]
    print(report.table(["bytes", "ms", "fitted, ms", "error, %"], lines))
    for name, (median, low, high) in result["core"].items():
        print(f"one core, {name}: {median} ({low} to {high})")


def main():
    report.parse_command_line(FLAGS)
    tf.get_logger().setLevel("ERROR")
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    hvd.init()
    machine = report.machine()
    result = {"machine": machine, **measure_allreduce(_ROUNDS.value)}
    own_core = hvd.size() <= machine["cores"]
    core_rounds = max(2, _ROUNDS.value // 3)
    result["core"] = measure_core(core_rounds) if own_core else {}
    if hvd.rank() > 0:
        return
    print_result(hvd.size(), result)
    output = pathlib.Path(_OUTPUT.value)
    results = json.loads(output.read_text()) if output.exists() else {}
    report.write_json(output, results | {f"{hvd.size()} ranks": result})


if __name__ == "__main__":
    main()
