"""The flags --config=NAME[:VARIANT] and --config.KEY=VALUE of a command."""

import pathlib
import traceback

from absl import flags
from ml_collections import config_flags

from horovod_recipes.errors import JobError
from horovod_recipes.errors import one_line
from horovod_recipes.errors import root_cause

CONFIGS = pathlib.Path(__file__).parent
CONFIG_CHOICES = "give the path of a file, or one of " + ", ".join(
    sorted(path.stem for path in CONFIGS.glob("[!_]*.py"))
)
# The command line, where ml_collections looks for the changes to the config.
# It would look in `sys.argv` before `parse` can name a mistake there.
_arguments = []


def define_config(flag_values):
    """Defines --config in `flag_values`."""
    _arguments.clear()
    config_flags.DEFINE_config_file(
        "config",
        None,
        f"What to train: {CONFIG_CHOICES}. You can change every key of it: "
        "--config.epochs=10, --config.schedule.power=1.0 and so on.",
        flag_values=flag_values,
        sys_argv=_arguments,
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
    given = [a for a in argv if a.startswith("--config=")]
    names = [argument.removeprefix("--config=") for argument in given]
    if not names:
        raise JobError(f"--config is missing: {CONFIG_CHOICES}")
    if len(names) > 1:
        raise JobError(f"--config is there {len(names)} times; give one")
    argv.remove(given[0])
    path, variant = find_config(names[0])
    argv.insert(1, f"--config={path}{variant}")
    _arguments[:] = argv
    try:
        rest = flag_values(argv)[1:]
        # ml_collections raises the error of reading a file only here.
        is_config = hasattr(flag_values.config, "lock")
    except flags.Error as error:
        text = root_cause(error).removeprefix("ERROR:: ")
        if "get_config() takes 0 positional arguments" in text:
            text = f"--config={names[0]}: this config has no variants"
        raise JobError(text) from None
    except JobError as error:
        raise JobError(f"--config={names[0]}: {error}") from None
    except (Exception, SystemExit) as error:  # A file can raise any error.
        raise JobError(_why_not_loaded(error, names[0], path)) from None
    if not is_config:
        raise JobError(
            f"--config={names[0]}: get_config() gives "
            f"{type(flag_values.config).__name__} and not a ConfigDict; does "
            "it end with `return config`?"
        )
    if rest:
        raise JobError(f"unknown argument {rest[0]!r}")
    return names[0]


def find_config(name):
    """Returns the path of a config's file, and `":VARIANT"` or `""`."""
    stem, colon, variant = name.partition(":")
    for path in (CONFIGS / f"{stem}.py", pathlib.Path(stem)):
        if path.is_file():
            text = path.read_text(errors="replace")
            # Otherwise ml_collections calls get_config of an earlier config.
            if "get_config" not in text and "import *" not in text:
                raise JobError(f"{path} has no function get_config")
            return path, colon + variant
    raise JobError(f"unknown config {stem!r}: {CONFIG_CHOICES}")


def _why_not_loaded(error, name, path):
    """Returns the message for an error of a config's file, or of a change."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f.lineno for f in frames if f.filename == str(path)]
    if isinstance(error, (AttributeError, KeyError)) and not lines:
        # ml_collections wraps a KeyError. `str` of that would add quotes.
        while isinstance(error.args[0], KeyError):
            error = error.args[0]
        return (
            f"unknown key of the config: {one_line(error.args[0])}; a config "
            "file of your own can add arguments to optimizer, schedule and "
            "model"
        )
    place = f", in line {lines[-1]}" if lines else ""
    return (
        f"cannot load --config={name}: {type(error).__name__}: "
        f"{root_cause(error)}{place}"
    )
