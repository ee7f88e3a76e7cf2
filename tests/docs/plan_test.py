"""The tables of docs/plan.md agree with the model, and the text with them."""

import dataclasses
import json
import pathlib
import re
import statistics

from keras.applications import ResNet50

from horovod_recipes.planning import estimate
from horovod_recipes.planning.hardware import HARDWARE
from horovod_recipes.planning.hardware import RESNET50_V1_5_FLOPS
from horovod_recipes.planning.hardware import allreduce_seconds
from horovod_recipes.training.job_size import JobSize
from tests.docs import published

ROOT = pathlib.Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs/plan.md").read_text()
MEASURED = json.loads((ROOT / "docs/results/allreduce_model.json").read_text())


def bus_bandwidth(hardware, ranks, message_bytes):
    """Returns the bus bandwidth as nccl-tests defines it, in GB/s."""
    seconds = allreduce_seconds(hardware, ranks, message_bytes)
    return 2 * (ranks - 1) / ranks * message_bytes / seconds / 1e9


def test_published_bus_bandwidth():
    a100 = dataclasses.replace(
        HARDWARE["a100"], network_bytes_per_second=4 * 200 * published.GBIT
    )
    sizes = range(8, 2**27 + 1, 2**20)
    ours = [bus_bandwidth(a100, 24, size) for size in sizes]
    for what, theirs, value in (
        ("24 A100, 4 x 200 Gbit/s, highest up to 128 MB [6]", 96, max(ours)),
        (
            "24 A100, 4 x 200 Gbit/s, mean of 8 B to 128 MB [6]",
            84.8,
            statistics.mean(ours),
        ),
        (
            "1,984 H200, 8 x 400 Gbit/s, 512 MB [7]",
            350,
            bus_bandwidth(HARDWARE["h100"], 1984, 2**29),
        ),
    ):
        error = 100 * (value / theirs - 1)
        line = f"| {what} | {theirs:g} | {value:.1f} | {error:+.0f} |"
        assert line in DOCUMENT


def test_published_hour():
    """Goyal et al. trained 90 epochs with batches of 8,192 in one hour."""
    p100 = HARDWARE["p100"]
    _, achieved = p100.flops_per_second["float32"]
    step = estimate.step_seconds(
        p100,
        achieved,
        RESNET50_V1_5_FLOPS,
        published.gradients_of(ResNet50),
        JobSize(256, 32, 1, 1, 1),
    )
    minutes = 90 * 156 * step["total"] / 60
    assert f"the plan has {minutes:.0f} minutes" in DOCUMENT


def test_measured_table():
    """The measured table in docs/plan.md agrees with the results file."""
    for ranks, result in MEASURED.items():
        latency, bandwidth = (
            result["latency_us"],
            result["bandwidth_gb_per_second"],
        )
        assert f"| {ranks} | {latency:g} | {bandwidth:g} |" in DOCUMENT


def test_text_has_the_range_of_the_table():
    errors = [
        overlapped - theirs
        for _, theirs, _, overlapped in published.efficiencies()
    ]
    text = re.sub(r"\s+", " ", DOCUMENT)
    assert (
        f"the plan's error is {min(errors):+.1f} to {max(errors):+.1f} points"
        in text
    )
