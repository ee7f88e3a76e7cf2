"""Compares plans with hand computations."""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import keras
import pytest
from keras import layers

from benchmarks.speed import allreduce_model
from horovod_recipes import plan as plan_command
from horovod_recipes.configs import demo
from horovod_recipes.configs import resnet50
from horovod_recipes.configs import simclr
from horovod_recipes.errors import JobError
from horovod_recipes.models import MODELS
from horovod_recipes.models.flops import training_flops
from horovod_recipes.planning import estimate
from horovod_recipes.planning import overlap
from horovod_recipes.planning import page
from horovod_recipes.planning.hardware import HARDWARE
from horovod_recipes.planning.hardware import RESNET50_V1_5_FLOPS
from horovod_recipes.planning.hardware import RESNET50_V1_FLOPS
from horovod_recipes.planning.hardware import Hardware
from horovod_recipes.planning.hardware import allreduce_seconds
from horovod_recipes.planning.hardware import find_hardware
from horovod_recipes.planning.hardware import ring_seconds
from horovod_recipes.planning.hardware import tree_seconds
from horovod_recipes.training.job_size import JobSize
from horovod_recipes.training.job_size import job_size
from keras_lars import LARS
from keras_lars import TrustRatio

ROOT = pathlib.Path(__file__).parents[3]
MEASURED = json.loads((ROOT / "docs/results/allreduce_model.json").read_text())

# Hardware with round figures and two devices per node.
TOY = Hardware(
    description="toy",
    flops_per_second={"float32": (4e9, 1e9)},
    speed_source="nowhere",
    memory_bytes=1e9,
    memory_bytes_per_second=1e9,
    devices_per_node=2,
    node_bytes_per_second=1e9,
    node_latency_seconds=1e-3,
    network_bytes_per_second=1e8,
    network_latency_seconds=2e-3,
    tree_latency_seconds=None,
)


def test_ring():
    # Six messages of 25 MB take 25 ms each, with a latency of 1 ms.
    assert ring_seconds(4, 1e8, 1e9, 1e-3) == pytest.approx(6 * 0.026)
    assert ring_seconds(1, 1e8, 1e9, 1e-3) == 0


def test_tree():
    # 100 MB go up and down, through three levels of 1 ms each way.
    assert tree_seconds(8, 1e8, 1e9, 1e-3) == pytest.approx(2 * 0.103)


def test_allreduce_goes_through_nodes_and_network():
    # Two devices send half of 100 MB at 1 GB/s, twice.
    assert allreduce_seconds(TOY, 2, 1e8) == pytest.approx(2 * 0.051)
    # Four nodes send a quarter of it at 100 MB/s, six times.
    ring = 6 * (0.25 + 2e-3)
    assert allreduce_seconds(TOY, 8, 1e8) == pytest.approx(2 * 0.051 + ring)


def test_trees_are_faster_on_many_nodes():
    with_trees = dataclasses.replace(TOY, tree_latency_seconds=5e-3)
    assert allreduce_seconds(with_trees, 8, 1e8) == allreduce_seconds(
        TOY, 8, 1e8
    )
    # On 512 nodes a ring needs 1,022 messages, but a tree has 9 levels.
    tree = 2 * (1 + 9 * 5e-3)
    assert allreduce_seconds(with_trees, 1024, 1e8) == pytest.approx(
        2 * 0.051 + tree
    )


def test_fit_recovers_latency_and_bandwidth():
    sizes = [2**12, 2**20, 2**27]
    seconds = [ring_seconds(4, size, 3e9, 5e-5) for size in sizes]
    latency, bandwidth = allreduce_model.fit_ring(sizes, seconds, ranks=4)
    assert latency == pytest.approx(5e-5)
    assert bandwidth == pytest.approx(3e9)


def test_fit_weighs_errors_by_size():
    # A wrong time of a tiny message barely changes the bandwidth.
    seconds = [2e-4, *(ring_seconds(2, 2**n, 1e9, 1e-4) for n in (26, 27))]
    _, bandwidth = allreduce_model.fit_ring([2, 2**26, 2**27], seconds, ranks=2)
    assert bandwidth == pytest.approx(1e9, rel=1e-3)


def test_cpu_is_what_was_measured():
    measured, cpu = MEASURED["2 ranks"], HARDWARE["cpu"]
    core = {name: median for name, (median, _, _) in measured["core"].items()}
    assert cpu.network_latency_seconds == measured["latency_us"] * 1e-6
    assert (
        cpu.network_bytes_per_second
        == measured["bandwidth_gb_per_second"] * 1e9
    )
    assert cpu.memory_bytes_per_second == core["memory_gb_per_second"] * 1e9
    assert cpu.flops_per_second["float32"] == (
        core["matmul_gflops"] * 1e9,
        core["resnet50_images_per_second"] * RESNET50_V1_5_FLOPS,
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
    # 16 positions have 18 + 4 weights, and the dense layer has 6.
    # Each weight takes two FLOPs, in three passes.
    assert training_flops(tiny_model("float32")) == 6 * (16 * 22 + 6)


@pytest.mark.parametrize(
    ("version", "flops"),
    [("v1", RESNET50_V1_FLOPS), ("v1.5", RESNET50_V1_5_FLOPS)],
)
def test_flops_of_resnet50(version, flops):
    model = MODELS["resnet50"]((224, 224, 3), 1000, version=version)
    assert training_flops(model) == flops


def test_memory():
    memory = estimate.memory_per_device(
        tiny_model("float32"), LARS(1.0), "float32", JobSize(2, 5, 3, 1, 1)
    )
    # Trainable: 18 + (2 + 2) + 4 + (6 + 3) = 35.
    # "weights" adds the 4 moving means and variances.
    assert memory == {
        "weights": 4 * 39,
        "gradients": 4 * 35,
        "accumulated gradients": 4 * 35,
        "optimizer's state": 4 * 35,
        "Horovod's copy of the gradients": 4 * 35,
        # Inputs of convolution, batch norm and the dense layer.
        # ReLU's output, which the second convolution reads, counts once.
        "activations": 5 * 4 * (16 + 32 + 2 + 32),
    }


def test_memory_in_half_precision_on_one_rank():
    model, job = tiny_model("mixed_bfloat16"), JobSize(1, 5, 1, 1, 1)
    memory = estimate.memory_per_device(model, LARS(1.0), "mixed_bfloat16", job)
    assert memory == {
        "weights": 4 * 39,
        "weights in half precision": 2 * 35,
        "gradients": 4 * 35,
        "optimizer's state": 4 * 35,
        # Batch norm keeps its input in float32.
        "activations": 5 * (2 * 16 + 4 * 32 + 2 * 2 + 2 * 32),
    }


def test_adam_inside_a_trust_ratio_has_two_moments():
    optimizer = TrustRatio(keras.optimizers.Adam())
    model = tiny_model("float32")
    assert estimate.optimizer_bytes(optimizer, model) == 2 * 4 * 35


def test_step_with_accumulation_hides_nothing():
    gradients = [(5e7, 1.0), (5e7, 0.5)]
    step = estimate.step_seconds(
        TOY, 1e9, 1e6, gradients, JobSize(2, 5, 3, 1, 1)
    )
    assert step == {
        # 15 images of 1 MFLOP at 1 GFLOP/s.
        "forward_and_backward": pytest.approx(0.015),
        # Both gradients leave as one message.
        "exposed_allreduce": pytest.approx(2 * 0.051),
        "hidden_allreduce": 0,
        # 7 passes over 100 MB at 1 GB/s.
        "update": pytest.approx(0.7),
        "total": pytest.approx(0.015 + 2 * 0.051 + 0.7),
    }


def test_step_hides_what_is_complete_early():
    gradients = [(5e7, 1.0), (5e7, 0.5)]
    step = estimate.step_seconds(
        TOY, 1e9, 6e7, gradients, JobSize(2, 5, 1, 1, 1)
    )
    # 5 images take 0.3 s, and their backward pass 0.2 s. Half of it is
    # left when the last gradient is complete, whose allreduce takes 52 ms.
    assert step["forward_and_backward"] == pytest.approx(0.3)
    assert step["hidden_allreduce"] == pytest.approx(2 * 0.026)
    assert step["exposed_allreduce"] == pytest.approx(2 * 0.026)
    assert step["total"] == pytest.approx(0.3 + 0.052 + 0.7)


def test_groups_that_wait_leave_together():
    # One group per gradient, which are complete at 1, 2 and 4 s.
    gradients = [(2**20, 1.0), (2**20, 0.5), (2**20, 0.25)]
    sent = []

    def seconds_of_message(size):
        sent.append(size / 2**20)
        return 5.0

    # The first message ends after 6 s, when both others are waiting. The
    # backward pass takes 4 s, and the second message ends after 11 s.
    times = overlap.allreduce_times(gradients, 4.0, seconds_of_message)
    assert times == (10.0, 7.0)
    assert sent == [1, 2]


def test_gradients_are_complete_from_the_last_layer_to_the_first():
    # The convolutions take 16 x 18 and 16 x 4 products, and the dense layer 6.
    flops = 16 * 18 + 16 * 4 + 6
    assert overlap.gradients_of(tiny_model("float32")) == [
        (4 * 18, 1.0),
        (4 * 2, pytest.approx((16 * 4 + 6) / flops)),
        (4 * 2, pytest.approx((16 * 4 + 6) / flops)),
        (4 * 4, pytest.approx((16 * 4 + 6) / flops)),
        (4 * 6, pytest.approx(6 / flops)),
        (4 * 3, pytest.approx(6 / flops)),
    ]


@pytest.fixture(scope="module")
def resnet50_plan():
    return estimate.make_plan(resnet50.get_config("32k"), 256, "a100")


def test_plan_agrees_with_the_job(resnet50_plan):
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
        128 / 909 * RESNET50_V1_FLOPS / RESNET50_V1_5_FLOPS
        + allreduce_seconds(HARDWARE["a100"], 256, 4 * 25_557_032)
        + 7 * 4 * 25_557_032 / 1555e9
    )
    # The warm-up's last step is just below the peak rate of 40.
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
            1 - row["step"]["exposed_allreduce"] / row["step"]["total"]
        )
    assert rows[5]["step"] == resnet50_plan["step"]
    assert [row["accumulation_steps"] for row in rows[:4]] == [64, 32, 16, 8]
    assert [row["micro_batch_size"] for row in rows[-3:]] == [32, 16, 8]
    assert [bool(row["note"]) for row in rows] == [False] * 8 + [True] * 2
    hidden = [row["step"]["hidden_allreduce"] > 0 for row in rows]
    # Without accumulation, on 512 ranks and more, gradients travel early.
    assert hidden == [False] * 6 + [True] * 4
    for part in (rows[:6], rows[6:]):
        efficiencies = [row["efficiency"] for row in part]
        assert efficiencies == sorted(efficiencies, reverse=True)


def test_table_names_ranks_that_do_not_divide_the_batch():
    config = demo.get_config()
    config.global_batch_size = 1000
    made = estimate.make_plan(config, 2, "cpu")
    notes = {row["ranks"]: row["note"] for row in made["scaling"]}
    assert notes[8] == ""
    assert notes[16].startswith("global_batch_size 1000 is not divisible by 16")
    assert "   16  global_batch_size 1000 is not" in page.as_text(made, "demo")


def test_page_says_if_the_memory_does_not_suffice(resnet50_plan):
    assert "DOES NOT FIT" not in page.as_text(resnet50_plan, "resnet50:32k")
    lines = page.memory_lines({"activations": 2e9}, available=1e9)
    assert lines[-1].endswith("2.000  of 1, without temporaries: DOES NOT FIT")


@pytest.mark.parametrize(
    ("ranks", "hardware", "message"),
    [
        (2, "tpu", "unknown hardware 'tpu'; choose one of p100, v100, a100"),
        (2, "h100", "the speed of h100 in float32 is unknown; use --config."),
        (3, "cpu", "1024 is not divisible by 3 ranks; the nearest divisi"),
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
        for precision, (peak, achieved) in hardware.flops_per_second.items():
            assert find_hardware(name, precision) is hardware
            assert 0.1 < achieved / peak < 0.9, (name, precision)


def test_duration():
    assert page.duration(59.6) == "1 min 00 s"
    assert page.duration(3599) == "59 min 59 s"
    assert page.duration(2 * 3600 + 30) == "2 h 00 min"


def test_bars():
    assert page.bars([0.0, 1.0, 2.0], width=3) == "▁▅█"
    assert page.bars([0.0, 0.0], width=2) == "▁▁"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "--config.model.filters=1000000000000",
            "cannot make the network of model.name=small_cnn (",
        ),
        (
            "--config.dataset.image_size=1000000000",
            "cannot make the network of model.name=small_cnn (",
        ),
        ("--output=/proc/plan", "cannot write to --output=/proc/plan: No such"),
    ],
)
# ml_collections loads config files in a deprecated way.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_command_that_cannot_work(capsys, argument, message):
    arguments = ["plan", "--config=demo", "--ranks=2", "--hardware=a100"]
    assert plan_command.main([*arguments, argument]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


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
        "error: --hardware is missing: The hardware to plan for: p100, v100, "
    )


def test_simclr_counts_both_views_and_the_pass_of_gradient_caching():
    config = simclr.get_config("imagenet_4096")
    planned = {
        ranks: estimate.make_plan(config, ranks, "a100") for ranks in (64, 128)
    }
    network = estimate.planned_network(config)
    flops = 2 * training_flops(network)
    # 64 ranks need two micro-batches of 32 images.
    assert planned[64]["training_flops_per_image"] == flops * 4 // 3
    assert planned[128]["training_flops_per_image"] == flops
    activations = 2 * 32 * estimate.activation_bytes(network)
    for plan in planned.values():
        assert plan["memory"]["activations"] == activations
    # 4,096 ranks would have one image each.
    assert "needs 2 images" in planned[64]["scaling"][-1]["note"]
