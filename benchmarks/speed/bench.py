"""Runs the benchmarks of speed, and writes one page of what they measured.

    python -m benchmarks.speed.bench
    python -m benchmarks.speed.bench --report

The first takes half an hour on two cores, which should have nothing else to do;
the second only writes the page anew. The page, docs/results/report.md, has the
machine, the versions, and of each benchmark its question, its commands, its
tables and its figure, from the JSON that it has written.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys
import types

from absl import flags

from benchmarks.speed import allreduce
from benchmarks.speed import input_pipeline
from benchmarks.speed import optimizer_step
from benchmarks.speed import report
from benchmarks.speed import scaling

# Of its own, because tests import all benchmarks into one process.
FLAGS = flags.FlagValues()
_REPORT = flags.DEFINE_bool(
    "report", False, "Measure nothing: write the page.", flag_values=FLAGS
)
_DOCS = flags.DEFINE_string(
    "docs", "docs", "The folder of results/ and images/.", flag_values=FLAGS
)
# Seconds, of a command.
TIME_LIMIT = 1800


@dataclasses.dataclass(frozen=True)
class Benchmark:
    module: types.ModuleType
    result: str
    launchers: tuple = ("",)

    @property
    def name(self):
        return self.module.__name__.rpartition(".")[2]

    def commands(self):
        return [
            f"{launcher}python -m {self.module.__name__}"
            for launcher in self.launchers
        ]


GLOO = "horovodrun --gloo -np 2 "
MPI = "horovodrun --mpi -np 2 "
BENCHMARKS = (
    Benchmark(optimizer_step, "optimizer_step_cpu.json"),
    Benchmark(allreduce, "allreduce.json", (GLOO, MPI)),
    Benchmark(input_pipeline, "input_pipeline.json"),
    Benchmark(scaling, "scaling.json", (GLOO, MPI)),
)


def run_all():
    import horovod_recipes.keras as hvd

    for benchmark in BENCHMARKS:
        for command in benchmark.commands():
            if command.startswith(MPI) and not hvd.mpi_built():
                print(f"skipped, as Horovod was built without MPI: {command}")
                continue
            print(f"\n$ {command}", flush=True)
            run(command)


def run(command):
    """Runs a command with this Python and its scripts; ends all it started."""
    folder = str(pathlib.Path(sys.executable).parent)
    words = [
        f"{folder}/{word}" if word in ("python", "horovodrun") else word
        for word in command.split()
    ]
    # Not `subprocess`'s own limit, which leaves the ranks running.
    limited = ["timeout", "--kill-after=10", str(TIME_LIMIT), *words]
    if subprocess.run(limited, check=False).returncode != 0:
        sys.exit(f"error: failed: {command}")


def page(docs):
    """Returns the Markdown of all results, and draws their figures."""
    sections = ["# What is measured of speed"]
    for benchmark in BENCHMARKS:
        result = json.loads((docs / "results" / benchmark.result).read_text())
        image = docs / "images" / f"{benchmark.name}.png"
        benchmark.module.draw(result, image)
        question = benchmark.module.__doc__.partition("\n")[0]
        sections += [
            f"## {question}",
            "\n".join(f"    {command}" for command in benchmark.commands()),
            machines(result),
            benchmark.module.markdown(result),
            f"![{question}](../images/{image.name})",
            f"[{benchmark.result}]({benchmark.result})",
        ]
    sections.insert(
        1,
        "Written by `make bench`. In a round of a benchmark all that it "
        "compares take turns; medians are followed by quartiles. How each is "
        "measured is in the docstring of its module in "
        "[benchmarks](../../horovod_recipes/benchmarks).",
    )
    return "\n\n".join(sections) + "\n"


def machines(result):
    """Returns a line for each machine that a file of results is from."""
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
    report.parse_command_line(FLAGS)
    docs = pathlib.Path(_DOCS.value)
    if not _REPORT.value:
        run_all()
    path = docs / "results" / "report.md"
    path.write_text(page(docs))
    print(f"written: {path}")


if __name__ == "__main__":
    main()
