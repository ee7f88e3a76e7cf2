"""What all benchmarks share: measuring, tables, files, help and the report."""

import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import _measure
from benchmarks import _results
from benchmarks import report
from benchmarks.speed import allreduce
from benchmarks.speed import callbacks
from benchmarks.speed import optimizer_step
from benchmarks.speed import resnet50_gpu
from benchmarks.study import large_batch
from benchmarks.study import simclr
from benchmarks.study import trust_ratios

DOCS = pathlib.Path(__file__).parents[2] / "docs"
COMMANDS = (
    report,
    *(benchmark.module for benchmark in report.BENCHMARKS),
    resnet50_gpu,
    large_batch,
    simclr,
    trust_ratios,
)


def test_spread_is_median_and_quartiles():
    assert _measure.spread([4.0, 1.0, 2.0, 3.0, 5.0]) == [3.0, 1.5, 4.5]


def test_ratios_are_those_of_each_round():
    assert _measure.spread_of_ratios([2, 4, 9], [1, 2, 3]) == [2, 2, 3]


def test_functions_take_turns():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = _measure.interleaved_times(functions, rounds=2)
    assert "".join(calls) == "aabb" * 2
    assert [len(times[name]) for name in "ab"] == [2, 2]


def test_memory_now_and_at_the_peak():
    _measure.reset_peak_memory()
    before = _measure.memory_bytes("VmRSS")
    array = np.ones(50_000_000, "uint8")
    assert _measure.memory_bytes("VmRSS") - before > 40_000_000
    del array
    assert _measure.memory_bytes("VmHWM") - before > 40_000_000


def test_table_is_markdown():
    cells = ["x", _results.cell([1.0, 0.5, 2.25], ".2f")]
    assert _results.table(["a", "b"], [cells]) == (
        "| a | b |\n| --- | --- |\n| x | 1.00 (0.50 to 2.25) |"
    )


def test_bars_are_drawn(tmp_path):
    path = tmp_path / "images" / "bars.png"
    _results.draw_bars({"a": {"x": (1.0, 0.5, 2.0)}}, "seconds", path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_results_are_added(tmp_path):
    path = tmp_path / "results" / "a.json"
    _results.add_json(path, "first", 1)
    _results.add_json(path, "second", 2)
    _results.add_json(path, "first", 3)
    assert json.loads(path.read_text()) == {"first": 3, "second": 2}


@pytest.mark.parametrize("module", COMMANDS, ids=lambda m: m.__name__)
def test_help_says_what_how_long_and_where(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["command", "--help"])
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert module.__doc__.splitlines()[0] in text
    # Nobody has timed all benchmarks together.
    assert "minute" in text or module is report
    assert "docs/results/" in text


def test_wrong_options_are_refused(monkeypatch, capsys):
    for option, message in {
        "--modle=tiny": "unrecognized arguments: --modle=tiny",
        "--rounds=1": "argument --rounds: must be at least 2, not 1",
    }.items():
        monkeypatch.setattr(sys, "argv", ["command", option])
        with pytest.raises(SystemExit) as end:
            optimizer_step.main()
        assert end.value.code == 2
        assert message in capsys.readouterr().err


def test_no_banner_comes_before_the_result():
    result = subprocess.run(
        [sys.executable, "-m", optimizer_step.__name__, "--help"],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert result.stderr == ""


def test_page_is_made_from_the_results(tmp_path):
    assert report.page(DOCS) == (DOCS / "results" / "report.md").read_text()
    for benchmark in report.BENCHMARKS:
        if (DOCS / "results" / benchmark.result).exists():
            image = DOCS / "images" / f"{benchmark.name}.png"
            assert image.exists() == benchmark.has_figure
        # Without its result, a benchmark is still on the page.
        assert report.results(benchmark, tmp_path) == ["Not measured yet."]


def test_figures_are_drawn_from_the_results(tmp_path):
    shutil.copytree(DOCS / "results", tmp_path / "results")
    (tmp_path / "images").mkdir()
    report.draw_all(tmp_path)
    drawn = {path.stem for path in (tmp_path / "images").iterdir()}
    assert drawn == {b.name for b in report.BENCHMARKS if b.has_figure}


def test_a_failed_command_ends_the_report():
    with pytest.raises(SystemExit, match="failed: python -c exit"):
        report.run("python -c exit(3)")


def read_result(name):
    return json.loads((DOCS / "results" / name).read_text())


def test_measured_figures_are_within_their_limits():
    for result in read_result("allreduce.json").values():
        ways = {line["way"]: line["ratio"][0] for line in result["results"]}
        assert ways[allreduce.OURS] <= 1.05
    lines = read_result("scaling.json")["Gloo, 2 ranks"]["results"]
    ratios = {line["accumulation"]: line["all_over_apart"] for line in lines}
    assert ratios[8][0] >= 0.95
    measured = read_result("callbacks.json")["callbacks"]
    for callback in ("ReplicaCheck", "TrustRatioLogger"):
        assert measured[callback]["cost_percent"] < 1


@pytest.mark.slow
def test_one_resnet50():
    for result in read_result("allreduce.json").values():
        assert result["variables"] == 161
    assert read_result("callbacks.json")["variables"] == 161
    measured = read_result("optimizer_step_cpu.json")["resnet50"]
    assert measured["variables"] == 161
    assert len(optimizer_step.shapes_of("resnet50")) == 161


def test_cost_of_callbacks():
    found = callbacks.summary([9, 2, 2, 2], {"check": [5, 0.5, 0.5, 0.5]})
    assert found["step_ms"] == [2000, 2000, 2000]
    assert found["callbacks"]["check"] == {
        "ms": [500, 500, 500],
        "first_ms": 5000,
        # Half a second in 100 steps of 2 s.
        "cost_percent": 0.25,
    }
    assert callbacks.markdown(found).splitlines()[-1] == (
        "| check | 500.0 (500.0 to 500.0) | 5000 | 0.25 |"
    )


def test_optimizer_step_on_tensorflow(monkeypatch):
    monkeypatch.setattr(optimizer_step, "TINY_SHAPES", [(8, 4), (4,)])
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
