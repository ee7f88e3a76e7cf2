"""NT-Xent over ranks equals NT-Xent of one process, and so do gradients."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import horovod_recipes.keras as hvd
from horovod_recipes.models.losses import contrast
from horovod_recipes.models.losses import nt_xent
from tests.parallel.common import assert_same_on_all_ranks
from tests.parallel.common import horovod_operations
from tests.parallel.common import of_rank

TEMPERATURE = 0.5


def whole(rows, dimensions=5, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(2, rows, dimensions)).astype("float32")


def part(array, rows_of_rank_0):
    """Returns this rank's rows."""
    return of_rank(array[:rows_of_rank_0], array[rows_of_rank_0:])


def reference(first, second, temperature):
    """Returns the loss by the paper's formula in float64, view by view."""
    views = np.concatenate([first, second]).astype("float64")
    views /= np.linalg.norm(views, axis=1, keepdims=True)
    n = len(first)
    similarity = views @ views.T / temperature
    losses = []
    for i in range(2 * n):
        others = [similarity[i, k] for k in range(2 * n) if k != i]
        losses.append(
            np.log(np.sum(np.exp(others))) - similarity[i, (i + n) % (2 * n)]
        )
    return np.mean(losses)


@pytest.mark.parametrize("rows_of_rank_0", [0, 1, 2, 3])
@pytest.mark.parametrize("in_graph", [False, True])
def test_gather_and_its_gradient_with_uneven_parts(rows_of_rank_0, in_graph):
    """Rank r's loss weighs the gathered rows by r + 1."""
    rows = np.arange(12, dtype="float32").reshape(4, 3)

    def gradient(mine):
        with tf.GradientTape() as tape:
            tape.watch(mine)
            gathered = hvd.differentiable_allgather(mine)
            weight = tf.range(1.0, 13.0)[:, tf.newaxis] ** 2
            weight = tf.reshape(weight, [4, 3]) * of_rank(1.0, 2.0)
            loss = tf.reduce_sum(gathered * weight)
        return gathered, tape.gradient(loss, mine)

    if in_graph:
        gradient = tf.function(
            gradient, input_signature=[tf.TensorSpec([None, 3])]
        )
    mine = tf.constant(part(rows, rows_of_rank_0))
    gathered, result = gradient(mine)
    np.testing.assert_array_equal(gathered, rows)
    expected = 3 * np.arange(1.0, 13.0).reshape(4, 3) ** 2
    np.testing.assert_array_equal(result, part(expected, rows_of_rank_0))


def test_gather_takes_arrays_variables_and_more_dimensions():
    value = np.full([1, 2, 2], of_rank(1.0, 2.0), "float32")
    both = np.concatenate([np.full([1, 2, 2], r + 1.0) for r in range(2)])
    for tensor in (value, tf.Variable(value), keras.Variable(value)):
        np.testing.assert_array_equal(
            hvd.differentiable_allgather(tensor), both
        )


def test_gather_over_a_process_set(this_rank_alone):
    """Each rank is alone in its set, so nothing is exchanged."""
    mine = tf.constant([[of_rank(1.0, 2.0)]])
    with tf.GradientTape() as tape:
        tape.watch(mine)
        gathered = hvd.differentiable_allgather(
            mine, process_set=this_rank_alone
        )
        loss = tf.reduce_sum(of_rank(3.0, 5.0) * gathered)
    np.testing.assert_array_equal(gathered, mine)
    assert float(tape.gradient(loss, mine)[0, 0]) == of_rank(3.0, 5.0)


def test_plain_allgather_has_another_gradient():
    """The reason for `differentiable_allgather`, in its docstring."""
    mine = tf.constant([[1.0]])
    with tf.GradientTape() as tape:
        tape.watch(mine)
        loss = tf.reduce_sum(hvd.allgather(mine)) * of_rank(1.0, 3.0)
    assert float(tape.gradient(loss, mine)[0, 0]) == 2.0


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
def test_loss_of_all_ranks_is_the_papers(temperature):
    first, second = whole(6)
    mine = nt_xent(part(first, 3), part(second, 3), temperature)
    total = hvd.allreduce(mine)
    expected = reference(first, second, temperature)
    assert float(total) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("rows_of_rank_0", [0, 2, 5])
def test_uneven_parts_give_the_losses_of_their_rows(rows_of_rank_0):
    first, second = whole(5)
    views = part(first, rows_of_rank_0), part(second, rows_of_rank_0)
    mine = nt_xent(*views, TEMPERATURE)
    sums = hvd.allreduce(mine * float(len(views[0])), op=hvd.Sum)
    expected = reference(first, second, TEMPERATURE)
    assert float(sums) / 5 == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("by", ["optimizer", "tape"])
def test_gradients_of_a_network_are_those_of_one_process(by, this_rank_alone):
    images = np.random.default_rng(1).normal(size=(2, 8, 4)).astype("float32")

    def network():
        keras.utils.set_random_seed(3)
        inputs = keras.Input([4])
        x = keras.layers.Dense(6, activation="tanh")(inputs)
        return keras.Model(inputs, keras.layers.Dense(3)(x))

    def loss_of(model, views, process_set):
        return nt_xent(*map(model, views), TEMPERATURE, process_set)

    alone, model = network(), network()
    with tf.GradientTape() as tape:
        loss = loss_of(alone, images, this_rank_alone)
    expected = tape.gradient(loss, [v.value for v in alone.trainable_variables])

    mine = [part(views, 4) for views in images]
    optimizer = keras.optimizers.SGD(1.0)
    if by == "optimizer":
        tape = tf.GradientTape()
        optimizer = hvd.DistributedOptimizer(optimizer)
    else:
        tape = hvd.DistributedGradientTape(tf.GradientTape())
    with tape:
        my_loss = loss_of(model, mine, None)
    before = [v.numpy() for v in model.trainable_variables]
    optimizer.apply(
        tape.gradient(my_loss, [v.value for v in model.trainable_variables]),
        model.trainable_variables,
    )
    for old, new, gradient in zip(
        before, model.trainable_variables, expected, strict=True
    ):
        np.testing.assert_allclose(
            old - new.numpy(), gradient, rtol=1e-4, atol=1e-7
        )
    assert float(hvd.allreduce(my_loss)) == pytest.approx(float(loss), rel=1e-6)
    assert_same_on_all_ranks(model.trainable_variables)


def test_what_one_watches():
    first, second = whole(4)
    second[:3] = first[:3]
    mine = contrast(part(first, 2), part(second, 2), TEMPERATURE)
    hits = hvd.allgather(mine.hits).numpy()
    np.testing.assert_array_equal(hits[:3], 1.0)
    unit = [
        x / np.linalg.norm(x, axis=1, keepdims=True) for x in (first, second)
    ]
    alignment = np.sum((unit[0] - unit[1]) ** 2, axis=1)
    np.testing.assert_allclose(
        hvd.allgather(mine.alignment), alignment, atol=1e-6
    )
    assert hits[3] == float(np.argmax(unit[0][3] @ unit[1].T) == 3)
    views = np.concatenate(unit)
    distances = np.sum((views[:, None] - views[None]) ** 2, axis=-1)
    near = np.exp(-2 * distances[~np.eye(8, dtype=bool)])
    uniformity = hvd.allreduce(tf.reduce_mean(mine.uniformity))
    assert float(uniformity) == pytest.approx(near.mean(), rel=1e-5)


def test_scalar_is_refused():
    with pytest.raises(ValueError, match="`tensor` must have one dimension"):
        hvd.differentiable_allgather(1.0)


@pytest.mark.parametrize("temperature", [0, -0.1, float("nan")])
def test_bad_temperature(temperature):
    with pytest.raises(ValueError, match="`temperature` must be above 0"):
        nt_xent(np.ones([2, 3]), np.ones([2, 3]), temperature)


def test_one_gather_a_loss():
    views = tf.TensorSpec([4, 3])
    names = [op.type for op in horovod_operations(nt_xent, views, views)]
    assert names == ["HorovodAllgather", "HorovodAllgather"]
