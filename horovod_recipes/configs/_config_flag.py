"""The flags --config=NAME[:VARIANT] and --config.KEY=VALUE of a command."""

import pathlib
import sys

from absl import flags
from ml_collections import config_flags

from horovod_recipes.errors import JobError
from horovod_recipes.errors import one_line
from horovod_recipes.errors import root_cause

CONFIGS = pathlib.Path(__file__).parent
CONFIG_CHOICES = "give the path of a file, or one of " + ", ".join(
    sorted(path.stem for path in CONFIGS.glob("[!_]*.py"))
)


def define_config(flag_values):
    """Defines --config in `flag_values`."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        f"What to train: {CONFIG_CHOICES}. You can change every key of it: "
        "--config.epochs=10, --config.schedule.power=1.0 and so on.",
        flag_values=flag_values,
    )


def parse(flag_values, argv):
    """Parses a command line into `flag_values`; returns the config's name.

    Raises:
        JobError: If a flag or key is unknown, or if its value is not valid.
    """
    argv = list(argv)
    if "--config" in argv[:-1]:
        index = argv.index("--config")
        argv[index : index + 2] = [f"--config={argv[index + 1]}"]
    names = [a.removeprefix("--config=") for a in argv if "--config=" in a]
    if not names:
        raise JobError(f"--config is missing: {CONFIG_CHOICES}")
    if len(names) > 1:
        raise JobError(f"--config is there {len(names)} times; give one")
    # ml_collections looks in `sys.argv` for the changes that follow --config.
    argv.remove(f"--config={names[0]}")
    argv.insert(1, config_flag(names[0]))
    sys.argv = argv
    try:
        rest = flag_values(argv)[1:]
    except AttributeError as error:
        # ml_collections wraps a KeyError. `str` of that would add quotes.
        cause = error.args[0]
        text = cause.args[0] if isinstance(cause, KeyError) else cause
        raise JobError(
            f"unknown key of the config: {one_line(text)}; a config file of "
            "your own can add arguments to optimizer, schedule and model"
        ) from None
    except flags.Error as error:
        text = root_cause(error)
        if "get_config() takes 0 positional arguments" in text:
            text = f"--config={names[0]}: this config has no variants"
        raise JobError(text) from None
    except JobError as error:
        raise JobError(f"--config={names[0]}: {error}") from None
    except Exception as error:  # A config file can raise any error.
        raise JobError(
            f"cannot load --config={names[0]}: {type(error).__name__}: "
            f"{root_cause(error)}"
        ) from None
    if rest:
        raise JobError(f"unknown argument {rest[0]!r}")
    return names[0]


def config_flag(name):
    """Returns `--config=PATH[:VARIANT]` for a packaged name or a path."""
    stem, colon, variant = name.partition(":")
    for path in (CONFIGS / f"{stem}.py", pathlib.Path(stem)):
        if path.is_file():
            text = path.read_text(errors="replace")
            # Otherwise ml_collections calls get_config of an earlier config.
            if "get_config" not in text and "import *" not in text:
                raise JobError(f"{path} has no function get_config")
            return f"--config={path}{colon}{variant}"
    raise JobError(f"unknown config {stem!r}: {CONFIG_CHOICES}")
