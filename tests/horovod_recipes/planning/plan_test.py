"""The plan of a job: by hand, beside published figures, and as a command."""

import dataclasses
import json
import pathlib
import re
import statistics
import subprocess
import sys

import keras
import pytest
from keras import layers

from benchmarks.speed import allreduce_model
from horovod_recipes.configs import demo
from horovod_recipes.configs import resnet50
from horovod_recipes.errors import JobError
from horovod_recipes.models import MODELS
from horovod_recipes.models.flops import training_flops
from horovod_recipes.planning import estimate
from horovod_recipes.planning import page
from horovod_recipes.planning.hardware import HARDWARE
from horovod_recipes.planning.hardware import RESNET50_V1
from horovod_recipes.planning.hardware import RESNET50_V1_5
from horovod_recipes.planning.hardware import Hardware
from horovod_recipes.planning.hardware import allreduce_seconds
from horovod_recipes.planning.hardware import find_hardware
from horovod_recipes.planning.hardware import ring_seconds
from horovod_recipes.planning.hardware import tree_seconds
from horovod_recipes.training.job_size import JobSize
from horovod_recipes.training.job_size import job_size

ROOT = pathlib.Path(__file__).parents[3]
DOCUMENT = (ROOT / "docs/plan.md").read_text()
MEASURED = json.loads((ROOT / "docs/results/allreduce_model.json").read_text())

# Two devices a node; nothing like any hardware.
TOY = Hardware(
    description="toy",
    flops={"float32": (4e9, 1e9)},
    speed_source="nowhere",
    memory=1e9,
    memory_bandwidth=1e9,
    devices_per_node=2,
    node_bandwidth=1e9,
    node_latency=1e-3,
    network_bandwidth=1e8,
    network_latency=2e-3,
    tree_latency=None,
)


def test_ring():
    # Three sendings of a quarter of 100 MB, and three back, 1 ms each.
    assert ring_seconds(4, 1e8, 1e9, 1e-3) == pytest.approx(6 * 0.026)
    assert ring_seconds(1, 1e8, 1e9, 1e-3) == 0


def test_tree():
    # 100 MB up and down, three levels of 1 ms each way.
    assert tree_seconds(8, 1e8, 1e9, 1e-3) == pytest.approx(2 * 0.103)


def test_allreduce_goes_through_nodes_and_network():
    # Two devices: half of 100 MB at 1 GB/s, there and back.
    assert allreduce_seconds(TOY, 2, 1e8) == pytest.approx(2 * 0.051)
    # Four nodes: a quarter at 100 MB/s, three times there and back.
    ring = 6 * (0.25 + 2e-3)
    assert allreduce_seconds(TOY, 8, 1e8) == pytest.approx(2 * 0.051 + ring)


def test_trees_are_for_many_nodes():
    with_trees = dataclasses.replace(TOY, tree_latency=5e-3)
    assert allreduce_seconds(with_trees, 8, 1e8) == allreduce_seconds(
        TOY, 8, 1e8
    )
    # On 512 nodes a ring would take 1022 messages.
    tree = 2 * (1 + 9 * 5e-3)
    assert allreduce_seconds(with_trees, 1024, 1e8) == pytest.approx(
        2 * 0.051 + tree
    )


def test_fit_finds_the_ring_again():
    sizes = [2**12, 2**20, 2**27]
    seconds = [ring_seconds(4, size, 3e9, 5e-5) for size in sizes]
    latency, bandwidth = allreduce_model.fit_ring(sizes, seconds, ranks=4)
    assert latency == pytest.approx(5e-5)
    assert bandwidth == pytest.approx(3e9)


def test_fit_weighs_errors_by_size():
    # One latency that is wrong by half does not move the bandwidth.
    seconds = [2e-4, *(ring_seconds(2, 2**n, 1e9, 1e-4) for n in (26, 27))]
    _, bandwidth = allreduce_model.fit_ring([2, 2**26, 2**27], seconds, ranks=2)
    assert bandwidth == pytest.approx(1e9, rel=1e-3)


def test_cpu_is_what_was_measured():
    measured, cpu = MEASURED["2 ranks"], HARDWARE["cpu"]
    core = {name: median for name, (median, _, _) in measured["core"].items()}
    assert cpu.network_latency == measured["latency_us"] * 1e-6
    assert cpu.network_bandwidth == measured["bandwidth_gb_per_second"] * 1e9
    assert cpu.memory_bandwidth == core["memory_gb_per_second"] * 1e9
    assert cpu.flops["float32"] == (
        core["matmul_gflops"] * 1e9,
        core["resnet50_images_per_second"] * RESNET50_V1_5,
    )


def tiny_model(precision):
    keras.config.set_dtype_policy(precision)
    inputs = keras.Input((4, 4, 1), dtype="uint8")
    x = layers.Rescaling(1 / 255)(inputs)
    x = layers.Conv2D(2, 3, padding="same", use_bias=False)(x)
    x = layers.BatchNormalization()(x)
    x = layers.ReLU()(x)
    x = layers.Conv2D(2, 1, use_bias=False)(x)
    x = layers.GlobalAveragePooling2D()(x)
    outputs = layers.Dense(3, dtype="float32")(x)
    keras.config.set_dtype_policy("float32")
    return keras.Model(inputs, outputs)


def test_flops():
    # 16 places x 18 and 4 weights, and 6 weights; two FLOPs each, three passes.
    assert training_flops(tiny_model("float32")) == 6 * (16 * 22 + 6)


@pytest.mark.parametrize(
    ("version", "flops"), [("v1", RESNET50_V1), ("v1.5", RESNET50_V1_5)]
)
def test_flops_of_resnet50(version, flops):
    model = MODELS["resnet50"]((224, 224, 3), 1000, version=version)
    assert training_flops(model) == flops


def test_memory():
    memory = estimate.memory_per_device(
        tiny_model("float32"), "float32", JobSize(2, 5, 3, 1, 1)
    )
    # 18 weights, 2 scales and 2 offsets, 4 weights, 6 weights and 3 biases;
    # the moving means and variances are weights that are not trained.
    assert memory == {
        "weights": 4 * 39,
        "gradients": 4 * 35,
        "accumulated gradients": 4 * 35,
        "momentum": 4 * 35,
        "Horovod's copy of the gradients": 4 * 35,
        # What the first convolution, batch norm and the dense layer take in,
        # and what ReLU gives out, which is what the second takes in.
        "activations": 5 * 4 * (16 + 32 + 2 + 32),
    }


def test_memory_in_half_precision_on_one_rank():
    memory = estimate.memory_per_device(
        tiny_model("mixed_bfloat16"), "mixed_bfloat16", JobSize(1, 5, 1, 1, 1)
    )
    assert memory == {
        "weights": 4 * 39,
        "weights in half precision": 2 * 35,
        "gradients": 4 * 35,
        "momentum": 4 * 35,
        # Batch norm keeps its input in float32.
        "activations": 5 * (2 * 16 + 4 * 32 + 2 * 2 + 2 * 32),
    }


def test_step():
    step = estimate.step_seconds(TOY, 1e9, 1e6, 1e8, JobSize(2, 5, 3, 1, 1))
    assert step == {
        # 15 images of 1 MFLOP at 1 GFLOP/s.
        "forward_and_backward": pytest.approx(0.015),
        "allreduce": pytest.approx(2 * 0.051),
        # 9 passes over 100 MB at 1 GB/s.
        "update": pytest.approx(0.9),
        "total": pytest.approx(0.015 + 2 * 0.051 + 0.9),
    }


@pytest.fixture(scope="module")
def resnet50_plan():
    return estimate.make_plan(resnet50.get_config("32k"), 256, "a100")


def test_plan_is_that_of_the_job(resnet50_plan):
    job = job_size(resnet50.get_config("32k"), 256)
    assert resnet50_plan["job"] == {
        "ranks": 256,
        "micro_batch_size": job.micro_batch_size,
        "accumulation_steps": job.accumulation_steps,
        "global_batch_size": 32768,
        "epochs": 100,
        # 1,281,167 images make 39 batches.
        "steps_per_epoch": 39,
        "steps": 3900,
    }
    assert resnet50_plan["allreduce_bytes"] == 4 * 25_557_032
    assert resnet50_plan["step"]["total"] == pytest.approx(
        # 909 images/s of v1.5, which has more FLOPs than v1.
        128 / 909 * RESNET50_V1 / RESNET50_V1_5
        + allreduce_seconds(HARDWARE["a100"], 256, 4 * 25_557_032)
        + 9 * 4 * 25_557_032 / 1555e9
    )
    # The decay of the paper begins at step 0: (1 - 468 / 3900) ** 2 of 40.
    assert resnet50_plan["schedule"]["highest"] == pytest.approx(40, rel=0.003)
    assert resnet50_plan["schedule"]["steps"][-1] == 3899


def test_scaling_table(resnet50_plan):
    rows = resnet50_plan["scaling"]
    assert [row["ranks"] for row in rows] == [
        8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096
    ]  # fmt: skip
    for row in rows:
        assert 32768 == (
            row["ranks"] * row["micro_batch_size"] * row["accumulation_steps"]
        )
        assert row["training_seconds"] == 3900 * row["step"]["total"]
        assert row["images_per_second"] == 32768 / row["step"]["total"]
        assert row["efficiency"] == pytest.approx(
            1 - row["step"]["allreduce"] / row["step"]["total"]
        )
    assert rows[5]["step"] == resnet50_plan["step"]
    assert [row["accumulation_steps"] for row in rows[:4]] == [64, 32, 16, 8]
    assert [row["micro_batch_size"] for row in rows[-3:]] == [32, 16, 8]
    assert [bool(row["note"]) for row in rows] == [False] * 8 + [True] * 2
    efficiencies = [row["efficiency"] for row in rows]
    assert efficiencies == sorted(efficiencies, reverse=True)


def test_ranks_that_do_not_divide_the_batch_say_so():
    config = demo.get_config()
    config.global_batch_size = 1000
    made = estimate.make_plan(config, 2, "cpu")
    notes = {row["ranks"]: row["note"] for row in made["scaling"]}
    assert notes[8] == ""
    assert notes[16].startswith("global_batch_size 1000 is not divisible by 16")
    assert "   16  global_batch_size 1000 is not" in page.as_text(made, "demo")


def test_memory_that_does_not_suffice_says_so(resnet50_plan):
    assert "DOES NOT FIT" not in page.as_text(resnet50_plan, "resnet50:32k")
    lines = page.memory_lines({"activations": 2e9}, available=1e9)
    assert lines[-1].endswith("2.000  of 1, and temporaries: DOES NOT FIT")


@pytest.mark.parametrize(
    ("ranks", "hardware", "message"),
    [
        (2, "tpu", "unknown hardware 'tpu'; choose one of p100, v100, a100"),
        (2, "h100", "no speed is known of h100 in float32; plan with --config"),
        (3, "cpu", "1024 is not divisible by 3 ranks; the nearest that is"),
    ],
)
def test_errors(ranks, hardware, message):
    with pytest.raises(JobError, match=re.escape(message)):
        estimate.make_plan(demo.get_config(), ranks, hardware)


def test_folder_of_images():
    config = demo.get_config()
    config.dataset.name = "folder"
    with pytest.raises(JobError, match=r"set --config\.dataset\.image_size"):
        estimate.make_plan(config, 2, "cpu")
    config.dataset.image_size = 28
    assert estimate.image_shape(config.dataset) == (28, 28, 3)


def test_every_speed_is_below_the_peak():
    for name, hardware in HARDWARE.items():
        for precision, (peak, achieved) in hardware.flops.items():
            assert find_hardware(name, precision) is hardware
            assert 0.1 < achieved / peak < 0.9, (name, precision)


def test_duration():
    assert page.duration(59.6) == "1 min 00 s"
    assert page.duration(3599) == "59 min 59 s"
    assert page.duration(2 * 3600 + 30) == "2 h 00 min"


def test_bars():
    assert page.bars([0.0, 1.0, 2.0], width=3) == "▁▅█"


def test_command(tmp_path):
    result = subprocess.run(
        [
            *(sys.executable, "-m", "horovod_recipes.plan", "--config=demo"),
            *("--ranks=2", "--hardware=cpu", "--config.epochs=20"),
            f"--output={tmp_path / 'plan'}",
        ],
        capture_output=True,
        cwd=ROOT,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("demo on 2 ranks of cpu in float32\n")
    assert "global batch   1024 = 2 ranks x 512 micro-batch x" in result.stdout
    assert "steps          60 = 20 epochs x 3" in result.stdout
    written = json.loads((tmp_path / "plan/plan.json").read_text())
    assert written["job"]["steps"] == 60
    picture = (tmp_path / "plan/schedule.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 5000


def test_command_without_hardware():
    result = subprocess.run(
        [
            *(sys.executable, "-m", "horovod_recipes.plan"),
            *("--config=demo", "--ranks=2"),
        ],
        capture_output=True,
        cwd=ROOT,
        text=True,
        timeout=300,
    )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(
        "error: --hardware is missing: What to run on: p100, v100, "
    )


RESNET50_BYTES = 4 * 25_557_032
GBIT = 1e9 / 8
UBER = dataclasses.replace(
    HARDWARE["p100"], devices_per_node=4, network_bandwidth=25 * GBIT
)
V100 = HARDWARE["v100"]

# Each: what, the efficiency, on what, ranks, those of the baseline, the seconds
# of its step, and the bytes of the gradients. Sources are in docs/plan.md.
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
        "ResNet-50, 64 H100 with 50 images each, MLPerf [5]",
        294_700 / 56_060 / 8,
        *(HARDWARE["h100"], 64, 8, 50 * 8 / 56_060, RESNET50_BYTES),
    ),
]


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda row: row[0])
def test_published_efficiency(published):
    """The lines of the table in docs/plan.md are what the model gives."""
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
    """Returns what nccl-tests calls so, in GB/s."""
    seconds = allreduce_seconds(hardware, ranks, message_bytes)
    return 2 * (ranks - 1) / ranks * message_bytes / seconds / 1e9


def test_published_bus_bandwidth():
    a100 = dataclasses.replace(
        HARDWARE["a100"], network_bandwidth=4 * 200 * GBIT
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
    """Goyal et al. trained 90 epochs with batches of 8,192 in an hour."""
    p100 = HARDWARE["p100"]
    _, achieved = p100.flops["float32"]
    step = estimate.step_seconds(
        p100, achieved, RESNET50_V1_5, RESNET50_BYTES, JobSize(256, 32, 1, 1, 1)
    )
    minutes = 90 * 156 * step["total"] / 60
    assert f"the plan has {minutes:.0f} minutes" in DOCUMENT


def test_measured_table():
    """The measured lines of docs/plan.md are those of the results."""
    for ranks, result in MEASURED.items():
        latency, bandwidth = (
            result["latency_us"],
            result["bandwidth_gb_per_second"],
        )
        assert f"| {ranks} | {latency:g} | {bandwidth:g} |" in DOCUMENT
