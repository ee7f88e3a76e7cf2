"""TrustRatio on two ranks equals TrustRatio on one with all examples."""

import horovod.tensorflow.keras
import keras
import numpy as np
import pytest
import tensorflow as tf

import horovod_recipes.keras as hvd
from keras_lars import TrustRatio
from tests.parallel.common import assert_same_on_all_ranks
from tests.parallel.common import of_rank
from tests.parallel.optimizer_test import GLOBAL_BATCH
from tests.parallel.optimizer_test import STEPS
from tests.parallel.optimizer_test import create_model
from tests.parallel.optimizer_test import examples
from tests.parallel.optimizer_test import fit
from tests.parallel.optimizer_test import this_ranks_part


def lamb(**arguments):
    inner = keras.optimizers.Adam(0.02, **arguments)
    return TrustRatio(inner, weight_decay=0.01)


@pytest.mark.parametrize(
    "arguments", [{}, {"clipnorm": 0.05}, {"use_ema": True}], ids=str
)
def test_equals_one_rank_with_the_global_batch(arguments):
    """2 ranks x 2 micro-batches of 8, or x 1 of 16, equal 1 rank x 32."""
    alone = create_model(seed=0, optimizer=lamb(**arguments))
    x, y = examples()
    alone.fit(x, y, batch_size=GLOBAL_BATCH, shuffle=False, verbose=0)
    ratios = alone.optimizer.trust_ratios().values()

    for passes in (1, 2):
        optimizer = hvd.DistributedOptimizer(
            lamb(**arguments),
            backward_passes_per_step=passes,
            average_aggregated_gradients=True,
        )
        model = create_model(
            seed=hvd.rank(), optimizer=optimizer, steps_per_execution=passes
        )
        fit(model, this_ranks_part(GLOBAL_BATCH // hvd.size() // passes))
        assert int(optimizer.iterations) == STEPS
        for a, b in zip(model.get_weights(), alone.get_weights(), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            list(optimizer.trust_ratios().values()), list(ratios), rtol=1e-3
        )
        assert_same_on_all_ranks(model.weights + optimizer.variables)


@pytest.mark.parametrize(
    ("binding", "reason"),
    [
        (hvd, "put DistributedOptimizer around TrustRatio"),
        (horovod.tensorflow.keras, "does not average gradients on Keras 3"),
    ],
    ids=["ours", "upstream"],
)
def test_distributed_optimizer_inside_is_refused(binding, reason):
    inner = binding.DistributedOptimizer(keras.optimizers.SGD(0.1))
    with pytest.raises(ValueError, match=reason):
        TrustRatio(inner)


def test_all_ranks_skip_the_step_of_an_infinity_on_one():
    optimizer = hvd.DistributedOptimizer(
        keras.optimizers.LossScaleOptimizer(lamb(), initial_scale=2.0)
    )
    variable = keras.Variable(np.ones((2, 3)), name="kernel")
    optimizer.apply([tf.fill([2, 3], of_rank(np.inf, 1.0))], [variable])
    np.testing.assert_array_equal(variable.numpy(), np.ones((2, 3)))
    assert float(optimizer.dynamic_scale) == 1.0
    optimizer.apply([tf.fill([2, 3], of_rank(1.0, 3.0))], [variable])
    assert int(optimizer.iterations) == 1
    assert np.all(variable.numpy() < 1)
    assert_same_on_all_ranks([variable])


def test_saved_model_loads_and_goes_on(tmp_path):
    model = create_model(0, hvd.DistributedOptimizer(lamb()))
    fit(model, this_ranks_part(16))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is TrustRatio
    hvd.DistributedOptimizer(loaded.optimizer)
    for m in (model, loaded):
        fit(m, this_ranks_part(16))
    for a, b in zip(
        model.weights + model.optimizer.variables,
        loaded.weights + loaded.optimizer.variables,
        strict=True,
    ):
        np.testing.assert_array_equal(a.numpy(), b.numpy())
    assert_same_on_all_ranks(loaded.weights)


def test_elastic_state_restores_and_goes_on_as_before():
    model = create_model(hvd.rank(), hvd.DistributedOptimizer(lamb()))
    state = hvd.elastic.KerasState(model)
    state.sync()
    after = []
    for _ in range(2):
        fit(model, this_ranks_part(16))
        after.append(
            [v.numpy() for v in model.weights + model.optimizer.variables]
        )
        state.restore()
    for a, b in zip(*after, strict=True):
        np.testing.assert_array_equal(a, b)
