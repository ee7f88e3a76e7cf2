"""The large-batch study: recipes, search, and how it resumes."""

import concurrent.futures
import dataclasses
import json
import math
import pathlib
import subprocess

import keras
import numpy as np
import pytest

from benchmarks.study import fashion_mnist
from benchmarks.study import large_batch
from benchmarks.study import training
from benchmarks.study.training import NETWORKS
from benchmarks.study.training import RECIPES
from benchmarks.study.training import SETTINGS
from benchmarks.study.training import MicroBatches
from benchmarks.study.training import Run
from benchmarks.study.training import Setting
from tests.benchmarks.small_data import write_fashion_mnist

pytestmark = pytest.mark.slow

TINY = Setting(
    batches=(256, 512),
    epochs=1,
    warmup_epochs=0,
    training_images=1024,
    tries=2,
    seeds=2,
)


def searched(accuracy, tries):
    """Returns the exponents that a search tries, given `{exponent: top-1}`."""
    tried = {}
    for _ in range(tries):
        exponent = large_batch.next_exponent(tried)
        tried[exponent] = {
            "rate": 3**exponent,
            "validation_top1": accuracy(exponent),
        }
    best = large_batch.best(tried.values())
    return list(tried), next(k for k in tried if tried[k] is best)


@pytest.mark.parametrize(
    ("accuracy", "exponents", "best"),
    [
        (lambda k: 80 - abs(k), [0, 1, -1, 0.5], 0),
        (lambda k: 80 - abs(k - 0.6), [0, 1, 2, 0.5], 0.5),
        (lambda k: 80 - abs(k + 0.6), [0, 1, -1, -2], -1),
        (lambda k: 80 + k, [0, 1, 2, 3], 3),
        # While nothing is learned, the accuracy of guesses does not count.
        (lambda k: 10 + k / 10, [0, -2, -1, -4], -4),
        (lambda k: 0 if k > -2 else 80 + k, [0, -2, -1, -3], -2),
        (lambda k: 0 if k > -1 else 80 + k, [0, -2, -1, -1.5], -1),
        (lambda k: 0 if k != -1 else 80, [0, -2, -1, -0.5], -1),
        (lambda k: 0 if k > -3 else 80 + k, [0, -2, -1, -4], -4),
        (lambda k: 0 if k > 0 else 80 + k, [0, 1, -1, -0.5], 0),
    ],
)
def test_search_follows_what_is_better(accuracy, exponents, best):
    assert searched(accuracy, tries=4) == (exponents, best)


def test_rates_of_a_chain_follow_the_batch():
    """If the first rate is always the best, SGD's scales linearly."""
    setting = dataclasses.replace(TINY, batches=(256, 1024, 8192), tries=3)
    for recipe, rates in {
        "sgd": [0.03, 0.03, 0.03],
        "sgd_linear": [0.03, 0.12, 0.96],
        "lars": [2.0, 4.0, 11.3],
    }.items():
        chain = large_batch.runs_of_chain("alexnet", recipe, setting)
        runs, accuracy = [chain.send(None)], 80
        while runs[-1] is not None:
            accuracy = accuracy - 1 if runs[-1].seed == 0 else 80
            result = {"rate": runs[-1].rate, "validation_top1": accuracy}
            runs.append(large_batch.next_of(chain, result))
        assert len(runs) == 3 * (3 + 1) + 1
        assert [run.rate for run in runs[:-1:4]] == pytest.approx(rates)
        assert [run.seed for run in runs[:4]] == [0, 0, 0, 1]
        assert runs[3] == Run("alexnet", recipe, 256, rates[0], 1)


def test_sgd_is_that_of_keras():
    """One layer without bias, so that the decay can be in the gradient."""
    run = Run("alexnet", "sgd", 256, 0.1, 0)
    optimizer, _ = training.make_optimizer(run, TINY)
    weight = keras.Variable(np.ones((2, 3), "float32"))
    same = keras.Variable(np.ones((2, 3), "float32"))
    sgd = keras.optimizers.SGD(0.1, momentum=training.MOMENTUM)
    rng = np.random.default_rng(0)
    for _ in range(3):
        gradient = rng.normal(size=(2, 3)).astype("float32")
        decay = training.WEIGHT_DECAY * np.array(same)
        optimizer.apply([gradient], [weight])
        sgd.apply([gradient + decay], [same])
    np.testing.assert_allclose(weight, same, rtol=1e-6)
    assert not np.allclose(weight, 1, rtol=0.01)


@pytest.mark.parametrize("recipe", ["lars", "lamb", "orscale"])
def test_rate_warms_up_and_counts_updates(recipe):
    setting = dataclasses.replace(TINY, epochs=10, warmup_epochs=2)
    run = Run("alexnet", recipe, 512, 8.0, 0)
    optimizer, updates = training.make_optimizer(run, setting)
    assert updates == 20
    variable = keras.Variable(np.ones((2, 2), "float32"))
    rates = []
    for _ in range(2 * updates):
        rates.append(float(optimizer.learning_rate))
        optimizer.apply([np.ones((2, 2), "float32")], [variable])
    # Two micro-batches per update; the first rate is not 0.
    assert rates[:10:2] == pytest.approx([2.0, 3.5, 5.0, 6.5, 8.0])
    assert rates[1::2] == rates[::2]
    assert rates[-1] == pytest.approx(8.0 / 16**2)


def test_micro_batches_have_each_image_once_an_epoch():
    images = np.arange(512).reshape(-1, 1, 1, 1)
    batches = MicroBatches(images, images[:, 0, 0, 0], 5, seed=1)
    assert len(batches) == 5
    found = [batches[index] for index in range(5)]
    for x, y in found:
        np.testing.assert_array_equal(x[:, 0, 0, 0], y)
    epochs = [np.concatenate([found[i][1], found[i + 1][1]]) for i in (0, 2)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(512))
    assert not np.array_equal(*epochs)


def test_tensorflow_reads_the_same_batches_and_does_not_tune():
    """A sleeping tuner delayed the end of trainings by half a minute."""
    images = np.arange(512, dtype="float32").reshape(-1, 1, 1, 1)
    batches = MicroBatches(images, np.arange(512) % 10, 3, seed=1)
    dataset = training.without_autotuning(batches)
    assert dataset.options().autotune.enabled is False
    assert int(dataset.cardinality()) == 3
    for found, expected in zip(dataset, batches, strict=True):
        for part, same in zip(found, expected, strict=True):
            np.testing.assert_array_equal(part, same)


def test_a_diverged_network_has_a_top1_of_0():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3)])
    model.set_weights([np.eye(3), np.zeros(3)])
    labels = np.array([0, 1, 2])
    assert training.top1(model, np.eye(3)[[0, 1, 1]], labels) == 66.67
    model.set_weights([np.eye(3), np.full(3, np.nan)])
    assert training.top1(model, np.eye(3), labels) == 0.0


def test_stopped_study_resumes(tmp_path):
    trained = []

    def train(run, setting):
        trained.append(run)
        if len(trained) >= stop_after:
            raise KeyboardInterrupt
        top1 = round(50 + 10 * run.rate % 7 + run.seed, 2)
        return dataclasses.asdict(run) | {
            "updates": 4,
            "validation_top1": top1,
            "test_top1": top1,
        }

    def study():
        with concurrent.futures.ThreadPoolExecutor(1) as executor:
            large_batch.study(TINY, executor, path, train)

    path = tmp_path / "results.json"
    stop_after = 30
    with pytest.raises(KeyboardInterrupt):
        study()
    kept = json.loads(path.read_text())["runs"]
    assert 10 < len(kept) < 30

    stop_after = math.inf
    before = len(trained)
    study()
    all_runs = 2 * len(RECIPES) * 2 * (2 + 1)
    assert len(trained) - before == all_runs - len(kept)
    found = json.loads(path.read_text())
    assert len(found["runs"]) == all_runs
    assert len(found["cells"]) == 2 * len(RECIPES) * 2
    for cell in found["cells"]:
        runs = [
            run
            for run in found["runs"]
            if all(run[k] == cell[k] for k in ("network", "recipe", "batch"))
        ]
        best = max(
            (run for run in runs if run["seed"] == 0),
            key=lambda run: run["validation_top1"],
        )
        assert cell["rate"] == best["rate"]
        assert cell["top1"] == [
            run["test_top1"] for run in runs if run["rate"] == best["rate"]
        ]
        assert cell["mean_top1"] == round(np.mean(cell["top1"]), 2)


def test_wide_cell_is_chosen_by_the_mean_of_its_seeds():
    """The rate that is best with seed 0 fails with the other seeds."""
    setting = dataclasses.replace(TINY, seeds=3)
    top1s = {0.03: [90.0, 10.0, 10.0], 0.09: [88.0, 87.0, 86.0]}
    results = {}
    chain = large_batch.runs_of_chain("alexnet", "sgd", setting)
    run = chain.send(None)
    while run is not None:
        # At the other batch no seed fails.
        top1 = top1s[run.rate][run.seed if run.batch == 256 else 0]
        results[run] = dataclasses.asdict(run) | {
            "updates": 4,
            "validation_top1": top1,
            "test_top1": top1 - 1,
        }
        run = large_batch.next_of(chain, results[run])
    assert len(results) == 2 * (2 + 2) + 2
    wide, other = large_batch.cells_of(results, setting)
    assert (wide["batch"], wide["rate"]) == (256, 0.09)
    assert wide["top1"] == [87.0, 86.0, 85.0]
    assert (other["batch"], other["rate"]) == (512, 0.03)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_learns(data_folder, recipe):
    """So it does on JAX: `without_tensorflow_test`."""
    write_fashion_mnist(data_folder)
    setting = Setting((512,), 20, 2, 1024, 1, 1)
    run = Run("resnet", recipe, 512, RECIPES[recipe].first_rate * 3, 1)
    assert training.train(run, setting)["test_top1"] > 30


CELL = {
    "network": "alexnet",
    "recipe": "lars",
    "batch": 256,
    "updates": 4,
    "rate": 2.0,
    "rates_tried": [2.0, 6.0, 0.667],
    "rate_at_the_edge": False,
    "top1": [89.0, 90.5],
    "mean_top1": 89.75,
}


def test_table_and_picture(tmp_path):
    cells = [CELL, CELL | {"recipe": "sgd", "rate_at_the_edge": True}]
    assert large_batch.markdown(cells, "alexnet").splitlines()[2] == (
        "| 256 | 4 | 89.75 (89.0 to 90.5) at 2* | 89.75 (89.0 to 90.5) at 2 |"
    )
    path = tmp_path / "picture.png"
    large_batch.draw(cells, path)
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("setting", SETTINGS)
def test_committed_cells_are_those_of_the_runs(setting):
    results = pathlib.Path(__file__).parents[2] / "docs/results"
    name = "large_batch" if setting == "full" else "large_batch_small"
    path = results / f"{name}.json"
    runs = large_batch.read_results(path, SETTINGS[setting])
    cells = large_batch.cells_of(runs, SETTINGS[setting])
    assert cells == json.loads(path.read_text())["cells"]
    batches = SETTINGS[setting].batches
    recipes = large_batch.recipes_in(cells)
    assert len(cells) == len(NETWORKS) * len(recipes) * len(batches)


def test_results_of_another_setting_are_refused(tmp_path):
    path = tmp_path / "results.json"
    large_batch.write_results(path, TINY, {})
    assert large_batch.read_results(path, TINY) == {}
    with pytest.raises(SystemExit, match="another setting"):
        large_batch.read_results(path, dataclasses.replace(TINY, epochs=2))


def test_fashion_mnist_is_read_from_its_files(data_folder):
    expected = write_fashion_mnist(data_folder)
    (images, labels), (test_images, test_labels) = fashion_mnist.load()
    assert images.shape == test_images.shape == (1024, 28, 28, 1)
    for found in (labels, test_labels, images[:, ::3, 0, 0].argmax(1)):
        np.testing.assert_array_equal(found, expected)


def test_fashion_mnist_says_where_to_get_it(monkeypatch, data_folder):
    def fail(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(keras.utils, "get_file", fail)
    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(OSError, match="no network; and no network"):
        fashion_mnist.fetch()
    # Nothing is left that looks like the files.
    assert list(data_folder.iterdir()) == []
