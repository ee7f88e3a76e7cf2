"""Whole jobs from the command line: exit status, printed lines, files."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.corrupt_dataset import write_corrupt_copy
from tests.jobs.launcher import HOROVODRUN
from tests.jobs.launcher import ROOT
from tests.jobs.launcher import TRAIN
from tests.jobs.launcher import error_lines
from tests.jobs.launcher import run

TINY = (
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
            r"""config: 'epoch' Did you mean "epochs" instead of "epoch"\?$""",
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
    ids=["config", "key", "value", "flag", "modes", "none", "workdir"],
)
def test_bad_command_line(tmp_path, arguments, message):
    workdir = tmp_path / "run"
    result = run(*TRAIN, f"--workdir={workdir}", *arguments)
    assert result.returncode == 1
    (line,) = error_lines(result)
    assert re.search(message, line), line
    assert result.stderr.splitlines()[-1] == line
    assert not workdir.exists()


def test_a_line_is_written_whole(tmp_path):
    """A pipe of packets gives back each write on its own, as mpirun may."""
    reader, writer = os.pipe2(os.O_DIRECT)
    job = subprocess.Popen(
        [
            *("timeout", "300", "env", "PYTHONUNBUFFERED=1"),
            *(*TRAIN, "--config=demo", "--bogus", f"--workdir={tmp_path}"),
        ],
        cwd=ROOT,
        stderr=writer,
    )
    os.close(writer)
    with job, open(reader, "rb", buffering=0) as writes:
        texts = list(iter(lambda: writes.read(4096), b""))
    (line,) = [text for text in texts if text.startswith(b"error: ")]
    assert line.endswith(b"\n"), line


def test_job_under_horovodrun(tmp_path):
    workdir = tmp_path / "run"
    job = [*TRAIN, "--config=demo", f"--workdir={workdir}", *TINY]
    result = run(*HOROVODRUN, *job)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    settings = [line for line in lines if "config=demo ranks=2" in line]
    assert len(settings) == 1
    assert "global_batch=1024 (2 ranks x 512 micro-batch x 1 " in settings[0]
    assert "steps=6 (2 epochs x 3)" in settings[0]
    # Rank 0 alone has a progress bar; its last line is the summary.
    assert not [line for line in lines if line.startswith("[1]<stdout>")]
    assert lines[-1].startswith('[0]<stdout>:{"config": "demo"')
    summary = json.loads(lines[-1].removeprefix("[0]<stdout>:"))
    assert summary == json.loads((workdir / "summary.json").read_text())

    # Its checkpoint loads where there is no Horovod.
    script = (
        "import sys; sys.modules['horovod'] = None; import keras, keras_lars; "
        f"model = keras.saving.load_model({str(workdir)!r} + "
        "'/checkpoints/step-00000006.keras'); "
        "print(type(model.optimizer).__name__, int(model.optimizer.iterations))"
    )
    loaded = run(sys.executable, "-c", script)
    assert loaded.stdout.split() == ["LARS", "6"], loaded.stderr


def test_corrupt_image_ends_all_ranks(tmp_path):
    folder, (name,) = write_corrupt_copy(tmp_path / "data", "train", [3000])
    workdir = tmp_path / "run"
    result = run(
        *HOROVODRUN,
        *TRAIN,
        "--config=demo",
        f"--workdir={workdir}",
        f"--config.dataset.data_dir={folder}",
        *TINY,
    )
    assert result.returncode == 1
    first, second = sorted(error_lines(result))
    reason = (
        f"rank 1 met a corrupt image: {name}; replace it, "
        "or train without it: --config.dataset.corrupt_images=skip"
    )
    assert first == (
        "[0]<stderr>:error: rank 0 stopped: rank 1 on localhost failed: "
        + reason
    )
    assert second == f"[1]<stderr>:error: {reason}"
    assert not (workdir / "summary.json").exists()
    assert not list(workdir.rglob(".part-*"))


def test_bad_config_ends_all_ranks(tmp_path):
    workdir = tmp_path / "run"
    result = run(
        *HOROVODRUN,
        *TRAIN,
        "--config=demo",
        f"--workdir={workdir}",
        "--config.global_batch_size=1001",
    )
    assert result.returncode == 1
    lines = sorted(error_lines(result))
    assert [line[:19] for line in lines] == [
        "[0]<stderr>:error: ",
        "[1]<stderr>:error: ",
    ]
    assert all("the nearest that is: 1000" in line for line in lines)
    assert not workdir.exists()


def test_disk_that_fails_ends_all_ranks(tmp_path):
    """Rank 0 cannot write its checkpoint: something is in the way."""
    workdir = tmp_path / "run"
    job = [*TRAIN, "--config=demo", f"--workdir={workdir}", *TINY]
    script = (
        "import sys; from horovod_recipes import train; "
        "import horovod_recipes.training.workdir as c; "
        "make = c.prepare_workdir; "
        "c.prepare_workdir = lambda w, *a: (make(w, *a), "
        "(w / 'checkpoints').touch()); "
        "sys.exit(train.main(['train', *sys.argv[1:]]))"
    )
    result = run(*HOROVODRUN, sys.executable, "-c", script, *job[3:])
    assert result.returncode == 1
    first, second = sorted(error_lines(result))
    assert first.startswith(
        "[0]<stderr>:error: on rank 0: cannot write the checkpoint "
        f"{workdir}/checkpoints/step-00000006.keras: File exists; those"
    )
    assert second == first.replace("[0]", "[1]")
    assert not (workdir / "summary.json").exists()
