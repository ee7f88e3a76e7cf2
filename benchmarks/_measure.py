"""Measuring: times in turns, medians, memory, and the machine."""

import importlib.metadata
import os
import pathlib
import platform
import re
import statistics
import time

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


def interleaved_times(functions, rounds):
    """Returns `{name: [seconds of each round]}`.

    All functions run in each round, so other load on the machine affects all
    of them. Each runs once untimed first: the threads of the previous function
    then rest, and the caches hold the function's own data.
    """
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            function()
            begin = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - begin)
    return times


def spread(values, digits=3):
    """Returns the median and the quartiles."""
    low, _, high = statistics.quantiles(values, n=4)
    median = statistics.median(values)
    return [round(float(value), digits) for value in (median, low, high)]


def spread_of_ratios(values, others):
    """Returns the median and the quartiles of the ratio in each round."""
    return spread([a / b for a, b in zip(values, others, strict=True)])


def memory_bytes(field):
    """Returns the resident memory of this process.

    Args:
        field: `"VmRSS"` for the memory now, `"VmHWM"` for its peak.
    """
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", status).group(1))


def reset_peak_memory():
    """Starts a new peak, without the memory that was freed before."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def machine():
    """Returns what the numbers depend on: processor, cores, versions."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": versions,
    }


def _processor():
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
