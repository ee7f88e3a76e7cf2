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


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "eager"])
def test_sources_may_be_nested(graph):
    a, b, c = (keras.Variable(1.0, name=name) for name in "abc")
    t = tf.Variable(1.0, name="t")
    sources = {"one": a, "more": [b, (t,)], "unconnected": c}
    factors = of_rank([2.0, 4.0, 6.0], [4.0, 8.0, 12.0])

    def gradients(unconnected):
        with tf.GradientTape() as tape:
            loss = sum(
                factor * tf.convert_to_tensor(variable)
                for factor, variable in zip(factors, [a, b, t], strict=True)
            )
        tape = hvd.DistributedGradientTape(tape)
        return tape.gradient(loss, sources, unconnected_gradients=unconnected)

    function = tf.function(gradients) if graph else gradients
    for unconnected, expected in (
        (tf.UnconnectedGradients.NONE, None),
        (tf.UnconnectedGradients.ZERO, 0.0),
    ):
        result = function(unconnected)
        assert result.keys() == sources.keys()
        assert float(result["one"]) == 3.0
        assert float(result["more"][0]) == 6.0
        assert float(result["more"][1][0]) == 9.0
        assert result["unconnected"] == expected


def test_persistent_tape_and_several_targets():
    a, b = keras.Variable(1.0), keras.Variable(2.0)
    with tf.GradientTape(persistent=True) as tape:
        first = of_rank(1.0, 3.0) * a.value * b.value
        second = of_rank(2.0, 4.0) * a.value
    tape = hvd.DistributedGradientTape(tape)
    assert float(tape.gradient([first, second], a)) == 4.0 + 3.0
    assert float(tape.gradient(first, b)) == 2.0
    assert float(
        tape.gradient(first, a, output_gradients=tf.constant(2.0))
    ) == (8.0)


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "eager"])
def test_jacobian_is_the_mean_of_the_ranks(graph):
    a, b = keras.Variable([1.0, 2.0]), tf.Variable(3.0)

    def jacobian():
        with tf.GradientTape() as tape:
            target = of_rank(2.0, 4.0) * a.value * b
        tape = hvd.DistributedGradientTape(tape)
        return tape.jacobian(target, {"a": a, "b": b})

    result = (tf.function(jacobian) if graph else jacobian)()
    np.testing.assert_array_equal(result["a"], [[9.0, 0.0], [0.0, 9.0]])
    np.testing.assert_array_equal(result["b"], [3.0, 6.0])


def test_batch_jacobian_is_refused():
    x = tf.ones((2, 3))
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = x**2
    tape = hvd.DistributedGradientTape(tape)
    with pytest.raises(ValueError, match="no mean"):
        tape.batch_jacobian(y, x)


def test_partial_tape_leaves_layers_to_each_rank():
    model = keras.Sequential(
        [
            keras.Input((2,)),
            keras.layers.Dense(1, use_bias=False, kernel_initializer="ones"),
            keras.layers.Dense(1, use_bias=False, kernel_initializer="ones"),
        ]
    )
    with tf.GradientTape() as tape:
        loss = of_rank(1.0, 3.0) * tf.reduce_sum(model(tf.ones((1, 2))))
    tape = hvd.PartialDistributedGradientTape(
        tape, local_layers=model.layers[1], scale_local_gradients=False
    )
    first, second = tape.gradient(loss, model.trainable_variables)
    np.testing.assert_array_equal(first, [[2.0], [2.0]])
    np.testing.assert_array_equal(second, [[of_rank(2.0, 6.0)]])
    with pytest.raises(ValueError, match="no weights yet"):
        hvd.PartialDistributedGradientTape(
            tf.GradientTape(), local_layers=[keras.layers.Dense(1)]
        )


def test_bad_argument_is_named():
    with pytest.raises(ValueError, match="`gradtape`"):
        hvd.DistributedGradientTape(None)
    with pytest.raises(ValueError, match="`groups`"):
        hvd.DistributedGradientTape(tf.GradientTape(), groups=-1)
