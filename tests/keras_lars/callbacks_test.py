"""The files of TrustRatioLogger hold the ratios that the optimizer had."""

import csv
import importlib.util
import pathlib
import struct
import warnings

import keras
import numpy as np
import pytest

from keras_lars import LARS
from keras_lars._unwrap import innermost
from keras_lars.callbacks import TrustRatioLogger

BATCHES = 10
HEADER = ["step", "net/hidden/kernel", "net/logits/kernel"]


def compiled_model(optimizer=None, seed=0, **arguments):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(5, activation="tanh", name="hidden"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Dense(3, name="logits"),
        ],
        name="net",
    )
    # Most tests do without XLA, which takes a second to compile the update.
    optimizer = optimizer or LARS(0.5, weight_decay=0.01, jit_compile=False)
    model.compile(optimizer, loss="mse", **arguments)
    return model


def fit(model, *callbacks, epochs=1):
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(BATCHES * 4, 6)), rng.normal(size=(BATCHES * 4, 3))
    model.fit(
        x,
        y,
        batch_size=4,
        epochs=epochs,
        shuffle=False,
        callbacks=list(callbacks),
        verbose=0,
    )


class Seen(keras.callbacks.Callback):
    """Keeps `trust_ratios()` of the adapted variables after every batch."""

    def __init__(self):
        super().__init__()
        self.ratios = {}

    def on_train_batch_end(self, batch, logs=None):
        optimizer = innermost(self.model.optimizer)
        ratios = optimizer.trust_ratios()
        self.ratios[int(optimizer.iterations)] = [
            ratios[path] for path in HEADER[1:]
        ]


def read_csv(log_dir):
    with (log_dir / "trust_ratios.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == HEADER
    steps = [int(row[0]) for row in rows]
    assert steps == sorted(set(steps))
    return {int(row[0]): [float(cell) for cell in row[1:]] for row in rows}


def read_events(log_dir):
    # TensorBoard imports pkg_resources, which warns, if it is installed.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing import event_accumulator
        from tensorboard.util import tensor_util

        events = event_accumulator.EventAccumulator(
            str(log_dir), size_guidance={"tensors": 0}
        )
        events.Reload()
    return {
        tag: {
            event.step: tensor_util.make_ndarray(event.tensor_proto)
            # TensorBoard reads files of the same second by name, and so the
            # tenth file of a process before the ninth.
            for event in sorted(events.Tensors(tag), key=lambda e: e.step)
        }
        for tag in events.Tags()["tensors"]
    }


@pytest.mark.parametrize(
    ("every_n_steps", "steps_per_execution", "steps"),
    [
        (1, 1, list(range(1, 21))),
        (4, 1, [4, 8, 12, 16, 20]),
        # Each epoch of 10 batches ends with an execution of 1.
        (4, 3, [6, 9, 13, 16, 20]),
        (1, 3, [3, 6, 9, 10, 13, 16, 19, 20]),
    ],
)
def test_files_hold_what_the_optimizer_had(
    tmp_path, every_n_steps, steps_per_execution, steps
):
    if keras.backend.backend() == "torch" and steps_per_execution > 1:
        pytest.skip("Keras's torch backend has no steps_per_execution.")
    log_dir = tmp_path / "not" / "there"
    model = compiled_model(
        LARS(0.5, weight_decay=0.01), steps_per_execution=steps_per_execution
    )
    seen = Seen()
    fit(model, TrustRatioLogger(log_dir, every_n_steps), seen, epochs=2)

    expected = {step: seen.ratios[step] for step in steps}
    assert len({tuple(row) for row in expected.values()}) == len(steps)
    assert read_csv(log_dir) == expected

    events = read_events(log_dir)
    histogram = events.pop("log10_trust_ratio")
    assert list(events) == [f"trust_ratio/{path}" for path in HEADER[1:]]
    for column, scalars in enumerate(events.values()):
        assert {step: float(x) for step, x in scalars.items()} == {
            step: row[column] for step, row in expected.items()
        }
    assert list(histogram) == steps
    for step, bins in histogram.items():
        logs = np.log10(expected[step])
        assert bins[:, 2].sum() == len(logs)
        assert bins[0, 0] == pytest.approx(logs.min(), rel=1e-5)
        assert bins[-1, 1] == pytest.approx(logs.max(), rel=1e-5)


def test_gradient_accumulation_counts_updates(tmp_path):
    optimizer = LARS(0.5, gradient_accumulation_steps=3, jit_compile=False)
    seen = Seen()
    fit(
        compiled_model(optimizer), TrustRatioLogger(tmp_path, 2), seen, epochs=3
    )
    assert max(seen.ratios) == 10
    steps = [2, 4, 6, 8, 10]
    assert read_csv(tmp_path) == {step: seen.ratios[step] for step in steps}


class CountingLogger(TrustRatioLogger):
    """Counts how often it asks for the model, which copies state on JAX."""

    reads = 0

    @property
    def model(self):
        self.reads += 1
        return super().model


def test_steps_in_between_do_not_read_the_optimizer(tmp_path):
    logger, reads = CountingLogger(tmp_path, 5), []
    count = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: reads.append(logger.reads)
    )
    fit(compiled_model(), logger, count)
    assert list(read_csv(tmp_path)) == [5, 10]
    reading = np.flatnonzero(np.diff(reads)) + 2
    assert reading.tolist() == [5, 10]


def test_loss_scale_optimizer(tmp_path):
    optimizer = keras.optimizers.LossScaleOptimizer(LARS(0.5))
    seen = Seen()
    fit(compiled_model(optimizer), TrustRatioLogger(tmp_path, 3), seen)
    # Scaled losses overflow at first, and Keras skips such updates.
    steps = [step for step in seen.ratios if step and step % 3 == 0]
    assert steps
    assert read_csv(tmp_path) == {step: seen.ratios[step] for step in steps}


def test_training_is_bit_equal_without_it(tmp_path):
    models = compiled_model(LARS(0.5)), compiled_model(LARS(0.5))
    fit(models[0], TrustRatioLogger(tmp_path, 2), epochs=2)
    fit(models[1], epochs=2)
    variables = [[*m.variables, *m.optimizer.variables] for m in models]
    assert len(variables[0]) > 15
    for logged, plain in zip(*variables, strict=True):
        np.testing.assert_array_equal(
            keras.ops.convert_to_numpy(logged),
            keras.ops.convert_to_numpy(plain),
        )


def test_second_fit_appends(tmp_path):
    model, seen = compiled_model(), Seen()
    logger = TrustRatioLogger(tmp_path, 4)
    for _ in range(2):
        fit(model, logger, seen)
    expected = {step: seen.ratios[step] for step in (4, 8, 12, 16, 20)}
    assert read_csv(tmp_path) == expected
    assert list(read_events(tmp_path)["log10_trust_ratio"]) == list(expected)


class Kill(keras.callbacks.Callback):
    """Interrupts `fit` right after an update, between two checkpoints."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def on_train_batch_end(self, batch, logs=None):
        if int(self.model.optimizer.iterations) == self.step:
            raise KeyboardInterrupt


def test_records_are_on_disk_at_once(tmp_path):
    seen, files = Seen(), []

    def read(batch, logs):
        if batch + 1 == 5:
            files.extend([read_csv(tmp_path), read_events(tmp_path)])

    reader = keras.callbacks.LambdaCallback(on_train_batch_end=read)
    fit(compiled_model(), TrustRatioLogger(tmp_path, 2), seen, reader)
    table, events = files
    assert table == {step: seen.ratios[step] for step in (2, 4)}
    assert list(events["log10_trust_ratio"]) == [2, 4]


def test_resumed_job_appends(tmp_path):
    def run(*others):
        # In this order Keras restores the optimizer after the logger's
        # `on_train_begin`.
        logger, seen = TrustRatioLogger(tmp_path, 3), Seen()
        backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
        fit(compiled_model(), logger, seen, *others, backup, epochs=2)
        return seen.ratios

    with pytest.raises(KeyboardInterrupt):
        run(Kill(17))
    first = read_csv(tmp_path)
    assert list(first) == [3, 6, 9, 12, 15]
    assert not (tmp_path / "trust_ratios.png").exists()
    with (tmp_path / "trust_ratios.csv").open("a") as file:
        file.write("6,0.5,0.")

    ratios = run()
    assert min(ratios) == BATCHES + 1
    expected = {step: first[step] for step in (3, 6, 9)}
    expected |= {step: ratios[step] for step in (12, 15, 18)}
    assert read_csv(tmp_path) == expected
    assert (tmp_path / "trust_ratios.png").exists()


def test_new_job_starts_anew(tmp_path):
    path = tmp_path / "trust_ratios.csv"
    for text in ("other,file\n1,2\n", ",".join(HEADER) + "\n5,1,1\n", ""):
        path.write_text(text)
        fit(compiled_model(), TrustRatioLogger(tmp_path, 5))
        assert list(read_csv(tmp_path)) == [5, 10]


def test_other_header_starts_anew(tmp_path):
    model = compiled_model()
    fit(model)
    other = "step,other/kernel\n5,1.0\n"
    (tmp_path / "trust_ratios.csv").write_text(other)
    with pytest.warns(UserWarning, match="it has other columns; it is kept as"):
        fit(model, TrustRatioLogger(tmp_path, 5))
    assert list(read_csv(tmp_path)) == [15, 20]
    assert (tmp_path / "trust_ratios.damaged.csv").read_text() == other


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("9,1.0", "a row is cut"),
        ("nine,1.0,1.0", "invalid literal"),
        ("9,1.0,\xff", "could not convert|can't decode"),
    ],
    ids=["cut", "step", "bytes"],
)
def test_damaged_table_does_not_end_training(tmp_path, row, problem):
    """The rows before the damage stay, and the file is kept."""
    model = compiled_model()
    fit(model, TrustRatioLogger(tmp_path, 4))
    path = tmp_path / "trust_ratios.csv"
    with path.open("a", encoding="latin-1") as file:
        file.write(f"{row}\n10,1.0,1.0\n")
    damaged = path.read_bytes()
    with pytest.warns(UserWarning, match=problem):
        fit(model, TrustRatioLogger(tmp_path, 4))
    kept = list(read_csv(tmp_path))
    # Bytes that are no text are found before the rows are split.
    assert kept in ([4, 8, 12, 16, 20], [12, 16, 20])
    assert (tmp_path / "trust_ratios.damaged.csv").read_bytes() == damaged


def test_picture(tmp_path):
    fit(compiled_model(), TrustRatioLogger(tmp_path, 2))
    data = (tmp_path / "trust_ratios.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width > 700
    assert height > 200
    assert len(data) > 5000
    assert not list(tmp_path.glob(".part*"))


def test_no_picture_without_a_record(tmp_path):
    fit(compiled_model(), TrustRatioLogger(tmp_path))
    assert read_csv(tmp_path) == {}
    assert not (tmp_path / "trust_ratios.png").exists()


def test_the_users_matplotlib_is_left_alone(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    fit(compiled_model(), TrustRatioLogger(tmp_path, 5))
    assert dict(matplotlib.rcParams) == before


def test_beside_a_tensorboard_callback_that_writes_rarely(tmp_path):
    other = keras.callbacks.TensorBoard(tmp_path / "other", update_freq=7)
    fit(compiled_model(), other, TrustRatioLogger(tmp_path / "ours", 2))
    events = read_events(tmp_path / "ours")
    assert list(events["log10_trust_ratio"]) == [2, 4, 6, 8, 10]


def test_a_model_that_is_built_by_its_first_batch(tmp_path):
    model = keras.Sequential(
        [
            keras.layers.Dense(5, name="hidden"),
            keras.layers.Dense(3, name="logits"),
        ],
        name="net",
    )
    model.compile(LARS(0.5), loss="mse")
    fit(model, TrustRatioLogger(tmp_path, 5))
    assert [len(row) for row in read_csv(tmp_path).values()] == [2, 2]


def test_other_optimizer(tmp_path):
    model = compiled_model(keras.optimizers.SGD())
    with pytest.raises(ValueError, match="Received: optimizer=SGD"):
        fit(model, TrustRatioLogger(tmp_path))


def test_nothing_adapted(tmp_path):
    model = compiled_model(LARS(exclude_from_layer_adaptation=["."]))
    with pytest.raises(ValueError, match="exclude_from_layer_adaptation"):
        fit(model, TrustRatioLogger(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("every_n_steps", [0, -1, 1.0, True, "1", None])
def test_bad_every_n_steps(every_n_steps):
    with pytest.raises(ValueError, match="every_n_steps") as raised:
        TrustRatioLogger("logs", every_n_steps)
    assert f"Received: every_n_steps={every_n_steps!r}" in str(raised.value)


@pytest.mark.parametrize("log_dir", ["", None, 3, True])
def test_bad_log_dir(log_dir):
    with pytest.raises(ValueError, match="log_dir") as raised:
        TrustRatioLogger(log_dir)
    assert f"Received: log_dir={log_dir!r}" in str(raised.value)


@pytest.mark.parametrize("missing", ["tensorflow", "tensorboard", "matplotlib"])
def test_missing_package_is_named(monkeypatch, missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name == missing else find(name),
    )
    message = f"pip install {missing}"
    with pytest.raises(ImportError, match=message):
        TrustRatioLogger(pathlib.Path("logs"))
