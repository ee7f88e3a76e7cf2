"""What does XLA gain where it compiles forward and backward pass?

    python -m benchmarks.speed.xla_step

makes updates of ResNet-50 on generated images as a job of one rank does, with
the config's `xla` and without, which take turns. The update is a program of its
own in both. The first call traces and compiles.
"""

import time

import tensorflow as tf
from absl import flags

import horovod_recipes.keras as hvd
from benchmarks.speed import report
from benchmarks.speed.scaling import update_function
from horovod_recipes.models import MODELS

# Of its own, because tests import all benchmarks into one process.
FLAGS = flags.FlagValues()
_ROUNDS = flags.DEFINE_integer(
    "rounds", 9, "How often each is timed.", lower_bound=2, flag_values=FLAGS
)
_IMAGE_SIZE = flags.DEFINE_integer(
    "image_size", 64, "Pixels.", flag_values=FLAGS
)
_MICRO_BATCH = flags.DEFINE_integer(
    "micro_batch", 16, "Images at once.", flag_values=FLAGS
)
_ACCUMULATION = flags.DEFINE_integer(
    "accumulation", 1, "Micro-batches an update.", flag_values=FLAGS
)
_THREADS = flags.DEFINE_integer(
    "threads", 1, "Of the processor.", flag_values=FLAGS
)
_OUTPUT = flags.DEFINE_string(
    "output", "docs/results/xla_step.json", "JSON to write.", flag_values=FLAGS
)


def measure(network, micro_batch, accumulation, rounds):
    """Returns `[{xla, images_per_second, ratio, first_call_seconds}]`."""
    updates, first_calls = {}, {}
    for xla in (False, True):
        begin = time.perf_counter()
        updates[xla] = update_function(
            network, micro_batch, accumulation, xla, hvd.global_process_set
        )
        updates[xla]()
        first_calls[xla] = time.perf_counter() - begin
    times = report.interleaved_times(updates, rounds)
    images = micro_batch * accumulation
    return [
        {
            "xla": xla,
            "images_per_second": report.spread(
                [images / s for s in times[xla]]
            ),
            "ratio": report.spread(
                [a / b for a, b in zip(times[False], times[xla], strict=True)]
            ),
            "first_call_seconds": round(first_calls[xla], 1),
        }
        for xla in updates
    ]


def main():
    report.parse_command_line(FLAGS)
    tf.get_logger().setLevel("ERROR")
    tf.config.threading.set_intra_op_parallelism_threads(_THREADS.value)
    tf.config.threading.set_inter_op_parallelism_threads(_THREADS.value)
    hvd.init()
    size = _IMAGE_SIZE.value
    # As in a job, whose collectives it takes note of.
    with hvd.callbacks.Watchdog(3600):
        results = measure(
            lambda: MODELS["resnet50"]((size, size, 3), 1000, version="v1"),
            _MICRO_BATCH.value,
            _ACCUMULATION.value,
            _ROUNDS.value,
        )
    rows = [
        [
            "XLA" if line["xla"] else "without",
            "{} ({} to {})".format(*line["images_per_second"]),
            "{} ({} to {})".format(*line["ratio"]),
            line["first_call_seconds"],
        ]
        for line in results
    ]
    header = ["", "images/s", "x without", "first call, s"]
    print(report.table(header, rows))
    report.write_json(
        _OUTPUT.value,
        {
            "machine": report.machine(),
            "image_size": size,
            "micro_batch": _MICRO_BATCH.value,
            "accumulation": _ACCUMULATION.value,
            "threads": _THREADS.value,
            "rounds": _ROUNDS.value,
            "results": results,
        },
    )


if __name__ == "__main__":
    main()
