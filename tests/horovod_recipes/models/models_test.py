"""Compares the networks with their papers, with NumPy and with Keras's."""

import functools
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from horovod_recipes.models import MODELS
from horovod_recipes.models.heads import encoder_of
from horovod_recipes.models.heads import simclr_network
from horovod_recipes.models.layers import GroupedConv2D
from horovod_recipes.models.layers import LocalResponseNormalization

alexnet = MODELS["alexnet"]
resnet50 = MODELS["resnet50"]
small_resnet50 = functools.partial(
    resnet50, (32, 32, 3), 10, stage_blocks=(1, 1, 1, 1), width=8
)
small_alexnet = functools.partial(alexnet, (67, 67, 3), 10)
small_alexnet_bn = functools.partial(small_alexnet, normalization="batch_norm")
SMALL_NETWORKS = [small_resnet50, small_alexnet, small_alexnet_bn]
each_small_network = pytest.mark.parametrize(
    "create", SMALL_NETWORKS, ids=["resnet50", "alexnet", "alexnet_bn"]
)


@pytest.fixture(autouse=True)
def _same_start():
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_dtype_policy("float32")


@pytest.fixture(scope="module")
def resnet50_v1():
    return resnet50((224, 224, 3), 1000, version="v1")


@pytest.fixture(scope="module")
def resnet50_v1_5():
    return resnet50((224, 224, 3), 1000, version="v1.5")


@pytest.fixture(scope="module")
def bvlc_alexnet():
    return alexnet((227, 227, 3), 1000)


def images(model, count=4):
    shape = (count, *model.input.shape[1:])
    return np.random.default_rng(0).integers(0, 256, shape, "uint8")


def count(variables):
    return sum(np.prod(v.shape) for v in variables)


def multiply_adds(model):
    """Returns the multiply-adds of convolutions and dense layers per image."""
    return sum(
        np.prod(layer.output.shape[1:-1]) * np.prod(layer.kernel.shape)
        for layer in model.layers
        if isinstance(layer, (keras.layers.Conv2D, keras.layers.Dense))
    )


def test_resnet50_has_the_published_size(resnet50_v1, resnet50_v1_5):
    """Checks the parameters and multiply-adds against published tables.

    torchvision's table lists the parameters, and 4.089e9 multiply-adds for
    v1.5. For v1, He et al. list 3.8e9 (table 1), and Sze et al. list 3.86e9 for
    its convolutions (https://arxiv.org/abs/1703.09039, table II).
    """
    for model in (resnet50_v1, resnet50_v1_5):
        assert count(model.trainable_variables) == 25_557_032
        # 53 kernels, gamma and beta of 53 batch norms, and the logits layer.
        assert len(model.trainable_variables) == 53 + 2 * 53 + 2
        assert count(model.non_trainable_variables) == 53_120
        assert model.output.shape == (None, 1000)
    assert multiply_adds(resnet50_v1) == 3_857_973_248
    assert multiply_adds(resnet50_v1_5) == 4_089_184_256


def test_alexnet_has_the_published_size(bvlc_alexnet):
    """Checks the parameters and multiply-adds against a published table.

    Sze et al. (https://arxiv.org/abs/1703.09039), table II, list 61 M and 724
    M. Caffe's network has exactly this number of parameters.
    """
    assert count(bvlc_alexnet.trainable_variables) == 60_965_224
    assert multiply_adds(bvlc_alexnet) == 724_406_816
    sizes = {
        name: bvlc_alexnet.get_layer(name).output.shape[1:]
        for name in ("conv1", "pool1", "pool2", "pool5", "fc6", "fc8")
    }
    assert sizes == {
        "conv1": (55, 55, 96),
        "pool1": (27, 27, 96),
        "pool2": (13, 13, 256),
        "pool5": (6, 6, 256),
        "fc6": (4096,),
        "fc8": (1000,),
    }


def test_alexnet_bn_has_batch_norms_instead_of_biases_and_lrn():
    model = alexnet((227, 227, 3), 1000, normalization="batch_norm")
    filters = 96 + 256 + 384 + 384 + 256
    assert count(model.trainable_variables) == 60_965_224 + filters
    assert model.get_layer("bn1").input is model.get_layer("conv1").output
    assert model.get_layer("relu1").input is model.get_layer("bn1").output
    assert not any("lrn" in layer.name for layer in model.layers)


def test_smallest_image_of_alexnet():
    assert small_alexnet().get_layer("pool5").output.shape[1:] == (1, 1, 256)
    with pytest.raises(ValueError, match="at least 67 x 67 pixels"):
        alexnet((80, 66, 3), 10)


@pytest.mark.slow
def test_resnet50_v1_equals_keras_applications():
    """Keras's convolutions have biases; our batch norm means absorb them."""
    ours = resnet50((64, 64, 3), 10, version="v1", batch_norm_epsilon=1.001e-5)
    theirs = keras.applications.ResNet50(
        weights=None,
        input_shape=(64, 64, 3),
        classes=10,
        classifier_activation=None,
    )
    rng = np.random.default_rng(0)
    for v in theirs.variables:
        if not v.path.endswith("kernel"):
            v.assign(rng.uniform(0.5, 1.5, v.shape))
    for layer in theirs.layers:
        if layer.name.endswith("_conv"):
            kernel, bias = layer.get_weights()
            ours.get_layer(our_name(layer.name)).set_weights([kernel])
            name = layer.name.replace("_conv", "_bn")
            gamma, beta, mean, variance = theirs.get_layer(name).get_weights()
            ours.get_layer(our_name(name)).set_weights(
                [gamma, beta, mean - bias, variance]
            )
    ours.get_layer("logits").set_weights(
        theirs.get_layer("predictions").get_weights()
    )

    x = images(ours)
    mean = 255 * np.array([0.485, 0.456, 0.406])
    stddev = 255 * np.array([0.229, 0.224, 0.225])
    expected = theirs.predict((x - mean) / stddev, verbose=0)
    assert expected.std() > 0.1
    np.testing.assert_allclose(
        ours.predict(x, verbose=0), expected, rtol=1e-3, atol=1e-3
    )


def our_name(name):
    """Translates a layer name of Keras's ResNet, such as conv3_block1_0_bn."""
    stage, *block, kind = name.removeprefix("conv").split("_")
    if not block:
        return f"stem_{kind}"
    block, index = block
    part = f"{kind}{index}" if index != "0" else f"projection_{kind}"
    return f"stage{int(stage) - 1}_{block}_{part}"


def test_strides_of_the_two_versions(resnet50_v1, resnet50_v1_5):
    for model, expected in ((resnet50_v1, (2, 1)), (resnet50_v1_5, (1, 2))):
        for stage in (1, 2, 3, 4):
            for block in (1, 2, 3):
                strides = tuple(
                    model.get_layer(f"stage{stage}_block{block}_{name}").strides
                    for name in ("conv1", "conv2", "conv3")
                )
                halves = stage > 1 and block == 1
                first, second = expected if halves else (1, 1)
                assert strides == ((first,) * 2, (second,) * 2, (1, 1))


def test_resnet50_v1_5_pads_both_sides_alike():
    """Stride 2 gives every second pixel of the output with stride 1."""
    model = small_resnet50(version="v1.5")
    x = np.random.default_rng(0).normal(size=(1, 8, 8, 16)).astype("float32")
    convolution = model.get_layer("stage2_block1_conv2")
    strided = convolution(model.get_layer("stage2_block1_pad")(x))
    dense = keras.ops.conv(x, convolution.kernel, padding="same")
    np.testing.assert_allclose(strided, dense[:, ::2, ::2], atol=1e-5)


def test_zero_gamma():
    def gammas(model):
        return {
            v.path: np.unique(v).tolist()
            for v in model.trainable_variables
            if v.path.endswith("gamma")
        }

    expected = gammas(small_resnet50())
    assert set(map(tuple, expected.values())) == {(1.0,)}
    for stage in (1, 2, 3, 4):
        expected[f"stage{stage}_block1_bn3/gamma"] = [0.0]
    assert gammas(small_resnet50(zero_gamma=True)) == expected


def test_initial_values_of_resnet50(resnet50_v1):
    kernel = resnet50_v1.get_layer("stage4_block1_conv2").kernel.numpy()
    # He et al., https://arxiv.org/abs/1502.01852, equation 10.
    assert kernel.std() == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.01)
    logits = resnet50_v1.get_layer("logits")
    assert logits.kernel.numpy().std() == pytest.approx(0.01, rel=0.01)
    assert not logits.bias.numpy().any()

    model = small_resnet50(kernel_initializer="zeros", logits_stddev=0.5)
    assert not model.get_layer("stage1_block1_conv1").kernel.numpy().any()
    stddev = model.get_layer("logits").kernel.numpy().std()
    assert stddev == pytest.approx(0.5, rel=0.05)


def test_initial_values_of_alexnet_are_those_of_caffe(bvlc_alexnet):
    """BVLC/caffe has them in models/bvlc_alexnet/train_val.prototxt."""
    expected = {
        "conv1": (0.01, 0.0),
        "conv2": (0.01, 0.1),
        "conv3": (0.01, 0.0),
        "conv4": (0.01, 0.1),
        "conv5": (0.01, 0.1),
        "fc6": (0.005, 0.1),
        "fc7": (0.005, 0.1),
        "fc8": (0.01, 0.0),
    }
    for name, (stddev, bias) in expected.items():
        layer = bvlc_alexnet.get_layer(name)
        kernel = layer.kernel.numpy()
        assert kernel.std() == pytest.approx(stddev, rel=0.02)
        # A normal distribution has 0.27 % beyond 3 standard deviations.
        outside = (abs(kernel) > 3 * stddev).mean()
        assert outside == pytest.approx(0.0027, rel=0.3)
        np.testing.assert_array_equal(layer.bias, np.float32(bias))


def test_alexnet_has_two_groups(bvlc_alexnet):
    groups = [
        bvlc_alexnet.get_layer(f"conv{index}").groups for index in range(1, 6)
    ]
    assert groups == [1, 2, 1, 2, 2]
    assert bvlc_alexnet.get_layer("conv2").kernel.shape == (5, 5, 48, 256)


def test_grouped_convolution():
    x = np.random.default_rng(0).normal(size=(2, 6, 6, 4)).astype("float32")
    arguments = {"filters": 6, "kernel_size": 3, "groups": 2, "strides": 2}
    ours = GroupedConv2D(**arguments)
    theirs = keras.layers.Conv2D(**arguments)
    ours.build(x.shape)
    theirs.build(x.shape)
    theirs.set_weights([ours.kernel, np.arange(6)])
    ours.set_weights([ours.kernel, np.arange(6)])
    np.testing.assert_allclose(ours(x), theirs(x), atol=1e-5)

    changed = x.copy()
    changed[..., 2:] += 1
    same = np.isclose(ours(x), ours(changed)).all(axis=(0, 1, 2))
    np.testing.assert_array_equal(same, [True] * 3 + [False] * 3)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_local_response_normalization(policy):
    # Many squares exceed float16's largest value, 65,504.
    x = np.random.default_rng(0).normal(scale=300, size=(2, 3, 3, 7))
    squares = np.pad(x**2, [(0, 0), (0, 0), (0, 0), (2, 2)])
    neighbours = sum(squares[..., i : i + 7] for i in range(5))
    expected = x / (1 + 1e-4 / 5 * neighbours) ** 0.75
    layer = LocalResponseNormalization(dtype=policy)
    outputs = layer(x)
    assert outputs.dtype == layer.compute_dtype
    rtol = 1e-5 if policy == "float32" else 2e-3
    np.testing.assert_allclose(tf.cast(outputs, "float64"), expected, rtol=rtol)


@pytest.mark.parametrize(
    ("create", "layer", "stddev"),
    [
        (small_resnet50, "normalize_image", [58.395, 57.12, 57.375]),
        (small_alexnet, "subtract_mean", [1, 1, 1]),
    ],
    ids=["resnet50", "alexnet"],
)
def test_images_are_normalized_in_float32(create, layer, stddev):
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = create()
    normalize = keras.Model(model.input, model.get_layer(layer).output)
    x = images(model)
    np.testing.assert_allclose(
        normalize.predict(x, verbose=0),
        (x - np.array([123.675, 116.28, 103.53])) / stddev,
        rtol=1e-4,
        atol=1e-4,
    )


@each_small_network
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_logits_are_float32_whatever_the_policy(create, policy):
    model = create()
    expected = model.predict(images(model), verbose=0)
    assert expected.dtype == "float32"
    keras.config.set_dtype_policy(policy)
    mixed = create()
    mixed.set_weights(model.get_weights())
    first = next(x for x in mixed.layers if isinstance(x, keras.layers.Conv2D))
    assert first.compute_dtype == policy.removeprefix("mixed_")
    assert {v.dtype for v in mixed.trainable_variables} == {"float32"}
    logits = mixed.predict(images(model), verbose=0)
    assert logits.dtype == "float32"
    # The logits were never rounded to half precision.
    rounded = tf.cast(logits, first.compute_dtype).numpy()
    assert (logits != rounded.astype("float32")).any()
    error = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
    assert 0 < error < 0.03


@each_small_network
def test_every_variable_has_a_name_and_a_gradient(create):
    model = create()
    paths = [v.path for v in model.trainable_variables]
    assert len(set(paths)) == len(paths)
    assert not any(path[0].isupper() or "_1/" in path for path in paths)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    with tf.GradientTape() as tape:
        value = loss(np.arange(4), model(images(model), training=True))
    gradients = tape.gradient(value, [v.value for v in model.trainable_weights])
    for path, gradient in zip(paths, gradients, strict=True):
        assert 0 < np.linalg.norm(gradient) < np.inf, path


def test_dropout_acts_in_training_only():
    model = small_alexnet(dropout=0.25)
    assert [model.get_layer(f"drop{i}").rate for i in (6, 7)] == [0.25, 0.25]
    drop6 = keras.Model(model.input, model.get_layer("drop6").output)
    kept = (drop6(images(model), training=True).numpy() != 0).mean()
    evaluated = (drop6(images(model), training=False).numpy() != 0).mean()
    # fc6's biases start at 0.1, so nearly all of its outputs are positive.
    assert evaluated > 0.99
    assert kept == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize("create", [small_resnet50, small_alexnet_bn])
def test_arguments_of_batch_norm(create):
    model = create(batch_norm_momentum=0.8, batch_norm_epsilon=0.25)
    norms = [
        layer
        for layer in model.layers
        if isinstance(layer, keras.layers.BatchNormalization)
    ]
    # ResNet has one in the stem, and four per block with a projection.
    assert len(norms) == (1 + 4 * 4 if create is small_resnet50 else 5)
    for layer in norms:
        assert (layer.momentum, layer.epsilon) == (0.8, 0.25)


def test_arguments_out_of_range():
    with pytest.raises(ValueError, match=r'`version` must be "v1" or "v1\.5"'):
        small_resnet50(version="v2")
    with pytest.raises(ValueError, match='`normalization` must be "lrn" or'):
        small_alexnet(normalization="bn")
    for create in (small_resnet50, small_alexnet_bn):
        with pytest.raises(ValueError, match='`batch_norm` must be "micro_'):
            create(batch_norm="ghost")


def test_saved_networks_load_without_horovod(tmp_path):
    for index, create in enumerate(SMALL_NETWORKS):
        model = create()
        model.save(tmp_path / f"{index}.keras")
        np.save(tmp_path / f"{index}_images.npy", images(model))
        logits = model.predict(images(model), verbose=0)
        np.save(tmp_path / f"{index}_logits.npy", logits)
    script = """
import sys
sys.modules["horovod"] = None
import keras
import numpy as np
import horovod_recipes.models
for index in range(3):
    model = keras.saving.load_model(f"{index}.keras")
    images = np.load(f"{index}_images.npy")
    expected = np.load(f"{index}_logits.npy")
    logits = model.predict(images, verbose=0)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)


def test_resnet18_for_small_images():
    """It has as many weights as the networks that others train on CIFAR-10."""
    network = MODELS["resnet18"]((32, 32, 3), 10)
    assert count(network.trainable_variables) == 11_173_962
    outputs = {layer.name: layer.output.shape[1:] for layer in network.layers}
    assert outputs["stem_relu"] == (32, 32, 64)
    assert outputs["stage1_block2_relu"] == (32, 32, 64)
    assert outputs["stage4_block2_relu"] == (4, 4, 512)
    assert outputs["pool"] == (512,)
    assert "stage1_block1_projection_conv" not in outputs
    small = MODELS["resnet18"](
        (28, 28, 1), 10, stage_blocks=(1, 1, 1), width=16, stem_stride=2
    )
    assert small.get_layer("stem_relu").output.shape[1:] == (14, 14, 16)
    assert small(images(small)).shape == (4, 10)


@pytest.mark.parametrize("projection_layers", [2, 3])
def test_simclr_network(projection_layers):
    """Its head is as the paper has it, and its encoder lacks the logits."""
    classifier = MODELS["resnet18"]((8, 8, 3), 10, stage_blocks=(1, 1), width=4)
    network = simclr_network(classifier, projection_layers, 16)
    features, embedding, logits = (
        network.output[name] for name in ("features", "embedding", "logits")
    )
    assert [x.shape[1] for x in (features, embedding, logits)] == [8, 16, 10]
    head = [
        layer for layer in network.layers if layer.name.startswith("projection")
    ]
    kinds = [type(layer).__name__ for layer in head]
    block = ["Dense", "BatchNormalization", "ReLU"]
    assert kinds == (block * projection_layers)[:-1]
    denses = [layer for layer in head if isinstance(layer, keras.layers.Dense)]
    sizes = [8] * (projection_layers - 1) + [16]
    assert [dense.units for dense in denses] == sizes
    assert not any(dense.use_bias for dense in denses)
    assert np.std(denses[0].kernel) == pytest.approx(0.01, rel=0.3)
    # The last batch norm only scales.
    assert not head[-1].center
    assert "logits" not in [layer.name for layer in network.layers]

    x = images(network)
    encoder = encoder_of(network)
    np.testing.assert_array_equal(encoder(x), network(x)["features"])
    np.testing.assert_array_equal(
        encoder(x),
        keras.Model(classifier.input, classifier.layers[-1].input)(x),
    )
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(network(x)["logits"] ** 2)
    gradients = tape.gradient(
        loss, [v.value for v in network.trainable_variables]
    )
    reached = [
        v.path
        for v, g in zip(network.trainable_variables, gradients, strict=True)
        if g is not None
    ]
    assert reached == ["probe/kernel", "probe/bias"]


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_outputs_of_simclr_are_float32_in_half_precision(policy):
    keras.config.set_dtype_policy(policy)
    network = simclr_network(
        MODELS["resnet18"]((8, 8, 3), 10, stage_blocks=(1,), width=4), 2, 16
    )
    outputs = network(images(network))
    assert {x.dtype for x in outputs.values()} == {tf.float32}


def test_saved_encoder_loads_without_this_project(tmp_path):
    network = simclr_network(
        MODELS["resnet18"]((8, 8, 3), 10, stage_blocks=(1,), width=4), 2, 16
    )
    encoder, x = encoder_of(network), images(network)
    encoder.save(tmp_path / "encoder.keras")
    np.save(tmp_path / "x.npy", x)
    script = f"""
import sys
for name in ("horovod", "horovod_recipes", "keras_lars"):
    sys.modules[name] = None
import keras, numpy as np
encoder = keras.saving.load_model("{tmp_path}/encoder.keras")
np.save("{tmp_path}/y.npy", encoder(np.load("{tmp_path}/x.npy")))
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    np.testing.assert_allclose(
        np.load(tmp_path / "y.npy"), encoder(x), rtol=1e-5, atol=1e-6
    )
