"""What does XLA gain if it compiles the forward and backward pass?

    python -m benchmarks.speed.xla_step

It makes updates of ResNet-50 on generated images in one process, as a job does,
with the config's `xla` and without it, in turns. The update is a program of its
own in both. The first call traces and compiles. It takes 3 minutes on 1 core.
"""

import time

from benchmarks import _measure
from benchmarks import _results
from benchmarks.speed import _ranks


def measure(network, micro_batch, accumulation, rounds):
    """Returns `[{xla, images_per_second, ratio, first_call_seconds}]`.

    `network` is a function that returns a new model.
    """
    updates, first_calls = {}, {}
    for xla in (False, True):
        begin = time.perf_counter()
        updates[xla] = _ranks.update_function(
            network(), micro_batch, accumulation, xla
        )
        updates[xla]()
        first_calls[xla] = time.perf_counter() - begin
    times = _measure.interleaved_times(updates, rounds)
    images = micro_batch * accumulation
    return [
        {
            "xla": xla,
            "images_per_second": _measure.spread(
                [images / s for s in times[xla]]
            ),
            "ratio": _measure.spread_of_ratios(times[False], times[xla]),
            "first_call_seconds": round(first_calls[xla], 1),
        }
        for xla in updates
    ]


def markdown(result):
    rows = [
        [
            "XLA" if line["xla"] else "without",
            _results.cell(line["images_per_second"]),
            _results.cell(line["ratio"]),
            line["first_call_seconds"],
        ]
        for line in result["results"]
    ]
    header = ["", "images/s", "x without", "first call, s"]
    return _results.table(header, rows)


def main():
    parser = _results.parser(__spec__, __doc__, "docs/results/xla_step.json")
    _results.add_rounds(parser, 9)
    _results.add_integer(
        parser, "image_size", 64, "height and width in pixels", at_least=32
    )
    _results.add_integer(parser, "micro_batch", 16, "images per micro-batch")
    _results.add_integer(parser, "accumulation", 1, "micro-batches per update")
    _results.add_integer(parser, "threads", 1, "threads of TensorFlow")
    options = parser.parse_args()
    with _ranks.start(options.threads):
        results = measure(
            lambda: _ranks.resnet50_v1(options.image_size),
            options.micro_batch,
            options.accumulation,
            options.rounds,
        )
    result = {
        "machine": _measure.machine(),
        "image_size": options.image_size,
        "micro_batch": options.micro_batch,
        "accumulation": options.accumulation,
        "threads": options.threads,
        "rounds": options.rounds,
        "results": results,
    }
    print(markdown(result))
    _results.write_json(options.output, result)


if __name__ == "__main__":
    main()
