"""Runs the benchmarks of speed, and writes a page of their results.

    python -m benchmarks.report
    python -m benchmarks.report --page_only

The first command needs a machine that does nothing else. The second one only
writes the page again. docs/results/report.md has each
benchmark's question, command, machine, table and figure, from its JSON file.
Benchmarks of MPI need a Horovod built with MPI.
"""

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys
import types

from benchmarks import _results
from benchmarks.speed import allreduce
from benchmarks.speed import allreduce_model
from benchmarks.speed import callbacks
from benchmarks.speed import input_pipeline
from benchmarks.speed import job
from benchmarks.speed import memory
from benchmarks.speed import norm
from benchmarks.speed import optimizer_step
from benchmarks.speed import overlap
from benchmarks.speed import scaling
from benchmarks.speed import simclr
from benchmarks.speed import training_step
from benchmarks.speed import xla_step

DOCS = pathlib.Path("docs")
GLOO = "horovodrun --gloo -np 2 "
MPI = "horovodrun --mpi -np 2 "
# Time limit of each command, in seconds.
TIME_LIMIT_S = 3600


@dataclasses.dataclass(frozen=True)
class Benchmark:
    module: types.ModuleType
    result: str
    launchers: tuple = ("",)

    @property
    def name(self):
        return self.module.__name__.rpartition(".")[2]

    @property
    def question(self):
        return self.module.__doc__.partition("\n")[0]

    @property
    def has_figure(self):
        return hasattr(self.module, "draw")

    def commands(self):
        return [
            f"{launcher}python -m {self.module.__name__}"
            for launcher in self.launchers
        ]


BENCHMARKS = (
    Benchmark(training_step, "training_step.json"),
    Benchmark(job, "job.json", (GLOO,)),
    Benchmark(overlap, "overlap.json", ("", MPI)),
    Benchmark(optimizer_step, "optimizer_step_cpu.json"),
    Benchmark(norm, "norm.json"),
    Benchmark(memory, "memory.json"),
    Benchmark(allreduce, "allreduce.json", (GLOO, MPI)),
    Benchmark(allreduce_model, "allreduce_model.json", (GLOO,)),
    Benchmark(callbacks, "callbacks.json", (GLOO,)),
    Benchmark(input_pipeline, "input_pipeline.json"),
    Benchmark(scaling, "scaling.json", (GLOO, MPI)),
    Benchmark(xla_step, "xla_step.json"),
    Benchmark(simclr, "simclr_step.json", (GLOO,)),
)
INTRODUCTION = (
    "`make bench` writes this page. In each round of a benchmark the compared "
    "functions take turns. Quartiles follow medians. The docstring of each "
    "module in [benchmarks/speed](../../benchmarks/speed) says how it measures."
)


def run_all():
    import horovod_recipes.keras as hvd

    for benchmark in BENCHMARKS:
        for command in benchmark.commands():
            if command.startswith(MPI) and not hvd.mpi_built():
                print(f"skipped, because Horovod has no MPI: {command}")
                continue
            print(f"\n$ {command}", flush=True)
            run(command)


def run(command):
    """Runs a command of this Python's environment, or ends this process."""
    folder = str(pathlib.Path(sys.executable).parent)
    words = [
        f"{folder}/{word}" if word in ("python", "horovodrun") else word
        for word in command.split()
    ]
    # The limit of `subprocess` would leave the ranks running.
    limited = ["timeout", "--kill-after=10", str(TIME_LIMIT_S), *words]
    if subprocess.run(limited, check=False).returncode != 0:
        sys.exit(f"error: failed: {command}")


def page(docs):
    """Returns the Markdown of all results in `docs/results`."""
    sections = ["# Results of the benchmarks of speed", INTRODUCTION]
    for benchmark in BENCHMARKS:
        sections += [
            f"## {benchmark.question}",
            "\n".join(f"    {command}" for command in benchmark.commands()),
            *results(benchmark, docs),
        ]
    return "\n\n".join(sections) + "\n"


def results(benchmark, docs):
    """Returns the Markdown blocks of a benchmark's results."""
    path = docs / "results" / benchmark.result
    if not path.exists():
        return ["Not measured yet."]
    result = json.loads(path.read_text())
    blocks = [machines(result), benchmark.module.markdown(result)]
    if benchmark.has_figure:
        image = f"../images/{benchmark.name}.png"
        blocks.append(f"![{benchmark.question}]({image})")
    return [*blocks, f"[{benchmark.result}]({benchmark.result})"]


def draw_all(docs):
    """Draws the figures of all results into `docs/images`."""
    for benchmark in BENCHMARKS:
        path = docs / "results" / benchmark.result
        if benchmark.has_figure and path.exists():
            image = docs / "images" / f"{benchmark.name}.png"
            benchmark.module.draw(json.loads(path.read_text()), image)


def machines(result):
    """Returns a line with the machines of a file of results."""
    found = [
        part["machine"]
        for part in (result, *result.values())
        if isinstance(part, dict) and "machine" in part
    ]
    lines = [
        f"{machine['processor']}, {machine['cores']} cores, Python "
        f"{machine['python']}, "
        + ", ".join(f"{n} {v}" for n, v in machine["versions"].items())
        for machine in found
    ]
    return "; ".join(dict.fromkeys(lines))


def main():
    parser = argparse.ArgumentParser(
        prog=f"python -m {__spec__.name}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--page_only",
        action="store_true",
        help="measure nothing; write the page and figures from the JSON files",
    )
    options = parser.parse_args()
    if not options.page_only:
        run_all()
    draw_all(DOCS)
    _results.write_text(DOCS / "results" / "report.md", page(DOCS))


if __name__ == "__main__":
    main()
