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

from absl import flags

from horovod_recipes._quiet import without_banner
from horovod_recipes.configs import _flags
from horovod_recipes.errors import JobError
from horovod_recipes.planning.hardware import HARDWARE

FLAGS = flags.FlagValues()
_flags.define_config(FLAGS)
flags.DEFINE_integer(
    "ranks", None, "The number of ranks, one per device.", 1, flag_values=FLAGS
)
flags.DEFINE_string(
    "hardware",
    None,
    f"The hardware to plan for: {', '.join(HARDWARE)}.",
    FLAGS,
)
flags.DEFINE_string(
    "output", None, "A folder for plan.json and schedule.png.", FLAGS
)


def main(argv):
    """Prints the plan of a command line; returns the exit status."""
    if "--help" in argv:
        print(__doc__, FLAGS, sep="")
        return 0
    with without_banner():
        from horovod_recipes.planning.estimate import make_plan
        from horovod_recipes.planning.page import as_text
        from horovod_recipes.planning.page import write_plan

    try:
        name = _flags.parse(FLAGS, argv)
        for flag in ("ranks", "hardware"):
            if FLAGS[flag].value is None:
                raise JobError(f"--{flag} is missing: {FLAGS[flag].help}")
        plan = make_plan(FLAGS.config, FLAGS.ranks, FLAGS.hardware)
    # Networks and schedules raise TypeError or ValueError for bad arguments.
    except (JobError, TypeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(as_text(plan, name))
    if FLAGS.output:
        write_plan(plan, pathlib.Path(FLAGS.output))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
