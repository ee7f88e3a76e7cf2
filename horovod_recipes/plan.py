"""Estimates the sizes, memory and time of a training job before it runs.

python -m horovod_recipes.plan --config=resnet50:32k --ranks=256
    --hardware=a100 [--config.key=value ...] [--output=DIR]

It prints how the global batch is divided, the schedule, the memory per device
and the time per step, also for other numbers of ranks. It needs no dataset, no
GPU and no Horovod. docs/plan.md explains the estimates and compares them with
published figures.
"""

import pathlib
import sys

from horovod_recipes._quiet import without_banner
from horovod_recipes.errors import JobError
from horovod_recipes.errors import missing_package
from horovod_recipes.errors import one_line
from horovod_recipes.planning.hardware import HARDWARE


def main(argv):
    """Prints the plan of a command line; returns the exit status."""
    try:
        flags = create_flags()
        if "--help" in argv:
            print(__doc__, flags, sep="")
            return 0
        name, plan = run(flags, argv)
        show(name, plan, flags.output)
    except ModuleNotFoundError as error:
        print(f"error: {missing_package(error)}", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"error: cannot write to --output={flags.output}: "
            f"{error.strerror}; choose a writable folder",
            file=sys.stderr,
        )
        return 1
    # Networks and schedules raise TypeError or ValueError for bad arguments.
    except (JobError, TypeError, ValueError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


def create_flags():
    """Returns the flags of the command line, before they are parsed."""
    from absl import flags

    from horovod_recipes.configs import _config_flag

    values = flags.FlagValues()
    _config_flag.define_config(values)
    flags.DEFINE_integer(
        "ranks",
        None,
        "The number of ranks, one per device.",
        1,
        flag_values=values,
    )
    flags.DEFINE_string(
        "hardware",
        None,
        f"The hardware to plan for: {', '.join(HARDWARE)}.",
        values,
    )
    flags.DEFINE_string(
        "output", None, "A folder for plan.json and schedule.png.", values
    )
    return values


def run(flags, argv):
    """Parses the command line; returns the config's name and the plan."""
    from horovod_recipes.configs import _config_flag

    with without_banner():
        from horovod_recipes.planning.estimate import make_plan

    name = _config_flag.parse(flags, argv)
    for flag in ("ranks", "hardware"):
        if flags[flag].value is None:
            raise JobError(f"--{flag} is missing: {flags[flag].help}")
    return name, make_plan(flags.config, flags.ranks, flags.hardware)


def show(name, plan, folder):
    """Prints a plan, and writes it to a folder if there is one."""
    from horovod_recipes.planning.page import as_text
    from horovod_recipes.planning.page import write_plan

    print(as_text(plan, name))
    if folder:
        write_plan(plan, pathlib.Path(folder))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
