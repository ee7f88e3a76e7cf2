"""How many more images per second do two ranks train on than one?

    horovodrun --gloo -np 2 python -m benchmarks.speed.scaling
    horovodrun --mpi -np 2 python -m benchmarks.speed.scaling

The second command needs a Horovod built with MPI. Each takes 8 minutes on 2
cores. It trains ResNet-50 v1 on images of 64 x 64 pixels as a job does, with
accumulation 8 and without. Each rank has its own core and one thread. A round
makes three kinds of updates, with the same number of images per rank:

- all: all ranks make an update together;
- apart: all ranks make one at the same time, without communication;
- alone: rank 0 makes one while the others wait.

The speed-up is the images per second of all divided by those of rank 0 alone,
in each round. The speed-up of ranks apart is what the machine allows, because
cores share caches, memory and their host.

Horovod's timeline records three more updates of each kind. A figure shows their
parts: computing, waiting for the slowest rank, the allreduce, and the update.
"""

import os
import statistics
import time

import horovod_recipes.keras as hvd
from benchmarks import _measure
from benchmarks import _results
from benchmarks.speed import _ranks
from benchmarks.speed import _timeline

# Parts of an update, and their colors in the figure.
PARTS = {
    "compute": "tab:blue",
    "wait": "tab:red",
    "allreduce": "tab:orange",
    "update": "tab:green",
}
# Updates in the timeline.
RECORDED_UPDATES = 3


def pin_to_core():
    """Gives this rank, with all of its threads, one core."""
    cores = sorted(os.sched_getaffinity(0))
    core = cores[hvd.local_rank() % len(cores)]
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), {core})


def speeds(updates, images, barrier, rounds):
    """Returns `{kind: [images per second of each round]}` on every rank."""
    ways = {
        "all": (updates["all"], hvd.size()),
        "apart": (updates["alone"], hvd.size()),
        "alone": (updates["alone"], 1),
    }
    found = {kind: [] for kind in ways}
    for _ in range(rounds):
        for kind, (update, ranks) in ways.items():
            barrier()
            begin = time.perf_counter()
            if hvd.rank() < ranks:
                update()
            # The slowest rank's time counts.
            barrier()
            seconds = time.perf_counter() - begin
            found[kind].append(ranks * images / seconds)
    return found


def recorded_parts(update, process_set, barrier):
    """Returns rank 0's seconds in each part of an update."""
    begins = _timeline.named_allreduce("mark_begins", process_set)
    ends = _timeline.named_allreduce("mark_ends", process_set)
    takes_part = 0 in process_set.ranks
    if takes_part:
        begins()
        ends()
    parts = []
    for _ in range(RECORDED_UPDATES):
        with _timeline.recorded(barrier) as events:
            if takes_part:
                begins()
                update()
                ends()
        if events:
            parts.append(parts_of_update(events))
    return {
        name: statistics.median(part[name] for part in parts)
        for name in PARTS
        if parts
    }


def parts_of_update(events):
    """Returns the seconds in each part of the update between two marks."""
    spans = _timeline.spans(events)
    marks = [span for span in spans if "mark_" in span[0]]
    gradients = [
        span
        for span in spans
        if "mark_" not in span[0] and "barrier" not in span[0]
    ]
    begin = min(end for _, name, _, end in marks if name == "ALLREDUCE")
    end = max(
        begin for _, name, begin, _ in marks if name == "NEGOTIATE_ALLREDUCE"
    )
    ready = min(begin for _, name, begin, _ in gradients)
    reduced = [
        (begin, end) for _, name, begin, end in gradients if name == "ALLREDUCE"
    ]
    first = min(begin for begin, _ in reduced)
    last = max(end for _, end in reduced)
    return {
        "compute": (ready - begin) / 1e6,
        "wait": (first - ready) / 1e6,
        "allreduce": (last - first) / 1e6,
        "update": (end - last) / 1e6,
    }


def measure(network, micro_batch, accumulation, rounds, alone):
    """Returns the result for one number of micro-batches per update.

    Args:
        network: Function that returns a `keras.Model` from uint8 images to
            logits.
        micro_batch: Integer, images per rank and micro-batch.
        accumulation: Integer, micro-batches per update.
        rounds: Integer.
        alone: The `ProcessSet` of this rank.
    """
    sets = {"all": hvd.global_process_set, "alone": alone}
    updates = {
        kind: _ranks.update_function(
            network(), micro_batch, accumulation, False, process_set
        )
        for kind, process_set in sets.items()
    }
    barrier = _timeline.named_allreduce("barrier")
    images = micro_batch * accumulation
    # The first rounds compile.
    speeds(updates, images, barrier, rounds=2)
    found = speeds(updates, images, barrier, rounds)
    parts = {
        kind: recorded_parts(updates[kind], sets[kind], barrier)
        for kind in sets
    }
    return {
        "accumulation": accumulation,
        "global_batch": images * hvd.size(),
        "images_per_second": {
            kind: _measure.spread(values, 2) for kind, values in found.items()
        },
        "speed_up": {
            kind: _measure.spread_of_ratios(found[kind], found["alone"])
            for kind in ("all", "apart")
        },
        "all_over_apart": _measure.spread_of_ratios(
            found["all"], found["apart"]
        ),
        "seconds_of_an_update": {
            kind: {name: round(value, 4) for name, value in part.items()}
            for kind, part in parts.items()
        },
    }


def markdown(results):
    """Returns the tables of a file of results, over all libraries."""
    rows, parts_rows = [], []
    for key, result in results.items():
        for line in result["results"]:
            name = f"{key}, accumulation {line['accumulation']}"
            values = (
                line["images_per_second"]["alone"],
                line["images_per_second"]["all"],
                line["speed_up"]["all"],
                line["speed_up"]["apart"],
                line["all_over_apart"],
            )
            rows.append([name, *map(_results.cell, values)])
            parts_rows += [
                [f"{name}, {kind}", *parts.values()]
                for kind, parts in line["seconds_of_an_update"].items()
            ]
    header = ["", "images/s alone", "all", "speed-up", "apart", "all / apart"]
    return (
        f"{_results.table(header, rows)}\n\nSeconds of rank 0 in each part "
        "of an update, from Horovod's timeline:\n\n"
        f"{_results.table(['', *PARTS], parts_rows)}"
    )


def draw(results, path):
    """Draws the parts of an update as a PNG."""
    import matplotlib.figure

    lines = {
        f"{key}, accumulation {line['accumulation']}": line
        for key, result in results.items()
        for line in result["results"]
    }
    figure = matplotlib.figure.Figure(
        figsize=(8, 1 + 1.5 * len(lines)), layout="constrained"
    )
    panels = figure.subplots(len(lines), squeeze=False)[:, 0]
    for axes, (title, line) in zip(panels, lines.items(), strict=True):
        kinds = {"all": "all ranks", "alone": "rank 0 alone"}
        left = [0.0] * len(kinds)
        for part, color in PARTS.items():
            widths = [line["seconds_of_an_update"][k][part] for k in kinds]
            axes.barh(
                list(kinds.values()), widths, left=left, color=color, label=part
            )
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.set_title(
            f"{title}: speed-up {line['speed_up']['all'][0]}", fontsize=10
        )
    panels[-1].set_xlabel("seconds of rank 0, from Horovod's timeline")
    bars = panels[0].get_legend_handles_labels()
    figure.legend(*bars, loc="outside lower center", ncols=len(PARTS))
    _results.save_figure(figure, path)


def main():
    parser = _results.parser(
        __spec__,
        __doc__,
        "docs/results/scaling.json",
        "JSON file to write; it keeps results of other libraries and numbers "
        "of ranks (default: %(default)s)",
    )
    _results.add_rounds(parser, 9)
    _results.add_integer(
        parser, "image_size", 64, "height and width in pixels", at_least=32
    )
    _results.add_integer(
        parser, "micro_batch", 16, "images per rank and micro-batch"
    )
    parser.add_argument(
        "--accumulation",
        type=int,
        nargs="+",
        default=[8, 1],
        metavar="N",
        help="micro-batches per update (default: 8 1)",
    )
    options = parser.parse_args()
    _timeline.allow()
    alone = [hvd.ProcessSet([rank]) for rank in range(launched_ranks())]
    with _ranks.start(process_sets=alone):
        machine = _measure.machine()
        pin_to_core()
        results = [
            measure(
                lambda: _ranks.resnet50_v1(options.image_size),
                options.micro_batch,
                accumulation,
                options.rounds,
                alone[hvd.rank()],
            )
            for accumulation in options.accumulation
        ]
    if hvd.rank() == 0:
        result = {
            "machine": machine,
            "ranks": hvd.size(),
            "image_size": options.image_size,
            "micro_batch": options.micro_batch,
            "rounds": options.rounds,
            "results": results,
        }
        print(markdown({_ranks.key(): result}))
        _results.add_json(options.output, _ranks.key(), result)


def launched_ranks():
    """Returns the number of ranks before Horovod starts."""
    for name in ("HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE"):
        if name in os.environ:
            return int(os.environ[name])
    return 1


if __name__ == "__main__":
    main()
