"""DistributedOptimizer on two ranks equals one rank with all examples."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import horovod_recipes.keras as hvd
from keras_lars import LARS
from keras_lars.schedules import WarmupPolynomialDecay
from tests.parallel.common import arrays_of_ranks
from tests.parallel.common import assert_same_on_all_ranks
from tests.parallel.common import largest_difference
from tests.parallel.common import of_rank

GLOBAL_BATCH = 32
STEPS = 6


def create_model(seed, optimizer, batch_norm=False, **compile_arguments):
    keras.utils.set_random_seed(seed)
    layers = [keras.Input((8,)), keras.layers.Dense(16, activation="relu")]
    if batch_norm:
        layers.append(keras.layers.BatchNormalization())
    layers += [keras.layers.Dropout(0.0), keras.layers.Dense(3)]
    model = keras.Sequential(layers)
    model.compile(
        optimizer,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        **compile_arguments,
    )
    return model


def create_lars(**arguments):
    """Returns a LARS with a schedule, which XLA compiles unless told not to."""
    schedule = WarmupPolynomialDecay(5.0, total_steps=STEPS, warmup_steps=2)
    return LARS(schedule, weight_decay=1e-3, **arguments)


def examples():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(STEPS * GLOBAL_BATCH, 8)).astype("float32")
    return x, np.argmax(x[:, :3], axis=1)


def this_ranks_part(micro_batch):
    """Returns this rank's share of every global batch, in micro-batches."""
    x, y = examples()
    shape = (-1, hvd.size(), GLOBAL_BATCH // hvd.size())
    x = x.reshape(*shape, 8)[:, hvd.rank()].reshape(-1, 8)
    y = y.reshape(shape)[:, hvd.rank()].reshape(-1)
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(micro_batch)


def fit(model, dataset, broadcast=True):
    callbacks = []
    if broadcast:
        callbacks = [hvd.callbacks.BroadcastGlobalVariablesCallback(0)]
    model.fit(dataset, shuffle=False, verbose=0, callbacks=callbacks)


@pytest.mark.parametrize(
    "create_optimizer",
    [create_lars, lambda: keras.optimizers.Adam(0.01)],
    ids=["LARS", "Adam"],
)
@pytest.mark.parametrize("run_eagerly", [False, True])
def test_weights_are_bit_equal_after_fit(create_optimizer, run_eagerly):
    optimizer = hvd.DistributedOptimizer(create_optimizer())
    model = create_model(
        seed=hvd.rank(), optimizer=optimizer, run_eagerly=run_eagerly
    )
    before = arrays_of_ranks(model.weights)
    assert largest_difference(*before) > 0.1
    fit(model, this_ranks_part(16))
    assert_same_on_all_ranks(model.weights)
    # Training has begun with rank 0's weights and has changed them.
    assert largest_difference(before[0], model.get_weights()) > 1e-3


def test_weights_would_differ_without_averaging():
    model = create_model(seed=0, optimizer=create_lars(jit_compile=False))
    fit(model, this_ranks_part(16), broadcast=False)
    assert largest_difference(*arrays_of_ranks(model.weights)) > 1e-4


def test_broadcast_refuses_an_optimizer_that_does_not_average():
    model = create_model(seed=0, optimizer=create_lars())
    with pytest.raises(ValueError, match="DistributedOptimizer"):
        fit(model, this_ranks_part(16))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"clipnorm": 0.05, "jit_compile": False},
        {"global_clipnorm": 0.05, "jit_compile": False},
    ],
    ids=str,
)
def test_equals_one_rank_with_the_global_batch(arguments):
    """2 ranks x 2 micro-batches of 8, or x 1 of 16, equal 1 rank x 32."""
    alone = create_model(seed=0, optimizer=create_lars(**arguments))
    x, y = examples()
    alone.fit(x, y, batch_size=GLOBAL_BATCH, shuffle=False, verbose=0)

    for passes in (1, 2):
        optimizer = hvd.DistributedOptimizer(
            create_lars(**arguments),
            backward_passes_per_step=passes,
            average_aggregated_gradients=True,
        )
        model = create_model(
            seed=hvd.rank(), optimizer=optimizer, steps_per_execution=passes
        )
        fit(model, this_ranks_part(GLOBAL_BATCH // hvd.size() // passes))
        assert int(optimizer.iterations) == STEPS
        for a, b in zip(model.get_weights(), alone.get_weights(), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        assert_same_on_all_ranks(model.weights)


def applied(optimizer, gradients, initial=(1.0, 1.0)):
    """Returns a variable of two numbers after `apply` of each gradient."""
    variable = keras.Variable(initial, name="kernel")
    for gradient in gradients:
        optimizer.apply([tf.constant(gradient)], [variable])
    return variable.numpy()


def sgd(**arguments):
    return keras.optimizers.SGD(0.5, **arguments)


def test_mean_and_sum_of_gradients():
    gradient = of_rank([1.0, 2.0], [3.0, 6.0])
    mean = applied(hvd.DistributedOptimizer(sgd()), [gradient])
    np.testing.assert_allclose(mean, [0.0, -1.0])
    total = applied(hvd.DistributedOptimizer(sgd(), op=hvd.Sum), [gradient])
    np.testing.assert_allclose(total, [-1.0, -3.0])


def test_accumulated_gradients_are_averaged_or_summed():
    gradients = [[float(hvd.rank()), 1.0], [2.0, 3.0], [7.0, 7.0]]
    for average, expected in ((True, [0.375, 0.0]), (False, [-0.25, -1.0])):
        optimizer = hvd.DistributedOptimizer(
            sgd(),
            backward_passes_per_step=2,
            average_aggregated_gradients=average,
        )
        # The third gradient waits for a fourth.
        np.testing.assert_allclose(applied(optimizer, gradients), expected)
        assert int(optimizer.iterations) == 1


def test_gradients_are_reduced_before_they_are_clipped():
    # The mean is zero. Clipping first would leave a part of rank 1's.
    gradient = of_rank([-2.0, 0.0], [2.0, 0.0])
    optimizer = hvd.DistributedOptimizer(sgd(clipvalue=1.0 + hvd.rank()))
    np.testing.assert_allclose(applied(optimizer, [gradient]), [1.0, 1.0])


@pytest.mark.usefixtures("_mixed_float16")
def test_mixed_float16_needs_no_wrapping():
    optimizer = hvd.DistributedOptimizer(create_lars())
    model = create_model(seed=hvd.rank(), optimizer=optimizer)
    assert model.optimizer.inner_optimizer is optimizer
    x = np.ones((32, 8), "float32")
    if hvd.rank() == 1:
        x[3, 3] = np.inf
    # The first of 4 steps has an infinity, on rank 1 alone.
    y = np.zeros(32, "int64")
    fit(model, tf.data.Dataset.from_tensor_slices((x, y)).batch(8))
    assert hvd.allgather_object(int(optimizer.iterations)) == [3, 3]
    assert all(np.isfinite(w).all() for w in model.get_weights())
    assert_same_on_all_ranks(model.weights)


def test_accumulated_gradients_belong_to_their_variables():
    first, second = keras.Variable([0.0]), keras.Variable([0.0])
    one, ten = tf.constant([1.0]), tf.constant([10.0])

    optimizer = hvd.DistributedOptimizer(sgd(), backward_passes_per_step=2)
    optimizer.build([first, second])
    optimizer.apply([one], [first])
    optimizer.apply([ten], [second])
    assert (first.numpy(), second.numpy()) == (-0.5, -5.0)

    optimizer.apply([one, ten], [first, second])
    optimizer.apply([ten, one], [second, first])
    assert (first.numpy(), second.numpy()) == (-1.5, -15.0)


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_gradient_that_comes_only_in_a_later_pass():
    first, second = keras.Variable([0.0]), keras.Variable([0.0])
    one = tf.constant([1.0])
    optimizer = hvd.DistributedOptimizer(sgd(), backward_passes_per_step=2)
    optimizer.apply([one, None], [first, second])
    optimizer.apply([one, one], [first, second])
    assert (first.numpy(), second.numpy()) == (-1.0, -0.5)


@pytest.mark.parametrize(
    ("dtype", "passes", "value"), [("bfloat16", 512, 1), ("float16", 4, 3e4)]
)
def test_half_precision_gradients_accumulate_in_float32(dtype, passes, value):
    variable = keras.Variable([0.0], dtype=dtype)
    optimizer = hvd.DistributedOptimizer(
        keras.optimizers.SGD(1.0),
        backward_passes_per_step=passes,
        average_aggregated_gradients=True,
    )
    for _ in range(passes):
        optimizer.apply([tf.constant([value], dtype)], [variable])
    assert float(variable.numpy()[0]) == pytest.approx(-value, rel=0.01)


def test_optimizer_distributed_after_a_fit_averages():
    model = create_model(seed=hvd.rank(), optimizer=create_lars())
    fit(model, this_ranks_part(16), broadcast=False)
    hvd.DistributedOptimizer(model.optimizer)
    fit(model, this_ranks_part(16))
    assert_same_on_all_ranks(model.weights)


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("passes", [1, 2])
def test_variables_without_gradient_stay(passes):
    first = keras.Variable([1.0], name="first")
    second = keras.Variable([1.0], name="second")
    optimizer = hvd.DistributedOptimizer(sgd(), backward_passes_per_step=passes)
    for _ in range(passes):
        optimizer.apply([tf.constant([2.0 / passes]), None], [first, second])
    np.testing.assert_allclose(first.numpy(), [0.0])
    np.testing.assert_allclose(second.numpy(), [1.0])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (dict(optimizer="sgd"), "keras.optimizers.Optimizer"),
        (dict(backward_passes_per_step=0), "backward_passes_per_step"),
    ],
)
def test_bad_argument_is_named(arguments, match):
    with pytest.raises(ValueError, match=match):
        hvd.DistributedOptimizer(**({"optimizer": sgd()} | arguments))


def test_distributing_twice_is_an_error():
    optimizer = hvd.DistributedOptimizer(sgd())
    with pytest.raises(ValueError, match="already"):
        hvd.DistributedOptimizer(optimizer)


def test_saved_model_names_the_plain_optimizer(tmp_path):
    optimizer = hvd.DistributedOptimizer(
        create_lars(), backward_passes_per_step=2
    )
    model = create_model(seed=0, optimizer=optimizer, steps_per_execution=2)
    fit(model, this_ranks_part(8))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is LARS
    ours = [v.numpy() for v in model.optimizer.variables]
    theirs = [v.numpy() for v in loaded.optimizer.variables]
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)
