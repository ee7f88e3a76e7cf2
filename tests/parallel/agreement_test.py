"""Ranks that bring different tensors end with the same error, by name."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import horovod_recipes.keras as hvd
from tests.parallel.common import of_rank

pytestmark = pytest.mark.filterwarnings("ignore:Gradients do not exist")

# What the error is in eager mode, and in a graph.
ERRORS = (ValueError, tf.errors.InvalidArgumentError)


@pytest.fixture(autouse=True)
def _is_alive_afterwards():
    """The error leaves Horovod able to go on."""
    yield
    assert len(hvd.allgather_object(None)) == 2


def variables():
    return [keras.Variable([1.0], name=name) for name in "abc"]


def raised(function, *arguments):
    """Returns the message of the error, which is the same on both ranks."""
    with pytest.raises(ERRORS) as info:
        function(*arguments)
    message = str(info.value)
    found = message[message.index("The ranks bring different") :].split(". ")[0]
    first, second = hvd.allgather_object(found)
    assert first == second
    return found


def gradient(number=1.0):
    return tf.constant([float(number)])


in_any_mode = pytest.mark.parametrize("graph", [False, True])


@in_any_mode
@pytest.mark.parametrize("passes", [1, 2])
def test_gradients_of_different_variables(graph, passes):
    a, b, _ = variables()
    optimizer = hvd.DistributedOptimizer(
        keras.optimizers.SGD(1.0), backward_passes_per_step=passes
    )
    optimizer.build([a, b])

    def step():
        grads = of_rank([gradient(10.0), None], [None, gradient()])
        for _ in range(passes):
            optimizer.apply(grads, [a, b])

    message = raised(tf.function(step) if graph else step)
    assert "a (float32, shape (1,)) only on rank 0" in message
    assert "b (float32, shape (1,)) only on rank 1" in message
    assert a.numpy() == b.numpy() == 1.0


@in_any_mode
def test_different_numbers_of_gradients(graph):
    a, b, c = variables()
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0))

    def step():
        trained = of_rank([a, b, c], [a, c])
        optimizer.apply([gradient() for _ in trained], trained)

    message = raised(tf.function(step) if graph else step)
    assert message.endswith("b (float32, shape (1,)) only on rank 0")


@in_any_mode
def test_a_rank_without_any_gradient(graph):
    a, b, _ = variables()
    optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam())

    def step():
        optimizer.apply(of_rank([gradient(), None], [None, None]), [a, b])

    assert "only on rank 0" in raised(tf.function(step) if graph else step)


@in_any_mode
def test_no_rank_has_a_gradient(graph):
    a, _, _ = variables()
    optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam())

    def step():
        optimizer.apply([None], [a])

    with pytest.raises(ValueError, match="No gradients provided"):
        (tf.function(step) if graph else step)()


@in_any_mode
def test_a_difference_that_comes_later(graph):
    """One rank traces again or takes another branch; the other does not."""
    a, b, _ = variables()
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0))
    optimizer.build([a, b])

    def step(with_b):
        optimizer.apply([gradient(), gradient() if with_b else None], [a, b])

    step = tf.function(step) if graph else step
    step(True)
    step(False)
    step(True)
    message = raised(step, hvd.rank() == 0)
    assert "b (float32, shape (1,)) only on rank 0" in message
    np.testing.assert_array_equal(a.numpy(), [-2.0])
    np.testing.assert_array_equal(b.numpy(), [-1.0])


@pytest.mark.parametrize("sparse", [False, True])
def test_gradient_that_is_constant_on_one_rank(sparse):
    """TensorFlow would run the allreduce of constants once, not per step."""
    a, _, _ = variables()
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0))
    optimizer.build([a])

    @tf.function
    def step(changing):
        grad = of_rank(gradient(), changing)
        if sparse:
            grad = tf.IndexedSlices(grad, tf.constant([0]), [1])
        optimizer.apply([grad], [a])

    for number in range(4):
        step(gradient(number))
    np.testing.assert_array_equal(a.numpy(), [1.0 - (4 + 0 + 1 + 2 + 3) / 2])


def test_collective_of_a_constant_on_one_rank():
    @tf.function
    def total(changing):
        return hvd.allreduce(of_rank(gradient(), changing), op=hvd.Sum)

    sums = [float(total(gradient(number))[0]) for number in range(3)]
    assert sums == [1.0, 2.0, 3.0]


def test_another_order():
    a, b, _ = variables()
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0))
    trained = of_rank([a, b], [b, a])
    message = raised(optimizer.apply, [gradient(), gradient()], trained)
    assert "number 0 is a (float32, shape (1,)) on rank 0 and b (" in message


def test_variables_without_a_name_differ_by_their_place_in_the_optimizer():
    first, second = keras.Variable([1.0]), keras.Variable([1.0])
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0))
    optimizer.build([first, second])
    trained = [of_rank(first, second)]
    message = raised(optimizer.apply, [gradient()], trained)
    assert "variable (float32, shape (1,)) only on rank 0" in message
    assert "variable, number 2 (float32, shape (1,)) only on rank 1" in message


def test_dense_and_sparse_gradients():
    table = keras.Variable(np.ones((4, 2)), name="table")
    rows = tf.IndexedSlices(tf.ones((1, 2)), tf.constant([1]), [4, 2])
    grads = [of_rank(tf.ones((4, 2)), rows)]
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0))
    message = raised(optimizer.apply, grads, [table])
    assert "table (sparse float32" in message
    optimizer = hvd.DistributedOptimizer(
        keras.optimizers.SGD(1.0), sparse_as_dense=True
    )
    optimizer.apply(grads, [table])
    expected = [[0.5, 0.5], [0.0, 0.0], [0.5, 0.5], [0.5, 0.5]]
    np.testing.assert_array_equal(table.numpy(), expected)


def test_names_that_keras_has_numbered_otherwise_agree():
    for _ in range(hvd.rank()):
        keras.layers.Dense(1)
    model = keras.Sequential(
        [keras.Input((2,)), keras.layers.Dense(3), keras.layers.Dense(1)]
    )
    paths = hvd.allgather_object([v.path for v in model.trainable_variables])
    assert paths[0] != paths[1]
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), "mse")
    callback = hvd.callbacks.BroadcastGlobalVariablesCallback(0)
    x, y = np.ones((4, 2)), np.full((4, 1), hvd.rank())
    model.fit(x, y, verbose=0, callbacks=[callback])
    hvd.broadcast_variables(model.optimizer.variables, root_rank=0)


@in_any_mode
def test_tape(graph):
    a, b, _ = variables()

    def gradients():
        with tf.GradientTape() as tape:
            loss = of_rank(10.0 * a.value, 1.0 * b.value)
        tape = hvd.DistributedGradientTape(tape)
        return tape.gradient(loss, [a, b])

    message = raised(tf.function(gradients) if graph else gradients)
    assert "a (float32, shape (1,)) only on rank 0" in message


@in_any_mode
def test_tape_with_zero_for_unconnected_variables(graph):
    a, b, _ = variables()

    def gradients():
        with tf.GradientTape() as tape:
            loss = of_rank(10.0 * a.value, 1.0 * b.value)
        tape = hvd.DistributedGradientTape(tape)
        return tape.gradient(loss, [a, b], unconnected_gradients="zero")

    result = (tf.function(gradients) if graph else gradients)()
    np.testing.assert_array_equal(np.ravel(result), [5.0, 0.5])


class TwoHeads(keras.Model):
    """Each rank trains a head of its own."""

    def __init__(self):
        super().__init__()
        self.heads = [keras.layers.Dense(1), keras.layers.Dense(1)]

    def build(self, shape):
        for head in self.heads:
            head.build(shape)

    def call(self, inputs):
        return self.heads[hvd.rank()](inputs)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_fit(jit_compile):
    model = TwoHeads()
    model.build((None, 2))
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
    model.compile(optimizer, "mse", jit_compile=jit_compile)
    callback = hvd.callbacks.BroadcastGlobalVariablesCallback(0)

    def fit():
        model.fit(
            np.ones((4, 2)), np.ones((4, 1)), verbose=0, callbacks=[callback]
        )

    message = raised(fit)
    assert "dense/kernel (float32, shape (2, 1)) only on rank 0" in message
    assert "dense/kernel, number 2 (float32, shape (2, 1)) only on r" in message


@in_any_mode
def test_broadcast_names_a_variable_of_another_shape(graph):
    a, b = (
        keras.Variable([1.0], name="a"),
        keras.Variable(np.ones(of_rank((2, 3), (3, 2)), "float32"), name="b"),
    )

    def broadcast():
        hvd.broadcast_variables([a, b], root_rank=0)

    message = raised(tf.function(broadcast) if graph else broadcast)
    assert "b (float32, shape (2, 3)) only on rank 0" in message
    assert "b (float32, shape (3, 2)) only on rank 1" in message


def test_broadcast_names_variables_that_one_rank_lacks():
    a, b, c = variables()
    message = raised(hvd.broadcast_variables, of_rank([a], [a, b, c]), 0)
    assert "b (float32, shape (1,)) only on rank 1; c (" in message


def test_sums_and_means_name_them_too():
    a, b, _ = variables()
    for function in (hvd.average_variables, hvd.sum_over_ranks):
        assert "only on rank 1" in raised(function, of_rank([a], [a, b]))
        assert "only on rank 0" in raised(function, of_rank([a], []))
