"""Whole jobs from the command line: exit status, printed lines, files."""

import json
import os
import re
import subprocess
import sys

import pytest

import horovod_recipes.keras as hvd
from horovod_recipes import train
from tests.corrupt_dataset import damage
from tests.corrupt_dataset import write_corrupt_copy
from tests.jobs.launcher import ROOT
from tests.jobs.launcher import TRAIN
from tests.jobs.launcher import TWO_RANKS
from tests.jobs.launcher import error_lines
from tests.jobs.launcher import limited
from tests.jobs.launcher import python
from tests.jobs.launcher import run

TINY = (
    "--config=demo",
    "--config.model.filters=2",
    "--config.epochs=2",
    "--config.schedule.warmup_epochs=1",
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config=dmo"],
            "unknown config 'dmo': .* one of alexnet, alexnet_bn, demo, resnet",
        ),
        (
            ["--config.epoch=3", "--config=demo"],
            r"""config: 'epoch' Did you mean "epochs" instead of "epoch"\?""",
        ),
        (
            ["--config=demo", "--config.optimizer.nesterov=True"],
            "a config file of your own can add arguments to optimizer",
        ),
        (["--config=demo", "--config=resnet50"], "--config is there 2 times"),
        (["--config=demo:small"], "demo:small: this config has no variants"),
        (
            ["--config=horovod_recipes/errors.py"],
            "horovod_recipes/errors.py has no function get_config",
        ),
        (["--config=demo", "--config.epochs=few"], "invalid literal .*'few'"),
        (["--config=demo", "--bogus"], "Unknown command line flag 'bogus'"),
        (["--config=demo", "--resume", "--overwrite"], "exclude each other"),
        (
            [],
            "--config is missing: .* one of alexnet, alexnet_bn, demo, resnet",
        ),
        (["--config=demo", "--workdir="], "--workdir is missing"),
    ],
    ids=[
        *("config", "key", "argument", "twice", "variant", "file"),
        *("value", "flag", "modes", "none", "workdir"),
    ],
)
# ml_collections loads config files in a deprecated way.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_bad_command_line(monkeypatch, capsys, tmp_path, arguments, message):
    """In one process, as importing TensorFlow takes longer than the rest."""
    # Parsing changes it.
    monkeypatch.setattr(sys, "argv", [])
    # Under MPI, a process that has shut Horovod down cannot start it again.
    monkeypatch.setenv("HOROVOD_CONTROLLER", "gloo")
    monkeypatch.setenv("HOROVOD_CPU_OPERATIONS", "gloo")
    # No other rank needs time to say why.
    monkeypatch.setattr(hvd.callbacks, "SECONDS_TO_SAY_WHY", 0)
    workdir = tmp_path / "run"
    assert train.main(["train", f"--workdir={workdir}", *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line), line
    assert not workdir.exists()


def test_line_is_written_whole(tmp_path):
    """A pipe of packets gives back each write on its own, as mpirun may."""
    reader, writer = os.pipe2(os.O_DIRECT)
    arguments = ("--config=demo", "--bogus", f"--workdir={tmp_path}")
    job = subprocess.Popen(
        limited(["env", "PYTHONUNBUFFERED=1", *TRAIN, *arguments], 300),
        cwd=ROOT,
        stderr=writer,
    )
    os.close(writer)
    with job, open(reader, "rb", buffering=0) as writes:
        texts = list(iter(lambda: writes.read(4096), b""))
    assert job.returncode == 1
    (line,) = [text for text in texts if text.startswith(b"error: ")]
    assert line.endswith(b"\n"), line
    assert line == texts[-1]


def test_job_under_horovodrun(whole_job):
    result, workdir = whole_job.result, whole_job.workdir
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    settings = [line for line in lines if "config=demo ranks=2" in line]
    assert len(settings) == 1
    assert "global_batch=1024 (2 ranks x 512 micro-batch x 1 " in settings[0]
    assert "steps=9 (3 epochs x 3)" in settings[0]
    # Rank 0 alone has a progress bar; its last line is the summary.
    assert not [line for line in lines if line.startswith("[1]<stdout>")]
    assert lines[-1].startswith('[0]<stdout>:{"config": "demo"')
    summary = json.loads(lines[-1].removeprefix("[0]<stdout>:"))
    assert summary == json.loads((workdir / "summary.json").read_text())

    # A process without Horovod can load its checkpoint.
    script = (
        "import sys; sys.modules['horovod'] = None; import keras, keras_lars; "
        f"model = keras.saving.load_model({str(workdir)!r} + "
        "'/checkpoints/step-00000009.keras'); "
        "print(type(model.optimizer).__name__, int(model.optimizer.iterations))"
    )
    loaded = run(sys.executable, "-c", script)
    assert loaded.stdout.split() == ["LARS", "9"], loaded.stderr


def test_corrupt_image_ends_all_ranks(tmp_path):
    folder, (name,) = write_corrupt_copy(tmp_path / "data", "train", [3000])
    workdir = tmp_path / "run"
    result = run(
        *(*TWO_RANKS, *TRAIN, *TINY, f"--workdir={workdir}"),
        f"--config.dataset.data_dir={folder}",
    )
    assert result.returncode == 1
    first, second = error_lines(result)
    reason = (
        f"rank 1 found a corrupt image: {name}; replace it, "
        "or train without it: --config.dataset.corrupt_images=skip"
    )
    assert first == (
        "[0]<stderr>:error: rank 0 stopped: rank 1 on localhost failed: "
        + reason
    )
    assert second == f"[1]<stderr>:error: {reason}"
    assert not (workdir / "summary.json").exists()
    assert not list(workdir.rglob(".part-*"))


def test_damaged_file_is_named(tmp_path):
    folder, _ = write_corrupt_copy(tmp_path / "data", "test", [])
    (file,) = (tmp_path / "data").rglob("*-test.tfrecord-*")
    damage(file)
    result = run(
        *(*TRAIN, *TINY, f"--workdir={tmp_path / 'run'}"),
        f"--config.dataset.data_dir={folder}",
    )
    assert result.returncode == 1
    (line,) = error_lines(result)
    assert line.endswith(
        f"error: rank 0 cannot read all of the shard {file}: it is damaged, or "
        "not readable; copy it or prepare the dataset again"
    )


def test_bad_config_ends_all_ranks(tmp_path):
    workdir = tmp_path / "run"
    result = run(
        *(*TWO_RANKS, *TRAIN, "--config=demo", f"--workdir={workdir}"),
        "--config.global_batch_size=1001",
    )
    assert result.returncode == 1
    lines = error_lines(result)
    assert [line[:19] for line in lines] == [
        "[0]<stderr>:error: ",
        "[1]<stderr>:error: ",
    ]
    assert all("the nearest divisible size is 1000" in line for line in lines)
    assert not workdir.exists()


def test_disk_that_fails_ends_all_ranks(tmp_path):
    """Rank 0 cannot write its checkpoint: a file is where its folder goes."""
    workdir = tmp_path / "run"
    in_the_way = str(workdir / "checkpoints")
    result = run(
        *TWO_RANKS,
        *python("tests.jobs.faulty_job", "only_file", in_the_way, *TINY),
        f"--workdir={workdir}",
    )
    assert result.returncode == 1
    first, second = error_lines(result)
    assert first.startswith(
        "[0]<stderr>:error: on rank 0: cannot write the checkpoint "
        f"{workdir}/checkpoints/step-00000006.keras: File exists; "
    )
    assert second == first.replace("[0]", "[1]")
    assert not (workdir / "summary.json").exists()
