"""What does SimCLR learn on Fashion-MNIST, and how does the batch matter?

    python -m benchmarks.study.simclr

It takes 80 minutes on 2 cores. It downloads Fashion-MNIST, and trains by
`horovodrun` on two ranks, with the packaged config `simclr:fashion_mnist`:

- Learning: SimCLR, and the same network with labels, over three seeds. Beside
  them is the same network with random weights.
- Batch: a shorter training at each global batch. The rate of LARS follows the
  batch linearly or by the square root, and that of SGD linearly.

`horovod_recipes.evaluate --fixed_features` evaluates every network in the same
way. Each trial is saved in a JSON file when it ends, and a study that was
stopped resumes from this file. To print the tables from it:

    python -m benchmarks.study.simclr --report
"""

import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

from benchmarks import _measure
from benchmarks import _results
from benchmarks.study import fashion_mnist
from horovod_recipes.configs import simclr as recipes
from keras_lars.schedules import scale_learning_rate

CONFIG = "simclr:fashion_mnist"
RANKS = 2
SEEDS = (0, 1, 2)
# What the training with labels changes: crops and flips without distortions,
# and the rate.
LABELS = {
    "task": "classification",
    "dataset.augmentation": "large_crop",
    "schedule.peak_learning_rate": 8.0,
}
EPOCHS = {"learning": 8, "batch": 2}
WARMUP_EPOCHS = 1
# The batch from which the rates are scaled.
BASE_BATCH = 1024
# In the order in which they run.
BATCHES = (BASE_BATCH, 4096, 256)
# The rate of each optimizer at `BASE_BATCH`, which other batches scale.
RATES = {"lars": 32.0, "sgd": 1.0}
# Optimizer and rule of each recipe of the batch part.
RECIPES = {
    "LARS, linear": ("lars", "linear"),
    "LARS, square root": ("lars", "sqrt"),
    "SGD, linear": ("sgd", "linear"),
}
# Time limit of each command, in seconds.
TIME_LIMIT_S = 3600


@dataclasses.dataclass(frozen=True)
class Trial:
    """A training and its evaluation.

    Attributes:
        part: `"learning"` or `"batch"`.
        recipe: `"SimCLR"` or `"labels"`; or `"lars"` or `"sgd"`, for SimCLR.
        batch: Integer, the global batch.
        rate: Float, the highest learning rate.
        epochs: Integer.
        seed: Integer.
    """

    part: str
    recipe: str
    batch: int
    rate: float
    epochs: int
    seed: int

    @property
    def name(self):
        what = f"{self.part}-{self.recipe}-{self.batch}"
        return f"{what}-{self.rate:g}-{self.seed}".lower()


def trials():
    """Returns all trials, in the order in which they run."""
    config = recipes.get_config("fashion_mnist")
    rates = {
        "SimCLR": config.schedule.peak_learning_rate,
        "labels": LABELS["schedule.peak_learning_rate"],
    }
    found = [
        Trial(
            *("learning", recipe, config.global_batch_size, rate),
            *(EPOCHS["learning"], seed),
        )
        for seed in SEEDS
        for recipe, rate in rates.items()
    ]
    cells = [
        (optimizer, batch, scaled_rate(optimizer, rule, batch))
        for batch in BATCHES
        for optimizer, rule in RECIPES.values()
    ]
    # At the base batch, both rules give the same cell.
    return found + [
        Trial("batch", *cell, EPOCHS["batch"], seed=0)
        for cell in dict.fromkeys(cells)
    ]


def scaled_rate(optimizer, rule, batch):
    return scale_learning_rate(RATES[optimizer], batch, BASE_BATCH, rule)


def changes_of(trial):
    """Returns the values of the config's keys that a trial changes."""
    changes = {
        "seed": trial.seed,
        "epochs": trial.epochs,
        "schedule.warmup_epochs": WARMUP_EPOCHS,
    }
    if trial.recipe == "labels":
        changes |= LABELS
    if trial.part == "batch":
        changes |= {
            "global_batch_size": trial.batch,
            "optimizer_name": trial.recipe,
            "schedule.peak_learning_rate": trial.rate,
        }
    return changes


def commands_of(trial, folder):
    """Returns the two commands of a trial, to train and to evaluate."""
    launcher = f"horovodrun --gloo -np {RANKS} python -m horovod_recipes"
    workdir = f"--workdir={folder / trial.name}"
    flags = [f"--config.{key}={v}" for key, v in changes_of(trial).items()]
    train = [f"{launcher}.train --config={CONFIG}", workdir, "--overwrite"]
    evaluate = [f"{launcher}.evaluate", workdir, "--fixed_features"]
    if (trial.part, trial.recipe) == ("learning", "SimCLR"):
        evaluate.append("--with_random_weights")
    return " ".join(train + flags), " ".join(evaluate)


def run(trial, folder):
    """Trains and evaluates; returns the result."""
    seconds = []
    commands = commands_of(trial, folder)
    for command in commands:
        begin = time.perf_counter()
        launch(command)
        seconds.append(round(time.perf_counter() - begin, 1))
    workdir = folder / trial.name
    summary, evaluation = (
        json.loads((workdir / f"{name}.json").read_text())
        for name in ("summary", "evaluation")
    )
    return dataclasses.asdict(trial) | {
        "commands": commands,
        "updates": summary["steps"],
        # By the probe that trained beside the encoder, or by its own logits.
        "own_top1": summary["top1"],
        **{k: v for k, v in evaluation.items() if k.endswith("_top1")},
        "training_seconds": seconds[0],
        "evaluation_seconds": seconds[1],
    }


def launch(command):
    """Runs a command of this Python's environment, or ends this process."""
    folder = pathlib.Path(sys.executable).parent
    words = [
        str(folder / word) if word in ("python", "horovodrun") else word
        for word in command.split()
    ]
    # The limit of `subprocess` would leave the ranks running.
    limited = ["timeout", "--kill-after=30", str(TIME_LIMIT_S), *words]
    environment = {"TF_ENABLE_ONEDNN_OPTS": "1"} | os.environ
    if subprocess.run(limited, env=environment, check=False).returncode != 0:
        sys.exit(f"error: failed: {command}")


def study(path, folder, run=run):
    """Runs the trials that the file at `path` lacks, and adds each.

    Args:
        path: The JSON file.
        folder: `pathlib.Path`, the folder of the work folders.
        run: Function of a trial and `folder` that returns the result.

    Returns:
        List of results, in the order of `trials()`.
    """
    results = read_results(path)
    for trial in trials():
        if trial not in results:
            results[trial] = run(trial, folder)
            write_results(path, results)
            print(json.dumps(results[trial]), flush=True)
    return list(results.values())


def read_results(path):
    """Returns `{trial: result}` from the file, which may be missing."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    if found["setting"] != setting():
        sys.exit(
            f"error: {path} has trials of another setting: pass another "
            "--output, or remove the file"
        )
    names = [field.name for field in dataclasses.fields(Trial)]
    return {
        Trial(**{name: result[name] for name in names}): result
        for result in found["trials"]
    }


def setting():
    """Returns what all trials depend on, as JSON."""
    values = {
        "config": recipes.get_config("fashion_mnist").to_dict(),
        "ranks": RANKS,
        "labels": LABELS,
        "warmup_epochs": WARMUP_EPOCHS,
    }
    return json.loads(json.dumps(values))


def write_results(path, results):
    content = {
        "command": f"python -m {__spec__.name}",
        "machine": _measure.machine(),
        "setting": setting(),
        "trials": list(results.values()),
    }
    _results.write_json(path, content, verbose=False)


def learning_table(results):
    """Returns the table of networks: mean, lowest and highest top-1."""
    found = [result for result in results if result["part"] == "learning"]
    simclr, labels = (
        [result for result in found if result["recipe"] == recipe]
        for recipe in ("SimCLR", "labels")
    )
    lines = {
        "random weights": (simclr, "random_", None),
        "SimCLR": (simclr, "", None),
        "labels": (labels, "", "own_top1"),
    }
    rows = [
        [
            name,
            spread([r[f"{prefix}linear_top1"] for r in of_name]),
            spread([r[f"{prefix}knn_top1"] for r in of_name]),
            spread([r[own] for r in of_name]) if own else "",
        ]
        for name, (of_name, prefix, own) in lines.items()
        if of_name
    ]
    header = ["network", "linear, %", "nearest neighbours, %", "own logits, %"]
    return _results.table(header, rows)


def spread(values):
    """Returns the text of the mean, and of the lowest and highest value."""
    mean = statistics.mean(values)
    return f"{mean:.1f} ({min(values):.1f} to {max(values):.1f})"


def batch_table(results):
    """Returns the table of batches, by the linear classifier."""
    found = {
        (result["recipe"], result["batch"], result["rate"]): result
        for result in results
        if result["part"] == "batch"
    }
    rows = []
    for batch in sorted(BATCHES):
        row = [f"{batch:,}"]
        for optimizer, rule in RECIPES.values():
            rate = scaled_rate(optimizer, rule, batch)
            result = found.get((optimizer, batch, rate))
            row.append(
                f"{result['linear_top1']:.1f} at {rate:g}"
                if result
                else "not run"
            )
        rows.append(row)
    return _results.table(["batch", *RECIPES], rows)


def main():
    parser = _results.parser(
        __spec__, __doc__, "docs/results/simclr_fashion_mnist.json"
    )
    parser.add_argument(
        "--folder",
        type=pathlib.Path,
        default=pathlib.Path("runs/study_simclr"),
        help="folder of the runs (default: %(default)s)",
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="train nothing; report on the saved trials",
    )
    options = parser.parse_args()
    if options.report:
        results = list(read_results(options.output).values())
    else:
        fashion_mnist.prepare()
        results = study(options.output, options.folder)
    print(learning_table(results))
    print()
    print(batch_table(results))


if __name__ == "__main__":
    main()
