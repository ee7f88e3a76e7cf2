"""The short and the full run of the fuzzers, and the file of results."""

import importlib.metadata
import platform
import time

import hypothesis
import pytest

from benchmarks import _results
from tests.fuzz import fuzzing

PACKAGES = ("horovod", "hypothesis", "keras", "ml_collections")

_common = {
    # A job's start takes longer than hypothesis expects of an input.
    "deadline": None,
    "suppress_health_check": list(hypothesis.HealthCheck),
    # Seeds are kept in the file of results, and not in a folder.
    "database": None,
    "print_blob": True,
}
hypothesis.settings.register_profile("short", **_common, derandomize=True)
hypothesis.settings.register_profile("full", **_common)
# The argument --hypothesis-profile=full comes after this.
hypothesis.settings.load_profile("short")

_targets = {}


def pytest_ignore_collect(collection_path):
    """Leaves whole processes out of the short run."""
    is_slow = collection_path.name == "processes_test.py"
    return True if is_slow and not fuzzing.is_full() else None


def pytest_addoption(parser):
    parser.addoption("--fuzz-results", help="JSON file to write after a run")


@pytest.fixture(autouse=True)
def _counted(request):
    fuzzing.counts.clear()
    begin = time.perf_counter()
    yield
    result = {
        "inputs": sum(fuzzing.counts.values()),
        "outcomes": dict(sorted(fuzzing.counts.items())),
        "seconds": round(time.perf_counter() - begin, 1),
    }
    request.node.user_properties.append(("fuzzed", result))


def pytest_runtest_logreport(report):
    """Collects the counts of all processes of pytest-xdist, in the first."""
    if report.when == "teardown":
        results = dict(report.user_properties)
        if "fuzzed" in results:
            _add(_target_of(report.nodeid), results["fuzzed"])


def _target_of(nodeid):
    """Returns for example `"workdir: metrics"`, for all of its parameters."""
    room, test = nodeid.partition("[")[0].split("::")
    room = room.rpartition("/")[2].removesuffix("_test.py")
    return f"{room}: {test.removeprefix('test_').replace('_', ' ')}"


def _add(target, result):
    total = _targets.setdefault(target, {"inputs": 0, "seconds": 0.0})
    for name, count in result["outcomes"].items():
        total[name] = total.get(name, 0) + count
    total["inputs"] += result["inputs"]
    total["seconds"] = round(total["seconds"] + result["seconds"], 1)


def pytest_sessionfinish(session, exitstatus):
    options = session.config.option
    path = getattr(options, "fuzz_results", None)
    if not path or exitstatus or hasattr(session.config, "workerinput"):
        return
    import tensorflow as tf

    total = {
        name: sum(target.get(name, 0) for target in _targets.values())
        for name in ("inputs", fuzzing.RIGHT, fuzzing.ERROR, "seconds")
    }
    result = {
        "command": "make fuzz",
        "seed": options.hypothesis_seed,
        "total": total | {"seconds": round(total["seconds"], 1)},
        "targets": dict(sorted(_targets.items())),
        "versions": {
            "python": platform.python_version(),
            # Its package has several names.
            "tensorflow": tf.__version__,
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
    }
    _results.write_json(path, result, verbose=False)
