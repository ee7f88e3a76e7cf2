"""TrustRatio in Keras: `fit`, saving, copying, dtypes, sparse gradients."""

import copy
import csv
import json
import pickle
import subprocess
import sys

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_lars import TrustRatio
from keras_lars.callbacks import TrustRatioLogger
from keras_lars.muon import ConvMuon
from keras_lars.schedules import WarmupPolynomialDecay
from tests.keras_lars.common import apply
from tests.keras_lars.common import assert_close
from tests.keras_lars.common import fitted_model
from tests.keras_lars.common import one_step
from tests.keras_lars.common import small_model
from tests.keras_lars.lars_saving_test import RESUME
from tests.keras_lars.lars_saving_test import more_data
from tests.keras_lars.lars_test import DENSE
from tests.keras_lars.lars_test import SPARSE
from tests.keras_lars.reference import NEEDS_MUON
from tests.keras_lars.reference import variables_and_gradients


def lamb(rate=0.02, jit_compile=True, **arguments):
    inner = keras.optimizers.Adam(rate, **arguments)
    return TrustRatio(inner, weight_decay=0.01, jit_compile=jit_compile)


def state(model):
    return [v.numpy() for v in model.weights + model.optimizer.variables]


def assert_equal(values, expected):
    for value, wanted in zip(values, expected, strict=True):
        np.testing.assert_array_equal(value, wanted)


def fit_on(model):
    x, y = more_data()
    model.fit(x, y, batch_size=32, shuffle=False, verbose=0)


@pytest.fixture(scope="module")
def eager_weights():
    optimizer = lamb(jit_compile=False)
    return fitted_model(optimizer, run_eagerly=True).get_weights()


@pytest.mark.parametrize(
    ("update_compiled", "how"),
    [
        (True, {}),
        (True, {"jit_compile": True}),
        (True, {"run_eagerly": True}),
        (False, {}),
        (False, {"jit_compile": True}),
    ],
    ids=str,
)
def test_model_fit_gives_the_same_weights(update_compiled, how, eager_weights):
    model = fitted_model(lamb(jit_compile=update_compiled), **how)
    assert_close(model.get_weights(), eager_weights, 1e-3, 1e-5)
    assert int(model.optimizer.iterations) == 12


@NEEDS_MUON
def test_config_round_trip_of_every_argument():
    arguments = dict(
        trust_coefficient=0.02,
        weight_decay=0.01,
        epsilon=1e-6,
        clip=(0.5, 1.5),
        exclude_from_layer_adaptation=["bias"],
        exclude_from_weight_decay=[],
        unadapted_scale=0.3,
        jit_compile=False,
        name="mine",
    )
    inner = ConvMuon(0.25, rms_rate=None, clipnorm=1.0, use_ema=True)
    config = json.loads(json.dumps(TrustRatio(inner, **arguments).get_config()))
    again = TrustRatio.from_config(config)
    assert {key: again.get_config()[key] for key in arguments} == arguments
    assert type(again.optimizer) is ConvMuon
    assert again.optimizer.get_config() == inner.get_config()


def test_other_process_resumes_a_saved_model(tmp_path):
    schedule = WarmupPolynomialDecay(0.02, total_steps=24, warmup_steps=3)
    model = fitted_model(lamb(schedule))
    model.save(tmp_path / "model.keras")
    x, y = more_data()
    np.savez(tmp_path / "data.npz", x=x, y=y)
    files = [tmp_path / f for f in ("model.keras", "data.npz", "after.npz")]
    subprocess.run(
        [sys.executable, "-c", RESUME, *files], check=True, timeout=300
    )
    fit_on(model)
    after = np.load(tmp_path / "after.npz")
    assert_equal(
        model.get_weights(),
        [after[f"arr_{i}"] for i in range(len(model.weights))],
    )


def test_weights_only_checkpoint_resumes_bit_for_bit(tmp_path):
    model = fitted_model(lamb())
    model.save_weights(tmp_path / "model.weights.h5")
    loaded = small_model()
    loaded.compile(lamb(), model.loss, jit_compile=False)
    loaded.optimizer.build(loaded.trainable_variables)
    loaded.load_weights(tmp_path / "model.weights.h5")
    for m in (model, loaded):
        fit_on(m)
    assert_equal(state(loaded), state(model))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copy_goes_on_alone(how):
    model = fitted_model(lamb())
    if how == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    else:
        copied = copy.deepcopy(model)
    before = state(copied)
    assert_equal(before, state(model))
    fit_on(model)
    assert_equal(state(copied), before)
    fit_on(copied)
    assert_equal(state(copied), state(model))


def test_loading_does_not_check_patterns():
    """A process may load an optimizer without the frozen layers."""
    variables, gradients = variables_and_gradients(steps=1)
    inner = keras.optimizers.SGD()
    excluding = TrustRatio(inner, exclude_from_weight_decay=["gone"])
    apply(TrustRatio.from_config(excluding.get_config()), gradients, variables)
    with pytest.raises(ValueError, match=r"frozen.*'gone'"):
        apply(excluding, gradients, variables)


@pytest.mark.parametrize("jit_compile", [True, False])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        dict(clipnorm=1.0),
        dict(clipvalue=5.5),
        dict(global_clipnorm=1.0),
        dict(loss_scale_factor=4.0),
        dict(gradient_accumulation_steps=2),
    ],
    ids=lambda arguments: next(iter(arguments), "plain"),
)
def test_sparse_gradient_equals_dense(arguments, jit_compile):
    tables = []
    for gradient in (DENSE, SPARSE):
        inner = keras.optimizers.SGD(0.1, momentum=0.9, **arguments)
        optimizer = TrustRatio(inner, weight_decay=0.1, jit_compile=jit_compile)
        table = keras.Variable(np.ones((4, 2), "float32"), name="embeddings")
        for _ in range(2):
            optimizer.apply([gradient], [table])
        tables.append(table.numpy())
    assert np.abs(tables[0] - 1).max() > 1e-4
    np.testing.assert_allclose(*tables, rtol=1e-6)


@pytest.mark.parametrize("jit_compile", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_dtypes_move_as_float32_does(dtype, jit_compile):
    after = []
    for kind in ("float32", dtype):
        variables, gradients = variables_and_gradients(steps=5, dtype=kind)
        inner = keras.optimizers.SGD(0.1, momentum=0.9)
        optimizer = TrustRatio(inner, jit_compile=jit_compile)
        apply(optimizer, gradients, variables, kind)
        after.append([v.numpy().astype("float64") for v in variables])
    tolerance = {"float16": 2e-2, "bfloat16": 0.1, "float64": 1e-5}[dtype]
    assert_close(*after, rtol=tolerance, atol=tolerance)


def test_half_precision_norms_do_not_overflow():
    # The sum of squares is 1e7, and float16 ends at 65504.
    value = np.full((1000, 1), 100.0, "float16")
    variable = keras.Variable(value, dtype="float16", name="kernel")
    optimizer = TrustRatio(keras.optimizers.SGD(0.1))
    optimizer.apply([tf.constant(value)], [variable])
    np.testing.assert_allclose(variable.numpy(), 0.9 * value, rtol=1e-3)


@pytest.mark.parametrize(
    ("weights", "gradient", "after"),
    [
        ([0.0, 0.0], [3.0, 4.0], [-0.6, -0.8]),
        ([3.0, 4.0], [0.0, 0.0], [3.0, 4.0]),
        # Otherwise the step has the length of the weights.
        ([3.0, 4.0], [0.3, 0.4], [-3.0, -4.0]),
    ],
)
def test_zero_norm_uses_unadapted_scale(weights, gradient, after):
    optimizer = TrustRatio(keras.optimizers.SGD(2.0), unadapted_scale=0.1)
    value = one_step(optimizer, [weights], [gradient])
    np.testing.assert_allclose(value, [after], rtol=1e-6)


def test_clip_bounds_the_ratio():
    optimizer = TrustRatio(keras.optimizers.SGD(1.0), clip=(0.5, 1.5))
    value = one_step(optimizer, [[3.0, 4.0]], [[0.3, 0.4]])
    np.testing.assert_allclose(value, [[2.55, 3.4]], rtol=1e-6)
    assert optimizer.trust_ratios() == {"kernel": 1.5}


@pytest.mark.parametrize("jit_compile", [True, False])
def test_nan_in_a_gradient_is_not_hidden(jit_compile):
    inner = keras.optimizers.SGD(1.0)
    optimizer = TrustRatio(inner, jit_compile=jit_compile)
    after = one_step(optimizer, [[1.0, 2.0]], [[np.nan, 1.0]])
    assert np.isnan(after).all()


@pytest.mark.parametrize("jit_compile", [True, False])
def test_gradients_are_clipped_before_the_ratio(jit_compile):
    inner = keras.optimizers.SGD(1.0, clipvalue=0.3)
    optimizer = TrustRatio(inner, clip=(0.0, 1.0), jit_compile=jit_compile)
    after = one_step(optimizer, [[3.0, 4.0]], [[9.0, 9.0]])
    np.testing.assert_allclose(after, [[2.7, 3.7]], rtol=1e-6)


def test_accumulated_micro_batches_equal_their_mean():
    _, gradients = variables_and_gradients(steps=4)
    means = [
        [(a + b) / 2 for a, b in zip(*pair, strict=True)]
        for pair in (gradients[:2], gradients[2:])
    ]
    results = []
    for grads, steps in ((gradients, 2), (means, None)):
        variables, _ = variables_and_gradients(steps=4)
        optimizer = lamb(gradient_accumulation_steps=steps)
        apply(optimizer, grads, variables)
        results.append([v.numpy() for v in variables])
        ratios = list(optimizer.trust_ratios().values())
        assert [r == 1 for r in ratios] == [False, True, False]
    assert_close(*results, rtol=1e-5, atol=1e-7)


def test_rate_of_a_callback_is_the_inner_optimizers():
    model = fitted_model(lamb())
    before = model.get_weights()
    x, y = more_data()
    model.fit(
        *(x, y),
        verbose=0,
        callbacks=[keras.callbacks.LearningRateScheduler(lambda epoch: 0.0)],
    )
    assert float(model.optimizer.optimizer.learning_rate) == 0
    after = model.get_weights()
    for i in (0, 1, 2, 3, 6, 7):  # All but batch norm's statistics.
        np.testing.assert_array_equal(after[i], before[i])
    model.optimizer.learning_rate = 0.25
    assert float(model.optimizer.optimizer.learning_rate) == 0.25


def test_moving_average_of_the_inner_optimizer_becomes_the_weights():
    """Keras does this after `fit`."""
    plain = fitted_model(lamb())
    averaged = fitted_model(lamb(use_ema=True, ema_momentum=0.5))
    averages = [
        v for v in averaged.optimizer.variables if v.path.endswith("average")
    ]
    for a, b, average in zip(
        plain.trainable_variables,
        averaged.trainable_variables,
        averages,
        strict=True,
    ):
        assert np.abs(a.numpy() - b.numpy()).max() > 1e-4
        np.testing.assert_array_equal(b.numpy(), average.numpy())


def test_argument_that_is_set_later_acts_in_the_next_step():
    variables, gradients = variables_and_gradients(steps=1)
    optimizer = TrustRatio(keras.optimizers.SGD(1.0))
    apply(optimizer, gradients, variables)
    optimizer.clip = (0.0, 1e-9)
    before = variables[0].numpy()
    apply(optimizer, gradients, variables)
    np.testing.assert_allclose(variables[0].numpy(), before, rtol=1e-6)
    with pytest.raises(ValueError, match="`clip` must be"):
        optimizer.clip = (2.0, 1.0)
    with pytest.raises(ValueError, match="cannot change after the first step"):
        optimizer.exclude_from_weight_decay = []


@pytest.mark.parametrize("jit_compile", [True, False])
@pytest.mark.parametrize("number", [float, np.float32])
def test_argument_of_the_inner_optimizer_acts_in_the_next_step(
    number, jit_compile
):
    after = []
    for momentum in (number(0.0), number(0.9)):
        inner = keras.optimizers.SGD(0.1)
        inner.momentum = number(0.5)
        optimizer = TrustRatio(inner, jit_compile=jit_compile)
        variable = keras.Variable([[3.0, 4.0]], name="kernel")
        for gradient in ([[0.3, 0.4]], [[0.4, -0.3]]):
            optimizer.apply([tf.constant(gradient)], [variable])
            inner.momentum = momentum
        after.append(variable.numpy())
    # The velocity of the second step is the gradient, or has the first too.
    np.testing.assert_allclose(after[0], [[2.34, 3.87]], rtol=1e-5)
    assert np.abs(after[1] - after[0]).max() > 0.1


def test_argument_that_belongs_inside_is_refused():
    optimizer = TrustRatio(keras.optimizers.SGD())
    for name in ("clipnorm", "use_ema", "gradient_accumulation_steps"):
        with pytest.raises(ValueError, match=f"`{name}`.*the optimizer inside"):
            setattr(optimizer, name, 2)


def test_first_step_without_variables_is_refused():
    variables, [gradients] = variables_and_gradients(steps=1)
    inner = keras.optimizers.SGD()
    inner.build(variables)
    with pytest.raises(ValueError, match="first step needs the variables"):
        TrustRatio(inner).apply(gradients)


MANY_OPTIMIZERS = """
import keras
from keras_lars import TrustRatio

for _ in range(6):
    optimizer = TrustRatio(keras.optimizers.SGD(0.1))
    optimizer.apply([keras.ops.ones(3)], [keras.Variable([1.0, 2.0, 3.0])])
"""


def test_many_optimizers_in_one_process_print_no_warning():
    """TensorFlow warns of a function that it compiles again and again."""
    # It does so twice in a process; other tests may have used that up.
    process = subprocess.run(
        [sys.executable, "-c", MANY_OPTIMIZERS],
        stderr=subprocess.PIPE,
        check=True,
        text=True,
        timeout=300,
    )
    assert "retracing" not in process.stderr


def test_loss_scale_of_the_inner_optimizer_cancels():
    plain = fitted_model(lamb())
    scaled = fitted_model(lamb(loss_scale_factor=1024.0))
    assert_close(scaled.get_weights(), plain.get_weights(), 1e-4, 1e-6)


def test_saved_file_holds_each_variable_once(tmp_path):
    model = fitted_model(lamb())
    model.save_weights(tmp_path / "model.weights.h5")
    names = []

    def note(name, item):
        if isinstance(item, h5py.Dataset):
            names.append(name)

    with h5py.File(tmp_path / "model.weights.h5") as file:
        file["optimizer"].visititems(note)
    assert len(names) == len(model.optimizer.variables)


def test_weights_of_another_optimizer_can_be_set():
    first, second = fitted_model(lamb()), fitted_model(lamb(0.1))
    weights = [v.numpy() for v in first.optimizer.variables]
    second.optimizer.set_weights(weights)
    assert_equal([v.numpy() for v in second.optimizer.variables], weights)


def test_frozen_layer_stays():
    model = small_model()
    model.layers[0].trainable = False
    model.compile(
        lamb(), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    frozen, last = model.layers[0].get_weights(), model.layers[-1].get_weights()
    fit_on(model)
    assert_equal(model.layers[0].get_weights(), frozen)
    assert np.abs(model.layers[-1].get_weights()[0] - last[0]).max() > 1e-3


@pytest.mark.parametrize("jit_compile", [True, False])
def test_variables_of_tensorflow(jit_compile):
    values, gradient = [[3.0, 4.0]], [tf.constant([[0.3, 0.4]])]
    after = []
    for variable in (keras.Variable(values), tf.Variable(values)):
        optimizer = lamb(jit_compile=jit_compile)
        optimizer.apply(gradient, [variable])
        after.append(variable.numpy())
    np.testing.assert_array_equal(*after)


def test_loss_scale_optimizer_around_it():
    scaled = keras.optimizers.LossScaleOptimizer(lamb(), initial_scale=4.0)
    variables, gradients = variables_and_gradients(steps=3)
    plain_variables, _ = variables_and_gradients(steps=3)
    apply(scaled, [[4 * g for g in grads] for grads in gradients], variables)
    apply(lamb(), gradients, plain_variables)
    assert_close(
        [v.numpy() for v in variables],
        [v.numpy() for v in plain_variables],
        rtol=1e-5,
        atol=1e-7,
    )


def test_logger_records_what_the_optimizer_had(tmp_path):
    model = fitted_model(lamb())
    x, y = more_data()
    logger = TrustRatioLogger(tmp_path, every_n_steps=1)
    model.fit(x, y, batch_size=32, verbose=0, callbacks=[logger])
    with (tmp_path / "trust_ratios.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row.pop("step") for row in rows] == ["13", "14", "15"]
    ratios = model.optimizer.trust_ratios()
    assert set(rows[-1]) < set(ratios)
    for path, value in rows[-1].items():
        assert float(value) == pytest.approx(ratios[path], rel=1e-5)
