"""ReplicaCheck on two ranks."""

import keras
import numpy as np
import pytest

import horovod_recipes.keras as hvd
from tests.parallel.common import arrays_of_ranks


class Change(keras.callbacks.Callback):
    """Changes one variable on rank 1 after the third step."""

    def __init__(self, change, path):
        super().__init__()
        self._change = change
        self._path = path

    def on_train_batch_end(self, batch, logs=None):
        # Both ranks look it up, so a wrong path fails on both.
        variables = self.model.weights + self.model.optimizer.variables
        (variable,) = [v for v in variables if v.path == self._path]
        if batch == 2 and hvd.rank() == 1:
            variable.assign(self._change(variable.numpy()))


def create_model():
    """Returns a model whose batch norm and dropout differ between the ranks."""
    keras.utils.set_random_seed(hvd.rank())
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(4, name="first"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(2, name="last"),
        ],
        name="net",
    )
    model.compile(
        hvd.DistributedOptimizer(
            keras.optimizers.Adam(0.1, name="adam"),
        ),
        "mse",
        jit_compile=False,
    )
    model.optimizer.build(model.trainable_variables)
    hvd.broadcast_variables(model.weights, root_rank=0)
    return model


@pytest.fixture(scope="module")
def traced_model():
    """A model that Keras traces once, and its first values."""
    model = create_model()
    variables = model.weights + model.optimizer.variables
    return model, variables, [v.numpy() for v in variables]


@pytest.fixture
def model(traced_model):
    """The traced model with its first values."""
    model, variables, values = traced_model
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
    return model


def train(model, callbacks, epochs=1):
    """Trains 4 steps per epoch."""
    x = np.random.default_rng(hvd.rank()).normal(size=(8, 3))
    model.fit(
        x, x[:, :2], batch_size=2, epochs=epochs, verbose=0, callbacks=callbacks
    )


def message_of(model, callbacks):
    with pytest.raises(hvd.callbacks.ReplicasDiffer) as raised:
        train(model, callbacks)
    first, second = hvd.allgather_object(str(raised.value))
    assert first == second
    return first.partition(". Usual")[0]


def flip_lowest_bit(value):
    bits = np.array(value).view("uint32")
    bits.flat[-1] ^= 1
    return bits.view("float32")


def swap(value):
    value = value.copy()
    value.flat[0], value.flat[1] = value.flat[1], value.flat[0]
    return value


def test_replicas_that_agree(model):
    train(model, [hvd.callbacks.ReplicaCheck(1)], epochs=2)


def test_local_variables_may_differ():
    model = create_model()
    model.optimizer.register_local_var(model.get_layer("last").kernel)
    train(model, [hvd.callbacks.ReplicaCheck(1)])
    first, second = arrays_of_ranks(model.get_layer("last").weights)
    assert (first[0] != second[0]).all()
    np.testing.assert_array_equal(first[1], second[1])


@pytest.mark.parametrize(
    ("change", "path"),
    [
        (flip_lowest_bit, "net/first/kernel"),
        (swap, "net/last/kernel"),
        (flip_lowest_bit, "adam/net_norm_gamma_velocity"),
        (lambda iteration: iteration + 1, "adam/iteration"),
        (flip_lowest_bit, "adam/learning_rate"),
    ],
)
def test_a_change_on_one_rank_is_named_on_every_rank(model, change, path):
    message = message_of(
        model, [Change(change, path), hvd.callbacks.ReplicaCheck(3)]
    )
    assert message == (
        "The replicas differ after update 3: 1 of 20 variables, "
        f"{path} (rank 1, unlike rank 0)"
    )


def test_a_change_after_the_last_multiple_is_found_at_the_end(model):
    message = message_of(
        model,
        [
            Change(lambda bias: bias + 1, "net/first/bias"),
            hvd.callbacks.ReplicaCheck(100),
        ],
    )
    assert message.startswith("The replicas differ after update 4: ")
    assert "net/first/bias (rank 1, unlike rank 0)" in message


def test_non_trainable_weights_on_demand(model):
    message = message_of(
        model, [hvd.callbacks.ReplicaCheck(2, non_trainable_weights=True)]
    )
    assert message == (
        "The replicas differ after update 2: 2 of 22 variables, "
        "net/norm/moving_mean (rank 1, unlike rank 0), "
        "net/norm/moving_variance (rank 1, unlike rank 0)"
    )


def test_arguments():
    for value in (0, 1.5, True):
        with pytest.raises(ValueError, match="`every_n_steps`"):
            hvd.callbacks.ReplicaCheck(value)
