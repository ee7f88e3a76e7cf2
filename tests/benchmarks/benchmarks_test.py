"""The benchmarks, in small: they run, and report what they measured."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from benchmarks.speed import allreduce
from benchmarks.speed import bench
from benchmarks.speed import input_pipeline
from benchmarks.speed import optimizer_step
from benchmarks.speed import report
from benchmarks.speed import scaling
from benchmarks.speed import upstream_binding

DOCS = pathlib.Path(__file__).parents[2] / "docs"


def test_spread_is_median_and_quartiles():
    assert report.spread([4.0, 1.0, 2.0, 3.0, 5.0]) == [3.0, 1.5, 4.5]


def test_table_is_markdown():
    assert report.table(["a", "b"], [(1, "x")]) == (
        "| a | b |\n| --- | --- |\n| 1 | x |"
    )


def test_bars_are_drawn(tmp_path):
    path = tmp_path / "images" / "bars.png"
    report.draw_bars({"a": {"x": (1.0, 0.5, 2.0)}}, "seconds", path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_results_are_added(tmp_path):
    path = tmp_path / "results" / "a.json"
    report.add_json(path, "first", 1)
    report.add_json(path, "second", 2)
    report.add_json(path, "first", 3)
    assert json.loads(path.read_text()) == {"first": 3, "second": 2}


def test_report_is_that_of_the_results(tmp_path):
    shutil.copytree(DOCS / "results", tmp_path / "results")
    page = bench.page(tmp_path)
    assert page == (DOCS / "results" / "report.md").read_text()
    for benchmark in bench.BENCHMARKS:
        assert (tmp_path / "images" / f"{benchmark.name}.png").exists()
        assert (DOCS / "images" / f"{benchmark.name}.png").exists()


def read_result(name):
    return json.loads((DOCS / "results" / name).read_text())


@pytest.mark.parametrize(
    ("markdown", "tables"),
    [
        (
            lambda: optimizer_step.markdown(
                {"": read_result("optimizer_step_cpu.json")["resnet50"]}
            ),
            1,
        ),
        (lambda: allreduce.markdown(read_result("allreduce.json")), 2),
        (
            lambda: input_pipeline.markdown(read_result("input_pipeline.json")),
            1,
        ),
        (lambda: scaling.markdown(read_result("scaling.json")), 1),
    ],
    ids=["optimizer_step", "allreduce", "input_pipeline", "scaling"],
)
def test_tables_of_the_readme_are_those_of_the_results(markdown, tables):
    readme = (DOCS.parent / "README.md").read_text()
    found = [
        block for block in markdown().split("\n\n") if block.startswith("| ")
    ]
    for table in found[:tables]:
        assert table in readme


def test_a_failed_command_ends_the_bench(capfd):
    with pytest.raises(SystemExit, match="failed: python -c exit"):
        bench.run("python -c exit(3)")


def limits():
    """Yields what has a limit, and whether what was measured is within it."""
    for key, result in read_result("allreduce.json").items():
        ways = {line["way"]: line["ratio"][0] for line in result["results"]}
        yield f"allreduce, {key}", ways[allreduce.OURS] <= 1.05
    replica_check = read_result("replica_check.json")
    yield "replica_check", replica_check["cost_percent"] < 1
    for line in read_result("scaling.json")["Gloo, 2 ranks"]["results"]:
        if line["accumulation"] == 8:
            yield "scaling", line["all_over_apart"][0] >= 0.95


def test_measured_figures_are_within_their_limits():
    found = dict(limits())
    assert found == dict.fromkeys(found, True)
    assert len(found) == 4


def test_functions_take_turns():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = report.interleaved_times(functions, rounds=2)
    assert "".join(calls) == "aabb" * 2
    assert [len(times[name]) for name in "ab"] == [2, 2]


def test_optimizer_step_on_tensorflow(monkeypatch):
    monkeypatch.setattr(optimizer_step, "shapes_of", lambda _: [(8, 4), (4,)])
    result = optimizer_step.measure("tiny", rounds=2)
    assert result["variables"] == 2
    assert result["parameters"] == 36
    assert result["floor_ms"]["LARS"] == pytest.approx(
        7 / 5 * result["floor_ms"]["SGD momentum"], abs=2e-3
    )
    lines = {line["optimizer"]: line for line in result["results"]}
    assert {"LARS, XLA", "LARS", "Keras Lamb", "optax.lars"} <= lines.keys()
    assert lines["Keras SGD momentum, XLA"]["ratio"] == [1.0, 1.0, 1.0]
    assert all(line["ms"][0] > 0 for line in lines.values())
    medians = [line["ms"][0] for line in result["results"]]
    assert medians == sorted(medians)


ON_JAX = """
import json, sys

# As on a machine without it.
sys.modules["tensorflow"] = None
from benchmarks.speed import optimizer_step

optimizer_step.shapes_of = lambda model: [(8, 4), (4,)]
print(json.dumps(optimizer_step.measure("tiny", rounds=2)))
"""


def test_optimizer_step_on_jax_without_tensorflow():
    result = subprocess.run(
        [sys.executable, "-c", ON_JAX],
        check=True,
        env=os.environ | {"KERAS_BACKEND": "jax"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
    )
    lines = json.loads(result.stdout.splitlines()[-1])["results"]
    assert {line["optimizer"] for line in lines} == {
        "LARS",
        "Keras SGD momentum",
        "Keras Lamb",
        "optax.sgd",
        "optax.lars",
    }


def test_unknown_flag_says_what_there_is():
    result = subprocess.run(
        [sys.executable, "-m", optimizer_step.__name__, "--modle=tiny"],
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
    )
    assert result.returncode == 1
    assert "Unknown command line flag 'modle'" in result.stderr
    assert "--model: <resnet50|alexnet|tiny>" in result.stderr


def test_trial_without_end_is_said_to_hang():
    trial = "`get_config`, `from_config`"
    assert upstream_binding.tried(trial, "ours", seconds=1) == {
        "kept": False,
        "text": "hangs: no end within 1 s",
    }


def test_table_of_bindings():
    kept = {"kept": True, "text": "weights: equal"}
    broken = {"kept": False, "text": "hangs"}
    rows = [{"promise": "`fit`", "upstream": broken, "ours": kept}]
    last = upstream_binding.as_table(rows).splitlines()[-1]
    assert last == "| `fit` | no: hangs | yes: weights: equal |"
