"""The study of SimCLR: its trials, how it resumes, and its results."""

import collections
import dataclasses
import json
import pathlib

import pytest

from benchmarks.study import simclr
from horovod_recipes.configs import simclr as recipes
from horovod_recipes.configs._check import check_config
from horovod_recipes.training import build
from horovod_recipes.training.job_size import job_size

RESULTS = (
    pathlib.Path(__file__).parents[2] / "docs/results/simclr_fashion_mnist.json"
)
FOLDER = pathlib.Path("runs")


def result_of(trial, folder=FOLDER):
    """Returns a made-up result."""
    return dataclasses.asdict(trial) | {
        "own_top1": 90.0 + trial.seed,
        "linear_top1": 80.0 + trial.seed,
        "knn_top1": 70.0,
        "random_linear_top1": 60.0,
        "random_knn_top1": 50.0,
    }


def test_trials_are_seeds_and_then_batches():
    trials = simclr.trials()
    seeds = collections.defaultdict(list)
    for trial in trials[:6]:
        assert (trial.part, trial.batch) == ("learning", 1024)
        seeds[trial.recipe].append(trial.seed)
    assert seeds == {"SimCLR": [0, 1, 2], "labels": [0, 1, 2]}
    rates = collections.defaultdict(set)
    for trial in trials[6:]:
        assert (trial.part, trial.seed) == ("batch", 0)
        rates[trial.recipe, trial.batch].add(trial.rate)
    lars, sgd = simclr.RATES["lars"], simclr.RATES["sgd"]
    assert rates == {
        ("lars", 256): {lars / 4, lars / 2},
        ("lars", 1024): {lars},
        ("lars", 4096): {lars * 4, lars * 2},
        ("sgd", 256): {sgd / 4},
        ("sgd", 1024): {sgd},
        ("sgd", 4096): {sgd * 4},
    }
    assert len({trial.name for trial in trials}) == len(trials)


@pytest.mark.parametrize("trial", simclr.trials(), ids=lambda t: t.name)
def test_config_of_a_trial_is_valid(trial):
    """A pattern of LARS that matches no variable ended the jobs with labels."""
    config = recipes.get_config("fashion_mnist")
    config.update_from_flattened_dict(simclr.changes_of(trial))
    check_config(config)
    size = job_size(config, simclr.RANKS)
    assert size.global_batch_size == trial.batch
    schedule = build.create_schedule(config, size)
    optimizer = build.create_optimizer(config, schedule)
    network = build.create_network(config, (28, 28, 1))
    optimizer.build(network.trainable_variables)
    highest = max(float(schedule(step)) for step in range(size.steps))
    assert highest == pytest.approx(trial.rate, rel=0.1)
    assert config.task == (
        "classification" if trial.recipe == "labels" else "simclr"
    )


def test_commands_of_a_trial():
    unlabelled, labels, *_, batch = simclr.trials()
    train, evaluate = simclr.commands_of(labels, FOLDER)
    assert train == (
        "horovodrun --gloo -np 2 python -m horovod_recipes.train "
        "--config=simclr:fashion_mnist "
        "--workdir=runs/learning-labels-1024-8-0 --overwrite --config.seed=0 "
        "--config.epochs=8 --config.schedule.warmup_epochs=1 "
        "--config.task=classification --config.dataset.augmentation=large_crop "
        "--config.schedule.peak_learning_rate=8.0"
    )
    assert evaluate == (
        "horovodrun --gloo -np 2 python -m horovod_recipes.evaluate "
        "--workdir=runs/learning-labels-1024-8-0 --fixed_features"
    )
    for trial, expected in ((unlabelled, True), (batch, False)):
        _, evaluate = simclr.commands_of(trial, FOLDER)
        assert evaluate.endswith(" --with_random_weights") == expected


def test_a_failed_command_ends_the_study():
    with pytest.raises(SystemExit, match="failed: python -c exit"):
        simclr.launch("python -c exit(3)")


def test_stopped_study_resumes(tmp_path):
    path = tmp_path / "results.json"
    ran = []

    def run(trial, folder):
        if len(ran) == 4:
            raise KeyboardInterrupt
        ran.append(trial)
        return result_of(trial, folder)

    with pytest.raises(KeyboardInterrupt):
        simclr.study(path, tmp_path, run)
    assert len(json.loads(path.read_text())["trials"]) == 4
    rest = []

    def run_rest(trial, folder):
        rest.append(trial)
        return result_of(trial, folder)

    results = simclr.study(path, tmp_path, run_rest)
    assert ran + rest == simclr.trials()
    assert results == list(map(result_of, simclr.trials()))
    assert json.loads(path.read_text())["trials"] == results


def test_results_of_another_setting_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    simclr.write_results(path, {})
    assert simclr.read_results(path) == {}
    monkeypatch.setattr(simclr, "RANKS", 4)
    with pytest.raises(SystemExit, match="another setting"):
        simclr.read_results(path)


def test_tables():
    results = list(map(result_of, simclr.trials()))
    assert simclr.learning_table(results).splitlines()[2:] == [
        "| random weights | 60.0 (60.0 to 60.0) | 50.0 (50.0 to 50.0) |  |",
        "| SimCLR | 81.0 (80.0 to 82.0) | 70.0 (70.0 to 70.0) |  |",
        "| labels | 81.0 (80.0 to 82.0) | 70.0 (70.0 to 70.0) | "
        "91.0 (90.0 to 92.0) |",
    ]
    rows = simclr.batch_table(results).splitlines()[2:]
    lars, sgd = simclr.RATES["lars"], simclr.RATES["sgd"]
    assert rows[0] == (
        f"| 256 | 80.0 at {lars / 4:g} | 80.0 at {lars / 2:g} | "
        f"80.0 at {sgd / 4:g} |"
    )
    assert rows[1].startswith(f"| 1,024 | 80.0 at {lars:g} | 80.0 at {lars:g}")
    rows = simclr.batch_table(results[:6]).splitlines()[2:]
    assert rows[2] == "| 4,096 | not run | not run | not run |"


def test_committed_results_are_those_of_the_trials():
    results = simclr.read_results(RESULTS)
    trials = simclr.trials()
    assert list(results) == trials
    for trial, result in results.items():
        folder = pathlib.Path("runs/study_simclr")
        assert tuple(result["commands"]) == simclr.commands_of(trial, folder)
