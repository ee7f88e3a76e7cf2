"""All ranks skip a step together under mixed_float16."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import horovod_recipes.keras as hvd
from tests.parallel.common import of_rank

SCALE = 4.0


def sgd():
    return keras.optimizers.SGD(0.5)


def scaled(optimizer):
    return keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=SCALE)


ORDERS = {
    "inside": lambda **a: hvd.DistributedOptimizer(scaled(sgd()), **a),
    "around": lambda **a: scaled(hvd.DistributedOptimizer(sgd(), **a)),
}
in_any_order = pytest.mark.parametrize("order", ORDERS)


def applied(optimizer, gradients, graph=True):
    """Applies each gradient to a variable of 1.

    Returns:
        For each rank the variable, the loss scale and the number of updates.
    """
    variable = keras.Variable([1.0])
    optimizer.build([variable])

    def step(gradient):
        optimizer.apply([gradient], [variable])

    if graph:
        step = tf.function(step)
    for gradient in gradients:
        step(tf.constant([gradient]))
    return hvd.allgather_object(
        (
            float(variable.numpy()[0]),
            float(optimizer.dynamic_scale),
            int(optimizer.iterations),
        )
    )


@in_any_order
@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_all_ranks_skip_a_step_that_one_cannot_take(order, graph, bad):
    # At a scale of 4, a gradient of 4 counts as 1; at a scale of 2, as 2.
    gradients = of_rank([4.0, bad, 2.0], [4.0, 4.0, 6.0])
    after = applied(ORDERS[order](), gradients, graph)
    assert after == [(1.0 - 0.5 * 1.0 - 0.5 * 2.0, 2.0, 2)] * 2


@in_any_order
def test_an_infinity_in_one_micro_batch_skips_the_update(order):
    optimizer = ORDERS[order](
        backward_passes_per_step=2, average_aggregated_gradients=True
    )
    # There are three updates of two micro-batches. All skip the second.
    gradients = of_rank(
        [4.0, 8.0, 4.0, 4.0, 2.0, 4.0],
        [4.0, 8.0, np.inf, 4.0, 2.0, 4.0],
    )
    after = applied(optimizer, gradients)
    assert after == [(1.0 - 0.5 * 1.5 - 0.5 * 1.5, 2.0, 2)] * 2


@in_any_order
def test_an_overflow_on_the_way_skips_the_step(order):
    """A gradient of 1e5, on rank 1 alone, becomes infinite in float16."""
    optimizer = ORDERS[order](compression=hvd.Compression.fp16)
    after = applied(optimizer, of_rank([4.0, 2.0], [1e5, 2.0]))
    assert after == [(1.0 - 0.5 * 1.0, 2.0, 1)] * 2


@in_any_order
def test_an_infinity_of_a_local_variable_skips_the_step(order):
    optimizer = ORDERS[order](scale_local_gradients=False)
    shared, local = keras.Variable([1.0]), keras.Variable([1.0])
    optimizer.register_local_var(local)
    bad = of_rank(4.0, np.inf)
    optimizer.apply([tf.constant([4.0]), tf.constant([bad])], [shared, local])
    optimizer.apply([tf.constant([2.0])] * 2, [shared, local])
    values = [v.numpy().tolist() for v in (shared, local)]
    assert hvd.allgather_object(values) == [[[0.5], [0.5]]] * 2
    assert float(optimizer.dynamic_scale) == 2.0


class Mixed(keras.Model):
    """A model with the policy mixed_float16 under any global policy."""

    def __init__(self):
        super().__init__(dtype="mixed_float16")
        self.dense = keras.layers.Dense(
            1, use_bias=False, kernel_initializer="ones", dtype="mixed_float16"
        )

        self(tf.zeros((1, 1)))

    def call(self, inputs):
        return self.dense(inputs)


def fit(model, values):
    """Fits x to 0, an example a step, with each rank's values of x."""
    x = np.array([values], "float32").T
    return model.fit(
        tf.data.Dataset.from_tensor_slices((x, np.zeros_like(x))).batch(1),
        shuffle=False,
        verbose=0,
        callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(0)],
    )


def after_fit(model, optimizer):
    assert model.optimizer is optimizer or (
        model.optimizer.inner_optimizer is optimizer
    )
    return hvd.allgather_object(
        (
            model.get_weights()[0].tolist(),
            float(model.optimizer.dynamic_scale),
            int(model.optimizer.iterations),
        )
    )


# With w = 1 and x = 0.5, the gradient of (w x)^2 is 0.5, and w becomes 0.75.
BAD_THEN_GOOD = ([np.inf, 0.5], [0.5, 0.5])
EXPECTED = [([[0.75]], 2.0**14, 1)] * 2


@pytest.mark.parametrize("jit_compile", [False, True])
def test_policy_of_the_model_alone(jit_compile):
    optimizer = hvd.DistributedOptimizer(sgd())
    model = Mixed()
    # Each call of `compile()` wraps the optimizer again.
    for _ in range(2):
        model.compile(optimizer, "mse", jit_compile=jit_compile)
        assert type(model.optimizer) is keras.optimizers.LossScaleOptimizer
    fit(model, of_rank(*BAD_THEN_GOOD))
    assert after_fit(model, optimizer) == EXPECTED


def test_policy_that_is_set_after_the_optimizer_is_made():
    optimizer = hvd.DistributedOptimizer(sgd())
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = Mixed()
        model.compile(optimizer, "mse", run_eagerly=True)
    finally:
        keras.config.set_dtype_policy("float32")
    fit(model, of_rank(*BAD_THEN_GOOD))
    assert after_fit(model, optimizer) == EXPECTED


@in_any_order
@pytest.mark.usefixtures("_mixed_float16")
def test_global_policy_with_a_loss_scale_of_the_users(order):
    optimizer = ORDERS[order]()
    model = Mixed()
    model.compile(optimizer, "mse", jit_compile=False)
    fit(model, of_rank(*BAD_THEN_GOOD))
    assert after_fit(model, optimizer) == [([[0.75]], SCALE / 2, 1)] * 2


@in_any_order
def test_saved_optimizer_is_plain(order, tmp_path):
    model = Mixed()
    model.compile(ORDERS[order](), "mse", jit_compile=False)
    fit(model, [0.5])
    config = keras.optimizers.serialize(model.optimizer)
    plain = keras.optimizers.deserialize(config)
    assert type(plain) is keras.optimizers.LossScaleOptimizer
    assert type(plain.inner_optimizer) is keras.optimizers.SGD
    # It acts on this rank alone.
    variable = keras.Variable([1.0])
    plain.apply([tf.constant([SCALE * (1.0 + hvd.rank())])], [variable])
    assert variable.numpy()[0] == 0.5 - 0.5 * hvd.rank()
