"""How many more images a second do two ranks train on than one?

    horovodrun --gloo -np 2 python -m benchmarks.speed.scaling
    horovodrun --mpi -np 2 python -m benchmarks.speed.scaling

trains ResNet-50 on images of 64 x 64 pixels by what a job does, with
accumulation 8 and without, on ranks that have a core of their own and one
thread each. In each round all ranks make an update together; then all make one
at the same time, each for itself, without communication; and then rank 0 makes
one alone, while the others wait. Each is of as many images a rank, so the
global batch grows with the ranks. The speed-up is the images a second of all
over those of the one, a round each; that of ranks apart is what the machine
allows, whose cores share caches, memory and their host.

Three more updates of each kind are recorded by Horovod's timeline, with which a
picture shows where the time goes: computing, waiting for the slowest rank, the
allreduce, and the optimizer's update.
"""

import json
import os
import pathlib
import statistics
import tempfile
import time

import keras
import matplotlib.figure
import tensorflow as tf
from absl import flags

import horovod_recipes.keras as hvd
from benchmarks.speed import report
from benchmarks.speed.allreduce import backend
from horovod_recipes.models import MODELS
from keras_lars import LARS

# Of its own, because tests import all benchmarks into one process.
FLAGS = flags.FlagValues()
_ROUNDS = flags.DEFINE_integer(
    "rounds", 9, "How often each is timed.", lower_bound=2, flag_values=FLAGS
)
_IMAGE_SIZE = flags.DEFINE_integer(
    "image_size", 64, "Pixels.", flag_values=FLAGS
)
_MICRO_BATCH = flags.DEFINE_integer(
    "micro_batch", 16, "Images of a rank at once.", flag_values=FLAGS
)
_ACCUMULATION = flags.DEFINE_multi_integer(
    "accumulation",
    [8, 1],
    "Micro-batches an update; may be given several times.",
    flag_values=FLAGS,
)
_XLA = flags.DEFINE_bool(
    "xla", False, "Compile forward and backward pass.", flag_values=FLAGS
)
_OUTPUT = flags.DEFINE_string(
    "output", "docs/results/scaling.json", "JSON to write.", flag_values=FLAGS
)
PARTS = {
    "compute": "tab:blue",
    "wait": "tab:red",
    "allreduce": "tab:orange",
    "update": "tab:green",
}
RECORDED = 3


def pin_to_core():
    """Gives this rank, with all of its threads, one core."""
    cores = sorted(os.sched_getaffinity(0))
    core = cores[hvd.local_rank() % len(cores)]
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), {core})


def update_function(network, micro_batch, accumulation, xla, process_set):
    """Returns a function that makes an update over the ranks of a set."""
    model = network()
    model.compile(
        hvd.DistributedOptimizer(
            # Its size does not change the time, but weights must stay finite.
            LARS(0.01, weight_decay=5e-4),
            backward_passes_per_step=accumulation,
            average_aggregated_gradients=True,
            process_set=process_set,
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        steps_per_execution=accumulation,
        jit_compile=xla,
    )
    model.optimizer.build(model.trainable_variables)
    model.make_train_function()
    images = tf.random.uniform(
        [micro_batch, *model.input_shape[1:]], 0, 256, tf.int32
    )
    labels = tf.random.uniform(
        [micro_batch], 0, model.output_shape[-1], tf.int32
    )
    batch = tf.cast(images, tf.uint8), labels
    batches = iter(tf.data.Dataset.from_tensors(batch).repeat())
    return lambda: model.train_function(batches)


def named_allreduce(name, process_set=hvd.global_process_set):
    """Returns a function that waits for all ranks of a set."""

    # Horovod's timeline has the names of operations in a graph alone, from
    # which TensorFlow takes what has no result or only constant inputs.
    @tf.function(autograph=False)
    def allreduce(tensor):
        return hvd.grouped_allreduce(
            [tensor], name=name, process_set=process_set
        )

    return lambda: allreduce(tf.zeros([1]))


def speeds(updates, images, barrier, rounds):
    """Returns `{kind: images a second, a round each}`, on every rank."""
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
    """Returns rank 0's seconds of each part of an update, by the timeline."""
    begins = named_allreduce("mark_begins", process_set)
    ends = named_allreduce("mark_ends", process_set)
    takes_part = 0 in process_set.ranks
    if takes_part:
        begins()
        ends()
    parts = []
    for _ in range(RECORDED):
        with tempfile.TemporaryDirectory() as folder:
            timeline = pathlib.Path(folder, "timeline.json")
            barrier()
            if hvd.rank() == 0:
                hvd.start_timeline(str(timeline))
            barrier()
            if takes_part:
                begins()
                update()
                ends()
            barrier()
            if hvd.rank() == 0:
                hvd.stop_timeline()
                parts.append(parts_of_update(read_timeline(timeline)))
    return {
        name: statistics.median(part[name] for part in parts)
        for name in PARTS
        if parts
    }


def read_timeline(path):
    """Returns the events of a timeline that has just been stopped."""
    deadline = time.monotonic() + 10
    while True:
        # A thread of Horovod's writes it.
        try:
            return json.loads(path.read_text())
        except (json.JSONDecodeError, FileNotFoundError):
            if time.monotonic() > deadline:
                raise
        time.sleep(0.1)


def parts_of_update(events):
    """Returns the seconds of each part of the update between two marks."""
    spans = spans_of_timeline(events)
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


def spans_of_timeline(events):
    """Returns `(operation, activity, begin, end)` of each, in microseconds."""
    operations, open_spans, spans = {}, {}, []
    for event in events:
        lane = event["pid"]
        if event.get("name") == "process_name":
            operations[lane] = event["args"].get("name", "")
        elif event["ph"] == "B":
            open_spans.setdefault(lane, []).append((event["name"], event["ts"]))
        elif event["ph"] == "E" and open_spans.get(lane):
            name, begin = open_spans[lane].pop()
            spans.append((operations[lane], name, begin, event["ts"]))
    return spans


def measure(network, micro_batch, accumulation, xla, rounds, alone):
    """Returns the result of one number of micro-batches an update.

    Args:
        network: Function that returns a `keras.Model` from uint8 images to
            logits.
        micro_batch: Integer, images of a rank at once.
        accumulation: Integer, micro-batches an update.
        xla: Whether to compile forward and backward pass.
        rounds: Integer.
        alone: The `ProcessSet` of this rank.
    """
    sets = {"all": hvd.global_process_set, "alone": alone}
    updates = {
        kind: update_function(
            network, micro_batch, accumulation, xla, process_set
        )
        for kind, process_set in sets.items()
    }
    barrier = named_allreduce("barrier")
    images = micro_batch * accumulation
    # The first ones compile.
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
            kind: report.spread(values, 2) for kind, values in found.items()
        },
        "speed_up": {
            kind: ratio(found[kind], found["alone"])
            for kind in ("all", "apart")
        },
        "all_over_apart": ratio(found["all"], found["apart"]),
        "seconds_of_an_update": {
            kind: {name: round(value, 4) for name, value in part.items()}
            for kind, part in parts.items()
        },
    }


def ratio(speeds, others):
    return report.spread([a / b for a, b in zip(speeds, others, strict=True)])


def markdown(results):
    """Returns the tables of a file of results, of each library."""
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
            rows.append([name, *map(report.cell, values)])
            parts_rows += [
                [f"{name}, {kind}", *parts.values()]
                for kind, parts in line["seconds_of_an_update"].items()
            ]
    header = ["", "images/s alone", "all", "speed-up", "apart", "all / apart"]
    return (
        f"{report.table(header, rows)}\n\nWhere the time of rank 0 goes, in "
        "seconds of an update, by Horovod's timeline:\n\n"
        f"{report.table(['', *PARTS], parts_rows)}"
    )


def draw(results, path):
    """Draws the parts of an update, as bars, into a PNG file."""
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
    panels[-1].set_xlabel("seconds of rank 0, by Horovod's timeline")
    bars = panels[0].get_legend_handles_labels()
    figure.legend(*bars, loc="outside lower center", ncols=len(PARTS))
    report.save_figure(figure, path)


def main():
    report.parse_command_line(FLAGS)
    tf.get_logger().setLevel("ERROR")
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    # So that the timeline can be started later.
    os.environ["HOROVOD_TIMELINE"] = "DYNAMIC"
    alone = [hvd.ProcessSet([rank]) for rank in range(launched_ranks())]
    hvd.init(process_sets=alone)
    machine = report.machine()
    pin_to_core()
    size = _IMAGE_SIZE.value
    # As in a job, whose collectives it takes note of.
    with hvd.callbacks.Watchdog(3600):
        results = [
            measure(
                lambda: MODELS["resnet50"]((size, size, 3), 1000, version="v1"),
                _MICRO_BATCH.value,
                accumulation,
                _XLA.value,
                _ROUNDS.value,
                alone[hvd.rank()],
            )
            for accumulation in _ACCUMULATION.value
        ]
    if hvd.rank() > 0:
        return
    key = f"{backend()}, {hvd.size()} ranks"
    result = {
        "machine": machine,
        "ranks": hvd.size(),
        "image_size": size,
        "micro_batch": _MICRO_BATCH.value,
        "xla": _XLA.value,
        "rounds": _ROUNDS.value,
        "results": results,
    }
    print(markdown({key: result}))
    report.add_json(_OUTPUT.value, key, result)


def launched_ranks():
    """Returns the number of ranks, before Horovod starts."""
    for name in ("HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE"):
        if name in os.environ:
            return int(os.environ[name])
    return 1


if __name__ == "__main__":
    main()
