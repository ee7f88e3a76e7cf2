"""Mistakes in a command line or a config file: each gets one clear line."""

import re
import sys

import pytest

import horovod_recipes.keras as hvd
from horovod_recipes import plan
from horovod_recipes import train
from horovod_recipes.configs import _config_flag
from horovod_recipes.configs import demo
from horovod_recipes.errors import JobError

# ml_collections loads config files in a deprecated way.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def parse(*arguments):
    flags = train.create_flags()
    name = _config_flag.parse(flags, ["train", *arguments])
    return name, flags.config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config.datset.cache=True"],
            "unknown key of the config: 'datset' Did you mean \"dataset\" "
            'instead of "datset"?; a config file',
        ),
        (
            ["--config.simclr.temperature=1.0"],
            "unknown key of the config: 'simclr'; a config file",
        ),
        (["--flagfile=/nowhere"], "Unable to open flagfile: [Errno 2] No such"),
        (["--x--config=demo"], "Unknown command line flag 'x--config'"),
        (["two\nlines"], r"unknown argument 'two\nlines'"),
    ],
    ids=str,
)
def test_bad_argument(arguments, message):
    with pytest.raises(JobError, match=re.escape(message)):
        parse("--config=demo", *arguments)
    # The next command line of this process is right.
    name, config = parse("--config=demo", "--config.epochs=3")
    assert (name, config.epochs) == ("demo", 3)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("{}['x']", "KeyError: 'x', in line 2"),
        ("raise KeyError", "KeyError: no message, in line 2"),
        ("raise AttributeError", "AttributeError: no message, in line 2"),
        ("raise SystemExit('no')", "SystemExit: no, in line 2"),
        ("open('/nowhere')", "OSError: .*No such file .*'/nowhere'"),
        ("return None", r"get_config\(\) gives NoneType and not a ConfigDict"),
        ("return {}", r"get_config\(\) gives dict and not a ConfigDict; does"),
    ],
)
def test_bad_config_file(tmp_path, statement, message):
    path = tmp_path / "mine.py"
    path.write_text(f"def get_config():\n    {statement}\n")
    with pytest.raises(JobError, match=f"--config={path}: .*{message}"):
        parse(f"--config={path}")


def test_parsing_changes_nothing_else():
    before = list(sys.argv)
    parse("--config=demo", "--config.epochs=3")
    assert sys.argv == before
    assert demo.get_config().epochs == 24


@pytest.mark.parametrize("command", ["train", "plan"])
def test_error_of_two_lines_is_printed_as_one(command, monkeypatch, capsys):
    # Under MPI, a process that has shut Horovod down cannot start it again.
    monkeypatch.setattr(hvd, "shutdown", lambda: None)
    # No other rank needs time to say why.
    monkeypatch.setattr(hvd.callbacks, "SECONDS_TO_SAY_WHY", 0)
    main = {"train": train.main, "plan": plan.main}[command]
    assert main([command, "--config=two\nlines", "--workdir=/proc/run"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: unknown config 'two")
