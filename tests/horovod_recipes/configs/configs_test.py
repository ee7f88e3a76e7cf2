"""Compares each ImageNet recipe with the tables of its sources."""

import importlib
import math
import pathlib
import re

import pytest

from horovod_recipes.configs import demo
from horovod_recipes.configs import simclr
from horovod_recipes.configs._check import check_config
from horovod_recipes.errors import JobError
from horovod_recipes.planning.estimate import image_shape
from horovod_recipes.training.build import create_network
from horovod_recipes.training.build import create_optimizer
from horovod_recipes.training.build import create_schedule
from horovod_recipes.training.job_size import job_size

ROOT = pathlib.Path(__file__).parents[3]
K = 1024
# Global batch, rate, warm-up epochs and top-1, typed from the paper's tables.
ALEXNET = {
    "512": (512, 2, 2, 58.7),
    "4k": (4 * K, 10, 2, 58.5),
    "8k": (8 * K, 10, 2, 58.2),
    "16k": (16 * K, 14, 2, 55.0),
    "32k": (32 * K, 14, 2, 46.9),
}
ALEXNET_SGD = {
    "512_sgd": (512, 0.02, 2.5, 58.8),
    "4k_sgd_best": (4 * K, 0.05, 2.5, 53.1),
    "8k_sgd_best": (8 * K, 0.03, 2.5, 44.8),
}
ALEXNET_BN = {
    "512": (512, 2, 5, 60.2),
    "4k": (4 * K, 10, 5, 60.4),
    "8k": (8 * K, 14, 5, 60.1),
    "16k": (16 * K, 23, 5, 59.3),
    "32k": (32 * K, 22, 5, 57.8),
}
ALEXNET_BN_SGD = {
    "512_sgd": (512, 0.02, 2.5, 60.2),
    "4k_sgd_best": (4 * K, 0.18, 2.5, 58.9),
    "8k_sgd_best": (8 * K, 0.30, 2.5, 58.0),
}
RESNET50 = {
    "256": (256, 4, 0, 73.8),
    "1k": (K, 9, 5, 73.3),
    "8k": (8 * K, 30, 5, 73.5),
    "16k": (16 * K, 33, 12, 72.9),
    "32k": (32 * K, 40, 12, 72.5),
    "256_inception": (256, 4, 0, 75.8),
    "1k_inception": (K, 9, 5, 75.4),
    "8k_inception": (8 * K, 30, 5, 75.2),
    "16k_inception": (16 * K, 33, 12, 74.4),
    "16k_inception_200epochs": (16 * K, 33, 12, 75.5),
    "32k_inception": (32 * K, 40, 12, 72.5),
}
# Base rate, base batch and warm-up epochs of the linearly scaled baselines.
LINEAR = {
    "alexnet": (0.02, 512, 2.5),
    "alexnet_bn": (0.02, 512, 2.5),
    "resnet50": (0.1, 256, 5),
}
# Global batch, rate, warm-up epochs, momentum, weight decay, total epochs,
# and the first and last epoch that reached 75.9 %.
MLPERF = {
    "4k": (4 * K, 10, 5, 0.9, 2e-4, 42, 39, 42),
    "8k": (8 * K, 17, 5, 0.9, 2e-4, 44, 41, 44),
    "32k": (32 * K, 21.2, 16, 0.94, 2.5e-5, 58, 55, 57),
    "64k": (64 * K, 24.699, 31, 0.951807, 1e-4, 89, 83, 86),
}
FAMILIES = ("alexnet", "alexnet_bn", "resnet50", "resnet50_mlperf")
PAPER = [
    (family, variant, row)
    for family, rows in (
        ("alexnet", ALEXNET | ALEXNET_SGD),
        ("alexnet_bn", ALEXNET_BN | ALEXNET_BN_SGD),
        ("resnet50", RESNET50),
    )
    for variant, row in rows.items()
]


def module(family):
    return importlib.import_module(f"horovod_recipes.configs.{family}")


def variants(family):
    return [(family, variant) for variant in module(family).ROWS]


ALL = [pair for family in FAMILIES for pair in variants(family)]


def assert_schedule(config, rate, warmup_epochs, epochs, end=0.0, rebase=False):
    """Checks the rate at the first, the last and several other updates."""
    job = job_size(config, ranks=8)
    schedule = create_schedule(config, job)
    steps_per_epoch = 1281167 // config.global_batch_size
    steps = epochs * steps_per_epoch
    assert (job.steps_per_epoch, job.steps) == (steps_per_epoch, steps)
    warmup = round(warmup_epochs * steps_per_epoch)
    start = warmup if rebase else 0

    def decayed(step):
        return end + (rate - end) * ((steps - step) / (steps - start)) ** 2

    later = (warmup + steps) // 2
    expected = {warmup: decayed(warmup), later: decayed(later), steps: end}
    expected[steps - 1] = decayed(steps - 1)
    if warmup:
        expected |= {0: 0.0, warmup // 4: rate * (warmup // 4) / warmup}
        expected[warmup - 1] = rate * (warmup - 1) / warmup
    for step, value in expected.items():
        assert float(schedule(step)) == pytest.approx(
            value, rel=1e-4, abs=rate * 1e-7
        )


def assert_common(config):
    assert config.dataset.name == "imagenet2012"
    assert config.dataset.num_classes == 1000
    assert config.dataset.train_examples == 1281167
    assert config.dataset.test_examples == 50000
    assert config.dataset.test_split == "validation"
    check_config(config)
    optimizer = create_optimizer(config, schedule=1.0)
    assert optimizer.trust_coefficient == 0.001
    assert optimizer.epsilon == 0
    assert optimizer.momentum_style == "paper"
    return optimizer


@pytest.mark.parametrize(("family", "variant", "row"), PAPER)
def test_rows_of_the_paper(family, variant, row):
    batch, rate, warmup_epochs, top1 = row
    config = module(family).get_config(variant)
    optimizer = assert_common(config)
    assert config.global_batch_size == batch
    assert config.expected_top1 == top1
    assert optimizer.momentum == 0.9
    assert optimizer.weight_decay == 0.0005
    assert config.label_smoothing == 0
    epochs = 200 if "200epochs" in variant else 100
    assert_schedule(config, rate, warmup_epochs, epochs)
    inception = "inception" in variant
    assert config.dataset.augmentation == (
        "inception" if inception else "minimal"
    )
    size = 224 if family == "resnet50" else 227
    assert config.dataset.image_size == size
    if "sgd" in variant:
        assert config.optimizer_name == "sgd"
        assert optimizer.exclude_from_layer_adaptation == [".*"]
        assert optimizer.unadapted_scale == 1.0
    else:
        assert config.optimizer_name == "lars"
        assert optimizer.exclude_from_layer_adaptation is None
        scale = 0.01 if family == "alexnet" else 1.0
        assert optimizer.unadapted_scale == scale


@pytest.mark.parametrize("family", list(LINEAR))
def test_baselines_scale_the_rate_linearly(family):
    base, base_batch, warmup_epochs = LINEAR[family]
    seen = 0
    for _, variant in variants(family):
        if not variant.endswith("_sgd"):
            continue
        config = module(family).get_config(variant)
        optimizer = assert_common(config)
        rate = base * config.global_batch_size / base_batch
        assert_schedule(config, rate, warmup_epochs, epochs=100)
        assert optimizer.exclude_from_layer_adaptation == [".*"]
        assert optimizer.weight_decay == (
            1e-4 if family == "resnet50" else 5e-4
        )
        lars = module(family).get_config(variant.removesuffix("_sgd"))
        assert config.global_batch_size == lars.global_batch_size
        assert config.model == lars.model
        seen += 1
    assert seen == 5


@pytest.mark.parametrize("variant", list(MLPERF))
def test_rows_of_mlperf(variant):
    batch, rate, warmup, momentum, decay, epochs, first, last = MLPERF[variant]
    config = module("resnet50_mlperf").get_config(variant)
    optimizer = assert_common(config)
    assert config.global_batch_size == batch
    assert optimizer.momentum == momentum
    assert optimizer.weight_decay == decay
    assert_schedule(config, rate, warmup, epochs, end=1e-4, rebase=True)
    assert first <= last <= epochs
    assert config.label_smoothing == 0.1
    assert (config.target_top1, config.stop_at_target) == (75.9, True)
    assert config.model.version == "v1.5"
    assert config.model.batch_norm_momentum == 0.9
    assert config.model.batch_norm_epsilon == 1e-5


def test_tables_hold_all_variants():
    """This file, the modules and their docstrings list the same variants."""
    expected = {
        "alexnet": ALEXNET.keys() | ALEXNET_SGD.keys(),
        "alexnet_bn": ALEXNET_BN.keys() | ALEXNET_BN_SGD.keys(),
        "resnet50": set(RESNET50),
        "resnet50_mlperf": set(MLPERF),
    }
    for family in LINEAR:
        batches = ("256 1k" if family == "resnet50" else "512 4k").split()
        expected[family] = expected[family] | {
            f"{batch}_sgd" for batch in (*batches, "8k", "16k", "32k")
        }
    for family in FAMILIES:
        assert module(family).ROWS.keys() == expected[family]
        doc = module(family).__doc__
        rows = re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \|", doc, re.M)
        documented = {variant: (rate, epochs) for variant, rate, epochs in rows}
        for variant in module(family).ROWS:
            schedule = module(family).get_config(variant).schedule
            name = variant.removesuffix("_inception")
            rate, warmup_epochs = map(float, documented[name])
            assert schedule.peak_learning_rate == rate
            assert schedule.warmup_epochs == warmup_epochs


def test_table_of_the_imagenet_page():
    """It lists every recipe, with the top-1 of its source or "none"."""
    page = (ROOT / "docs" / "imagenet.md").read_text()
    rows = re.findall(
        r"^\| `(\w+)` \| ([\w.]*) ?\| ([\w.]*) ?\| ([\w.]*) ?\|$", page, re.M
    )
    stated = {
        (family, variant): top1
        for variant, *cells in rows
        for family, top1 in zip(LINEAR, cells, strict=True)
        if top1
    }
    expected = {
        (family, variant): str(row[-1]) for family, variant, row in PAPER
    }
    for family, variant in ALL:
        if family in LINEAR:
            expected.setdefault((family, variant), "none")
    assert stated == expected
    for variant, (*_, epochs, first, last) in MLPERF.items():
        assert f"| `{variant}` | {first} to {last} | {epochs} |" in page


@pytest.mark.parametrize("family", FAMILIES)
def test_unknown_variant(family):
    with pytest.raises(JobError, match=r"unknown variant '9k'; .*4k|1k, 8k"):
        module(family).get_config("9k")


# Global batch, epochs, rate, temperature, weight decay and dense layers of the
# head, typed from arXiv 2002.05709 and the README of google-research/simclr.
SIMCLR = {
    "imagenet_4096": (4096, 100, 0.3 * 4096 / 256, 0.1, 1e-6, 2),
    "imagenet_8192": (8192, 100, 0.3 * 8192 / 256, 0.1, 1e-6, 2),
    "cifar10": (512, 1000, 1.0 * 512 / 256, 0.5, 1e-4, 3),
}


@pytest.mark.parametrize("variant", simclr.VARIANTS)
def test_simclr(variant):
    config = simclr.get_config(variant)
    check_config(config)
    job = job_size(config, ranks=2)
    schedule = create_schedule(config, job)
    warmup = config.schedule.warmup_epochs * job.steps_per_epoch
    peak = config.schedule.peak_learning_rate
    middle = (warmup + job.steps) / 2
    assert float(schedule(warmup)) == pytest.approx(peak)
    assert float(schedule(middle)) == pytest.approx(peak / 2, rel=1e-4)
    assert float(schedule(job.steps)) == 0
    optimizer = create_optimizer(config, schedule)
    assert optimizer.momentum == 0.9
    assert not optimizer.nesterov
    assert optimizer.trust_coefficient == 0.001
    assert optimizer.trust_ratio_norm == "joint"
    network = create_network(planned(config), image_shape(config.dataset))
    # A pattern that matches nothing is an error.
    optimizer.build(network.trainable_variables)
    adapted = [
        v.path
        for v in network.trainable_variables
        if not any(
            re.search(pattern, v.path)
            for pattern in optimizer.exclude_from_layer_adaptation
        )
    ]
    assert adapted == [
        v.path
        for v in network.trainable_variables
        if len(v.shape) > 1 and not v.path.startswith("probe/")
    ]
    if variant not in SIMCLR:
        return
    batch, epochs, rate, temperature, decay, layers = SIMCLR[variant]
    assert config.global_batch_size == batch
    assert (config.epochs, config.schedule.warmup_epochs) == (epochs, 10)
    assert peak == pytest.approx(rate)
    assert config.simclr.temperature == temperature
    assert config.simclr.projection_layers == layers
    assert config.simclr.embedding_size == 128
    assert optimizer.weight_decay == decay
    assert config.model.batch_norm == "synchronized"


def planned(config):
    """Returns the config without batch norm over ranks: Horovod is not up."""
    config = config.copy_and_resolve_references()
    config.model.batch_norm = "micro_batch"
    return config


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"simclr.temperature": 0.0}, "simclr.temperature must be above 0"),
        ({"simclr.temperature": -0.1}, "simclr.temperature must be above 0"),
        ({"simclr.embedding_size": 0}, "simclr.embedding_size must be 1 or"),
        ({"dataset.augmentation": "none"}, "different views of an image"),
        ({"dataset.augmentation": "minimal"}, "different views of an image"),
        ({"xla": True}, "does not work with xla"),
        (
            {"schedule.decay": "step"},
            "schedule.decay must be one of polynomial",
        ),
    ],
    ids=str,
)
def test_bad_simclr_config(changes, match):
    config = simclr.get_config("digits")
    config.update_from_flattened_dict(changes)
    with pytest.raises(JobError, match=match):
        check_config(config)


def test_simclr_needs_two_images_in_a_micro_batch():
    config = simclr.get_config("digits")
    config.max_micro_batch_size = 1
    with pytest.raises(JobError, match="needs 2 images or more"):
        job_size(config, ranks=2)


def test_unknown_variant_of_simclr():
    with pytest.raises(JobError, match="the variants are: imagenet_4096"):
        simclr.get_config("imagenet")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"labelsmoothing": 0.1},
            "key labelsmoothing; did you mean label",
        ),
        ({"dataset": {"chache": True}}, "key dataset.chache; did you mean da"),
        ({"epochs": None}, "epochs must be an integer, but is None"),
        ({"epochs": "30"}, "epochs must be an integer, but is '30'"),
        ({"epochs": 1.5}, "epochs must be an integer, but is 1.5"),
        ({"global_batch_size": [256]}, "global_batch_size must be an integer"),
        ({"max_micro_batch_size": True}, "must be an integer, but is True"),
        ({"epochs": 10**11}, "epochs must be at most 1,000,000, but is"),
        ({"label_smoothing": "0.1"}, "label_smoothing must be a number"),
        ({"schedule": {"warmup_epochs": None}}, "warmup_epochs must be a num"),
        ({"target_top1": "75.9"}, "target_top1 must be a number, or None"),
        ({"dataset": {"image_size": 3.5}}, "image_size must be an integer, or"),
        ({"xla": 1}, "xla must be True or False, but is 1"),
        ({"dataset": None}, "dataset must be a part of the config, with keys"),
        ({"optimizer": 5}, "optimizer must be a part of the config, with keys"),
        ({"epochs": 2**61}, "epochs must be at most 1,000,000, but is"),
        ({"global_batch_size": 2**61}, "size must be at most 1,000,000,000,00"),
        ({"schedule": {"peak_learning_rate": 1e308}}, "the largest float32"),
        ({"schedule": {"peak_learning_rate": math.nan}}, "the largest float3"),
        ({"dataset": {"name": 5}}, "dataset.name must be a text, but is 5"),
    ],
    ids=str,
)
def test_key_or_type_that_no_job_can_read(changes, match):
    """As a config file of one's own may have it."""
    config = demo.get_config()
    for key, value in changes.items():
        part, values = config, {key: value}
        if isinstance(value, dict):
            part, values = config[key], value
        with part.ignore_type(), part.unlocked():
            for name, changed in values.items():
                part[name] = changed
    with pytest.raises(JobError, match=match):
        check_config(config)


@pytest.mark.parametrize("excluded", [1, "bias", None, 0.5])
def test_exclusions_of_any_type_are_left_to_the_optimizer(excluded):
    config = demo.get_config()
    with config.unlocked(), config.ignore_type():
        config.optimizer.exclude_from_layer_adaptation = excluded
    check_config(config)


def test_keys_of_a_users_callback_are_no_mistakes():
    config = demo.get_config()
    with config.unlocked(), config.ignore_type():
        config.notes = "for my callback"
        config.hang_seconds = 90.0
    check_config(config)
