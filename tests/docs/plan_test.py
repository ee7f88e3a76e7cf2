"""The tables of docs/plan.md agree with the model, and the text with them."""

import dataclasses
import json
import pathlib
import re
import statistics

import pytest

from horovod_recipes.planning import estimate
from horovod_recipes.planning.hardware import HARDWARE
from horovod_recipes.planning.hardware import RESNET50_V1_5_FLOPS
from horovod_recipes.planning.hardware import allreduce_seconds
from horovod_recipes.training.job_size import JobSize

ROOT = pathlib.Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs/plan.md").read_text()
MEASURED = json.loads((ROOT / "docs/results/allreduce_model.json").read_text())

RESNET50_BYTES = 4 * 25_557_032
GBIT = 1e9 / 8
UBER = dataclasses.replace(
    HARDWARE["p100"], devices_per_node=4, network_bytes_per_second=25 * GBIT
)
V100 = HARDWARE["v100"]

# Each row: description, efficiency, hardware, ranks, ranks of the baseline,
# seconds of the baseline's step, bytes of the gradients.
# docs/plan.md has the sources.
PUBLISHED = [
    (
        "ResNet-50, 352 P100, 50 Gbit/s, Caffe2 [1]",
        1 / 1.12,
        *(HARDWARE["p100"], 352, 8, 16 * 60 / 5004, RESNET50_BYTES),
    ),
    (
        "Inception V3, 512 P100, 25 Gbit/s, Horovod [2]",
        0.90,
        *(UBER, 512, 1, 64 / 142, 4 * 23_817_352),
    ),
    (
        "VGG-16, 512 P100, 25 Gbit/s, Horovod [2]",
        0.68,
        *(UBER, 512, 1, 64 / 154, 4 * 138_357_544),
    ),
    (
        "ResNet-50, 32 V100, 100 Gbit/s, Horovod [3]",
        9514.64 / 362.44 / 32,
        *(V100, 32, 1, 128 / 362.44, RESNET50_BYTES),
    ),
    (
        "ResNet-50, 32 V100, 100 Gbit/s, OneFlow [3]",
        11711.18 / 384.85 / 32,
        *(V100, 32, 1, 128 / 384.85, RESNET50_BYTES),
    ),
    (
        "ResNet-50, 8 A100 of one node, TF32, Horovod [4]",
        7.70 / 8,
        *(HARDWARE["a100"], 8, 1, 256 / 909, RESNET50_BYTES),
    ),
    (
        "ResNet-50, 8 A100 of one node, mixed, Horovod [4]",
        7.32 / 8,
        *(HARDWARE["a100"], 8, 1, 256 / 2375, RESNET50_BYTES),
    ),
    (
        "ResNet-50, 64 H100 with 50 images each, Horovod [5]",
        294_700 / 56_060 / 8,
        *(HARDWARE["h100"], 64, 8, 50 * 8 / 56_060, RESNET50_BYTES),
    ),
]


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda row: row[0])
def test_published_efficiency(published):
    """The table in docs/plan.md agrees with the model."""
    what, efficiency, hardware, ranks, base, seconds, message = published
    allreduce = allreduce_seconds(hardware, ranks, message)
    longer = allreduce - allreduce_seconds(hardware, base, message)
    # The backward pass is two thirds of the step.
    exposed = max(0, longer - 2 / 3 * seconds)
    line = f"| {what} | {100 * efficiency:.1f} |"
    for added in (longer, exposed):
        ours = seconds / (seconds + added)
        line += f" {100 * ours:.1f} | {100 * (ours - efficiency):+.1f} |"
    assert line in DOCUMENT


def bus_bandwidth(hardware, ranks, message_bytes):
    """Returns the bus bandwidth as nccl-tests defines it, in GB/s."""
    seconds = allreduce_seconds(hardware, ranks, message_bytes)
    return 2 * (ranks - 1) / ranks * message_bytes / seconds / 1e9


def test_published_bus_bandwidth():
    a100 = dataclasses.replace(
        HARDWARE["a100"], network_bytes_per_second=4 * 200 * GBIT
    )
    sizes = range(8, 2**27 + 1, 2**20)
    ours = [bus_bandwidth(a100, 24, size) for size in sizes]
    for what, published, value in (
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
        error = 100 * (value / published - 1)
        line = f"| {what} | {published:g} | {value:.1f} | {error:+.0f} |"
        assert line in DOCUMENT


def test_published_hour():
    """Goyal et al. trained 90 epochs with batches of 8,192 in one hour."""
    p100 = HARDWARE["p100"]
    _, achieved = p100.flops_per_second["float32"]
    step = estimate.step_seconds(
        p100,
        achieved,
        RESNET50_V1_5_FLOPS,
        RESNET50_BYTES,
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


def errors_without_overlap():
    """Returns `{description: error in points}` from the published table."""
    rows = re.findall(
        r"^\| (.+? \[\d\]) \| [\d.]+ \| [\d.]+ \| ([+-][\d.]+) \| [\d.]+ \|",
        DOCUMENT,
        re.M,
    )
    return {what: float(error) for what, error in rows}


def test_text_has_the_range_of_the_table():
    errors = errors_without_overlap()
    assert list(errors) == [row[0] for row in PUBLISHED]
    # The networks of sources 3 to 5 are fast, in the page's words.
    fast = [error for what, error in errors.items() if what[-2] in "345"]
    text = re.sub(r"\s+", " ", DOCUMENT)
    assert (
        f"were {min(fast):.1f} to {max(fast):.1f} points below the plan" in text
    )
    every = errors.values()
    assert (
        f"the plan's error is {min(every):+.1f} to {max(every):+.1f} points"
        in text
    )
