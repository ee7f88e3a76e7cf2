"""SimCLR's training step on ranks and micro-batches is that of one batch."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import horovod_recipes.keras as hvd
from horovod_recipes.models.heads import simclr_network
from horovod_recipes.models.losses import nt_xent
from horovod_recipes.training.simclr import NTXent
from horovod_recipes.training.simclr import SimCLRModel
from keras_lars import LARS
from tests.parallel.common import assert_same_on_all_ranks
from tests.parallel.common import of_rank

GLOBAL_BATCH = 16
SHAPE = (6, 6, 1)
TEMPERATURE = 0.5
STEPS = 3


def classifier(batch_norm=None, dropout=0.0):
    """Returns a network whose batch norm, if any, is that of the argument."""
    inputs = keras.Input(SHAPE, dtype="uint8")
    x = layers.Rescaling(1 / 255)(inputs)
    x = layers.Flatten()(layers.Conv2D(4, 3, activation="tanh")(x))
    if batch_norm == "synchronized":
        x = hvd.SyncBatchNormalization(momentum=0.5)(x)
    x = layers.Dropout(dropout, seed=1)(x)
    return keras.Model(inputs, layers.Dense(3, name="logits")(x))


def create_model(optimizer, head=True, **arguments):
    keras.utils.set_random_seed(5)
    network = simclr_network(
        classifier(**arguments), projection_layers=1, embedding_size=4
    )
    if not head:
        # The head has a batch norm, whose statistics are of a micro-batch.
        embedding = layers.Dense(4, name="plain_head")(
            network.output["features"]
        )
        network = keras.Model(
            network.input, network.output | {"embedding": embedding}
        )
    model = SimCLRModel(network.input, network.output)
    model.compile(optimizer or "sgd", NTXent(TEMPERATURE), jit_compile=False)
    return model


def batches():
    """Returns the views and labels of whole batches, one per step."""
    rng = np.random.default_rng(2)
    views = rng.integers(0, 256, (STEPS, GLOBAL_BATCH, 2, *SHAPE), "uint8")
    return views, rng.integers(0, 3, (STEPS, GLOBAL_BATCH))


def dataset(ranks, micro_batches):
    """Returns this rank's batches for `fit`."""
    rank = hvd.rank() if ranks > 1 else 0
    views, labels = (
        array.reshape(STEPS, ranks, micro_batches, -1, *array.shape[2:])[
            :, rank
        ]
        for array in batches()
    )
    return tf.data.Dataset.from_tensor_slices((views, labels))


def by_hand(model, learning_rate):
    """Trains a model without batch norm by the definition, on one process."""
    optimizer = keras.optimizers.SGD(learning_rate)
    variables = [v.value for v in model.trainable_variables]
    for views, labels in zip(*batches(), strict=True):
        with tf.GradientTape() as tape:
            first, second = (model(views[:, i], training=True) for i in (0, 1))
            loss = nt_xent(
                first["embedding"], second["embedding"], TEMPERATURE, alone()
            )
            for outputs in (first, second):
                loss += tf.reduce_mean(
                    keras.losses.sparse_categorical_crossentropy(
                        labels, outputs["logits"], from_logits=True
                    )
                    / 2
                )
        optimizer.apply(
            tape.gradient(loss, variables), model.trainable_variables
        )
    return model


_alone = []


@pytest.fixture(autouse=True)
def _set_of_this_rank(this_rank_alone):
    _alone[:] = [this_rank_alone]


def alone():
    return _alone[0]


def fit(model, micro_batches):
    return model.fit(
        dataset(hvd.size(), micro_batches),
        shuffle=False,
        verbose=0,
        callbacks=[hvd.callbacks.ExactMetrics()],
    ).history


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_equals_one_batch_of_one_process(micro_batches):
    expected = by_hand(create_model(None, head=False), learning_rate=0.3)
    model = create_model(
        hvd.DistributedOptimizer(keras.optimizers.SGD(0.3)), head=False
    )
    fit(model, micro_batches)
    assert int(model.optimizer.iterations) == STEPS
    for a, b in zip(model.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)
    assert_same_on_all_ranks(model.get_weights())


def in_one_tape(model, micro_batches):
    """Trains with the activations of all micro-batches, without caching."""
    for views, labels in dataset(hvd.size(), micro_batches):
        with tf.GradientTape() as tape:
            outputs = [
                model(tf.concat([v[:, 0], v[:, 1]], 0), training=True)
                for v in views
            ]
            first, second = zip(
                *(tf.split(o["embedding"], 2) for o in outputs), strict=True
            )
            loss = nt_xent(tf.concat(first, 0), tf.concat(second, 0), 0.5)
            for micro_batch, o in zip(labels, outputs, strict=True):
                loss += tf.reduce_mean(
                    keras.losses.sparse_categorical_crossentropy(
                        tf.tile(micro_batch, [2]), o["logits"], from_logits=True
                    )
                ) / len(labels)
            loss = model.optimizer.scale_loss(loss)
        variables = model.trainable_variables
        model.optimizer.apply(
            tape.gradient(loss, [v.value for v in variables]), variables
        )
    return model


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: LARS(2.0),
        lambda: keras.optimizers.LossScaleOptimizer(LARS(2.0), 8.0),
    ],
    ids=["lars", "loss_scale"],
)
def test_second_pass_repeats_the_first(optimizer):
    """With dropout and synchronized batch norm, in the encoder and the head."""
    network = {"batch_norm": "synchronized", "dropout": 0.5}
    expected = in_one_tape(
        create_model(hvd.DistributedOptimizer(optimizer()), **network), 4
    )
    model = create_model(hvd.DistributedOptimizer(optimizer()), **network)
    fit(model, micro_batches=4)
    # Moving statistics and the states of random generators count too.
    for a, b in zip(
        [*model.variables, *model.optimizer.variables],
        [*expected.variables, *expected.optimizer.variables],
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5, err_msg=a.path)
    assert_same_on_all_ranks(model.trainable_variables)


def test_logs_are_those_of_the_global_batch():
    """And evaluation reports the probe alone."""
    histories = [
        fit(
            create_model(
                hvd.DistributedOptimizer(keras.optimizers.SGD(0.0)), head=False
            ),
            micro_batches,
        )
        for micro_batches in (1, 4)
    ]
    model = create_model(None, head=False)
    views, labels = batches()
    outputs = [[model(v[:, i], training=True) for i in (0, 1)] for v in views]
    loss = np.mean(
        [
            nt_xent(a["embedding"], b["embedding"], TEMPERATURE, alone())
            for a, b in outputs
        ]
    )
    hits = [
        tf.argmax(o["logits"], -1) == y
        for pair, y in zip(outputs, labels, strict=True)
        for o in pair
    ]
    for history in histories:
        assert history["loss"] == pytest.approx([loss], rel=1e-5)
        assert history["top1"] == pytest.approx([np.mean(hits)])
    assert histories[0].keys() == {
        *("loss", "contrastive_top1", "alignment", "uniformity"),
        *("probe_loss", "top1"),
    }
    for name, value in histories[0].items():
        assert histories[1][name] == pytest.approx(value, rel=1e-4), name
    images, mine = views[0, :, 0], of_rank(slice(0, 5), slice(5, 16))
    data = tf.data.Dataset.from_tensors((images[mine], labels[0][mine]))
    results = model.evaluate(data, verbose=0, return_dict=True)
    assert results.keys() == {"probe_loss", "top1"}
    results = hvd.evaluate(model, data, verbose=0)
    logits = model(images)["logits"]
    expected = np.mean(np.argmax(logits, -1) == labels[0])
    assert results["top1"] == pytest.approx(expected)


def test_encoder_is_not_changed_by_the_probe():
    views, labels = batches()
    results = []
    for y in (labels, (labels + 1) % 3):
        model = create_model(
            hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
        )
        data = tf.data.Dataset.from_tensors((views[:1], y[:1]))
        model.fit(data, shuffle=False, verbose=0)
        results.append([v.numpy() for v in model.trainable_variables])
    changed = [
        variable.path
        for variable, a, b in zip(
            model.trainable_variables, *results, strict=True
        )
        if np.any(a != b)
    ]
    assert changed == ["probe/kernel", "probe/bias"]


def test_saved_model_loads_and_goes_on(shared_folder):
    model = create_model(hvd.DistributedOptimizer(LARS(2.0)))
    fit(model, micro_batches=2)
    if hvd.rank() == 0:
        model.save(shared_folder / "model.keras")
    hvd.allreduce(0)
    loaded = keras.saving.load_model(shared_folder / "model.keras")
    assert type(loaded) is SimCLRModel
    assert loaded.loss.temperature == TEMPERATURE
    hvd.DistributedOptimizer(loaded.optimizer)
    for m in (model, loaded):
        fit(m, micro_batches=2)
    # The moving statistics in the file are those of rank 0.
    for a, b in zip(
        [*model.trainable_variables, *model.optimizer.variables],
        [*loaded.trainable_variables, *loaded.optimizer.variables],
        strict=True,
    ):
        np.testing.assert_array_equal(a.numpy(), b.numpy())
