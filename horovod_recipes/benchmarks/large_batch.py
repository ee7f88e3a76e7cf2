"""Where does LARS hold the accuracy at large batches, and where does SGD?

    python -m horovod_recipes.benchmarks.large_batch --setting=small
    python -m horovod_recipes.benchmarks.large_batch

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

    python -m horovod_recipes.benchmarks.large_batch --report

and a cell of it is repeated, and compared, by

    python -m horovod_recipes.benchmarks.large_batch --again=alexnet,lars,8192
"""

import concurrent.futures
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import pathlib
import statistics
import sys
import time

import keras
import numpy as np
from absl import flags
from keras import layers

from horovod_recipes.benchmarks import fashion_mnist
from horovod_recipes.benchmarks import report
from keras_lars import LARS
from keras_lars.schedules import WarmupPolynomialDecay
from keras_lars.schedules import scale_learning_rate

MICRO_BATCH = 256
VALIDATION_IMAGES = 5000
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
# Of rates that follow each other in a search.
FACTOR = 3
# The rate is too high then, or, where there are few updates, too low.
WHILE_NOTHING_IS_LEARNED = (0, -2, -1, -4)
# Top-1, in percent, up to which a network only guesses; 10 by chance.
LEARNED = 20


@dataclasses.dataclass(frozen=True)
class Recipe:
    title: str
    # At batch 256; a search begins there.
    first_rate: float
    # How the first rate to try follows from the best one at a smaller batch.
    scaling: str | None
    # Whether the rate warms up and decays; else it is fixed.
    scheduled: bool
    # Arguments of LARS.
    arguments: dict


# SGD is LARS that adapts no variable, so that all else is the same code.
SGD = {"exclude_from_layer_adaptation": [".*"]}
RECIPES = {
    "sgd": Recipe("SGD, fixed rate", 0.03, None, False, SGD),
    "sgd_linear": Recipe(
        "SGD, linear scaling, warm-up", 0.03, "linear", True, SGD
    ),
    "lars": Recipe("LARS, usual exclusions", 2.0, "sqrt", True, {}),
    "lars_scaled": Recipe(
        "LARS, unadapted_scale 0.003",
        2.0,
        "sqrt",
        True,
        {"unadapted_scale": 0.003},
    ),
}


@dataclasses.dataclass(frozen=True)
class Setting:
    batches: tuple
    epochs: int
    warmup_epochs: int
    training_images: int
    tries: int
    seeds: int


SETTINGS = {
    "full": Setting(
        # What matters most is there first.
        batches=(256, 8192, 32768, 1024, 4096, 16384),
        epochs=10,
        warmup_epochs=2,
        training_images=60_000 - VALIDATION_IMAGES,
        tries=4,
        seeds=3,
    ),
    "small": Setting(
        batches=(256, 4096),
        epochs=3,
        warmup_epochs=1,
        training_images=20_000,
        tries=3,
        seeds=2,
    ),
}


@dataclasses.dataclass(frozen=True)
class Run:
    network: str
    recipe: str
    batch: int
    rate: float
    seed: int


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


def small_alexnet(seed):
    """Returns five convolutions and three dense layers, without batch norm."""
    initializers = seeded_initializers(seed)

    def convolution(x, filters, size, strides=1):
        return layers.Conv2D(
            filters,
            size,
            strides,
            padding="same",
            activation="relu",
            kernel_initializer=next(initializers),
        )(x)

    def dense(x, units, activation="relu"):
        return layers.Dense(
            units, activation, kernel_initializer=next(initializers)
        )(x)

    inputs = keras.Input((28, 28, 1))
    x = convolution(inputs, 8, 5, strides=2)
    x = convolution(x, 16, 3)
    x = layers.MaxPooling2D(2)(x)
    x = convolution(x, 24, 3)
    x = convolution(x, 24, 3)
    x = convolution(x, 16, 3)
    x = layers.MaxPooling2D(2)(x)
    x = layers.Flatten()(x)
    x = dense(x, 64)
    x = dense(x, 64)
    return keras.Model(inputs, dense(x, 10, activation=None))


def small_resnet(seed):
    """Returns a ResNet of two blocks, with batch norm."""
    initializers = seeded_initializers(seed)

    def convolution(x, filters, size, strides=1):
        x = layers.Conv2D(
            filters,
            size,
            strides,
            padding="same",
            use_bias=False,
            kernel_initializer=next(initializers),
        )(x)
        return layers.BatchNormalization(momentum=0.9)(x)

    def block(x, filters):
        shortcut = convolution(x, filters, 1, strides=2)
        x = layers.ReLU()(convolution(x, filters, 3, strides=2))
        x = layers.Add()([shortcut, convolution(x, filters, 3)])
        return layers.ReLU()(x)

    inputs = keras.Input((28, 28, 1))
    x = layers.ReLU()(convolution(inputs, 8, 3, strides=2))
    x = block(x, 16)
    x = block(x, 32)
    x = layers.GlobalAveragePooling2D()(x)
    logits = layers.Dense(10, kernel_initializer=next(initializers))(x)
    return keras.Model(inputs, logits)


NETWORKS = {"alexnet": small_alexnet, "resnet": small_resnet}
NETWORK_TITLES = {
    "alexnet": "small AlexNet, no batch norm",
    "resnet": "small ResNet, batch norm",
}


def seeded_initializers(seed):
    """Yields He's initializers, each of a seed of its own."""
    for own_seed in np.random.default_rng(seed).integers(2**31, size=100):
        yield keras.initializers.HeNormal(int(own_seed))


class MicroBatches(keras.utils.PyDataset):
    """The micro-batches of whole updates, from shuffled epochs, end to end."""

    def __init__(self, images, labels, count, seed):
        super().__init__()
        self._images, self._labels, self._count = images, labels, count
        rng = np.random.default_rng(seed)
        epochs = math.ceil(count * MICRO_BATCH / len(images))
        self._order = np.concatenate(
            [rng.permutation(len(images)) for _ in range(epochs)]
        )

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        order = self._order[index * MICRO_BATCH : (index + 1) * MICRO_BATCH]
        return self._images[order], self._labels[order]


@functools.cache
def data(training_images):
    """Returns `{part: (images, labels)}`, with pixels from -1 to 1."""
    (images, labels), (test_images, test_labels) = fashion_mnist.load()
    images, test_images = (
        x.astype("float32") / 127.5 - 1 for x in (images, test_images)
    )
    return {
        "training": (images[:training_images], labels[:training_images]),
        "validation": (
            images[-VALIDATION_IMAGES:],
            labels[-VALIDATION_IMAGES:],
        ),
        "test": (test_images, test_labels),
    }


def make_optimizer(run, setting):
    """Returns the optimizer of a run, and how many updates it is to make."""
    recipe = RECIPES[run.recipe]
    updates = round(setting.epochs * setting.training_images / run.batch)
    rate = run.rate
    if recipe.scheduled:
        warmup = warmup_updates(setting, updates)
        rate = WarmupPolynomialDecay(
            run.rate,
            updates,
            warmup,
            # At 0 the first update would be lost: one of 17 at batch 32K.
            warmup_start_learning_rate=run.rate / max(warmup, 1),
        )
    accumulation = run.batch // MICRO_BATCH
    optimizer = LARS(
        rate,
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
        # Compiling takes longer than it gains on networks as small as these.
        jit_compile=False,
        gradient_accumulation_steps=accumulation if accumulation > 1 else None,
        **recipe.arguments,
    )
    return optimizer, updates


def warmup_updates(setting, updates):
    return round(setting.warmup_epochs / setting.epochs * updates)


def train(run, setting, callbacks=()):
    """Trains one network, and returns a dict of what came out."""
    begin = time.perf_counter()
    keras.backend.clear_session()
    parts = data(setting.training_images)
    model = NETWORKS[run.network](run.seed)
    optimizer, updates = make_optimizer(run, setting)
    model.compile(
        optimizer,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        # On a CPU, TensorFlow's own convolutions are the faster ones.
        jit_compile=keras.backend.backend() != "tensorflow",
    )
    count = updates * run.batch // MICRO_BATCH
    model.fit(
        MicroBatches(*parts["training"], count, run.seed),
        # Keras would shuffle the micro-batches, by a seed of its own.
        shuffle=False,
        verbose=0,
        callbacks=[keras.callbacks.TerminateOnNaN(), *callbacks],
    )
    accuracies = {
        f"{part}_top1": top1(model, *parts[part])
        for part in ("validation", "test")
    }
    return dataclasses.asdict(run) | {
        "updates": updates,
        **accuracies,
        "seconds": round(time.perf_counter() - begin, 1),
    }


def top1(model, images, labels):
    """Returns the accuracy in percent; 0 where the network has diverged."""
    logits = model.predict(images, batch_size=1000, verbose=0)
    if not np.isfinite(logits).all():
        return 0.0
    return round(100 * float(np.mean(logits.argmax(-1) == labels)), 2)


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


def table(cells, network):
    """Returns Markdown: mean, lowest and highest top-1, and the rate."""
    by_place = {(c["batch"], c["recipe"]): c for c in cells_in(cells, network)}
    rows = []
    for batch in sorted({batch for batch, _ in by_place}):
        found = [by_place.get((batch, recipe)) for recipe in RECIPES]
        updates = next(c["updates"] for c in found if c is not None)
        rows.append([batch, updates, *map(cell_text, found)])
    titles = [recipe.title for recipe in RECIPES.values()]
    return report.table(["batch", "updates", *titles], rows)


def cell_text(cell):
    if cell is None:
        return "not run"
    low, high = min(cell["top1"]), max(cell["top1"])
    edge = "*" if cell["rate_at_the_edge"] else ""
    return f"{cell['mean_top1']} ({low} to {high}) at {cell['rate']:g}{edge}"


def cells_in(cells, network):
    return [cell for cell in cells if cell["network"] == network]


def draw(cells, path):
    """Draws accuracy over batch, with the lowest and highest, as a PNG."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(11, 5), layout="constrained")
    panels = figure.subplots(1, len(NETWORKS), sharey=True)
    for axes, (network, title) in zip(
        panels, NETWORK_TITLES.items(), strict=True
    ):
        for index, (recipe, about) in enumerate(RECIPES.items()):
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
    report.save_figure(figure, path)


def print_report(cells):
    for network, title in NETWORK_TITLES.items():
        print(f"\n{title}: top-1, mean (lowest to highest) at the rate; * is")
        print("the highest or lowest rate that was tried\n")
        print(table(cells, network))


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
