"""What does a step save if gradients travel during the backward pass?

    python -m benchmarks.speed.overlap
    horovodrun --mpi -np 2 python -m benchmarks.speed.overlap

It trains ResNet-50 v1 on images of 64 x 64 pixels, 16 per rank, on two ranks
with one thread each. The gradients travel in one group after the backward pass,
or in several groups during it. Without communication, each rank updates with
its own gradients.

The first command makes two hosts of network namespaces, with one rank on each,
and gives their link several speeds. It needs root, Linux, iproute2 and
openssh-server. The second command measures two ranks of one machine, over MPI.
In a round, all ways take turns. Together, they take 11 minutes on 2 cores.

Horovod's timeline records one more step each way. A figure shows when the last
gradient was ready on rank 0, and when each group travelled.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from benchmarks import _measure
from benchmarks import _results

# The speed of each link, as `tc` takes it, and how many rounds to measure.
LINKS = {"not limited": 9, "1gbit": 9, "40mbit": 2}
IMAGE_SIZE, MICRO_BATCH = 64, 16
# The argument `groups` of a `DistributedOptimizer`.
GROUPS = {"one group": 1, "default": None, "each alone": 161}
# Time limit of the ranks on one link, in seconds.
TIME_LIMIT_S = 1800


def measure_here(rounds):
    """Returns `{link: [seconds of each way, their steps]}` on rank 0 of two."""
    import horovod_recipes.keras as hvd
    from benchmarks.speed import _ranks
    from benchmarks.speed import _timeline

    _timeline.allow()
    own = [hvd.ProcessSet([rank]) for rank in range(2)]
    with _ranks.start(process_sets=own):
        ways = {name: {"groups": groups} for name, groups in GROUPS.items()}
        ways["no communication"] = {"process_set": own[hvd.rank()]}
        updates = {
            name: _ranks.update_function(
                _ranks.resnet50_v1(IMAGE_SIZE),
                MICRO_BATCH,
                accumulation=1,
                xla=False,
                **way,
            )
            for name, way in ways.items()
        }
        meet = _timeline.named_allreduce("barrier")
        times = {name: [] for name in updates}
        for update in updates.values():
            update()  # Compiles.
        for _ in range(rounds):
            for name, update in updates.items():
                meet()
                begin = time.perf_counter()
                update()
                times[name].append(time.perf_counter() - begin)
        steps = {
            name: recorded_step(updates[name], meet)
            for name in ("one group", "default")
        }
        library = "MPI" if hvd.mpi_enabled() else "Gloo"
        if hvd.rank():
            return {}
        return {f"one machine, {library}": [times, steps]}


def recorded_step(update, meet):
    """Returns the `groups_of_step` of an update, on rank 0."""
    from benchmarks.speed import _timeline

    begins = _timeline.named_allreduce("mark_begins")
    ends = _timeline.named_allreduce("mark_ends")
    begins()
    ends()
    with _timeline.recorded(meet) as events:
        begins()
        update()
        ends()
    return groups_of_step(events) if events else None


def groups_of_step(events):
    """Returns the seconds of a step, and those of its groups of gradients.

    A group has the seconds from the beginning of the step until it was ready,
    until it left, and until it was reduced.
    """
    from benchmarks.speed import _timeline

    spans = _timeline.spans(events)
    begin = max(e for name, _, _, e in spans if "mark_begins" in name)
    end = min(b for name, _, b, _ in spans if "mark_ends" in name)
    groups = {}
    for name, activity, b, e in spans:
        if "mark_" in name or "barrier" in name:
            continue
        key = name.rpartition("_")[0]
        group = groups.setdefault(key, {"ready": 0, "left": [], "done": 0})
        if activity == "NEGOTIATE_ALLREDUCE":
            group["ready"] = max(group["ready"], b)
        elif activity == "ALLREDUCE":
            group["left"].append(b)
            group["done"] = max(group["done"], e)

    def seconds(*times):
        return [round((time - begin) / 1e6, 4) for time in times]

    return {
        "seconds": round((end - begin) / 1e6, 4),
        "groups": sorted(
            seconds(group["ready"], min(group["left"]), group["done"])
            for group in groups.values()
            if group["left"]
        ),
    }


def measure_links():
    """Yields what `measure_here` returns, for each link between two hosts."""
    from tests.cluster.hosts import Cluster

    # TensorFlow leaves it off on some processors; docs/performance.md has more.
    # horovodrun hands it to the ranks.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    cluster = Cluster(2)
    try:
        for link, rounds in LINKS.items():
            yield {link: measure_link(cluster, link, rounds)}
    finally:
        cluster.remove()


def measure_link(cluster, link, rounds):
    is_limited = link != "not limited"
    for host in cluster.hosts:
        if is_limited:
            cluster.limit(host, link)
    with tempfile.TemporaryDirectory() as folder:
        times = pathlib.Path(folder, "times.json")
        horovodrun = pathlib.Path(sys.executable).with_name("horovodrun")
        job = cluster.popen(
            "h1",
            *f"{horovodrun} --gloo -np 2 -H h1:1,h2:1".split(),
            *f"--network-interface eth0 {sys.executable}".split(),
            *f"-m {__spec__.name} --rounds={rounds}".split(),
            f"--times={times}",
        )
        try:
            if job.wait(TIME_LIMIT_S):
                sys.exit("error: the ranks on two hosts failed")
        except subprocess.TimeoutExpired:
            sys.exit("error: the ranks on two hosts take too long")
        (found,) = json.loads(times.read_text()).values()
    for host in cluster.hosts:
        cluster.kill(host)
        if is_limited:
            cluster.speed_up(host)
    return found


def summary(times, steps):
    """Returns the milliseconds of each way, and beside one group."""
    base = times["one group"]
    return {
        "machine": _measure.machine(),
        "steps": steps,
        "ways": {
            name: {
                "ms": _measure.spread([1e3 * s for s in seconds]),
                "ratio": _measure.spread_of_ratios(seconds, base),
            }
            for name, seconds in times.items()
        },
    }


def markdown(result):
    rows = [
        [
            link,
            name,
            _results.cell(way["ms"], ".0f"),
            _results.cell(way["ratio"], ".2f"),
        ]
        for link, part in result.items()
        for name, way in part["ways"].items()
    ]
    return _results.table(["link", "", "ms a step", "x one group"], rows)


def draw(result, path):
    """Draws one step of each way, on each link, as a PNG."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(
        figsize=(8, 1 + 1.2 * len(result)), layout="constrained"
    )
    panels = figure.subplots(len(result), squeeze=False)[:, 0]
    for axes, (link, part) in zip(panels, result.items(), strict=True):
        for row, step in enumerate(part["steps"].values()):
            groups = step["groups"]
            last = max(ready for ready, _, _ in groups)
            axes.barh(row + 0.2, last, 0.35, color="tab:blue")
            axes.barh(
                [row - 0.2] * len(groups),
                [done - left for _, left, done in groups],
                0.35,
                [left for _, left, _ in groups],
                color="tab:orange",
                edgecolor="white",
            )
        axes.set_yticks(range(len(part["steps"])), part["steps"])
        axes.set_title(link, fontsize=10)
    panels[0].barh(0, 0, color="tab:blue", label="until the last gradient")
    panels[0].barh(0, 0, color="tab:orange", label="allreduce of a group")
    panels[-1].set_xlabel("seconds of rank 0 since the step began")
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2)
    _results.save_figure(figure, path)


def main():
    parser = _results.parser(__spec__, __doc__, "docs/results/overlap.json")
    _results.add_rounds(parser, 11)
    parser.add_argument("--times", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    # Set by horovodrun, over Gloo and over MPI.
    if {"HOROVOD_RANK", "OMPI_COMM_WORLD_RANK"} & os.environ.keys():
        parts = [measure_here(options.rounds)]
    else:
        parts = measure_links()
    for part in parts:
        if options.times and part:
            options.times.write_text(json.dumps(part))
            continue
        # Rank 1 has measured nothing.
        for link, found in part.items():
            _results.add_json(options.output, link, summary(*found))
            print(markdown(json.loads(options.output.read_text())))


if __name__ == "__main__":
    main()
