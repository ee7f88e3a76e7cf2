"""Checks how ranks and micro-batches divide the global batch."""

import importlib
import math

import pytest

from horovod_recipes.configs import demo
from horovod_recipes.errors import JobError
from horovod_recipes.training.job_size import job_size

FAMILIES = ("alexnet", "alexnet_bn", "resnet50", "resnet50_mlperf")


def family_module(family):
    return importlib.import_module(f"horovod_recipes.configs.{family}")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ranks", [1, 8, 256])
def test_micro_batches_of_every_recipe(family, ranks):
    for variant in family_module(family).ROWS:
        config = family_module(family).get_config(variant)
        size = job_size(config, ranks)
        assert size.global_batch_size == config.global_batch_size
        assert size.micro_batch_size <= config.max_micro_batch_size
        share = config.global_batch_size // ranks
        fewest = math.ceil(share / config.max_micro_batch_size)
        assert size.accumulation_steps == fewest


@pytest.mark.parametrize(
    ("family", "variant", "ranks", "micro_batch", "accumulation"),
    [
        ("resnet50", "32k", 256, 64, 2),
        ("resnet50", "32k", 8, 64, 64),
        ("resnet50_mlperf", "64k", 512, 128, 1),
        ("alexnet", "8k", 4, 512, 4),
        ("alexnet_bn", "512", 2, 128, 2),
    ],
)
def test_micro_batches(family, variant, ranks, micro_batch, accumulation):
    size = job_size(family_module(family).get_config(variant), ranks)
    assert size.micro_batch_size == micro_batch
    assert size.accumulation_steps == accumulation


def test_share_that_no_power_of_two_divides():
    """A rank's 500 images become 10 micro-batches of 50, where 64 would fit."""
    config = demo.get_config()
    config.update(global_batch_size=1000, max_micro_batch_size=64)
    size = job_size(config, ranks=2)
    assert (size.micro_batch_size, size.accumulation_steps) == (50, 10)


def test_prime_share_of_any_size():
    """Trying all smaller numbers of micro-batches would take hours."""
    config, prime = demo.get_config(), 999_999_999_989
    config.global_batch_size = config.dataset.train_examples = prime
    size = job_size(config, ranks=1)
    assert (size.micro_batch_size, size.accumulation_steps) == (1, prime)


def test_too_many_updates():
    config = demo.get_config()
    config.update(global_batch_size=1, epochs=5001)
    message = "5,001 epochs of 4,000 updates are more than 20,000,000 updates"
    with pytest.raises(JobError, match=message):
        job_size(config, ranks=1)


def test_more_ranks_than_examples():
    with pytest.raises(JobError, match=r"1001 ranks .* 1000 examples .* test"):
        job_size(demo.get_config(), ranks=1001)
