"""The optimizer that a config names."""

import keras
import pytest
from ml_collections import config_dict

from horovod_recipes.configs import demo
from horovod_recipes.training.build import create_optimizer
from keras_lars import LARS
from keras_lars import TrustRatio
from keras_lars.muon import ConvMuon
from tests.keras_lars.reference import NEEDS_MUON


@pytest.mark.parametrize(
    ("name", "arguments", "inner"),
    [
        ("lamb", {"weight_decay": 0.01}, keras.optimizers.Adam),
        ("trust_ratio:sgd", {}, keras.optimizers.SGD),
        (
            "trust_ratio:adamw",
            {"inner": {"beta_2": 0.95}},
            keras.optimizers.AdamW,
        ),
        pytest.param(
            "trust_ratio:conv_muon",
            {"clip": (0.5, 1.5), "inner": {"rms_rate": None}},
            ConvMuon,
            marks=NEEDS_MUON,
        ),
    ],
)
def test_trust_ratio_around_the_named_optimizer(name, arguments, inner):
    config = demo.get_config()
    config.optimizer_name = name
    config.optimizer = config_dict.create(**arguments)
    optimizer = create_optimizer(config, schedule=0.5)
    assert type(optimizer) is TrustRatio
    assert type(optimizer.optimizer) is inner
    assert float(optimizer.learning_rate) == 0.5
    inner_arguments = arguments.pop("inner", {})
    for part, wanted in (
        (optimizer, arguments),
        (optimizer.optimizer, inner_arguments),
    ):
        for key, value in wanted.items():
            assert getattr(part, key) == value


def test_lamb_has_the_epsilon_of_its_paper():
    config = demo.get_config()
    config.optimizer_name = "lamb"
    config.optimizer = config_dict.create()
    assert create_optimizer(config, schedule=0.5).optimizer.epsilon == 1e-6


def test_loss_scale_is_around_the_trust_ratio():
    config = demo.get_config()
    config.optimizer_name, config.precision = "lamb", "mixed_float16"
    config.optimizer = config_dict.create()
    optimizer = create_optimizer(config, schedule=0.5)
    assert type(optimizer) is keras.optimizers.LossScaleOptimizer
    assert type(optimizer.inner_optimizer) is TrustRatio


def test_lars_is_the_demos():
    assert type(create_optimizer(demo.get_config(), schedule=0.5)) is LARS
