"""Tables and sentences of the documents agree with the files of results."""

import re
import statistics

import numpy as np
import pytest

from benchmarks.study import trust_ratios
from tests.docs import tables
from tests.docs.tables import read_result


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_results(page):
    """`python -m tests.docs.tables` writes them again."""
    text = page.read_text()
    assert tables.with_tables(text) == text


def test_every_table_is_shown_once():
    found = [
        name
        for page in tables.PAGES
        for name in tables.MARKED.findall(page.read_text())
    ]
    assert sorted(found) == sorted(tables.TABLES)


def study(name, network):
    """Returns `{batch: {recipe: mean top-1}}`."""
    found = {}
    for cell in read_result(name)["cells"]:
        if cell["network"] == network:
            row = found.setdefault(cell["batch"], {})
            row[cell["recipe"]] = cell["mean_top1"]
    return found


def ahead(row, recipe="lars_scaled"):
    """Returns by how many points a recipe is above the better SGD."""
    return row[recipe] - max(row["sgd"], row["sgd_linear"])


def sentences_on_accuracy():
    plain = study("large_batch.json", "alexnet")
    normed = study("large_batch.json", "resnet")
    row = plain[8192]
    best_sgd = max(row["sgd"], row["sgd_linear"])
    up_to_16384 = [normed[batch] for batch in normed if batch <= 16384]
    most = max(ahead(row, recipe) for row in up_to_16384 for recipe in row)
    yield "README.md", f"reaches {row['lars_scaled']:.1f} % top-1"
    yield "README.md", f"around Muon, reaches {row['orscale']:.1f} %"
    yield "README.md", f"the better of two SGD recipes {best_sgd:.1f} %"
    yield "README.md", f"SGD keeps up within {most:.1f} points up to batch 16,"


def sentences_on_large_batches():
    plain = study("large_batch.json", "alexnet")
    normed = study("large_batch.json", "resnet")
    page = "docs/large_batch.md"
    best = {
        (name, batch): max(row, key=row.get)
        for name, rows in (("plain", plain), ("normed", normed))
        for batch, row in rows.items()
    }
    nearest = max(
        max(row.values()) - max(row["sgd"], row["sgd_linear"])
        for row in (normed[256], normed[1024], plain[256])
    )
    assert nearest < 0.05
    yield page, "is within 0.1 points of the best recipe"
    middle = (4096, 8192, 16384)
    assert {best["normed", batch] for batch in middle} == {"lars_scaled"}
    points = [f"{ahead(normed[batch]):.1f}" for batch in middle]
    yield page, f"It is {points[0]}, {points[1]} and {points[2]} points above"
    last = normed[32768]
    assert best["normed", 32768] == "orscale"
    yield (
        page,
        f"It is {ahead(last, 'orscale'):.1f} points above the better SGD, and "
        f"{last['orscale'] - last['lars_scaled']:.1f} above LARS",
    )

    assert {best["plain", b] for b in (1024, 4096)} == {"lars_scaled"}
    points = [f"{ahead(plain[batch]):.0f}" for batch in (1024, 4096)]
    yield page, f"It is {points[0]} and {points[1]} points above the better SGD"
    most = max(
        plain[b]["lars_scaled"] - plain[b]["orscale"] for b in (1024, 4096)
    )
    yield page, f"OrScale is within {most:.1f} points of it."
    large = (8192, 16384, 32768)
    assert {best["plain", batch] for batch in large} == {"orscale"}
    points = [f"{ahead(plain[batch], 'orscale'):.0f}" for batch in large]
    yield (
        page,
        f"It is {points[0]} points above the better SGD at 8,192, {points[1]} "
        f"at 16,384 and {points[2]} at 32,768.",
    )
    points = [f"{ahead(plain[batch]):.0f}" for batch in large]
    yield page, f"is {points[0]}, {points[1]} and {points[2]} points above the"
    assert max(plain[32768].values()) < 70

    assert "lamb" not in best.values()
    above = [ahead(row, "lamb") for batch, row in plain.items() if batch > 256]
    yield page, f"by {min(above):.0f} to {max(above):.0f} points."
    assert max(ahead(row, "lamb") for row in normed.values()) < 0
    below = [
        ahead(row, "lars") < 0
        for rows in (plain, normed)
        for row in rows.values()
    ]
    yield page, f"In {sum(below)} of the {len(below)} cells it is below"
    usual = {batch: f"{ahead(row, 'lars'):.0f}" for batch, row in plain.items()}
    yield (
        page,
        f"it is {usual[8192]} points above it at 8,192, and {usual[16384]} at",
    )
    [cell] = [
        cell
        for cell in read_result("large_batch.json")["cells"]
        if (cell["network"], cell["recipe"], cell["batch"])
        == ("alexnet", "sgd_linear", 1024)
    ]
    yield (
        page,
        f"the rate is {cell['rate']:g} and the mean {cell['mean_top1']:.1f} %.",
    )
    runs = read_result("large_batch.json")["runs"]
    hours = sum(run["seconds"] for run in runs) / 3600
    yield (
        page,
        f"The saved results have {len(runs)} runs, which took {hours:.1f} "
        "hours of one core",
    )


def sentences_on_the_small_setting():
    page = "docs/large_batch.md"
    small = [
        study("large_batch_small.json", name) for name in ("alexnet", "resnet")
    ]
    at_256 = [row[256]["lars_scaled"] - row[256]["sgd_linear"] for row in small]
    at_4096 = [ahead(row[4096]) for row in small]
    yield page, f"it is {at_256[0]:.1f} and {at_256[1]:.1f} points above SGD"
    yield page, f"it is {at_4096[0]:.0f} and {at_4096[1]:.0f} points above the"
    assert all(
        max(cell, key=cell.get) == "orscale"
        for row in small
        for cell in row.values()
    )
    plain, normed = (
        row[4096]["orscale"] - row[4096]["lars_scaled"] for row in small
    )
    yield page, f"it is {plain:.0f} points above the second best without batch"
    yield page, f"norm, and {normed:.0f} points with it."
    tries = [
        run
        for run in read_result("large_batch_small.json")["runs"]
        if (run["network"], run["recipe"]) == ("alexnet", "lars")
        and (run["batch"], run["seed"]) == (4096, 0)
    ]
    best = max(tries, key=lambda run: run["test_top1"])
    yield (
        page,
        f"the best try has {best['test_top1']:.0f} %, at the rate "
        f"{best['rate']:g}.",
    )


def sentences_on_simclr():
    result = read_result("demo_simclr.json")
    yield (
        "docs/simclr.md",
        f"the linear classifier reached {result['linear_top1']} %",
    )
    yield "docs/simclr.md", f"and {result['random_linear_top1']} % on random"
    trials = tables.simclr_trials()
    simclr, labels = (
        [
            trial
            for trial in trials
            if (trial["part"], trial["recipe"]) == ("learning", recipe)
        ]
        for recipe in ("SimCLR", "labels")
    )
    for key, sentence in (
        (
            "linear_top1",
            "SimCLR is {:.1f} points above random weights and {:.1f} below",
        ),
        ("knn_top1", "it is {:.1f} points above and {:.1f} below."),
    ):
        mean, random, of_labels = (
            statistics.mean(trial[name] for trial in found)
            for found, name in (
                (simclr, key),
                (simclr, f"random_{key}"),
                (labels, key),
            )
        )
        yield (
            "docs/simclr.md",
            sentence.format(mean - random, of_labels - mean),
        )


def sentences_on_the_demo():
    lines = (tables.RESULTS / "demo_seeds.jsonl").read_text().splitlines()
    seeds = [tables.json.loads(line)["top1"] for line in lines]
    result = read_result("demo.json")
    yield "README.md", f"is {statistics.mean(seeds):.2f} %"
    yield "README.md", f'"top1": {result["top1"]}'
    yield "docs/training_jobs.md", ", ".join(map(str, seeds)) + " %"
    for page in ("README.md", "docs/training_jobs.md"):
        yield page, f'"global_batch_size": {result["global_batch_size"]}'
    yield (
        "docs/training_jobs.md",
        f'"steps": {result["steps"]}, "epochs": {result["epochs"]}',
    )


def spread(values, digits=2):
    median, low, high = (f"{value:.{digits}f}" for value in values)
    return f"{median} ({low} to {high})"


def sentences_on_speed():
    gloo = {
        line["way"]: line["ratio"][0]
        for line in read_result("allreduce.json")["Gloo, 2 ranks"]["results"]
    }
    yield "README.md", f"takes {gloo['DistributedOptimizer']:.2f} times as long"

    def speed_up(name, key, together="all"):
        lines = read_result(name)[key]["results"]
        return next(
            line["speed_up"][together]
            for line in lines
            if line["accumulation"] == 8
        )

    yield (
        "README.md",
        f"{speed_up('scaling.json', 'MPI, 2 ranks')[0]:.2f} times over MPI, "
        f"and {speed_up('scaling.json', 'Gloo, 2 ranks')[0]:.2f} times",
    )
    page = "docs/performance.md"
    earlier = speed_up("scaling_accumulation_8.json", "Gloo, 2 ranks")
    apart = speed_up("scaling_accumulation_8.json", "Gloo, 2 ranks", "apart")
    yield (
        page,
        f"Gloo had {spread(earlier)}, and ranks without communication "
        f"{spread(apart)}",
    )
    spinning = speed_up("scaling_mpi_spinning.json", "MPI, 2 ranks")
    yield page, f"are only {spread(spinning)} times as fast as one"
    with_xla = next(
        line for line in read_result("xla_step.json")["results"] if line["xla"]
    )
    yield page, f"{spread(with_xla['ratio'])} of the speed without it"
    ratios = read_result("input_pipeline.json")[
        "ratio_to_fused_decode_and_crop"
    ]
    yield (
        "docs/imagenet.md",
        f"The pipeline reaches {ratios['ours, minimal'][0]}.",
    )


def sentences_on_ratios():
    result = read_result("trust_ratios.json")
    page = "docs/optimizer.md"
    lines = result["first_step"]["batches"][-1]["variables"]
    of = {
        kind: {
            line["layer"]: line["ratio"]
            for line in lines
            if line["kind"] == kind
        }
        for kind in ("kernel", "bias")
    }
    lowest, highest = (
        choose(of["kernel"], key=of["kernel"].get) for choose in (min, max)
    )
    yield (
        page,
        f"is {of['kernel'][lowest]:.1f} ({lowest}) to "
        f"{of['kernel'][highest]:.0f} ({highest})",
    )
    biases = [ratio for ratio in of["bias"].values() if ratio]
    yield page, f"zero have {min(biases):.0f} to {max(biases):,.0f}"
    factors = [
        trust_ratios.paper_ratio(line) / line["ratio"]
        for line in lines
        if line["kind"] == "kernel"
    ]
    yield page, f"are {min(factors):.1f} to {max(factors):.0f} times ours"
    course = np.array(list(result["course"]["ratios"].values()))
    spreads = course.max(axis=0) / course.min(axis=0)
    yield page, f"is {min(spreads):.1f} to {max(spreads):.0f} times the lowest"


SENTENCES = [
    *sentences_on_accuracy(),
    *sentences_on_large_batches(),
    *sentences_on_the_small_setting(),
    *sentences_on_the_demo(),
    *sentences_on_simclr(),
    *sentences_on_speed(),
    *sentences_on_ratios(),
]


@pytest.mark.parametrize(("page", "sentence"), SENTENCES)
def test_sentences_are_those_of_the_results(page, sentence):
    text = re.sub(r"\s+", " ", (tables.ROOT / page).read_text())
    assert sentence in text
