"""Every file of a work folder, damaged, and what reads it afterwards."""

import json
import shutil
import sys
import types

import keras
import pytest
from hypothesis import strategies as st

import horovod_recipes.keras as hvd
from horovod_recipes import train
from horovod_recipes.configs import demo
from horovod_recipes.configs import simclr
from horovod_recipes.errors import JobError
from horovod_recipes.training import checkpoints
from horovod_recipes.training import evaluation
from horovod_recipes.training import job
from horovod_recipes.training import logs
from horovod_recipes.training import workdir as run_folder
from horovod_recipes.training.tasks import Classification
from keras_lars import LARS
from keras_lars import callbacks as lars_callbacks
from tests.fuzz import fuzzing
from tests.fuzz.fuzzing import ERROR
from tests.fuzz.fuzzing import RIGHT
from tests.fuzz.fuzzing import tries

STEPS = (4, 8, 12)


def small_model():
    inputs = keras.Input((3,))
    model = keras.Model(inputs, keras.layers.Dense(2, name="dense")(inputs))
    model.compile(LARS(0.1), "mse")
    model.optimizer.build(model.trainable_variables)
    return model


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model):
    """A work folder of a run that was killed after its third checkpoint."""
    folder = tmp_path_factory.mktemp("whole")
    run_folder.prepare_workdir(folder, demo.get_config(), "new").release()
    metrics = table(folder)
    for epoch, step in enumerate(STEPS):
        model.optimizer.iterations.assign(step)
        metrics.on_epoch_end(epoch, {"loss": 1.5 - epoch, "top1": 0.5})
        measured = {"seconds": 2.5 * step}
        checkpoints.save(folder, model, step, measured, keep=3)
        checkpoints.save_if_best(folder, model, step, 90.0 + epoch, keep=1)
    model.save(folder / "encoder.keras")
    ratios = folder / "trust_ratios"
    ratios.mkdir()
    lines = ["step,conv1/kernel,logits/kernel"]
    lines += [f"{step},0.0{step},{step}.5" for step in STEPS]
    (ratios / "trust_ratios.csv").write_text("\n".join(lines) + "\n")
    return folder


def table(folder):
    return logs.MetricsTable(
        folder,
        steps_per_epoch=4,
        schedule=lambda step: 0.1,
        throughput=types.SimpleNamespace(images_per_second=lambda: 90.0),
        task=Classification,
    )


def copy_of(whole):
    copy = whole.with_name("copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(whole, copy)
    return copy


def damaged_file(name, *others, alike=None):
    """Draws the content of a file as a function of the whole folder.

    Args:
        name: String, the path in the work folder.
        *others: Strings, the paths of files to swap it with.
        alike: Strategy of other contents.
    """

    @st.composite
    def draw_content(draw, whole):
        if alike is not None and draw(st.booleans()):
            return draw(alike)
        swapped = [(whole / other).read_bytes() for other in others]
        return draw(fuzzing.damaged((whole / name).read_bytes(), swapped))

    return draw_content


def as_json(values):
    return values.map(lambda value: json.dumps(value).encode())


@st.composite
def altered(draw, saved):
    """Draws a JSON object with some keys lacking, or of another type."""
    value = dict(saved)
    for key in draw(st.lists(st.sampled_from(sorted(saved)), max_size=3)):
        if draw(st.booleans()):
            value[key] = draw(fuzzing.OTHER_JSON)
        else:
            value.pop(key, None)
    return value


def other_objects(saved):
    return as_json(altered(saved) | fuzzing.OTHER_JSON)


CONFIG = json.loads(demo.get_config().to_json())
SUMMARY = {"config": "demo", "top1": 97.5, "steps": 12, "seconds": 30.0}
MEASURED = {
    "seconds": 20.0,
    "target_top1": 90.0,
    "epochs_to_target": 2,
    "seconds_to_target": 12.5,
    "metric_sums": [1.0, 2.0],
}
draw_config = damaged_file(
    "config.json", "metrics.csv", alike=other_objects(CONFIG)
)
draw_keras = damaged_file(
    "checkpoints/step-00000012.keras",
    *("config.json", "checkpoints/step-00000012.json", "encoder.keras"),
)
draw_measured = damaged_file(
    "checkpoints/step-00000012.json",
    *("config.json", "metrics.csv"),
    alike=other_objects(MEASURED),
)


@tries(full=1500, data=st.data(), mode=st.sampled_from(["resume", "overwrite"]))
def test_config(whole, data, mode):
    """A folder of which it is unclear whose it is loses nothing."""
    folder = copy_of(whole)
    content = data.draw(draw_config(whole))
    (folder / "config.json").write_bytes(content)
    before = fuzzing.content_of(folder)
    try:
        lock = run_folder.prepare_workdir(folder, demo.get_config(), mode)
    except JobError as error:
        fuzzing.assert_clear(error)
        assert fuzzing.content_of(folder) == before
        return ERROR
    lock.release()
    saved = json.loads(content)
    assert "global_batch_size" in saved
    if mode == "resume":
        # Keys that may change have the value of the new job.
        before["config.json"] = (whole / "config.json").read_bytes()
        assert fuzzing.content_of(folder) == before
    else:
        assert list(fuzzing.content_of(folder)) == ["config.json"]
    return RIGHT


@tries(
    full=1500,
    content=other_objects(SUMMARY)
    | fuzzing.damaged(json.dumps(SUMMARY).encode(), [b"epoch,step\n1,4\n"]),
)
def test_summary(whole, content):
    folder = copy_of(whole)
    (folder / "summary.json").write_bytes(content)
    before = fuzzing.content_of(folder)
    try:
        lock = run_folder.prepare_workdir(folder, demo.get_config(), "resume")
        assert lock is None
        summary = run_folder.read_summary(folder)
    except JobError as error:
        fuzzing.assert_clear(error, "summary.json", "delete it")
        return ERROR
    finally:
        assert fuzzing.content_of(folder) == before
    assert isinstance(summary["top1"], int | float)
    return RIGHT


@tries(full=1000, content=st.binary(max_size=300), mode=st.sampled_from("rno"))
def test_lock_file(whole, content, mode):
    """What is in it does not matter, as long as no process has it."""
    folder = copy_of(whole)
    lock_file = folder / run_folder.LOCK_FILE
    lock_file.write_bytes(content)
    mode = {"r": "resume", "n": "new", "o": "overwrite"}[mode]
    holder = None
    if mode == "new":
        # Another job in this process has the folder.
        holder, mode = open(lock_file, "a+"), "resume"
        run_folder.fcntl.flock(holder, run_folder.fcntl.LOCK_EX)
    before = fuzzing.content_of(folder)
    try:
        lock = run_folder.prepare_workdir(folder, demo.get_config(), mode)
    except JobError as error:
        fuzzing.assert_clear(error, "another job uses")
        assert holder
        assert fuzzing.content_of(folder) == before
        return ERROR
    finally:
        if holder:
            holder.close()
    assert not holder
    lock.release()
    assert not lock_file.exists()
    return RIGHT


@tries(full=500, short=8, data=st.data(), name=st.sampled_from("kj"))
def test_newest_checkpoint(whole, model, data, name):
    """The one before is loaded, and a line says so."""
    folder = copy_of(whole)
    newest = checkpoints.saved_steps(folder)[12]
    draw, damaged = {
        "k": (draw_keras, newest),
        "j": (draw_measured, newest.with_suffix(".json")),
    }[name]
    damaged.write_bytes(data.draw(draw(whole)))
    before = fuzzing.content_of(folder)
    model.optimizer.iterations.assign(0)
    with fuzzing.captured() as printed:
        try:
            step, measured = checkpoints.restore_latest(folder, model)
        except JobError as error:
            # It can be loaded, but is of another job.
            fuzzing.assert_clear(error, "was saved from another")
            assert fuzzing.content_of(folder) == before
            return ERROR
    lines = printed()
    fuzzing.assert_only_warnings(lines)
    assert_usable(measured)
    after = fuzzing.content_of(folder)
    if step == 12:
        assert lines == []
        assert after == before
        return RIGHT
    assert step == 8
    (line,) = lines
    assert line.startswith(f"warning: cannot load {newest.with_suffix('')}.")
    assert line.endswith("step-00000008.keras")
    assert int(model.optimizer.iterations) == 8
    kept = f"{newest.name}.broken"
    assert (
        after.pop(f"checkpoints/{kept}") == newest.with_name(kept).read_bytes()
    )
    del before[f"checkpoints/{newest.name}"]
    assert after == before
    return RIGHT


def assert_usable(measured):
    """A job can go on with what its checkpoint has measured."""
    from horovod_recipes.training.callbacks import TargetTop1

    TargetTop1(measured.get("target_top1"), True, measured).measured()


@tries(full=150, short=4, data=st.data())
def test_all_checkpoints(whole, model, data):
    folder = copy_of(whole)
    for path in checkpoints.saved_steps(folder).values():
        path.write_bytes(data.draw(draw_keras(whole)))
    before = fuzzing.content_of(folder)
    with fuzzing.captured() as printed:
        try:
            step, _ = checkpoints.restore_latest(folder, model)
        except JobError as error:
            fuzzing.assert_clear(error)
            assert fuzzing.content_of(folder) == before
            return ERROR
    fuzzing.assert_only_warnings(printed())
    assert step in STEPS
    return RIGHT


@tries(full=400, short=4, data=st.data())
def test_encoder(whole, data):
    folder = copy_of(whole)
    content = data.draw(draw_keras(whole))
    (folder / "encoder.keras").write_bytes(content)
    (folder / "summary.json").write_text('{"top1": 50.0}')
    try:
        config = simclr.get_config("digits")
        encoder = evaluation.load_encoder(config, folder)
    except JobError as error:
        fuzzing.assert_clear(error, "encoder.keras")
        return ERROR
    assert encoder.output_shape == (None, 2)
    return RIGHT


SIMCLR = json.loads(simclr.get_config("digits").to_json())


@tries(
    full=3000,
    content=other_objects(SIMCLR)
    | fuzzing.damaged(
        json.dumps(SIMCLR).encode(), [json.dumps(CONFIG).encode()]
    ),
)
def test_config_of_evaluation(whole, content):
    folder = copy_of(whole)
    (folder / "config.json").write_bytes(content)
    try:
        config = evaluation.read_job(folder)
        evaluation.config_of_classifier(config, epochs=3)
    except JobError as error:
        fuzzing.assert_clear(error)
        return ERROR
    assert config.task in ("simclr", "classification")
    return RIGHT


draw_table = damaged_file("metrics.csv", "config.json", "encoder.keras")


@tries(full=1500, short=15, data=st.data())
def test_metrics(whole, data):
    """A job goes on, its table is whole, and the old one is kept."""
    folder = copy_of(whole)
    path = folder / "metrics.csv"
    content = data.draw(draw_table(whole))
    path.write_bytes(content)
    with fuzzing.captured() as printed:
        metrics = table(folder)
        metrics.on_epoch_end(3, {"loss": 0.5, "top1": 0.75, "val_top1": 0.5})
        again = table(folder)
    lines = printed()
    fuzzing.assert_only_warnings(lines)
    assert path.read_text().splitlines()[-1].startswith("4,16,0.1,0.5,75.0,")
    copies = [p.read_bytes() for p in folder.glob("metrics.damaged*.csv")]
    assert copies == [content] * len(lines)
    # Drawing takes longer than all else.
    if data.draw(st.integers(0, 9)) == 9:
        again.on_train_end()
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    return RIGHT


draw_ratios = damaged_file(
    "trust_ratios/trust_ratios.csv", "metrics.csv", "config.json"
)


@tries(full=3000, short=15, data=st.data(), step=st.sampled_from([0, 4, 10]))
def test_trust_ratios(whole, data, step):
    folder = copy_of(whole) / "trust_ratios"
    path = folder / "trust_ratios.csv"
    content = data.draw(draw_ratios(whole))
    path.write_bytes(content)
    header = ["step", "conv1/kernel", "logits/kernel"]
    with pytest.MonkeyPatch.context() as patch:
        warned = []
        patch.setattr(
            lars_callbacks.warnings,
            "warn",
            lambda text, **_: warned.append(text),
        )
        lars_callbacks._start_table(path, header, step)
    copies = [p.read_bytes() for p in folder.glob("*.damaged.csv")]
    assert copies == [content] * len(warned)
    read_header, rows, problem = lars_callbacks._read_table(path)
    assert (read_header, problem) == (header, None)
    assert all(int(row[0]) <= step for row in rows)
    if rows and data.draw(st.integers(0, 9)) == 9:
        logger = lars_callbacks.TrustRatioLogger(folder, 3)
        logger._events = types.SimpleNamespace(close=lambda: None)
        logger.on_train_end()
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    return RIGHT


class TrainingStarts(Exception):
    """The job is about to train. It has the step that it begins with."""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of a job that was killed after its second checkpoint."""
    folder = tmp_path_factory.mktemp("jobs") / "whole"

    def save_and_end(prepared, watchdog, callbacks):
        model = prepared.model
        # A job that trains does this in its first step.
        model.optimizer.build(model.trainable_variables)
        table = next(c for c in callbacks if isinstance(c, logs.MetricsTable))
        for epoch in (0, 1):
            table.on_epoch_end(epoch, {"loss": 1.5 - epoch, "top1": 0.5})
            checkpoints.save(
                *(folder, model, 3 * (epoch + 1)),
                *({"seconds": 2.5}, 2),
            )
        raise TrainingStarts

    def start(prepared, watchdog, callbacks):
        raise TrainingStarts(prepared.steps_done)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [])
        # Under MPI, a process cannot start Horovod again.
        patch.setattr(hvd, "shutdown", lambda: None)
        patch.setattr(hvd.callbacks, "SECONDS_TO_SAY_WHY", 0)
        patch.setattr(job, "fit_parts", save_and_end)
        with pytest.raises(TrainingStarts):
            train.main(["train", "--config=demo", f"--workdir={folder}"])
        patch.setattr(job, "fit_parts", start)
        # Without damage, it resumes from the newest.
        whole = f"--workdir={copy_of(folder)}"
        with pytest.raises(TrainingStarts, match="6"):
            train.main(["train", "--config=demo", whole, "--resume"])
        yield folder


RUN_FILES = (
    "config.json",
    "checkpoints/step-00000003.keras",
    "checkpoints/step-00000006.keras",
    "checkpoints/step-00000003.json",
    "checkpoints/step-00000006.json",
    "metrics.csv",
    "mlperf.log",
)


# ml_collections loads config files in a deprecated way.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@tries(
    full=300,
    short=3,
    data=st.data(),
    names=st.lists(
        st.sampled_from(RUN_FILES), min_size=1, max_size=3, unique=True
    ),
    mode=st.sampled_from(["--resume"] * 5 + ["--overwrite", "--noresume"]),
)
def test_job(killed, data, names, mode):
    """The command resumes, and says from where, or ends with one line."""
    folder = copy_of(killed)
    swapped = [(killed / other).read_bytes() for other in RUN_FILES]
    for name in names:
        content = fuzzing.damaged((killed / name).read_bytes(), swapped)
        (folder / name).write_bytes(data.draw(content))
    before = fuzzing.content_of(folder)
    command = ["train", "--config=demo", f"--workdir={folder}", mode]
    with fuzzing.captured() as printed:
        try:
            assert train.main(command) == 1
        except TrainingStarts as start:
            (step,) = start.args
        else:
            step = None
    lines = printed()
    after = fuzzing.content_of(folder)
    if step is None:
        fuzzing.assert_one_error(lines)
        # Keys that may change have the value of the new job.
        assert after | {"config.json": b""} == before | {"config.json": b""}
        return ERROR
    fuzzing.assert_only_warnings(lines)
    if mode != "--resume":
        assert (mode, step) == ("--overwrite", 0)
        return RIGHT
    assert step in (3, 6)
    said = any(line.endswith("step-00000003.keras") for line in lines)
    assert said == (step == 3)
    kept = list(after.values())
    assert all(
        content in kept
        for name, content in before.items()
        # The job appends to the log, and writes the keys that may change.
        if name not in ("config.json", "mlperf.log")
    )
    return RIGHT
