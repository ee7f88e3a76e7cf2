"""The schedules at steps where their values are known."""

import json
import math

import keras
import numpy as np
import pytest

from keras_lars.schedules import WarmupCosineDecay
from keras_lars.schedules import WarmupPolynomialDecay
from keras_lars.schedules import scale_learning_rate


def values(schedule, steps):
    return [float(schedule(step)) for step in steps]


def test_rebased_decay_is_that_of_mlperf():
    # 32K row of the MLPerf reference, in a schedule of 10 steps after 4.
    schedule = WarmupPolynomialDecay(
        29.0, total_steps=14, warmup_steps=4, end_learning_rate=1e-4
    )
    after = [(29 - 1e-4) * (1 - t / 10) ** 2 + 1e-4 for t in range(11)]
    assert values(schedule, range(15)) == pytest.approx(
        [0.0, 7.25, 14.5, 21.75, *after], rel=1e-5
    )
    assert values(schedule, [20]) == pytest.approx([1e-4], rel=1e-5)


def test_decay_that_is_not_rebased_counts_from_step_0():
    schedule = WarmupPolynomialDecay(
        10.0, total_steps=10, warmup_steps=2, rebase=False
    )
    assert values(schedule, [0, 1, 2, 5]) == pytest.approx(
        [0.0, 5.0, 10 * 0.8**2, 10 * 0.5**2]
    )


def test_papers_schedule_without_warmup():
    schedule = WarmupPolynomialDecay(4.0, total_steps=8)
    assert values(schedule, [0, 2, 8]) == pytest.approx([4.0, 2.25, 0.0])


def test_warmup_power_and_start():
    schedule = WarmupPolynomialDecay(
        9.0,
        total_steps=8,
        warmup_steps=4,
        warmup_start_learning_rate=1.0,
        warmup_power=2.0,
    )
    assert values(schedule, [0, 2]) == pytest.approx([1.0, 3.0])


def test_cosine_after_a_linear_warmup():
    schedule = WarmupCosineDecay(
        3.0, total_steps=10, warmup_steps=4, end_learning_rate=1.0
    )
    after = [1 + (1 + math.cos(math.pi * t / 6)) for t in range(7)]
    assert values(schedule, range(11)) == pytest.approx(
        [0.0, 0.75, 1.5, 2.25, *after], rel=1e-6
    )
    assert values(schedule, [20]) == [1.0]
    without = WarmupCosineDecay(2.0, total_steps=4)
    assert values(without, [0, 2, 4]) == pytest.approx([2.0, 1.0, 0.0])


@pytest.mark.parametrize(
    "schedule",
    [
        WarmupPolynomialDecay(3.0, 9, 2, 0.1, 2.0, 0.01, 1.5, False),
        WarmupCosineDecay(3.0, 9, 2, 0.1),
    ],
    ids=lambda schedule: schedule.name,
)
def test_config_round_trip(schedule):
    again = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(schedule)
    )
    assert again.get_config() == schedule.get_config()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("peak_learning_rate", -1.0),
        *[("total_steps", v) for v in (0, -6, None, "9", [9])],
        ("warmup_steps", 10),
        ("warmup_steps", -1),
        ("warmup_start_learning_rate", float("nan")),
        ("warmup_power", 0.0),
        ("end_learning_rate", -1e-4),
        ("power", -2.0),
    ],
)
def test_bad_argument_is_named(name, value):
    arguments = {"peak_learning_rate": 1.0, "total_steps": 10, name: value}
    with pytest.raises(ValueError, match=name):
        WarmupPolynomialDecay(**arguments)
    if name not in ("warmup_start_learning_rate", "warmup_power", "power"):
        with pytest.raises(ValueError, match=name):
            WarmupCosineDecay(**arguments)


def test_steps_may_be_a_tensor():
    dataset = keras.ops.convert_to_tensor([8, 8, 8])
    schedule = WarmupPolynomialDecay(
        np.float32(4.0), total_steps=dataset[0] * 1, warmup_steps=np.int64(0)
    )
    assert schedule.get_config()["total_steps"] == 8
    json.dumps(schedule.get_config())
    assert values(schedule, [0, 2, 8]) == pytest.approx([4.0, 2.25, 0.0])


def test_scaling_rules():
    assert scale_learning_rate(0.1, 8192, 256) == pytest.approx(3.2)
    assert scale_learning_rate(0.1, 8192, 512, "sqrt") == pytest.approx(0.4)
    with pytest.raises(ValueError, match="rule"):
        scale_learning_rate(0.1, 8192, 512, "cubic")
    with pytest.raises(ValueError, match="base_batch_size"):
        scale_learning_rate(0.1, 8192, 0)
