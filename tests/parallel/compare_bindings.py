"""Compares the promises that Horovod's binding and ours keep on Keras 3.

    python -m tests.parallel.compare_bindings

It tries each promise with both bindings, on two ranks, and writes
docs/results/upstream_binding.json. Each trial is a job with a time limit,
because a trial of Horovod's binding may crash or hang.
"""

import argparse
import importlib
import json
import pathlib
import platform
import subprocess
import sys
import tempfile

from tests.parallel.promises import BINDINGS
from tests.parallel.promises import PROMISES

RESULTS = pathlib.Path("docs/results/upstream_binding.json")
HOROVODRUN = pathlib.Path(sys.executable).with_name("horovodrun")
# Seconds that a trial may take.
TIME_LIMIT_S = 90
# Exit statuses of `timeout` when a job has reached its limit.
TIMED_OUT = (124, 137)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--on-this-rank",
        nargs=3,
        metavar=("PROMISE", "BINDING", "FOLDER"),
        help="try one promise; horovodrun starts this on each rank",
    )
    arguments = parser.parse_args()
    if arguments.on_this_rank:
        promise, binding, folder = arguments.on_this_rank
        try_on_this_rank(promise, binding, pathlib.Path(folder))
    else:
        compare()


def compare():
    rows = []
    for promise in PROMISES:
        row = {"promise": promise}
        for binding in BINDINGS:
            row[binding] = tried(promise, binding)
            print(f"{promise}, {binding}: {row[binding]}", flush=True)
        rows.append(row)
    result = {"versions": versions(), "ranks": 2, "rows": rows}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


def versions():
    packages = ("horovod", "keras", "tensorflow")
    return {"python": platform.python_version()} | {
        package: importlib.import_module(package).__version__
        for package in packages
    }


def tried(promise, binding):
    """Returns whether two ranks keep a promise, and what was measured."""
    with tempfile.TemporaryDirectory() as folder:
        job = subprocess.run(
            ["timeout", "--kill-after=10", str(TIME_LIMIT_S)]
            + [HOROVODRUN, "--gloo", "-np", "2", sys.executable]
            + ["-m", "tests.parallel.compare_bindings"]
            + ["--on-this-rank", promise, binding, folder],
            capture_output=True,
            text=True,
        )
        results = [
            json.loads(path.read_text())
            for path in sorted(pathlib.Path(folder).glob("*.json"))
        ]
    # A rank that fails ends the job, before the other rank may have a result.
    failed = [result for result in results if not result["kept"]]
    if failed:
        return failed[0]
    if len(results) == 2:
        return results[0]
    if job.returncode in TIMED_OUT:
        return {
            "kept": False,
            "text": f"hangs: no end within {TIME_LIMIT_S} s",
        }
    raise RuntimeError(f"{promise}, {binding}:\n{job.stdout}\n{job.stderr}")


def try_on_this_rank(promise, binding, folder):
    """Writes whether this rank keeps a promise, and what was measured."""
    hvd = BINDINGS[binding]()
    hvd.init()
    try:
        kept, text = PROMISES[promise](hvd)
    except Exception as error:
        kept, text = False, f"{type(error).__name__}: {_gist(error)}"
    path = folder / f"{hvd.rank()}.json"
    path.write_text(json.dumps({"kept": bool(kept), "text": text}))


def _gist(error):
    """Returns the line of a message that says what is wrong."""
    lines = str(error).strip().splitlines() or [""]
    # TensorFlow puts the traceback first in errors of its tracing.
    return lines[-1 if lines[0] == "in user code:" else 0].strip()


if __name__ == "__main__":
    main()
