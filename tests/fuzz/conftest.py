"""The short and the full run of the fuzzers, and the file of results."""

import collections
import importlib.metadata
import platform
import time

import hypothesis
import pytest

from benchmarks import _results
from tests.fuzz import fuzzing

PACKAGES = ("hypothesis", "horovod", "keras", "ml_collections", "tensorflow")

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
            name = report.nodeid.removeprefix("tests/fuzz/")
            _targets[name.replace("_test.py::test_", ": ")] = results["fuzzed"]


def pytest_sessionfinish(session, exitstatus):
    options = session.config.option
    path = getattr(options, "fuzz_results", None)
    if not path or exitstatus or hasattr(session.config, "workerinput"):
        return
    outcomes = collections.Counter()
    for target in _targets.values():
        outcomes.update(target["outcomes"])
    result = {
        "command": "make fuzz",
        "seed": options.hypothesis_seed,
        "inputs": sum(outcomes.values()),
        "outcomes": dict(sorted(outcomes.items())),
        "seconds": round(sum(t["seconds"] for t in _targets.values()), 1),
        "targets": dict(sorted(_targets.items())),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
    }
    _results.write_json(path, result, verbose=False)
