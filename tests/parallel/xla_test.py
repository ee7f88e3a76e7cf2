"""Training steps that XLA compiles up to the allreduce, on two ranks."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import horovod_recipes.keras as hvd
from horovod_recipes.keras import _reduction
from keras_lars import LARS
from tests.parallel.common import arrays_of_ranks
from tests.parallel.common import assert_same_on_all_ranks


class Dropout(keras.layers.Layer):
    """Drops half of its inputs, the same ones inside XLA and outside of it.

    On a CPU, TensorFlow's random float32 numbers differ inside XLA.
    """

    def build(self, input_shape):
        self.seed_generator = keras.random.SeedGenerator(7 + hvd.rank())

    def call(self, inputs, training=False):
        if not training:
            return inputs
        seed, count = tf.unstack(tf.cast(self.seed_generator.next(), tf.int32))
        numbers = tf.range(tf.size(inputs)) * (7919 + seed) + 31 * count
        dropped = tf.reshape(numbers // 64 % 2 == 0, tf.shape(inputs))
        return tf.where(dropped, 0.0, 2.0 * inputs)


def create_model(jit_compile, passes=1, layers=None, model_class=keras.Model):
    keras.utils.set_random_seed(hvd.rank())
    inputs = keras.Input((8,))
    x = inputs
    for layer in layers or [
        keras.layers.Dense(16, activation="relu"),
        keras.layers.BatchNormalization(),
        Dropout(),
    ]:
        x = layer(x)
    model = model_class(inputs, keras.layers.Dense(3)(x))
    model.compile(
        hvd.DistributedOptimizer(
            LARS(2.0, weight_decay=1e-3),
            backward_passes_per_step=passes,
            average_aggregated_gradients=True,
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        steps_per_execution=passes,
        jit_compile=jit_compile,
    )
    return model


def examples():
    rng = np.random.default_rng(hvd.rank())
    x = rng.normal(size=(58, 8)).astype("float32")
    return x, np.argmax(x[:, :3], axis=1)


def fit(model, callbacks=None):
    """Trains for two epochs. Their last micro-batch is smaller."""
    if callbacks is None:
        callbacks = [hvd.callbacks.BroadcastGlobalVariablesCallback(0)]
    return model.fit(
        *examples(),
        batch_size=16,
        epochs=2,
        shuffle=False,
        verbose=0,
        callbacks=callbacks,
    ).history


def state(model):
    variables = model.variables + model.optimizer.variables
    return {v.path: v.numpy() for v in variables}


@pytest.mark.slow
@pytest.mark.parametrize("passes", [1, 2])
def test_equals_training_without_xla(passes):
    """The whole state is equal: weights, statistics, seeds, velocities."""
    plain = create_model(jit_compile=False, passes=passes)
    plain_history = fit(plain)
    model = create_model(jit_compile=True, passes=passes)
    history = fit(model)
    # A second call of `fit` makes a new step.
    fit(plain)
    fit(model)

    assert model.jit_compile
    for (path, a), b in zip(
        state(plain).items(), state(model).values(), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5, err_msg=path)
    for name, values in plain_history.items():
        assert history[name] == pytest.approx(values, rel=1e-5), name
    assert_same_on_all_ranks(model.trainable_variables)
    # The ranks have seen different examples.
    means = [v for v in model.variables if v.path.endswith("moving_mean")]
    first, second = arrays_of_ranks(means)
    assert np.abs(first[0] - second[0]).max() > 1e-3


def test_xla_compiles_all_but_the_optimizer(monkeypatch):
    """The layers are traced inside XLA, the reduction outside."""
    from tensorflow.python.ops import control_flow_util

    def in_xla():
        graph = tf.compat.v1.get_default_graph()
        return control_flow_util.GraphOrParentsInXlaContext(graph)

    traced = {"layer": set(), "reduction": set()}

    class Spy(keras.layers.Layer):
        def call(self, inputs, training=False):
            if training:
                traced["layer"].add(in_xla())
            return inputs

    monkeypatch.setattr(
        _reduction,
        "check_outside_xla",
        lambda name: traced["reduction"].add(in_xla()),
    )
    fit(create_model(jit_compile=True, layers=[Spy()]))
    assert traced == {"layer": {True}, "reduction": {False}}


@pytest.mark.slow
def test_dropout_and_sparse_gradients():
    model = create_model(
        jit_compile=True,
        passes=2,
        layers=[
            keras.layers.Lambda(tf.abs),
            keras.layers.Embedding(10, 4),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.5),
        ],
    )
    before = model.get_weights()
    fit(model)
    assert_same_on_all_ranks(model.trainable_variables)
    assert np.abs(model.get_weights()[0] - before[0]).max() > 1e-3
    seeds = [v.numpy().tolist() for v in model.variables if "seed" in v.path]
    first, second = hvd.allgather_object(seeds)
    # Each micro-batch has its own mask, and each rank has its own masks.
    assert first[0][1] == second[0][1] == 8
    assert first[0][0] != second[0][0]


@pytest.fixture
def gpu(monkeypatch):
    """Makes Keras find a GPU, so that jit_compile="auto" turns XLA on."""
    device = tf.config.PhysicalDevice("/physical_device:GPU:0", "GPU")
    monkeypatch.setattr(
        tf.config, "list_physical_devices", lambda device_type=None: [device]
    )


def create_without_callback(jit_compile="auto"):
    """Returns a model with the weights of rank 0."""
    model = create_model(jit_compile)
    hvd.broadcast_variables(model.weights, 0)
    return model


@pytest.mark.slow
def test_default_on_a_gpu_machine_without_the_callback(gpu):
    model = create_without_callback()
    assert model.jit_compile
    fit(model, [])

    plain = create_without_callback(jit_compile=False)
    start = plain.get_weights()[0]
    fit(plain, [])
    for a, b in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)
    assert np.abs(model.get_weights()[0] - start).max() > 1e-2
    assert_same_on_all_ranks(model.trainable_variables)

    before = model.get_weights()[0]
    model.train_on_batch(*examples())
    assert np.abs(model.get_weights()[0] - before).max() > 1e-3
    assert_same_on_all_ranks(model.trainable_variables)


def test_default_on_a_gpu_machine_for_a_loaded_model(gpu, shared_folder):
    saved = create_model("auto", layers=[keras.layers.Dense(4)])
    saved.optimizer.build(saved.trainable_variables)
    if hvd.rank() == 0:
        saved.save(shared_folder / "model.keras")
    hvd.broadcast_object(None, root_rank=0)  # Wait until rank 0 has saved.
    model = hvd.load_model(shared_folder / "model.keras")
    start = model.get_weights()[0]
    assert model.jit_compile
    fit(model, [])
    assert model.jit_compile
    assert np.abs(model.get_weights()[0] - start).max() > 1e-2
    assert_same_on_all_ranks(model.trainable_variables)


@pytest.mark.slow
def test_default_on_a_gpu_machine_in_an_elastic_job(gpu):
    model = create_model("auto")
    state = hvd.elastic.KerasState(model)
    state.sync()
    start = model.get_weights()[0]
    fit(model, [])
    state.commit()
    # `run` does the same when the ranks change.
    state.on_reset()
    state.sync()
    fit(model, [])
    assert model.jit_compile
    assert int(model.optimizer.iterations) == 16
    assert np.abs(model.get_weights()[0] - start).max() > 1e-2
    assert_same_on_all_ranks(model.trainable_variables)


def test_models_of_others_are_left_to_keras(gpu):
    """XLA compiles the whole step if the optimizer is not distributed."""
    model = create_model("auto", layers=[keras.layers.Dense(4)])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.predict(np.zeros((1, 8)), verbose=0)
    assert model.make_train_function() is None
    assert model.jit_compile
    assert "train_step" not in vars(model)


class OwnStep(keras.Model):
    def train_step(self, data):
        return super().train_step(data)


@pytest.mark.slow
def test_model_that_cannot_be_split_is_trained_without_xla():
    model = create_model(jit_compile=True, model_class=OwnStep)
    with pytest.warns(UserWarning, match="it has a train_step of its own"):
        fit(model)
    assert_trains_without_xla(model)


@pytest.mark.slow
def test_synchronized_batch_norm_is_trained_without_xla():
    layers = [keras.layers.Dense(4), hvd.SyncBatchNormalization()]
    with pytest.warns(UserWarning, match="doesn't support `jit_compile=True`"):
        model = create_model(jit_compile=True, layers=layers)
    assert_trains_without_xla(model)


@pytest.mark.slow
def test_default_on_a_gpu_machine_for_synchronized_batch_norm(gpu):
    layers = [keras.layers.Dense(4), hvd.SyncBatchNormalization()]
    assert_trains_without_xla(create_model("auto", layers=layers))


def assert_trains_without_xla(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(model)
    assert not model.jit_compile
    assert_same_on_all_ranks(model.trainable_variables)


def test_horovod_inside_xla_is_a_clear_error_on_every_rank():
    messages = []
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
    variable = keras.Variable([1.0])

    @tf.function(jit_compile=True)
    def step():
        optimizer.apply([tf.constant([1.0])], [variable])

    with pytest.raises(ValueError, match="apply outside of it") as error:
        step()
    messages.append(str(error.value))

    layer = hvd.SyncBatchNormalization()
    layer.build((None, 3))
    step = tf.function(lambda x: layer(x, training=True), jit_compile=True)
    with pytest.raises(ValueError, match="SyncBatchNormalization is") as error:
        step(tf.ones((4, 3)))
    messages.append(str(error.value))

    first, second = hvd.allgather_object(messages)
    assert first == second
