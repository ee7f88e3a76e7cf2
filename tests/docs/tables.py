"""The tables of the documents that are made by code.

    python -m tests.docs.tables

writes them again, after a new measurement. A document has the comment
`<!-- table: NAME -->` before each of them.
"""

import collections
import json
import pathlib
import re

from benchmarks import _results
from benchmarks.speed import memory
from benchmarks.speed import simclr
from benchmarks.study import large_batch
from benchmarks.study import simclr as simclr_study
from horovod_recipes.configs import resnet50
from horovod_recipes.planning import estimate
from horovod_recipes.planning import page
from tests.docs import published

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
MANY_RANKS = {
    "seconds_to_first_epoch": "start, to the first epoch, s",
    "requests_to_start": "requests to horovodrun's server, to start",
    "requests_per_second": "the same while training, per second",
    "server_requests_per_second": "requests that the server answers, alone, "
    "per second",
    "seconds_to_end_after_loss": "end, after a host was lost, s",
    "ranks_that_said_why": "ranks that said why",
    "lost_ranks_named": "ranks that they named (8 to 11 were lost)",
    "seconds_to_resume": "start on 12 ranks, to the first epoch, s",
    "top1": "top-1 at the end, %",
    "updates_watched": "updates of two ranks in which memory was watched",
    "rank0_mb_before": "memory of rank 0 before them, MB",
    "rank0_mb_after": "memory of rank 0 after them, MB",
}
FUZZING = ("inputs", "right result", "clear error")


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


def ratios():
    """Returns the table of docs/performance.md: this project beside others."""
    rows = []

    def parts(name, key=None):
        # A row appears when its benchmark has run.
        result = read_result(name) if (RESULTS / name).exists() else {}
        return result.get(key, []) if key else result

    def add(what, beside, ratio, better, command):
        cell = _results.cell(ratio, ".2f")
        module = f"`{command}`"
        rows.append([what, beside, cell, better, module])

    for part in parts("training_step.json", "results"):
        size, threads = part["image_size"], part["threads"]
        add(
            f"images/s, ResNet-50 {part['version']}, {size} x {size}, "
            f"{threads} thread{'s' * (threads > 1)}",
            part["peer"],
            part["steps"]["this_project"]["ratio"],
            "above 1",
            "training_step",
        )
    for ways in dict(parts("job.json", "results")).values():
        milliseconds = ways["bare fit"]["ms"][0]
        add(
            f"speed of a job, updates of {milliseconds:.0f} ms",
            "a bare `fit`",
            ways["job"]["speed"],
            "1",
            "job",
        )
    for link, part in parts("overlap.json").items():
        limit = part["ways"]["no communication"]["ratio"][0]
        add(
            f"time of a step, link {link}",
            "all gradients in one group",
            part["ways"]["default"]["ratio"],
            f"{limit:.2f}, without communication",
            "overlap",
        )
    for model, part in read_result("optimizer_step_cpu.json").items():
        (line,) = (
            line for line in part["results"] if line["optimizer"] == "LARS, XLA"
        )
        add(
            f"time of LARS's update, {model}",
            "SGD of Keras with XLA",
            line["ratio"],
            "below 1",
            "optimizer_step",
        )
    pipeline = read_result("input_pipeline.json")
    add(
        "images/s of the input, the paper's augmentation",
        "fused decode and crop alone",
        pipeline["ratio_to_fused_decode_and_crop"]["ours, minimal"],
        "1",
        "input_pipeline",
    )
    header = ["what", "beside", "ratio", "limit", "benchmarks.speed"]
    return _results.table(header, rows)


def study(name, network):
    return large_batch.markdown(read_result(name)["cells"], network)


def printed_plan():
    """Returns what the command of docs/plan.md prints."""
    plan = estimate.make_plan(resnet50.get_config("32k"), 256, "a100")
    return f"```text\n{page.as_text(plan, 'resnet50:32k')}\n```"


def published_efficiencies():
    """Returns the plan's efficiencies beside published ones."""
    rows = [
        [
            what,
            f"{theirs:.1f}",
            *(f"{ours:.1f}", f"{ours - theirs:+.1f}"),
            *(f"{overlapped:.1f}", f"{overlapped - theirs:+.1f}"),
        ]
        for what, theirs, ours, overlapped in published.efficiencies()
    ]
    header = ["", "published", "no overlap", "error", "overlap", "error"]
    return _results.table(header, rows)


def simclr_step():
    """Returns the ratios of SimCLR's step."""
    rows = [
        [network, *(_results.cell(r, ".2f") for r in part["ratios"].values())]
        for network, part in read_result("simclr_step.json")["results"].items()
    ]
    return _results.table(["network", *simclr.RATIOS], rows)


def simclr_batch():
    """Returns the table of a global batch of 8,192."""
    rows = [
        [
            run["micro_batches"],
            *(f"{loss:.3f}" for loss in run["train_loss"]),
            f"{run['peak_mb']:,}",
        ]
        for run in read_result("simclr_8192.json")["runs"]
    ]
    header = ["micro-batches", "loss, epoch 1", "loss, epoch 2", "peak MB"]
    return _results.table(header, rows)


def fuzzing():
    """Returns the number of inputs of each fuzzer, and how they ended."""
    result = read_result("fuzz.json")
    rows = [
        [name, *(f"{target.get(key, 0):,}" for key in FUZZING)]
        for name, target in [
            *result["targets"].items(),
            ("all", result["total"]),
        ]
    ]
    return _results.table(["fuzzer", *FUZZING], rows)


def chaos():
    """Returns the outcomes of the faults that jobs were given."""
    faults = collections.defaultdict(list)
    for fault in read_result("chaos.json")["faults"]:
        faults[fault["job"], fault["fault"], fault["outcome"]].append(fault)
    rows = [
        [
            *(job, name, len(rows), outcome),
            _results.span([row["seconds"] for row in rows]),
        ]
        for (job, name, outcome), rows in sorted(faults.items(), reverse=True)
    ]
    return _results.table(
        ["job", "fault", "times", "what the job did", "after, s"], rows
    )


def many_ranks():
    """Returns the figures of the job on 16 ranks."""
    result = read_result("many_ranks.json")
    rows = [[text, result[key]] for key, text in MANY_RANKS.items()]
    return _results.table(["16 ranks on 4 hosts", ""], rows)


def simclr_trials():
    return read_result("simclr_fashion_mnist.json")["trials"]


TABLES = {
    "chaos": chaos,
    "fuzz": fuzzing,
    "many_ranks": many_ranks,
    "memory": lambda: memory.markdown(read_result("memory.json")),
    "plan": printed_plan,
    "plan.published": published_efficiencies,
    "ratios": ratios,
    "simclr_8192": simclr_batch,
    "simclr_fashion_mnist.batch": lambda: simclr_study.batch_table(
        simclr_trials()
    ),
    "simclr_fashion_mnist.learning": lambda: simclr_study.learning_table(
        simclr_trials()
    ),
    "simclr_step": simclr_step,
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
