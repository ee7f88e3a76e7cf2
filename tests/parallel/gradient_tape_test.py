"""DistributedGradientTape on two ranks."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import horovod_recipes.keras as hvd
from tests.parallel.common import of_rank


def create_model():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((3,), dtype="int32"),
            keras.layers.Embedding(5, 2),
            keras.layers.Flatten(),
            keras.layers.Dense(2),
        ]
    )


def gradients_of(model, ids, **arguments):
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(model(ids, training=True) ** 2)
    if arguments:
        tape = hvd.DistributedGradientTape(tape, **arguments)
    return tape.gradient(loss, model.trainable_variables)


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "eager"])
def test_gradients_are_those_of_all_examples(graph):
    model = create_model()
    ids = np.random.default_rng(0).integers(5, size=(8, 3))
    first, *others = model.trainable_variables

    def gradients_of_ranks(ids):
        return gradients_of(model, ids, groups=[[first], others])

    if graph:
        gradients_of_ranks = tf.function(gradients_of_ranks)
    ours = gradients_of_ranks(tf.constant(of_rank(ids[:4], ids[4:])))
    expected = gradients_of(model, tf.constant(ids))
    for a, b in zip(ours, expected, strict=True):
        assert type(a) is type(b)
        np.testing.assert_allclose(
            tf.convert_to_tensor(a), tf.convert_to_tensor(b), rtol=1e-5
        )


def test_local_sources_and_the_wrapped_tape():
    shared, local = keras.Variable(1.0), keras.Variable(1.0)
    with tf.GradientTape(persistent=True) as tape:
        loss = of_rank(1.0, 3.0) * (shared.value + local.value)
    distributed = hvd.DistributedGradientTape(tape)
    assert isinstance(distributed, tf.GradientTape)
    distributed.register_local_source(local)
    local_pairs, global_pairs = distributed.get_local_and_global_gradients(
        loss, [shared, local]
    )
    own = of_rank(1.0, 3.0)
    assert [(v, float(g)) for v, g in local_pairs] == [(local, own / 2)]
    assert [(v, float(g)) for v, g in global_pairs] == [(shared, 2.0)]
    assert float(tape.gradient(loss, shared)) == own


def test_tape_may_be_wrapped_before_it_records():
    variable = keras.Variable(1.0)
    with hvd.DistributedGradientTape(tf.GradientTape(), op=hvd.Sum) as tape:
        loss = of_rank(1.0, 3.0) * variable.value
    assert float(tape.gradient(loss, variable)) == 4.0


def test_bad_argument_is_named():
    with pytest.raises(ValueError, match="`gradtape`"):
        hvd.DistributedGradientTape(None)
    with pytest.raises(ValueError, match="`groups`"):
        hvd.DistributedGradientTape(tf.GradientTape(), groups=-1)
