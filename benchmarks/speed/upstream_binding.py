"""Which promises of Horovod's Keras binding are kept on Keras 3?

    python -m benchmarks.speed.upstream_binding

tries each with Horovod's own binding and with this one, on two ranks, every
trial as a `horovodrun -np 2` of its own with a time limit. The verdicts are
what `binding_trials` measures: 36 jobs.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

from absl import flags

from benchmarks.speed import report
from benchmarks.speed.binding_trials import BINDINGS
from benchmarks.speed.binding_trials import TRIALS

# Of its own, because tests import all benchmarks into one process.
FLAGS = flags.FlagValues()
_SECONDS = flags.DEFINE_integer(
    "seconds", 90, "Time limit of a trial.", lower_bound=1, flag_values=FLAGS
)
_OUTPUT = flags.DEFINE_string(
    "output",
    "docs/results/upstream_binding.json",
    "JSON to write.",
    flag_values=FLAGS,
)
HOROVODRUN = pathlib.Path(sys.executable).with_name("horovodrun")


def tried(trial, binding, seconds):
    """Runs a trial on two ranks; returns whether it held, and in words."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["timeout", "--kill-after=10", str(seconds)]
        command += [HOROVODRUN, "--gloo", "-np", "2", sys.executable]
        command += ["-m", "benchmarks.speed.binding_trials"]
        job = subprocess.run(
            [*command, trial, binding, folder], capture_output=True, text=True
        )
        paths = sorted(pathlib.Path(folder).glob("*.json"))
        results = [json.loads(path.read_text()) for path in paths]
    # A rank that fails ends the job, and the other may then have no result.
    failed = [result for result in results if not result["kept"]]
    if failed:
        return failed[0]
    if len(results) == 2:
        return results[0]
    if job.returncode in (124, 137):
        return {"kept": False, "text": f"hangs: no end within {seconds} s"}
    raise RuntimeError(f"{trial}, {binding}:\n{job.stdout}\n{job.stderr}")


def main():
    report.parse_command_line(FLAGS)
    rows = []
    for trial in TRIALS:
        verdicts = {}
        for binding in BINDINGS:
            verdicts[binding] = tried(trial, binding, _SECONDS.value)
            print(f"{trial}, {binding}: {verdicts[binding]}", flush=True)
        rows.append({"promise": trial} | verdicts)
    print(as_table(rows))
    result = {"machine": report.machine(), "ranks": 2, "rows": rows}
    report.write_json(_OUTPUT.value, result)


def as_table(rows):
    header = ["on Keras 3", "Horovod's own binding", "horovod_recipes.keras"]
    return report.table(
        header,
        [
            [row["promise"]]
            + [
                f"{'yes' if row[b]['kept'] else 'no'}: {row[b]['text']}"
                for b in BINDINGS
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
