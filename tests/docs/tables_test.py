"""Tables and sentences of the documents agree with the files of results."""

import collections
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


BATCHES = (256, 1024, 4096, 8192, 16384, 32768)


def sentences_on_accuracy():
    plain = study("large_batch.json", "alexnet")
    normed = study("large_batch.json", "resnet")
    row = plain[8192]
    best_sgd = max(row["sgd"], row["sgd_linear"])
    up_to_16384 = [normed[batch] for batch in normed if batch <= 16384]
    most = max(ahead(row, recipe) for row in up_to_16384 for recipe in row)
    yield "README.md", f"reaches {row['lars_scaled']:.1f} % top-1 by LARS with"
    yield "README.md", f"and {row['orscale']:.1f} % by OrScale"
    yield (
        "README.md",
        f"recipes reaches {best_sgd:.1f} %, and plain LARS {row['lars']:.1f} %",
    )
    yield (
        "README.md",
        "Up to batch 16,384, a ResNet with batch norm gains at most "
        f"{most:.1f} points over SGD",
    )


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
    assert max(ahead(row, "lars") for row in normed.values()) < 0

    assert {best["plain", b] for b in (1024, 4096)} == {"lars_scaled"}
    lars, orscale = (
        [f"{ahead(plain[batch], name):.0f}" for batch in (1024, 4096)]
        for name in ("lars_scaled", "orscale")
    )
    yield (
        page,
        f"LARS is {lars[0]} and {lars[1]} points above the better SGD, and "
        f"OrScale {orscale[0]} and {orscale[1]}.",
    )
    large = (8192, 16384, 32768)
    assert {best["plain", batch] for batch in large} == {"orscale"}
    points = [f"{ahead(plain[batch], 'orscale'):.0f}" for batch in large]
    yield (
        page,
        f"It is {points[0]} points above the better SGD at 8,192, {points[1]} "
        f"at 16,384 and {points[2]} at 32,768.",
    )
    assert max(plain[32768].values()) < 70
    points = [f"{ahead(plain[batch]):.0f}" for batch in large]
    yield page, f"is {points[0]}, {points[1]} and {points[2]} points above the"
    above = [ahead(row, "lamb") for batch, row in plain.items() if batch > 256]
    yield page, f"by {min(above):.0f} to {max(above):.0f} points."
    row = plain[32768]
    yield page, f"LAMB is {row['lamb'] - row['lars_scaled']:.0f} points above"
    usual = {batch: ahead(row, "lars") for batch, row in plain.items()}
    assert {batch for batch in usual if usual[batch] > 0} == {8192, 16384}
    yield (
        page,
        f"only at 8,192, by {usual[8192]:.0f} points, and at 16,384, by "
        f"{usual[16384]:.0f}.",
    )


def sentences_on_the_search():
    page = "docs/large_batch.md"
    result = read_result("large_batch.json")
    at_the_edge = collections.Counter(
        cell["recipe"] for cell in result["cells"] if cell["rate_at_the_edge"]
    )
    assert at_the_edge["lars_scaled"] == at_the_edge["lamb"] == 0
    yield page, f"that was tried in {at_the_edge['sgd_linear']} of 12 cells"
    learned = collections.Counter(
        run["batch"]
        for run in result["runs"]
        if (run["network"], run["recipe"], run["seed"])
        == ("alexnet", "sgd_linear", 0)
        and run["validation_top1"] > 20
    )
    assert learned[4096] == learned[8192] == 1
    runs_of = collections.Counter(
        (run["network"], run["recipe"], run["batch"]) for run in result["runs"]
    )
    # Four tries and two more seeds, unless the rate was chosen by all seeds.
    chosen_again = collections.Counter(
        recipe for (_, recipe, _), count in runs_of.items() if count > 6
    )
    assert chosen_again == {"sgd_linear": 4, "sgd": 2, "lars": 2, "lamb": 1}
    [cell] = [
        cell
        for cell in result["cells"]
        if (cell["network"], cell["recipe"], cell["batch"])
        == ("alexnet", "sgd_linear", 1024)
    ]
    yield (
        page,
        f"the rate is {cell['rate']:g} and the mean {cell['mean_top1']:.1f} %.",
    )
    runs = result["runs"]
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
    *sentences_on_the_search(),
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


def test_overlaps_of_the_study_are_those_of_the_page():
    """docs/large_batch.md says where the ranges of seeds overlap."""
    cells = {
        (cell["network"], cell["batch"], cell["recipe"]): cell
        for cell in read_result("large_batch.json")["cells"]
    }

    def overlap(network, batch, recipe, other):
        if other == "better SGD":
            other = max(
                ("sgd", "sgd_linear"),
                key=lambda name: cells[network, batch, name]["mean_top1"],
            )
        a, b = (cells[network, batch, r]["top1"] for r in (recipe, other))
        return max(min(a), min(b)) <= min(max(a), max(b))

    def overlaps(network, recipe, other):
        return {
            batch for batch in BATCHES if overlap(network, batch, recipe, other)
        }

    middle = {4096, 8192, 16384}
    assert overlaps("resnet", "lars_scaled", "better SGD") & middle == {16384}
    assert overlaps("resnet", "lamb", "better SGD") == set(BATCHES)
    assert not overlap("resnet", 32768, "orscale", "better SGD")
    assert not overlap("resnet", 32768, "orscale", "lars_scaled")

    large = {8192, 16384, 32768}
    assert overlaps("alexnet", "lars_scaled", "orscale") >= {1024, 4096}
    assert not overlaps("alexnet", "orscale", "lars_scaled") & large
    assert not overlaps("alexnet", "orscale", "better SGD") & large
    assert overlaps("alexnet", "lars_scaled", "better SGD") & large == {32768}
    assert overlaps("alexnet", "lamb", "better SGD") - {256} == {8192}
    assert not overlap("alexnet", 32768, "lamb", "lars_scaled")
    assert overlaps("alexnet", "lars", "better SGD") >= {8192, 16384}
