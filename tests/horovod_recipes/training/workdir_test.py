"""Files of a work folder that others have changed, and folders in use."""

import json
import logging
import signal
import subprocess
import sys
import types

import keras
import numpy as np
import pytest

from horovod_recipes.configs import demo
from horovod_recipes.configs import simclr
from horovod_recipes.errors import JobError
from horovod_recipes.training import callbacks as job_callbacks
from horovod_recipes.training import checkpoints
from horovod_recipes.training import evaluation
from horovod_recipes.training import logs
from horovod_recipes.training import workdir as run_folder
from horovod_recipes.training.tasks import Classification
from keras_lars import LARS

HOLDER = """
import pathlib, sys, time
from horovod_recipes.training.workdir import Lock
lock = Lock(pathlib.Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(100)
"""
GARBAGE = (b"", b"[]", b"{", b"null", b"\xff\xfe\x00", b'"text"', b"{}")
GARBAGE += (b'{"top1": []}', b'{"top1": NaN}', b'{"top1": true}')


@pytest.fixture
def model():
    inputs = keras.Input((3,))
    model = keras.Model(inputs, keras.layers.Dense(2, name="dense")(inputs))
    model.compile(LARS(0.1), "mse")
    model.optimizer.build(model.trainable_variables)
    return model


def test_folder_in_use_is_refused_until_its_job_is_killed(tmp_path):
    run_folder.prepare_workdir(tmp_path, demo.get_config(), "new").release()
    before = (tmp_path / "config.json").read_text()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "locked\n"
        for mode in ("new", "resume", "overwrite"):
            with pytest.raises(JobError) as error:
                run_folder.prepare_workdir(tmp_path, demo.get_config(), mode)
            assert f"process {holder.pid} on " in str(error.value)
            assert "choose another --workdir" in str(error.value)
        assert (tmp_path / "config.json").read_text() == before
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait(timeout=30)
        holder.stdout.close()
    lock = run_folder.prepare_workdir(tmp_path, demo.get_config(), "resume")
    lock.release()
    assert not (tmp_path / run_folder.LOCK_FILE).exists()


def test_name_of_the_other_job_is_damaged(tmp_path):
    """The message is one line whatever the file holds."""
    lock_file = tmp_path / run_folder.LOCK_FILE
    lock_file.write_bytes(b"\xfft\no \x94")
    with lock_file.open("rb") as holder:
        run_folder.fcntl.flock(holder, run_folder.fcntl.LOCK_EX)
        with pytest.raises(JobError) as error:
            run_folder.Lock(tmp_path)
    assert f"another job uses {tmp_path}: \ufffdt o \ufffd; wait" in str(
        error.value
    )


def test_lock_of_a_job_that_ends_in_between(tmp_path, monkeypatch):
    """The file that a job waits for is deleted, and then locked anew."""
    first, flock = run_folder.Lock(tmp_path), run_folder.fcntl.flock
    calls = []

    def ends_in_between(file, operation):
        calls.append(file)
        if len(calls) == 1:
            first.release()
        return flock(file, operation)

    monkeypatch.setattr(run_folder.fcntl, "flock", ends_in_between)
    second = run_folder.Lock(tmp_path)
    assert len(calls) == 2
    with pytest.raises(JobError, match="another job uses"):
        run_folder.Lock(tmp_path)
    second.release()


def test_finished_run_in_a_folder_of_others_is_resumed(tmp_path):
    """It gives its summary, and writes nothing."""
    run_folder.prepare_workdir(tmp_path, demo.get_config(), "new").release()
    run_folder.write_summary(tmp_path, {"top1": 90.0})
    holder = run_folder.Lock(tmp_path)
    lock = run_folder.prepare_workdir(tmp_path, demo.get_config(), "resume")
    assert lock is None
    holder.release()


def test_links_in_a_folder_lead_nowhere(tmp_path):
    """A stranger's archive may hold links to files of the user."""
    mine, folder = tmp_path / "mine", tmp_path / "run"
    mine.mkdir()
    (mine / "text").write_text("mine")
    run_folder.prepare_workdir(folder, demo.get_config(), "new").release()
    for name in (
        run_folder.LOCK_FILE,
        ".part-config.json",
        ".part-summary.json",
        "mlperf.log",
    ):
        (folder / name).symlink_to(mine / "text")
    run_folder.prepare_workdir(folder, demo.get_config(), "resume").release()
    run_folder.write_summary(folder, {"top1": 90.0})
    handler = logs._AppendToFile(folder / "mlperf.log")
    handler.emit(logging.makeLogRecord({"msg": "a line"}))
    assert run_folder.read_summary(folder) == {"top1": 90.0}
    assert (folder / "mlperf.log").read_text() == "a line\n"
    (folder / "checkpoints").symlink_to(mine)
    run_folder.prepare_workdir(folder, demo.get_config(), "overwrite").release()
    assert not (folder / "checkpoints").exists()
    assert [path.name for path in mine.iterdir()] == ["text"]
    assert (mine / "text").read_text() == "mine"


def test_lock_whose_folder_has_gone(tmp_path):
    """Releasing it must not hide the error that ended the job."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    lock = run_folder.Lock(workdir)
    workdir.rename(tmp_path / "moved")
    workdir.write_text("not a folder")
    lock.release()
    run_folder.Lock(tmp_path / "moved").release()


def test_key_of_two_lines_in_a_config(tmp_path):
    config = json.loads(demo.get_config().to_json())
    (tmp_path / "config.json").write_text(json.dumps(config | {"a\nb": 1}))
    with pytest.raises(JobError, match="another config: a b was 1 and now is"):
        run_folder.prepare_workdir(tmp_path, demo.get_config(), "resume")


def test_own_file_with_the_name_of_a_lock(tmp_path):
    (tmp_path / "lock").write_text("mine")
    with pytest.raises(JobError, match="do not belong to a run"):
        run_folder.prepare_workdir(tmp_path, demo.get_config(), "new")
    assert (tmp_path / "lock").read_text() == "mine"


def test_checkpoint_that_the_machine_cannot_read_is_kept(
    tmp_path, model, monkeypatch
):
    """Nothing falls back where the file may be whole."""
    checkpoints.save(tmp_path, model, 5, {"seconds": 1.0}, keep=2)
    checkpoints.save(tmp_path, model, 6, {"seconds": 2.0}, keep=2)

    def fail(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(keras.saving, "load_model", fail)
    with pytest.raises(JobError, match=r"Permission denied.*; try again"):
        checkpoints.restore_latest(tmp_path, model)
    assert sorted(checkpoints.saved_steps(tmp_path)) == [5, 6]


def test_refused_folder_is_not_locked(tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(JobError, match="do not belong to a run"):
        run_folder.prepare_workdir(tmp_path, demo.get_config(), "overwrite")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("content", GARBAGE)
def test_damaged_summary_is_named(tmp_path, content):
    (tmp_path / "summary.json").write_bytes(content)
    with pytest.raises(JobError, match=r"summary\.json is not .* delete it"):
        run_folder.read_summary(tmp_path)


@pytest.mark.parametrize("content", GARBAGE)
def test_damaged_config_is_no_run(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(JobError, match=r"it has no config\.json of a run"):
        run_folder.prepare_workdir(tmp_path, demo.get_config(), "resume")


def test_foreign_files_beside_checkpoints(tmp_path, model):
    """They are neither loaded, nor counted, nor deleted."""
    checkpoints.save(tmp_path, model, 5, {"seconds": 1.0}, keep=1)
    checkpoints.save_if_best(tmp_path, model, 5, 90.0, keep=1)
    foreign = [
        tmp_path / "checkpoints" / "step-keep.keras",
        tmp_path / "checkpoints" / "copy of step-00000009.keras",
        tmp_path / "best" / "top1-mine-step-9.keras",
        tmp_path / "best" / "backup.keras",
    ]
    for path in foreign:
        path.write_bytes(b"mine")
    checkpoints.save(tmp_path, model, 6, {"seconds": 2.0}, keep=1)
    checkpoints.save_if_best(tmp_path, model, 6, 95.0, keep=1)
    assert list(checkpoints.saved_steps(tmp_path)) == [6]
    assert checkpoints.restore_latest(tmp_path, model) == (6, {"seconds": 2.0})
    assert all(path.read_bytes() == b"mine" for path in foreign)
    best = [p.name for p in (tmp_path / "best").glob("top1-0*")]
    assert best == ["top1-095.000-step-00000006.keras"]


@pytest.mark.parametrize("damaged", ["keras", "json"])
@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"[]", b'{"seconds": null}', b"{", b'{"seconds": NaN}'),
        *(b'{"target_top1": 90.0, "epochs_to_target": 2}',),
        *(b'{"metric_sums": ["1"]}', b'{"metric_sums": 3}'),
    ],
)
def test_broken_newest_checkpoint_falls_back(
    tmp_path, model, capsys, damaged, content
):
    checkpoints.save(tmp_path, model, 5, {"seconds": 1.0}, keep=2)
    checkpoints.save(tmp_path, model, 6, {"seconds": 2.0}, keep=2)
    newest = checkpoints.saved_steps(tmp_path)[6].with_suffix(f".{damaged}")
    newest.write_bytes(content)
    assert checkpoints.restore_latest(tmp_path, model) == (5, {"seconds": 1.0})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: cannot load {newest} (")
    assert line.endswith(
        "resuming from " + str(checkpoints.saved_steps(tmp_path)[5])
    )
    # The broken one does not count as one to keep.
    checkpoints.save(tmp_path, model, 7, {"seconds": 3.0}, keep=2)
    assert sorted(checkpoints.saved_steps(tmp_path)) == [5, 7]
    checkpoints.saved_steps(tmp_path)[7].unlink()
    older = checkpoints.saved_steps(tmp_path)[5]
    older.write_bytes(b"")
    with pytest.raises(JobError, match=f"{older.name} .*no checkpoint can be"):
        checkpoints.restore_latest(tmp_path, model)


def test_checkpoint_that_names_a_place_before_its_begin(
    tmp_path, model, capsys
):
    """The system says "invalid argument": it is the file's fault."""
    checkpoints.save(tmp_path, model, 5, {"seconds": 1.0}, keep=2)
    checkpoints.save(tmp_path, model, 6, {"seconds": 2.0}, keep=2)
    newest = checkpoints.saved_steps(tmp_path)[6]
    content = bytearray(newest.read_bytes())
    # The end of a zip file has the place of its list of files in bytes 16 to 19
    # of the last 22.
    content[-6:-2] = (2**31 - 1).to_bytes(4, "little")
    newest.write_bytes(content)
    assert checkpoints.restore_latest(tmp_path, model)[0] == 5
    assert f"warning: cannot load {newest} (" in capsys.readouterr().err


def test_checkpoint_of_other_metrics(model):
    """The first step says so, in one line."""
    model.compile(LARS(0.1), "mse")
    restore = job_callbacks.RestoreMetrics([1.0, 2.0, 3.0, 4.0, 5.0])
    with pytest.raises(JobError, match=r"has 5 metric_sums, but .* JSON file"):
        model.fit(
            np.ones((1, 3)), np.ones((1, 2)), callbacks=[restore], verbose=0
        )


SIMCLR = json.loads(simclr.get_config("digits").to_json())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"dataset": 3}, r"config\.json is damaged.* dataset must be a part"),
        ({"epochs": {}}, r"config\.json is damaged.* epochs must be an integ"),
        ({"a.b": 1}, r"config\.json is damaged.* dots in field names"),
        ({"task": 3}, "task must be a text, but is 3"),
    ],
    ids=str,
)
def test_evaluation_of_a_damaged_config(tmp_path, changes, match):
    (tmp_path / "config.json").write_text(json.dumps(SIMCLR | changes))
    with pytest.raises(JobError, match=match) as error:
        evaluation.read_job(tmp_path)
    assert "\n" not in str(error.value)


def test_evaluation_of_a_whole_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SIMCLR))
    assert evaluation.read_job(tmp_path).task == "simclr"


def table(folder):
    return logs.MetricsTable(
        folder,
        steps_per_epoch=3,
        schedule=lambda step: 0.1,
        throughput=types.SimpleNamespace(images_per_second=lambda: None),
        task=Classification,
    )


def end_epochs(metrics, first, last):
    for epoch in range(first, last):
        metrics.on_epoch_end(epoch, {"loss": 1.5, "top1": 0.5})


def epochs_in(path):
    lines = path.read_text().splitlines()
    return [line.split(",")[0] for line in lines[1:]]


@pytest.mark.parametrize(
    ("damage", "kept"),
    [
        (lambda text: text[: text.rindex(",")], 3),
        (lambda text: text.replace("\n3,9,", "\nthree,9,"), 2),
        (lambda text: text.replace("\n2,6,0.1", "\n2,6,0.1,0.1"), 1),
        (lambda text: text.replace("train_loss", "loss"), 0),
        (lambda text: "\xff\xff" + text, 0),
        (lambda text: "", 0),
    ],
    ids=["cut", "text", "long", "columns", "bytes", "empty"],
)
def test_damaged_table_is_kept_and_training_goes_on(
    tmp_path, capsys, damage, kept
):
    end_epochs(table(tmp_path), 0, 4)
    path = tmp_path / "metrics.csv"
    assert epochs_in(path) == ["1", "2", "3", "4"]
    path.write_text(damage(path.read_text()), encoding="latin-1")
    damaged = path.read_bytes()
    metrics = table(tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {path} cannot be continued (")
    assert f"its first {kept} rows" in line
    assert (tmp_path / "metrics.damaged.csv").read_bytes() == damaged
    # A job with no epoch left does not lose these rows.
    assert path.exists() == (kept > 0)
    assert not kept or epochs_in(path) == [str(n + 1) for n in range(kept)]
    end_epochs(metrics, 4, 6)
    # Another damage does not replace the first copy.
    path.write_text("")
    table(tmp_path)
    assert (tmp_path / "metrics.damaged.csv").read_bytes() == damaged
    assert (tmp_path / "metrics.damaged-1.csv").read_bytes() == b""
    end_epochs(metrics, 5, 6)
    assert epochs_in(path) == [str(n + 1) for n in range(kept)] + ["5", "6"]


def test_table_with_more_columns_goes_on(tmp_path, capsys):
    end_epochs(table(tmp_path), 0, 2)
    path = tmp_path / "metrics.csv"
    lines = path.read_text().splitlines()
    path.write_text("".join(f"{line},9\n" for line in lines))
    path.write_text(path.read_text().replace("second,9", "second,more", 1))
    end_epochs(table(tmp_path), 2, 3)
    assert epochs_in(path) == ["1", "2", "3"]
    assert "more" not in path.read_text()
    assert capsys.readouterr().err == ""


def test_whole_table_goes_on_without_a_word(tmp_path, capsys):
    end_epochs(table(tmp_path), 0, 4)
    # A job that resumes after two epochs writes the third and fourth again.
    end_epochs(table(tmp_path), 2, 5)
    assert epochs_in(tmp_path / "metrics.csv") == ["1", "2", "3", "4", "5"]
    assert capsys.readouterr().err == ""


def test_measurements_of_a_checkpoint_come_back(tmp_path, model):
    measured = {"seconds": 3.5, "metric_sums": [1.0, 2.0]}
    checkpoints.save(tmp_path, model, 5, measured, keep=1)
    assert checkpoints.restore_latest(tmp_path, model)[1] == measured
    assert json.loads(
        checkpoints.saved_steps(tmp_path)[5].with_suffix(".json").read_text()
    )
