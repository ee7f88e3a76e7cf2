"""Where does LARS hold the accuracy at large batches, and where does SGD?

    python -m benchmarks.study.large_batch --setting=small
    python -m benchmarks.study.large_batch

the first in less than 10 minutes on two cores, the second in hours; with
`KERAS_BACKEND=jax`, on a GPU where there is one. It trains two small networks,
an AlexNet without batch norm and a ResNet with it, on Fashion-MNIST, for the
same number of epochs at each global batch, by four recipes:

- SGD with momentum at a fixed rate;
- SGD with a rate that is scaled linearly with the batch, after a warm-up (Goyal
  et al., https://arxiv.org/abs/1706.02677): what the LARS paper argues against;
- LARS with the usual exclusions, the same warm-up and the same decay;
- the same with `unadapted_scale`.

In each cell, of a network, a recipe and a batch, the rate is searched for by
the same number of tries, by the accuracy on 5,000 of the training images, which
none of the runs is trained on. The chosen rate is then trained with two more
seeds. The accuracy that is reported is that on the 10,000 test images. A batch
is made of micro-batches of 256, whose gradients are averaged; batch norm's
statistics are those of a micro-batch, so that all batches have the same.

All runs are kept in a JSON as they end, by which a study that was stopped goes
on. A table and a figure are made of it:

    python -m benchmarks.study.large_batch --report

and a cell of it is repeated, and compared, by

    python -m benchmarks.study.large_batch --again=alexnet,lars,8192
"""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import pathlib
import statistics
import sys

import keras
from absl import flags

from benchmarks.speed import report
from benchmarks.study import fashion_mnist
from benchmarks.study.large_batch_report import draw
from benchmarks.study.large_batch_report import print_report
from benchmarks.study.large_batch_run import NETWORKS
from benchmarks.study.large_batch_run import RECIPES
from benchmarks.study.large_batch_run import SETTINGS
from benchmarks.study.large_batch_run import Run
from benchmarks.study.large_batch_run import train
from keras_lars.schedules import scale_learning_rate

# Of rates that follow each other in a search.
FACTOR = 3
# The rate is too high then, or, where there are few updates, too low.
WHILE_NOTHING_IS_LEARNED = (0, -2, -1, -4)
# Top-1, in percent, up to which a network only guesses; 10 by chance.
LEARNED = 20

# Of its own, because tests import all benchmarks into one process.
FLAGS = flags.FlagValues()
_SETTING = flags.DEFINE_enum(
    "setting", "full", list(SETTINGS), "How much to run.", flag_values=FLAGS
)
_WORKERS = flags.DEFINE_integer(
    "workers",
    len(os.sched_getaffinity(0)),
    "Runs at a time, of one thread each.",
    lower_bound=1,
    flag_values=FLAGS,
)
_REPORT = flags.DEFINE_bool(
    "report", False, "Train nothing: report on the runs.", flag_values=FLAGS
)
_AGAIN = flags.DEFINE_list(
    "again",
    None,
    "NETWORK,RECIPE,BATCH of a cell to train once more and compare.",
    flag_values=FLAGS,
)
_OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "JSON to write and to go on with. Defaults to "
    "docs/results/large_batch.json, or runs/large_batch_small.json.",
    flag_values=FLAGS,
)
_PICTURE = flags.DEFINE_string(
    "picture",
    None,
    "PNG to write. Defaults to docs/images/large_batch.png, or "
    "runs/large_batch_small.png.",
    flag_values=FLAGS,
)


def runs_of_chain(network, recipe, setting):
    """Yields the runs of a network and a recipe; is sent the result of each."""
    best_rates = {}
    for batch in setting.batches:
        first = first_rate(RECIPES[recipe], batch, best_rates)
        tried = {}
        for _ in range(setting.tries):
            exponent = next_exponent(tried)
            rate = rounded(first * FACTOR**exponent)
            tried[exponent] = yield Run(network, recipe, batch, rate, seed=0)
        best_rates[batch] = best(tried.values())["rate"]
        for seed in range(1, setting.seeds):
            yield Run(network, recipe, batch, best_rates[batch], seed)


def first_rate(recipe, batch, best_rates):
    """Returns the rate that follows from the best at the next smaller batch."""
    if not best_rates:
        return recipe.first_rate
    below = max(known for known in best_rates if known < batch)
    if recipe.scaling is None:
        return best_rates[below]
    return scale_learning_rate(best_rates[below], batch, below, recipe.scaling)


def next_exponent(tried):
    """Returns the power of `FACTOR` to try next.

    Args:
        tried: Dict, the result of each power that was tried, in which powers
            follow each other by 1 or 0.5.
    """
    if not tried:
        return 0
    middle = min(k for k in tried if tried[k] is best(tried.values()))
    if score(tried[middle]) == 0:
        return next(k for k in WHILE_NOTHING_IS_LEARNED if k not in tried)
    up, down = middle + 1, middle - 1
    for exponent in (up, down):
        if exponent not in tried:
            return exponent
    towards_up = score(tried[up]) >= score(tried[down])
    return middle + (0.5 if towards_up else -0.5)


def best(results):
    """Returns the best result of a search."""
    # Of equals the smallest: where all diverged, the rates are too high.
    return max(results, key=lambda r: (score(r), -r["rate"]))


def score(result):
    return (
        result["validation_top1"] if result["validation_top1"] > LEARNED else 0
    )


def rounded(rate):
    return float(f"{rate:.3g}")


def study(setting, workers, path):
    """Trains what is not in the file at `path` yet, and adds it as it ends."""
    results = read_results(path, setting)
    chains = [
        runs_of_chain(network, recipe, setting)
        for network in NETWORKS
        for recipe in RECIPES
    ]
    cells = len(chains) * len(setting.batches)
    progress = keras.utils.Progbar(
        cells * (setting.tries + setting.seeds - 1), unit_name="run"
    )
    with pool(workers) as executor:
        waiting = {}

        def advance(chain, result):
            """Starts the chain's next run that has no result."""
            while (run := next_of(chain, result)) is not None:
                result = results.get(run)
                if result is None:
                    waiting[executor.submit(train, run, setting)] = chain, run
                    return

        for chain in chains:
            advance(chain, None)
        progress.update(len(results))
        while waiting:
            done, _ = concurrent.futures.wait(
                waiting, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in done:
                chain, run = waiting.pop(future)
                results[run] = future.result()
                write_results(path, setting, results)
                progress.update(len(results))
                advance(chain, results[run])
    return results


def next_of(chain, result):
    try:
        return chain.send(result)
    except StopIteration:
        return None


def pool(workers):
    """Returns an executor of processes that have one thread each.

    So the same run gives the same result, to the bit, on one machine.
    """
    os.environ |= {
        "TF_NUM_INTRAOP_THREADS": "1",
        "TF_NUM_INTEROP_THREADS": "1",
        # Several processes may share a GPU.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_FLAGS": "--xla_gpu_deterministic_ops=true",
    }
    return concurrent.futures.ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
    )


def read_results(path, setting):
    """Returns `{run: result}` of the file, if there is one."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    if found["setting"] != as_json(setting):
        sys.exit(
            f"error: {path} has runs of another setting, {found['setting']}: "
            "name another --output, or remove it"
        )
    names = [field.name for field in dataclasses.fields(Run)]
    return {
        Run(**{name: result[name] for name in names}): result
        for result in found["runs"]
    }


def write_results(path, setting, results):
    """Writes all runs, and the cells that are complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{path.name}")
    content = {
        "command": " ".join(["python -m", __spec__.name, *sys.argv[1:]]),
        "backend": keras.backend.backend(),
        "machine": report.machine(),
        "setting": as_json(setting),
        "cells": cells_of(results, setting),
        "runs": list(results.values()),
    }
    part.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(part, path)


def as_json(setting):
    return json.loads(json.dumps(dataclasses.asdict(setting)))


def cells_of(results, setting):
    """Returns the complete cells, in the order of the study.

    Those of one network and recipe are found as the study found them, by asking
    for its runs.
    """
    cells = []
    for network in NETWORKS:
        for recipe in RECIPES:
            chain = runs_of_chain(network, recipe, setting)
            found = []
            run = next_of(chain, None)
            while run in results:
                found.append(results[run])
                run = next_of(chain, results[run])
            length = setting.tries + setting.seeds - 1
            for begin in range(0, len(found) - length + 1, length):
                cells.append(cell(found[begin : begin + length], setting))
    return cells


def cell(results, setting):
    """Returns what is reported of a cell, from its runs in their order."""
    tries = results[: setting.tries]
    chosen = best(tries)
    top1s = [r["test_top1"] for r in (chosen, *results[setting.tries :])]
    rates = [t["rate"] for t in tries]
    return {name: chosen[name] for name in ("network", "recipe", "batch")} | {
        "updates": chosen["updates"],
        "rate": chosen["rate"],
        "rates_tried": rates,
        "rate_at_the_edge": chosen["rate"] in (min(rates), max(rates)),
        "top1": top1s,
        "mean_top1": round(statistics.mean(top1s), 2),
    }


def repeat(name, setting, workers, path):
    """Trains a cell's seeds again; exits with 1 where the mean is another."""
    try:
        network, recipe, batch = name
        place = network, recipe, int(batch)
    except ValueError:
        sys.exit(f"error: --again={','.join(name)} is not NETWORK,RECIPE,BATCH")
    cells = cells_of(read_results(path, setting), setting)
    found = [
        c for c in cells if (c["network"], c["recipe"], c["batch"]) == place
    ]
    if not found:
        sys.exit(f"error: {path} has no complete cell {','.join(name)}")
    (first,) = found
    runs = [Run(*place, first["rate"], seed) for seed in range(setting.seeds)]
    with pool(workers) as executor:
        again = [
            result["test_top1"]
            for result in executor.map(train, runs, [setting] * len(runs))
        ]
    spread = max(first["top1"]) - min(first["top1"])
    difference = abs(statistics.mean(again) - statistics.mean(first["top1"]))
    print(f"{place}: {first['top1']}, again: {again}")
    print(f"the means differ by {difference:.2f}; the spread is {spread:.2f}")
    if difference > spread:
        sys.exit("error: not reproduced")


def main():
    report.parse_command_line(FLAGS)
    setting = SETTINGS[_SETTING.value]
    # Results of a try do not belong to the documentation.
    output, picture = (
        ("runs/large_batch_small.json", "runs/large_batch_small.png")
        if _SETTING.value == "small"
        else ("docs/results/large_batch.json", "docs/images/large_batch.png")
    )
    path = pathlib.Path(_OUTPUT.value or output)
    if _AGAIN.value:
        repeat(_AGAIN.value, setting, _WORKERS.value, path)
        return
    if _REPORT.value:
        results = read_results(path, setting)
    else:
        fashion_mnist.fetch()
        results = study(setting, _WORKERS.value, path)
    cells = cells_of(results, setting)
    print_report(cells)
    draw(cells, _PICTURE.value or picture)


if __name__ == "__main__":
    main()
