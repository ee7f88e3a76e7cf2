"""How long does an allreduce take, and do latency and bandwidth explain it?

    horovodrun --gloo -np 2 python -m benchmarks.speed.allreduce_model

It times `hvd.allreduce` of float32 tensors from 4 KB to 128 MB on ranks with
one thread each. It fits the latency and the bandwidth of
`hardware.ring_seconds` to the medians, by least squares of the relative error.
It takes 3 minutes on 2 cores.

If each rank has its own core, a third of the rounds also measures what one core
does while the others do the same: matrix products, training of ResNet-50,
reading and writing memory. The entry `cpu` of
`horovod_recipes.planning.hardware` has these numbers.

More ranks than cores (`-np 4` on two) wait for a core, which the fit shows. Its
numbers are in no entry.
"""

import statistics

import keras
import numpy as np
import tensorflow as tf

import horovod_recipes.keras as hvd
from benchmarks import _measure
from benchmarks import _results
from benchmarks.speed import _ranks
from horovod_recipes.models import MODELS
from horovod_recipes.planning import hardware

# Bytes of each message.
SIZES = [2**power for power in range(12, 28)]
# Images of 224 x 224 pixels in each step on one core.
RESNET50_BATCH = 8
# Rows and columns of the matrices of a product.
MATRIX_SIZE = 2048
# Float32 numbers of the array that is read and written.
ARRAY_LENGTH = 25_600_000


def allreduce_function(message_bytes):
    """Returns a function that sums a float32 tensor over the ranks."""
    tensor = tf.random.normal([message_bytes // 4])
    return lambda: hvd.allreduce(tensor, name=str(message_bytes), op=hvd.Sum)


def fit_ring(sizes, seconds, ranks):
    """Returns the latency and the bandwidth that explain the times best.

    Args:
        sizes: List of integers, bytes of each message.
        seconds: List of floats, time of each message.
        ranks: Integer above 1, ranks of the ring.

    Returns:
        Two floats: seconds per message and bytes per second. They minimise the
        sum of squares of relative errors of `hardware.ring_seconds`.
    """
    sizes, seconds = np.array(sizes, float), np.array(seconds)
    steps = 2 * (ranks - 1)
    # A time is linear in the latency and in the inverse of the bandwidth.
    # Divided by the measured time it should be 1.
    columns = [steps / seconds, steps / ranks * sizes / seconds]
    fit, *_ = np.linalg.lstsq(np.stack(columns, 1), np.ones(len(sizes)))
    return float(fit[0]), float(1 / fit[1])


def measure_allreduce(rounds):
    """Returns the fit, and each size's measured and fitted time."""
    functions = {size: allreduce_function(size) for size in SIZES}
    times = _measure.interleaved_times(functions, rounds)
    medians = [statistics.median(times[size]) for size in SIZES]
    latency, bandwidth = fit_ring(SIZES, medians, hvd.size())
    results = []
    for size, median in zip(SIZES, medians, strict=True):
        fitted = hardware.ring_seconds(hvd.size(), size, bandwidth, latency)
        results.append(
            {
                "bytes": size,
                "ms": _measure.spread([1e3 * s for s in times[size]]),
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
    """Returns what one core does per second, as medians with quartiles."""
    matrix = tf.random.normal([MATRIX_SIZE, MATRIX_SIZE])
    array = np.ones(ARRAY_LENGTH, "float32")
    # The work of one call in the key's unit, and the function to call.
    functions = {
        "matmul_gflops": (
            2 * MATRIX_SIZE**3 / 1e9,
            lambda: tf.matmul(matrix, matrix).numpy(),
        ),
        # Read once and written once.
        "memory_gb_per_second": (
            2 * array.nbytes / 1e9,
            lambda: np.negative(array, out=array),
        ),
        "resnet50_images_per_second": (RESNET50_BATCH, resnet50_function()),
    }
    times = _measure.interleaved_times(
        {name: function for name, (_, function) in functions.items()}, rounds
    )
    return {
        name: _measure.spread([work / s for s in times[name]])
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


def markdown(results):
    """Returns the fit, the table and the core of each number of ranks."""
    blocks = []
    for key, result in results.items():
        rows = [
            [
                f"{line['bytes']:,}",
                _results.cell(line["ms"], ".3g"),
                f"{line['fitted_ms']:.3g}",
                f"{line['error_percent']:+.0f}",
            ]
            for line in result["results"]
        ]
        blocks += [
            f"{key} on {result['machine']['cores']} cores: latency "
            f"{result['latency_us']} us, bandwidth "
            f"{result['bandwidth_gb_per_second']} GB/s",
            _results.table(["bytes", "ms", "fitted, ms", "error, %"], rows),
            *(
                f"one core, {name}: {_results.cell(values)}"
                for name, values in result["core"].items()
            ),
        ]
    return "\n\n".join(blocks)


def main():
    parser = _results.parser(
        __spec__,
        __doc__,
        "docs/results/allreduce_model.json",
        "JSON file to write; it keeps results of other numbers of ranks "
        "(default: %(default)s)",
    )
    _results.add_rounds(parser, 15)
    options = parser.parse_args()
    machine = _measure.machine()
    with _ranks.start():
        result = {"machine": machine, **measure_allreduce(options.rounds)}
        own_core = hvd.size() <= machine["cores"]
        core_rounds = max(2, options.rounds // 3)
        result["core"] = measure_core(core_rounds) if own_core else {}
    if hvd.rank() == 0:
        key = f"{hvd.size()} ranks"
        print(markdown({key: result}))
        _results.add_json(options.output, key, result)


if __name__ == "__main__":
    main()
