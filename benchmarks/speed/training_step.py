"""How fast is a training step of ResNet-50, beside tf_keras and PyTorch?

    python -m benchmarks.speed.training_step

It times updates on generated images: ResNet-50 v1 beside that of
`tf_keras.applications`, and v1.5 beside PyTorch, whose layout is channels-last.
Each has a process and an environment of its own; the first run makes those of
the peers. All take SGD with momentum; PyTorch's is fused. In a last row, LARS
takes its place. The processes take turns, and those that wait sleep. It takes
9 minutes on 2 cores, once the environments are there.
"""

import contextlib
import pathlib
import subprocess
import sys

import tensorflow as tf

from benchmarks import _environments
from benchmarks import _measure
from benchmarks import _results

REQUIREMENTS = {
    "tf_keras": [f"tensorflow-cpu=={tf.__version__}", "tf_keras==2.21.0"],
    "pytorch": ["torch==2.13.0", "numpy"],
}
# Networks and their peers; then pixels per side, and threads.
PEERS = {"v1": "tf_keras", "v1.5": "pytorch"}
SETTINGS = ((64, 1), (224, 2))
THIS_PROJECT = ("this_project", "this_project_unfused", "this_project_lars")
MICRO_BATCH = 16


@contextlib.contextmanager
def stepping(python, name, *arguments):
    """Yields a function that takes a step in a process, and returns its time.

    Args:
        python: Path of the Python that runs `_steps.py`.
        name: String, the name of a function there.
        *arguments: Its arguments.
    """
    script = pathlib.Path(__file__).with_name("_steps.py")
    process = subprocess.Popen(
        [python, script, name, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def step():
        process.stdin.write("\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            sys.exit(f"error: the steps of {name} failed")
        return float(line)

    try:
        yield step
    finally:
        process.kill()
        process.wait()


def measure(version, image_size, threads, rounds):
    """Returns the result of one network at one size."""
    peer = PEERS[version]
    pythons = {peer: _environments.python_of(peer, REQUIREMENTS[peer])}
    pythons |= dict.fromkeys(THIS_PROJECT, sys.executable)
    with contextlib.ExitStack() as stack:
        steps = {
            name: stack.enter_context(
                stepping(
                    python, name, version, image_size, MICRO_BATCH, threads
                )
            )
            for name, python in pythons.items()
        }
        for step in steps.values():
            step()  # Compiles.
        times = {name: [] for name in steps}
        for _ in range(rounds):
            for name, step in steps.items():
                step()  # The caches hold another process's data.
                times[name].append(step())
    return {
        "version": version,
        "peer": peer,
        "image_size": image_size,
        "threads": threads,
        "steps": {
            name: {
                "images_per_second": _measure.spread(
                    [MICRO_BATCH / s for s in seconds]
                ),
                "ratio": _measure.spread_of_ratios(times[peer], seconds),
            }
            for name, seconds in times.items()
        },
    }


def markdown(result):
    rows = [
        [
            f"{part['image_size']} x {part['image_size']}, "
            f"{part['threads']} thread{'s' * (part['threads'] > 1)}",
            part["version"],
            name.replace("_", " ") if name in THIS_PROJECT else name,
            _results.cell(line["images_per_second"], ".2f"),
            _results.cell(line["ratio"], ".2f"),
        ]
        for part in result["results"]
        for name, line in part["steps"].items()
    ]
    header = ["", "ResNet-50", "", "images/s", "x peer"]
    return _results.table(header, rows)


def main():
    parser = _results.parser(
        __spec__, __doc__, "docs/results/training_step.json"
    )
    _results.add_rounds(parser, 7)
    options = parser.parse_args()
    result = {
        "machine": _measure.machine(),
        "peers": REQUIREMENTS,
        "micro_batch": MICRO_BATCH,
        "rounds": options.rounds,
        "results": [],
    }
    for setting in SETTINGS:
        for version in PEERS:
            part = measure(version, *setting, options.rounds)
            result["results"].append(part)
            print(markdown(result), flush=True)
            _results.write_json(options.output, result)


if __name__ == "__main__":
    main()
