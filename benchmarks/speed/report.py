"""What all benchmarks print and keep: the machine, medians, tables, JSON."""

import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import sys
import time

from absl import flags

PACKAGES = (
    "keras",
    "tensorflow",
    "tensorflow-cpu",
    "jax",
    "jaxlib",
    "optax",
    "torch",
    "timm",
    "numpy",
)


def parse_command_line(flag_values):
    """Sets the flags, or ends the process with what there is to set."""
    try:
        unknown = flag_values(sys.argv)[1:]
        if unknown:
            raise flags.Error(f"unknown arguments: {' '.join(unknown)}")
    except flags.Error as error:
        sys.exit(f"error: {error}\n{flag_values.main_module_help()}")


def machine():
    """Returns what the numbers depend on: processor, cores, versions."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": versions,
    }


def processor():
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def interleaved_times(functions, rounds):
    """Returns `{name: [seconds of each round]}`.

    All functions run in each round, so that what else the machine does falls
    on all of them. Each runs once more before it is timed: the threads of the
    one before are then at rest, and the caches hold its own data.
    """
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            function()
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return times


def spread(values, digits=3):
    """Returns the median and the quartiles."""
    low, _, high = statistics.quantiles(values, n=4)
    median = statistics.median(values)
    return [round(value, digits) for value in (median, low, high)]


def table(header, rows):
    """Returns the lines of a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def cell(values):
    """Returns the text of a median and its quartiles."""
    median, low, high = values
    return f"{median} ({low} to {high})"


def draw_bars(panels, xlabel, path):
    """Draws medians with quartiles, a panel each, as a PNG.

    Args:
        panels: Dict, title to dict of label to `(median, low, high)`.
        xlabel: String.
        path: String or path.
    """
    import matplotlib.figure

    rows = [len(bars) for bars in panels.values()]
    figure = matplotlib.figure.Figure(
        (8, 0.6 + 0.7 * len(rows) + 0.27 * sum(rows)), layout="constrained"
    )
    all_axes = figure.subplots(
        len(rows), squeeze=False, height_ratios=rows, sharex=True
    )[:, 0]
    for axes, (title, bars) in zip(all_axes, panels.items(), strict=True):
        labels = list(bars)[::-1]
        for label in labels:
            median, low, high = bars[label]
            axes.barh(
                label,
                median,
                xerr=[[median - low], [high - median]],
                capsize=3,
                color="tab:blue",
            )
        axes.axvline(1, color="0.3", linewidth=0.8)
        axes.set_title(title, fontsize=10)
    all_axes[-1].set_xlabel(xlabel)
    save_figure(figure, path)


def save_figure(figure, path):
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"written: {path}")


def add_json(path, key, result):
    """Writes `result` into a file whose other keys stay."""
    path = pathlib.Path(path)
    content = json.loads(path.read_text()) if path.exists() else {}
    write_json(path, content | {key: result})


def write_json(path, result):
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {path}")
