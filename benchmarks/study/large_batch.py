"""Which recipe keeps the accuracy at large batches, and where does SGD?

    python -m benchmarks.study.large_batch --setting=small
    python -m benchmarks.study.large_batch

On 2 cores it takes 15 minutes in the small setting, and 4 to 5 hours in the
full one. With `KERAS_BACKEND=jax` it runs on a GPU if there is one. It
downloads Fashion-MNIST and trains two small networks on it, an AlexNet without
batch norm and a ResNet with it. Each global batch gets the same number of
epochs. The recipes are:

- SGD with momentum at a fixed rate;
- SGD whose rate scales linearly with the batch, after a warm-up (Goyal et al.,
  https://arxiv.org/abs/1706.02677), against which the LARS paper argues;
- LARS with the usual exclusions, the same warm-up and the same decay;
- the same with `unadapted_scale`;
- LAMB and OrScale: `TrustRatio` around Adam and around Muon.

A cell is a network, a recipe and a batch. The same number of tries searches for
the rate of each cell, by the accuracy on 5,000 training images that no run is
trained on. The best rate is then trained with the other seeds. If the seeds
differ by more than 10 points, all rates that were tried are trained with them,
and the rate with the best mean is chosen. The reported accuracy is the one on
the 10,000 test images. A batch consists of micro-batches of 256, whose
gradients are averaged. Batch norm computes its statistics over a micro-batch,
so they do not depend on the batch.

Each run is saved in a JSON file when it ends, and a study that was stopped
resumes from this file. To print the tables and draw the figure from it:

    python -m benchmarks.study.large_batch --report

To train the seeds of a cell again, and compare:

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
import numpy as np

from benchmarks import _measure
from benchmarks import _results
from benchmarks.study import fashion_mnist
from benchmarks.study.training import NETWORK_TITLES
from benchmarks.study.training import NETWORKS
from benchmarks.study.training import RECIPES
from benchmarks.study.training import SETTINGS
from benchmarks.study.training import Run
from benchmarks.study.training import train
from keras_lars.schedules import scale_learning_rate

# Ratio of neighbouring rates in a search.
FACTOR = 3
# Powers of `FACTOR` to try while nothing is learned. The rate is then too high
# or, with few updates, too low.
POWERS_WITHOUT_LEARNING = (0, -2, -1, -4)
# Top-1 in percent up to which a network only guesses; chance is 10.
GUESSING_TOP1 = 20
# Points between the seeds of a cell, above which its rate is chosen by them.
WIDE_SPREAD = 10


def runs_of_chain(network, recipe, setting):
    """Yields the runs of a network and a recipe, and is sent each result."""
    best_rates = {}
    wide = []
    for batch in setting.batches:
        first = first_rate(RECIPES[recipe], batch, best_rates)
        tried = {}
        for _ in range(setting.tries):
            exponent = next_exponent(tried)
            rate = rounded(first * FACTOR**exponent)
            tried[exponent] = yield Run(network, recipe, batch, rate, seed=0)
        chosen = best(tried.values())
        best_rates[batch] = chosen["rate"]
        seeds = [chosen]
        for seed in range(1, setting.seeds):
            seeds.append(
                (yield Run(network, recipe, batch, chosen["rate"], seed))
            )
        if spread_of(seeds) > WIDE_SPREAD:
            others = [r["rate"] for r in tried.values() if r is not chosen]
            wide += [(batch, rate) for rate in others]
    # These come last, and do not change the rates that other batches try.
    for batch, rate in wide:
        for seed in range(1, setting.seeds):
            yield Run(network, recipe, batch, rate, seed)


def spread_of(results):
    top1s = [result["validation_top1"] for result in results]
    return max(top1s) - min(top1s)


def first_rate(recipe, batch, best_rates):
    """Returns the rate to try first, from the best at the smaller batch."""
    if not best_rates:
        return recipe.first_rate
    below = max(known for known in best_rates if known < batch)
    if recipe.scaling is None:
        return best_rates[below]
    return scale_learning_rate(best_rates[below], batch, below, recipe.scaling)


def next_exponent(tried):
    """Returns the power of `FACTOR` to try next.

    Args:
        tried: Dict from each power that was tried, in steps of 1 or 0.5, to
            its result.
    """
    if not tried:
        return 0
    middle = min(k for k in tried if tried[k] is best(tried.values()))
    if score(tried[middle]) == 0:
        return next(k for k in POWERS_WITHOUT_LEARNING if k not in tried)
    up, down = middle + 1, middle - 1
    for exponent in (up, down):
        if exponent not in tried:
            return exponent
    towards_up = score(tried[up]) >= score(tried[down])
    return middle + (0.5 if towards_up else -0.5)


def best(results):
    """Returns the best result of a search."""
    # The smallest of equals: if all diverged, the rates are too high.
    return max(results, key=lambda r: (score(r), -r["rate"]))


def score(result):
    top1 = result["validation_top1"]
    return top1 if top1 > GUESSING_TOP1 else 0


def rounded(rate):
    return float(f"{rate:.3g}")


def study(setting, executor, path, train=train):
    """Trains the runs that the file at `path` lacks, and adds each.

    Args:
        setting: A `Setting`.
        executor: A `concurrent.futures.Executor`, for runs at the same time.
        path: The JSON file.
        train: Function of a run and the setting that returns the result.

    Returns:
        Dict `{run: result}` of all runs.
    """
    results = read_results(path, setting)
    chains = [
        runs_of_chain(network, recipe, setting)
        for network in NETWORKS
        for recipe in RECIPES
    ]
    progress = keras.utils.Progbar(None, unit_name="run")
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
    """Returns an executor of processes with one thread each.

    With one thread, a run gives bit-equal results on one machine.
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
    """Returns `{run: result}` from the file, which may be missing."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    if found["setting"] != as_json(setting):
        sys.exit(
            f"error: {path} has runs of another setting, {found['setting']}: "
            "pass another --output, or remove the file"
        )
    names = [field.name for field in dataclasses.fields(Run)]
    return {
        Run(**{name: result[name] for name in names}): result
        for result in found["runs"]
    }


def write_results(path, setting, results):
    """Writes all runs, and the cells that are complete."""
    content = {
        "command": " ".join(["python -m", __spec__.name, *sys.argv[1:]]),
        "backend": keras.backend.backend(),
        "machine": _measure.machine(),
        "setting": as_json(setting),
        "cells": cells_of(results, setting),
        "runs": list(results.values()),
    }
    _results.write_json(path, content, verbose=False)


def as_json(setting):
    return json.loads(json.dumps(dataclasses.asdict(setting)))


def cells_of(results, setting):
    """Returns the complete cells, in the order of the study.

    The rate of a wide cell is the first choice until all its rates have been
    trained with all seeds.
    """
    cells = []
    for network in NETWORKS:
        for recipe in RECIPES:
            # Follow the search, which depends on the results.
            chain = runs_of_chain(network, recipe, setting)
            by_batch = {}
            run = next_of(chain, None)
            while run in results:
                by_batch.setdefault(run.batch, []).append(results[run])
                run = next_of(chain, results[run])
            length = setting.tries + setting.seeds - 1
            cells += [
                cell(found, setting)
                for found in by_batch.values()
                if len(found) >= length
            ]
    return cells


def cell(results, setting):
    """Returns the summary of a cell from its runs, in their order."""
    by_rate = {}
    for result in results:
        by_rate.setdefault(result["rate"], []).append(result)
    seeds = max(
        (found for found in by_rate.values() if len(found) == setting.seeds),
        key=lambda found: (statistics.mean(map(score, found)), -rate_of(found)),
    )
    top1s = [result["test_top1"] for result in seeds]
    rate, rates = rate_of(seeds), list(by_rate)
    return {name: seeds[0][name] for name in ("network", "recipe", "batch")} | {
        "updates": seeds[0]["updates"],
        "rate": rate,
        "rates_tried": rates,
        "rate_at_the_edge": rate in (min(rates), max(rates)),
        "top1": top1s,
        "mean_top1": round(statistics.mean(top1s), 2),
    }


def rate_of(results):
    return results[0]["rate"]


def repeat(name, setting, executor, path):
    """Trains a cell's seeds again, and exits with 1 if the mean differs."""
    try:
        network, recipe, batch = name.split(",")
        place = network, recipe, int(batch)
    except ValueError:
        sys.exit(f"error: --again={name} is not NETWORK,RECIPE,BATCH")
    cells = cells_of(read_results(path, setting), setting)
    found = [
        c for c in cells if (c["network"], c["recipe"], c["batch"]) == place
    ]
    if not found:
        sys.exit(f"error: {path} has no complete cell {name}")
    (first,) = found
    runs = [Run(*place, first["rate"], seed) for seed in range(setting.seeds)]
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


def print_report(cells):
    for network, title in NETWORK_TITLES.items():
        print(f"\n{title}: top-1 in %, mean (lowest to highest) at the rate.")
        print("* is the highest or lowest rate that was tried.\n")
        print(markdown(cells, network))


def recipes_in(cells):
    """Returns `{name: Recipe}` of the recipes that have cells."""
    names = {cell["recipe"] for cell in cells}
    return {name: about for name, about in RECIPES.items() if name in names}


def markdown(cells, network):
    """Returns a network's table: mean, lowest and highest top-1, and rate."""
    recipes = recipes_in(cells)
    by_place = {(c["batch"], c["recipe"]): c for c in cells_in(cells, network)}
    rows = []
    for batch in sorted({batch for batch, _ in by_place}):
        found = [by_place.get((batch, recipe)) for recipe in recipes]
        updates = next(c["updates"] for c in found if c is not None)
        rows.append([batch, updates, *map(cell_text, found)])
    titles = [recipe.title for recipe in recipes.values()]
    return _results.table(["batch", "updates", *titles], rows)


def cell_text(cell):
    if cell is None:
        return "not run"
    low, high = min(cell["top1"]), max(cell["top1"])
    edge = "*" if cell["rate_at_the_edge"] else ""
    return f"{cell['mean_top1']} ({low} to {high}) at {cell['rate']:g}{edge}"


def cells_in(cells, network):
    return [cell for cell in cells if cell["network"] == network]


def draw(cells, path):
    """Draws mean, lowest and highest top-1 over the batch as a PNG."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(11, 5), layout="constrained")
    panels = figure.subplots(1, len(NETWORK_TITLES), sharey=True)
    for axes, (network, title) in zip(
        panels, NETWORK_TITLES.items(), strict=True
    ):
        for index, (recipe, about) in enumerate(recipes_in(cells).items()):
            line = [
                c for c in cells_in(cells, network) if c["recipe"] == recipe
            ]
            line.sort(key=lambda c: c["batch"])
            lowest, mean, highest = np.transpose(
                [(min(c["top1"]), c["mean_top1"], max(c["top1"])) for c in line]
                or np.empty((0, 3))
            )
            axes.errorbar(
                [c["batch"] for c in line],
                mean,
                [mean - lowest, highest - mean],
                marker="o",
                capsize=3,
                color=f"C{index}",
                label=about.title,
            )
        axes.set_title(title)
        axes.set_xscale("log", base=2)
        ticks = sorted({c["batch"] for c in cells})
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.set_xlabel("global batch")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("top-1 on the test images, %")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3,
    )
    _results.save_figure(figure, path)


def main():
    parser = _results.parser(
        __spec__,
        __doc__,
        None,
        "JSON file to write and to resume from (default: "
        "docs/results/large_batch.json, or runs/large_batch_small.json)",
    )
    parser.add_argument(
        "--picture",
        metavar="FILE",
        help="PNG file to write (default: docs/images/large_batch.png, or "
        "runs/large_batch_small.png)",
    )
    parser.add_argument(
        "--setting",
        choices=SETTINGS,
        default="full",
        help="how much to run (default: full)",
    )
    _results.add_integer(
        parser,
        "workers",
        len(os.sched_getaffinity(0)),
        "runs at a time, with one thread each",
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="train nothing; report on the saved runs",
    )
    parser.add_argument(
        "--again",
        metavar="NETWORK,RECIPE,BATCH",
        help="train the seeds of this cell again, and compare",
    )
    options = parser.parse_args()
    setting = SETTINGS[options.setting]
    # A small run must not replace the documented results.
    output, picture = (
        ("runs/large_batch_small.json", "runs/large_batch_small.png")
        if options.setting == "small"
        else ("docs/results/large_batch.json", "docs/images/large_batch.png")
    )
    path = options.output or pathlib.Path(output)
    if options.again:
        with pool(options.workers) as executor:
            repeat(options.again, setting, executor, path)
        return
    if options.report:
        results = read_results(path, setting)
    else:
        fashion_mnist.fetch()
        with pool(options.workers) as executor:
            results = study(setting, executor, path)
    cells = cells_of(results, setting)
    print_report(cells)
    draw(cells, options.picture or picture)


if __name__ == "__main__":
    main()
