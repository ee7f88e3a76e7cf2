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
In a round, all ways take turns. They take 20 and 5 minutes on
2 cores, by a guess.
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
LINKS = {"not limited": 9, "1gbit": 9, "40mbit": 3}
IMAGE_SIZE, MICRO_BATCH = 64, 16
# The argument `groups` of a `DistributedOptimizer`.
GROUPS = {"one group": 1, "default": None, "each alone": 161}
# Time limit of the ranks on one link, in seconds.
TIME_LIMIT_S = 1800


def measure_here(rounds):
    """Returns `{link: seconds of each way}` on rank 0 of two."""
    import horovod_recipes.keras as hvd
    from benchmarks.speed import _ranks

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
        times = {name: [] for name in updates}
        for update in updates.values():
            update()  # Compiles.
        for _ in range(rounds):
            for name, update in updates.items():
                hvd.allreduce(0.0, name="meet")
                begin = time.perf_counter()
                update()
                times[name].append(time.perf_counter() - begin)
        library = "MPI" if hvd.mpi_enabled() else "Gloo"
        return {f"one machine, {library}": times} if hvd.rank() == 0 else {}


def measure_links():
    """Yields `{link: seconds of each way}` for each link between two hosts."""
    from tests.cluster.hosts import Cluster

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


def summary(times):
    """Returns the milliseconds of each way, and beside one group."""
    base = times["one group"]
    return {
        "machine": _measure.machine(),
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
        for link, times in part.items():
            _results.add_json(options.output, link, summary(times))
            print(markdown(json.loads(options.output.read_text())))


if __name__ == "__main__":
    main()
