"""The study of norm ratios, in small, compared with NumPy."""

import dataclasses
import math

import keras
import numpy as np
import pytest

from benchmarks.study import training
from benchmarks.study import trust_ratios
from horovod_recipes.models.alexnet import alexnet
from keras_lars import LARS
from tests.benchmarks.small_data import write_fashion_mnist
from tests.benchmarks.small_data import write_photos

KERNEL = np.array([[0.3, -0.4], [0.0, 1.2]], "float32")
BIAS = np.array([0.5, -0.5], "float32")


def tiny_model():
    model = keras.Sequential(
        [keras.Input((2,)), keras.layers.Dense(2, name="fc8")]
    )
    model.set_weights([KERNEL, BIAS])
    return model


def test_first_step_is_that_by_hand():
    images = np.array([[1.0, 2.0], [-1.0, 0.5], [3.0, 1.0]], "float32")
    labels = np.array([0, 1, 1])
    loss, (kernel, bias) = trust_ratios.first_step(tiny_model(), images, labels)

    logits = images @ KERNEL + BIAS
    softmax = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    assert loss == pytest.approx(-np.log(softmax[range(3), labels]).mean())
    of_logits = (softmax - np.eye(2)[labels]) / 3
    gradient_norm = np.linalg.norm(images.T @ of_logits)
    # 0.3, 0.4 and 1.2 are the sides of a box whose diagonal is 1.3.
    assert kernel == {
        "layer": "fc8",
        "kind": "kernel",
        "weight_norm": pytest.approx(1.3),
        "gradient_norm": pytest.approx(gradient_norm),
        "ratio": pytest.approx(1.3 / gradient_norm),
    }
    gradient_norm = np.linalg.norm(of_logits.sum(0))
    assert (bias["layer"], bias["kind"]) == ("fc8", "bias")
    assert bias["weight_norm"] == pytest.approx(math.sqrt(0.5))
    assert bias["ratio"] == pytest.approx(math.sqrt(0.5) / gradient_norm)


def test_norm_ratio_follows_from_the_trust_ratio_of_lars():
    optimizer = LARS(1.0, weight_decay=0.01, trust_coefficient=0.002)
    kernel = keras.Variable(np.array([[3.0, 4.0]], "float32"))
    optimizer.apply([np.array([[0.0, 0.5]], "float32")], [kernel])
    (trust_ratio,) = optimizer.trust_ratios().values()
    assert trust_ratio == pytest.approx(0.002 * 5 / (0.5 + 0.01 * 5))
    ratios = trust_ratios.norm_ratios([trust_ratio], 0.002, 0.01)
    assert ratios == pytest.approx([5 / 0.5], rel=1e-5)


def test_course_has_the_ratio_of_every_update(data_folder):
    """At a rate that moves nothing, each is that of the whole first batch."""
    write_fashion_mnist(data_folder)
    setting = dataclasses.replace(
        training.SETTINGS["full"],
        epochs=2,
        warmup_epochs=0,
        training_images=1024,
    )
    run = dataclasses.replace(trust_ratios.RUN, batch=1024, rate=1e-9)
    result, ratios = trust_ratios.course(run, setting)
    assert result["updates"] == 2
    assert list(ratios) == list(trust_ratios.LAYERS)

    model = training.small_alexnet(run.seed)
    batch = training.data(1024)["training"]
    _, lines = trust_ratios.first_step(model, *batch)
    expected = [x["ratio"] for x in lines if x["kind"] == "kernel"]
    assert len(set(np.round(expected, 3))) == len(expected)
    for values, ratio in zip(ratios.values(), expected, strict=True):
        assert values == pytest.approx([ratio, ratio], rel=1e-3)


def test_photos_are_cropped_as_the_recipe_does(data_folder):
    write_photos(data_folder)
    images, labels = trust_ratios.photo_batch()
    assert images.shape == (2, 227, 227, 3)
    assert images.dtype == "uint8"
    assert images.mean(axis=(1, 2, 3)).tolist() == [0, 255]
    assert labels.tolist() == [7, 990]


def test_norms_say_which_of_the_papers_columns_are_the_kernels():
    """Its norms "conv1.b 1.86, conv2.b 5.546, conv3.b 9.40" and so on."""
    keras.utils.set_random_seed(0)
    model = alexnet((67, 67, 3), num_classes=1000)
    norms = {
        layer: np.linalg.norm(model.get_layer(layer).kernel)
        for layer in ("conv1", "conv2", "conv3", "conv4", "conv5", "fc7", "fc8")
    }
    assert norms == {
        "conv1": pytest.approx(1.86, rel=0.02),
        "conv2": pytest.approx(5.546, rel=0.01),
        "conv3": pytest.approx(9.40, rel=0.01),
        "conv4": pytest.approx(8.15, rel=0.01),
        "conv5": pytest.approx(6.65, rel=0.01),
        "fc7": pytest.approx(20.5, rel=0.01),
        "fc8": pytest.approx(20.2, rel=0.01),
    }


def lines(scale):
    return [
        {
            "layer": layer,
            "kind": kind,
            "weight_norm": 3.0 if kind == "kernel" else 0.0,
            "gradient_norm": 2.0 * scale,
            "ratio": 1.5 / scale if kind == "kernel" else 0.0,
        }
        for layer in trust_ratios.LAYERS
        for kind in ("kernel", "bias")
    ]


def test_tables():
    batches = [
        {"photos": 5, "variables": lines(2)},
        {"photos": 20, "variables": lines(1)},
    ]
    header, _, first, second, *_ = trust_ratios.first_step_table(
        batches
    ).splitlines()
    assert header == (
        "|  | ‖w‖ | ‖∇L‖ | ‖w‖/‖∇L‖, 20 photos | ‖w‖/‖∇L‖, 5 photos | "
        "paper, by copies |"
    )
    assert first == "| conv1 kernel | 3 | 2 | 1.5 | 0.75 | 8.48 |"
    assert second == "| conv1 bias | 0 | 2 | 0 | 0 | 5.76 |"
    ratios = {
        layer: [100.0 + update for update in range(1, 34)]
        for layer in trust_ratios.LAYERS
    }
    header, _, first, *_ = trust_ratios.course_table(ratios).splitlines()
    assert header == (
        "| ‖w‖/‖∇L‖, kernel | update 1 | update 5 | update 10 | update 30 | "
        "update 33 |"
    )
    assert first == "| conv1 | 101 | 105 | 110 | 130 | 133 |"


def test_picture(tmp_path):
    path = tmp_path / "images" / "picture.png"
    ratios = {layer: [1.0, 2.0] for layer in trust_ratios.LAYERS}
    trust_ratios.draw(lines(1), ratios, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_numbers_are_kept_with_5_digits():
    value = {"a": [1.2345678, 7, None, "x"], "b": {"c": 0.000123456}}
    assert trust_ratios.rounded(value) == {
        "a": [1.2346, 7, None, "x"],
        "b": {"c": 0.00012346},
    }
