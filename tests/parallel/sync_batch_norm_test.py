"""SyncBatchNormalization on two ranks equals one rank with all examples."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import horovod_recipes.keras as hvd
from horovod_recipes.keras import _watchdog
from horovod_recipes.models import MODELS
from tests.parallel.common import assert_same_on_all_ranks
from tests.parallel.common import horovod_operations

# The layer as a graph, and as it is.
WRAPPERS = [
    pytest.param(lambda f: tf.function(f, autograph=False), id="graph"),
    pytest.param(lambda f: f, id="eager"),
]
ARGUMENTS = {"momentum": 0.75, "epsilon": 0.01}


def inputs_of_ranks(sizes, offset=0.0):
    """Returns each rank's batch. The mean and the variance differ by rank."""
    rng = np.random.default_rng(0)
    return [
        rng.normal(offset + rank, 1 + rank, (size, 4, 5, 3)).astype("float32")
        for rank, size in enumerate(sizes)
    ]


def training_step(layer, x, call):
    """Returns the results of a training step by name.

    The loss is a sum over examples, so the sum of the ranks' gradients is the
    gradient of one rank with all examples.
    """
    layer.build(x.shape)
    layer.gamma.assign([0.5, 1.0, 2.0])
    layer.beta.assign([-1.0, 0.0, 1.0])
    x = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        outputs = call(x, training=True)
        loss = tf.reduce_sum(tf.cast(tf.sin(x), outputs.dtype) * outputs)
    gradients = tape.gradient(loss, [x, layer.gamma.value, layer.beta.value])
    return {
        "outputs": tf.cast(outputs, "float32").numpy(),
        "inputs": gradients[0].numpy(),
        "gamma": gradients[1].numpy(),
        "beta": gradients[2].numpy(),
        "moving_mean": layer.moving_mean.numpy(),
        "moving_variance": layer.moving_variance.numpy(),
    }


def test_ranks_may_have_made_other_layers_before():
    """Keras numbers layers, so their names differ between the ranks here."""
    for _ in range(1 + 2 * hvd.rank()):
        hvd.SyncBatchNormalization()
    model = keras.Sequential([keras.Input((3,))])
    for _ in range(2):
        model.add(hvd.SyncBatchNormalization(momentum=0.0))
    names = hvd.allgather_object(model.layers[0].name)
    assert names[0] != names[1]
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), "mse")
    x = np.full((4, 3), 2.0 * hvd.rank(), "float32")
    model.fit(x, x, verbose=0)
    for batch_norm, mean in zip(model.layers, (1.0, 0.0), strict=True):
        np.testing.assert_allclose(batch_norm.moving_mean, mean, atol=1e-6)


@pytest.mark.parametrize("sizes", [(6, 6), (5, 2)], ids=str)
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_equals_one_rank_with_all_examples(sizes, wrap):
    inputs = inputs_of_ranks(sizes)
    layer = hvd.SyncBatchNormalization(**ARGUMENTS)
    result = training_step(layer, inputs[hvd.rank()], wrap(layer))
    results = hvd.allgather_object(result)

    alone = keras.layers.BatchNormalization(**ARGUMENTS)
    expected = training_step(alone, np.concatenate(inputs), alone)
    for key in ("outputs", "inputs"):
        values = np.concatenate([r[key] for r in results])
        np.testing.assert_allclose(values, expected[key], rtol=1e-4, atol=1e-5)
    for key in ("gamma", "beta"):
        total = sum(r[key] for r in results)
        np.testing.assert_allclose(total, expected[key], rtol=1e-4, atol=1e-4)
    for key in ("moving_mean", "moving_variance"):
        np.testing.assert_array_equal(results[0][key], results[1][key])
        np.testing.assert_allclose(result[key], expected[key], rtol=1e-5)


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_watchdog_sees_both_allreduces(wrap):
    layer = hvd.SyncBatchNormalization()
    with hvd.callbacks.Watchdog():
        training_step(layer, inputs_of_ranks((2, 2))[hvd.rank()], wrap(layer))
        assert _watchdog._collectives.entered.numpy() == 2
        assert _watchdog._collectives.left.numpy() == 2


def test_differs_from_batch_norm_of_one_rank():
    x = inputs_of_ranks((6, 6))[hvd.rank()]
    ours = hvd.SyncBatchNormalization(**ARGUMENTS)
    local = keras.layers.BatchNormalization(**ARGUMENTS)
    difference = ours(x, training=True) - local(x, training=True)
    assert np.abs(difference).max() > 0.1


def test_variance_far_from_zero():
    """The mean is 1000 standard deviations; squares in float32 would fail."""
    inputs = inputs_of_ranks((6, 6), offset=1000.0)
    layer = hvd.SyncBatchNormalization(momentum=0.0)
    layer(inputs[hvd.rank()], training=True)
    variance = np.concatenate(inputs).astype("float64").var(axis=(0, 1, 2))
    np.testing.assert_allclose(layer.moving_variance, variance, rtol=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision(dtype):
    inputs = [tf.cast(x, dtype) for x in inputs_of_ranks((6, 4))]
    layer = hvd.SyncBatchNormalization(dtype=f"mixed_{dtype}", **ARGUMENTS)
    x = inputs[hvd.rank()]
    outputs = layer(x, training=True)
    assert outputs.dtype == dtype
    alone = keras.layers.BatchNormalization(**ARGUMENTS)
    whole = tf.cast(tf.concat(inputs, 0), "float32")
    expected = tf.split(alone(whole, training=True), [6, 4])[hvd.rank()]
    np.testing.assert_allclose(
        tf.cast(outputs, "float32"), expected, rtol=2e-2, atol=2e-2
    )
    # The statistics are in float32.
    np.testing.assert_allclose(
        layer.moving_variance, alone.moving_variance, rtol=1e-5
    )


def test_masked_examples_do_not_count():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 4, 5)).astype("float32")
    # Rank 0 has many more examples than rank 1.
    mask = rng.random((2, 3, 4)) < [[[0.9]], [[0.3]]]
    layer = hvd.SyncBatchNormalization(momentum=0.0)
    layer(x[hvd.rank()], training=True, mask=tf.constant(mask[hvd.rank()]))
    np.testing.assert_allclose(
        layer.moving_mean, x[mask].mean(axis=0), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        layer.moving_variance, x[mask].var(axis=0), rtol=1e-5
    )


def test_evaluation_has_no_collective():
    layer = hvd.SyncBatchNormalization(momentum=0.75)

    def operations(training):
        found = horovod_operations(
            lambda x: layer(x, training=training), tf.TensorSpec((2, 4, 5, 3))
        )
        return [operation.type for operation in found]

    assert operations(training=True) == ["HorovodAllreduce"]
    assert operations(training=False) == []
    layer.trainable = False
    assert operations(training=True) == []


def create_model(batch_norm, optimizer, **arguments):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(16, use_bias=False),
            batch_norm(momentum=0.9),
            keras.layers.ReLU(),
            keras.layers.Dense(3),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, jit_compile=False, **arguments)
    return model


@pytest.mark.parametrize("passes", [1, 2])
def test_fit_equals_one_rank_with_the_global_batch(passes):
    """4 passes of 2 ranks x 8 examples equal 4 of 1 rank x 16."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 2, 8, 8)).astype("float32")
    # The ranks' examples have different means.
    x[:, 1] += 2
    y = np.argmax(x[..., :3], axis=-1)
    model = create_model(
        hvd.SyncBatchNormalization,
        hvd.DistributedOptimizer(
            keras.optimizers.SGD(0.5, momentum=0.9),
            backward_passes_per_step=passes,
            average_aggregated_gradients=True,
        ),
        steps_per_execution=passes,
    )
    model.fit(
        x[:, hvd.rank()].reshape(-1, 8),
        y[:, hvd.rank()].reshape(-1),
        batch_size=8,
        shuffle=False,
        verbose=0,
        callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(0)],
    )
    alone = create_model(
        keras.layers.BatchNormalization,
        keras.optimizers.SGD(
            0.5,
            momentum=0.9,
            gradient_accumulation_steps=passes if passes > 1 else None,
        ),
    )
    alone.fit(
        x.reshape(-1, 8), y.reshape(-1), batch_size=16, shuffle=False, verbose=0
    )
    for a, b in zip(model.get_weights(), alone.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert_same_on_all_ranks(model.weights)


def create_network(name, batch_norm):
    keras.utils.set_random_seed(0)
    arguments = {
        "resnet50": {
            "image_shape": (32, 32, 3),
            "stage_blocks": (1, 1),
            "width": 4,
        },
        "alexnet": {
            "image_shape": (67, 67, 3),
            "normalization": "batch_norm",
            "dropout": 0.0,
        },
    }[name]
    return MODELS[name](num_classes=10, batch_norm=batch_norm, **arguments)


@pytest.mark.parametrize("name", ["resnet50", "alexnet"])
def test_networks_with_synchronized_batch_norm(name):
    model = create_network(name, "synchronized")
    plain = create_network(name, "micro_batch")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (16, *model.input.shape[1:]), "uint8")
    images[8:] //= 4
    own = images[hvd.rank() * 8 :][:8]
    expected = plain(images, training=True)[hvd.rank() * 8 :][:8]
    np.testing.assert_allclose(
        model(own, training=True), expected, rtol=1e-3, atol=1e-4
    )
    assert np.abs(plain(own, training=True) - expected).max() > 0.01


@pytest.mark.slow
def test_saved_network_loads_without_horovod(tmp_path):
    model = create_network("resnet50", "synchronized")
    images = np.full((2, 32, 32, 3), 7 + hvd.rank(), "uint8")
    model(images, training=True)
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "logits.npy", model.predict(images, verbose=0))
    script = """
import sys
sys.modules["horovod"] = None
import keras
import numpy as np
model = keras.saving.load_model("model.keras")
logits = model.predict(np.load("images.npy"), verbose=0)
np.testing.assert_allclose(logits, np.load("logits.npy"), rtol=1e-5, atol=1e-6)
assert type(model.get_layer("stem_bn")) is keras.layers.BatchNormalization
"""
    status = None
    if hvd.rank() == 0:
        command = [sys.executable, "-c", script]
        status = subprocess.run(command, cwd=tmp_path).returncode
    assert hvd.broadcast_object(status, root_rank=0) == 0
