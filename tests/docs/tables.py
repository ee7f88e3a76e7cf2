"""The tables of the documents that are made by code.

    python -m tests.docs.tables

writes them again, after a new measurement. A document has the comment
`<!-- table: NAME -->` before each of them.
"""

import json
import pathlib
import re

from benchmarks import _results
from benchmarks.study import large_batch
from horovod_recipes.configs import resnet50
from horovod_recipes.planning import estimate
from horovod_recipes.planning import page

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "docs/results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A comment, and the table or the printed text after it, if there is one.
MARKED = re.compile(
    r"^<!-- table: (\S+) -->\n"
    r"(?:\n?(?:```text\n(?s:.*?)\n```\n|(?:\|.*\n)+))?",
    re.M,
)
# The README shows some rows.
SHORT_PROMISES = (
    "`fit` averages gradients",
    "`DistributedGradientTape` averages",
    "`BroadcastGlobalVariablesCallback`",
    "saved model loads with Keras alone",
    "infinity on one rank, mixed_float16",
)
SHORT_OPTIMIZERS = (
    "torch SGD, fused",
    "Keras SGD momentum, XLA",
    "LARS, XLA",
    "timm Lars, foreach",
    "Keras Lamb, XLA",
    "optax.lars",
)


def read_result(name):
    return json.loads((RESULTS / name).read_text())


def bindings(chosen=None):
    """Returns the table of promises; `chosen` names the rows to show."""
    rows = read_result("upstream_binding.json")["rows"]
    if chosen:
        by_promise = {row["promise"]: row for row in rows}
        rows = [by_promise[promise] for promise in chosen]
    header = [
        "on two ranks",
        "Horovod's own binding",
        "`horovod_recipes.keras`",
    ]
    return _results.table(
        header,
        [
            [row["promise"], kept(row["upstream"]), kept(row["ours"])]
            for row in rows
        ],
    )


def kept(trial):
    return f"{'yes' if trial['kept'] else 'no'}: {trial['text']}"


def optimizer_step(model, chosen):
    """Returns the time of an update for some optimizers, fastest first."""
    lines = read_result("optimizer_step_cpu.json")[model]["results"]
    rows = [
        [
            line["optimizer"],
            _results.cell(line["ms"], ".3g"),
            _results.cell(line["ratio"], ".2f"),
        ]
        for line in lines
        if line["optimizer"] in chosen
    ]
    header = ["optimizer", "ms", "x Keras SGD momentum, XLA"]
    return _results.table(header, rows)


def study(name, network):
    return large_batch.markdown(read_result(name)["cells"], network)


def printed_plan():
    """Returns what the command of docs/plan.md prints."""
    plan = estimate.make_plan(resnet50.get_config("32k"), 256, "a100")
    return f"```text\n{page.as_text(plan, 'resnet50:32k')}\n```"


TABLES = {
    "plan": printed_plan,
    "upstream_binding": bindings,
    "upstream_binding.short": lambda: bindings(SHORT_PROMISES),
    "optimizer_step.short": lambda: optimizer_step(
        "resnet50", SHORT_OPTIMIZERS
    ),
    "large_batch.alexnet": lambda: study("large_batch.json", "alexnet"),
    "large_batch.resnet": lambda: study("large_batch.json", "resnet"),
    "large_batch_small.alexnet": lambda: study(
        "large_batch_small.json", "alexnet"
    ),
    "large_batch_small.resnet": lambda: study(
        "large_batch_small.json", "resnet"
    ),
}


def with_tables(text):
    """Returns the text of a document with all its tables made again."""
    return MARKED.sub(
        lambda match: f"<!-- table: {match[1]} -->\n\n{TABLES[match[1]]()}\n",
        text,
    )


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(with_tables(path.read_text()))
