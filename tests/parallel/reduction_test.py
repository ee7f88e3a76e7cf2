"""What each argument of DistributedOptimizer does to two ranks' gradients."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import horovod_recipes.keras as hvd
from keras_lars import LARS
from tests.parallel.common import arrays_of_ranks
from tests.parallel.common import horovod_operations
from tests.parallel.common import of_rank


def sgd(rate=1.0, **arguments):
    return keras.optimizers.SGD(rate, **arguments)


def updates(gradients, **arguments):
    """Returns what one step of SGD at rate 1 takes from variables of zero."""
    variables = [
        keras.Variable(tf.zeros_like(g), dtype=g.dtype) for g in gradients
    ]
    optimizer = hvd.DistributedOptimizer(sgd(), **arguments)
    optimizer.apply(gradients, variables)
    return [-tf.cast(v.value, "float64").numpy() for v in variables]


def operations_of_step(optimizer, variables, sparse=False):
    """Returns the operations of Horovod in one step, in order."""
    optimizer.build(variables)
    gradients = [tf.zeros(v.shape, v.dtype) for v in variables]
    if sparse:
        gradients = [
            tf.IndexedSlices(g, tf.range(len(g)), tf.shape(g))
            for g in gradients
        ]
    return horovod_operations(
        lambda gradients: optimizer.apply(gradients, variables), gradients
    )


def group_sizes(variables, groups):
    optimizer = hvd.DistributedOptimizer(sgd(), groups=groups)
    operations = operations_of_step(optimizer, variables)
    return [len(operation.inputs) for operation in operations]


def test_fp16_compression_rounds_as_half_precision_does():
    gradient = np.float32([1.0001, 3.14159, 1e-9, 0.25])
    (exact,) = updates([tf.constant(gradient)])
    np.testing.assert_array_equal(exact, gradient)
    (rounded,) = updates(
        [tf.constant(gradient)], compression=hvd.Compression.fp16
    )
    np.testing.assert_array_equal(rounded, np.float16(gradient))
    assert (rounded != gradient).tolist() == [True, True, True, False]


def test_predivide_factor_keeps_the_mean_and_its_range():
    gradient = tf.constant(of_rank([1.0, 6e4], [3.0, 6e4]))
    (mean,) = updates([gradient], gradient_predivide_factor=2.0)
    np.testing.assert_allclose(mean, [2.0, 6e4])
    # Half precision holds the mean, but not the sum. The factor divides the
    # gradients before they are added.
    fp16 = {"compression": hvd.Compression.fp16}
    (mean,) = updates([gradient], gradient_predivide_factor=2.0, **fp16)
    np.testing.assert_allclose(mean, [2.0, 6e4], rtol=1e-3)
    (mean,) = updates([gradient], **fp16)
    assert np.isinf(mean[1])


def test_gradients_of_several_types_travel_together():
    gradients = [
        tf.constant(of_rank([1.0], [3.0]), dtype)
        for dtype in ("float32", "bfloat16", "float64", "float16")
    ]
    assert updates(gradients) == [[2.0]] * 4


def test_device_is_that_of_the_reduction():
    variable = keras.Variable([0.0])
    for device in ("", "/device:CPU:0"):
        optimizer = hvd.DistributedOptimizer(sgd(), device_dense=device)
        (operation,) = operations_of_step(optimizer, [variable])
        assert operation.device == device

        # The values and the indices of a sparse gradient.
        optimizer = hvd.DistributedOptimizer(
            sgd(), device_sparse=device, op=hvd.Sum
        )
        operations = operations_of_step(optimizer, [variable], sparse=True)
        assert [op.device for op in operations] == [device] * 2


def test_groups_as_a_number():
    variables = [keras.Variable([0.0]) for _ in range(5)]
    assert group_sizes(variables, None) == [5]
    assert group_sizes(variables, 1) == [5]
    assert group_sizes(variables, 2) == [3, 2]
    assert group_sizes(variables, 9) == [1] * 5
    # Groups of equal bytes, from the last variable to the first.
    variables = [keras.Variable(np.zeros(n)) for n in (1, 2, 1, 4, 300, 2)]
    assert group_sizes(variables, 2) == [2, 4]


def test_by_default_there_is_a_group_for_each_mib():
    mib = 2**18  # Numbers in float32.
    variables = [
        keras.Variable(np.zeros(mib // 4, "float32")) for _ in range(12)
    ]
    assert group_sizes(variables, None) == [4, 4, 4]
    variables = [keras.Variable(np.zeros(mib, "float32")) for _ in range(32)]
    assert group_sizes(variables, None) == [2] * 16


def test_groups_as_lists_tell_variables_of_one_name_apart():
    variables = [keras.Variable([0.0], name="kernel") for _ in range(5)]
    first, second, third, *_ = variables
    # The last layers have their gradients first.
    assert group_sizes(variables, [[first, third], [second]]) == [1, 1, 1, 2]
    # A Keras variable and its tf.Variable are the same variable.
    assert group_sizes(variables, [[first.value, third, second]]) == [1, 1, 3]


def test_groups_by_path():
    model = keras.Sequential(
        [keras.Input((2,))]
        + [keras.layers.Dense(2, name=name) for name in ("a", "b", "c")]
    )
    variables = model.trainable_variables
    kernels = [v.path for v in variables if v.name == "kernel"]
    assert group_sizes(variables, [kernels]) == [1, 1, 1, 3]
    with pytest.raises(ValueError, match="'kernel'"):
        group_sizes(variables, [["kernel"]])


@pytest.mark.parametrize("groups", [2, "lists"])
@pytest.mark.parametrize("passes", [1, 2])
def test_groups_give_the_same_result(groups, passes):
    """Variables of two models, with the same short names."""
    variables = [
        keras.Variable([0.0, 0.0], name=name)
        for name in ("kernel", "bias", "kernel", "bias")
    ]
    if groups == "lists":
        groups = [[variables[0], variables[3]], [variables[2]]]
    optimizer = hvd.DistributedOptimizer(
        sgd(), groups=groups, backward_passes_per_step=passes
    )

    @tf.function
    def step():
        gradients = [
            tf.constant([float(i), of_rank(1.0, 3.0) * i]) for i in range(4)
        ]
        optimizer.apply(gradients, variables)

    for _ in range(passes):
        step()
    for i, variable in enumerate(variables):
        expected = np.array([-1.0 * i, -2.0 * i]) * passes
        np.testing.assert_array_equal(variable, expected)


def test_num_groups_is_the_old_name_of_groups():
    variables = [keras.Variable([0.0]) for _ in range(4)]
    with pytest.warns(DeprecationWarning, match="groups=2"):
        optimizer = hvd.DistributedOptimizer(sgd(), num_groups=2)
    assert len(operations_of_step(optimizer, variables)) == 2


def test_ranks_outside_of_the_process_set_keep_their_gradients(rank_0_alone):
    gradient = tf.constant(of_rank([1.0], [3.0]))
    (update,) = updates([gradient], process_set=rank_0_alone)
    assert update == of_rank([1.0], [3.0])
    (update,) = updates([gradient])
    assert update == [2.0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, (0.5, 1.5)),
        ({"scale_local_gradients": False}, (1.0, 3.0)),
        ({"op": hvd.Sum}, (0.5, 1.5)),
        ({"backward_passes_per_step": 2}, (1.0, 3.0)),
    ],
    ids=str,
)
def test_local_variables_are_left_to_each_rank(arguments, expected):
    shared, local = (keras.Variable([0.0], name="kernel") for _ in range(2))
    optimizer = hvd.DistributedOptimizer(sgd(), **arguments)
    optimizer.register_local_var(local)
    passes = arguments.get("backward_passes_per_step", 1)
    for _ in range(passes):
        gradient = tf.constant(of_rank([1.0], [3.0]))
        optimizer.apply([gradient, gradient], [shared, local])
    assert -local.numpy() == of_rank(*expected)
    total = 4.0 if arguments.get("op") == hvd.Sum else 2.0
    assert -shared.numpy() == total * passes


def test_partial_optimizer_leaves_layers_to_each_rank():
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(2, name=f"layer_{i}") for i in range(3)]
    model = keras.Sequential([keras.Input((2,)), *layers])
    before = model.get_weights()
    model.compile(
        hvd.PartialDistributedOptimizer(sgd(0.1), local_layers=layers[1]),
        "mse",
        jit_compile=False,
    )
    x = np.full((4, 2), 1.0 + hvd.rank(), "float32")
    model.fit(x, x, verbose=0)
    # A kernel and a bias of each layer.
    first, second = arrays_of_ranks(model.weights)
    equal = [np.array_equal(a, b) for a, b in zip(first, second, strict=True)]
    assert equal == [True, True, False, False, True, True]
    trained = zip(first, before, strict=True)
    assert not any(np.array_equal(a, b) for a, b in trained)


def test_infinity_in_a_local_gradient_makes_all_skip():
    shared, local = keras.Variable([1.0]), keras.Variable([1.0])
    optimizer = hvd.DistributedOptimizer(
        keras.optimizers.LossScaleOptimizer(sgd(), initial_scale=4.0)
    )
    optimizer.register_local_var(local)
    good = tf.constant([2.0])
    optimizer.apply(
        [good, tf.constant(of_rank([np.inf], [2.0]))], [shared, local]
    )
    assert (float(shared[0]), float(local[0])) == (1.0, 1.0)
    assert float(optimizer.dynamic_scale) == 2.0
    optimizer.apply([good, good], [shared, local])
    assert (float(shared[0]), float(local[0])) == (0.0, 0.5)


OPTIMIZERS = {
    "SGD": lambda: sgd(0.1, momentum=0.9),
    "clipnorm": lambda: sgd(0.1, clipnorm=1.0),
    "Adam": lambda: keras.optimizers.Adam(0.1),
    "LARS": lambda: LARS(10.0),
    "LossScaleOptimizer": lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(0.1), initial_scale=2.0
    ),
}


def sparse_gradient():
    """The ranks share rows, repeat rows, and have their own rows."""
    rows = of_rank([0, 1, 0], [1, 3])
    values = of_rank([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], [[7.0, 8.0]] * 2)
    return tf.IndexedSlices(
        tf.constant(values), tf.constant(rows), tf.constant([4, 2])
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sparse_gradients_train_as_dense_ones(name):
    table = keras.Variable(np.ones((4, 2)), name="embeddings")
    bias = keras.Variable(np.ones(2), name="bias")
    optimizer = hvd.DistributedOptimizer(OPTIMIZERS[name]())
    alone = [keras.Variable(v.numpy()) for v in (table, bias)]
    optimizer_alone = OPTIMIZERS[name]()
    mean = np.array([[3, 4], [5, 6], [0, 0], [3.5, 4]], "float32")

    @tf.function
    def step():
        gradients = [
            sparse_gradient(),
            tf.constant(of_rank([1.0, 1.0], [3.0, 3.0])),
        ]
        optimizer.apply(gradients, [table, bias])

    for _ in range(2):
        step()
        optimizer_alone.apply([tf.constant(mean), tf.fill(2, 2.0)], alone)
    np.testing.assert_allclose(table, alone[0], rtol=1e-6)
    np.testing.assert_allclose(bias, alone[1], rtol=1e-6)
    assert np.abs(table.numpy() - 1).max() > 1e-3


@pytest.mark.parametrize(
    ("arguments", "operations"),
    [
        ({}, ["HorovodAllgather"] * 2),
        ({"sparse_as_dense": True}, ["HorovodGroupedAllreduce"]),
    ],
    ids=str,
)
def test_how_sparse_gradients_travel(arguments, operations):
    table = keras.Variable(np.zeros((4, 2)))
    optimizer = hvd.DistributedOptimizer(sgd(), op=hvd.Sum, **arguments)
    optimizer.build([table])

    def step():
        optimizer.apply([sparse_gradient()], [table])

    assert [op.type for op in horovod_operations(step)] == operations
    tf.function(step)()
    expected = np.array([[6, 8], [10, 12], [0, 0], [7, 8]])
    np.testing.assert_array_equal(-table.numpy(), expected)


def test_accumulated_sparse_gradients():
    table = keras.Variable(np.zeros((4, 2)))
    optimizer = hvd.DistributedOptimizer(sgd(), backward_passes_per_step=2)
    for _ in range(2):
        optimizer.apply([sparse_gradient()], [table])
    expected = np.array([[6, 8], [10, 12], [0, 0], [7, 8]])
    np.testing.assert_array_equal(-table.numpy(), expected)


def test_two_optimizers_in_one_step():
    """The names of their operations do not collide."""
    variables = [keras.Variable([0.0], name="kernel") for _ in range(2)]
    first = hvd.DistributedOptimizer(sgd())
    second = hvd.DistributedOptimizer(sgd(), op=hvd.Sum)

    @tf.function
    def step():
        first.apply([tf.constant(of_rank([1.0], [3.0]))], variables[:1])
        second.apply([tf.constant(of_rank([5.0], [7.0]))], variables[1:])

    step()
    step()
    assert [float(-v[0]) for v in variables] == [4.0, 24.0]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"op": hvd.Compression}, "`op`"),
        ({"op": 2}, "Adasum"),
        ({"gradient_predivide_factor": 0.0}, "gradient_predivide_factor"),
        (
            {"gradient_predivide_factor": 2.0, "op": hvd.Sum},
            "gradient_predivide_factor",
        ),
        ({"process_set": hvd.ProcessSet([1])}, "`process_set`"),
        ({"groups": 0}, "`groups`"),
        ({"groups": [1, 2]}, "`groups`"),
    ],
    ids=str,
)
def test_bad_argument_is_named(arguments, match):
    with pytest.raises(ValueError, match=match):
        hvd.DistributedOptimizer(sgd(), **arguments)


@pytest.mark.parametrize(
    ("layers", "match"),
    [([keras.layers.Dense(2)], "build the model first"), (["dense"], "Layer")],
)
def test_bad_local_layer_is_named(layers, match):
    with pytest.raises(ValueError, match=match):
        hvd.PartialDistributedOptimizer(sgd(), local_layers=layers)
