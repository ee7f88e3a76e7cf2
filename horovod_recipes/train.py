"""Trains the network of a config, on every rank of a Horovod job.

horovodrun -np 2 python -m horovod_recipes.train --config=demo
    --workdir=DIR [--config.key=value ...] [--resume | --overwrite]
    [--rehearse]
"""

import gc
import json
import sys

from horovod_recipes import _sigterm
from horovod_recipes._quiet import without_banner
from horovod_recipes.errors import JobError
from horovod_recipes.errors import missing_package
from horovod_recipes.install_horovod import check_installed


def main(argv, callbacks=()):
    """Runs the job of a command line; returns the exit status.

    Args:
        argv: List of strings, the command line.
        callbacks: Your own Keras callbacks, for `train_and_evaluate`.
    """
    try:
        check_installed()
        flags = create_flags()
        if "--help" in argv:
            print(__doc__, flags, sep="")
            return 0
        with without_banner():
            import horovod_recipes.keras as hvd
            from horovod_recipes.training import process
            from horovod_recipes.training.callbacks import StoppedBySigterm
    except ModuleNotFoundError as error:
        print(f"error: {missing_package(error)}", file=sys.stderr)
        return 1
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1

    try:
        summary = run(flags, argv, callbacks)
    except StoppedBySigterm as stop:
        if hvd.rank() == 0:
            print(stop_line(stop.steps_done), flush=True)
        return 0
    except JobError as error:
        process.end_with_error(error)
        return 1
    if hvd.rank() == 0:
        print(json.dumps(summary), flush=True)
    return 0


def stop_line(steps_done):
    """Returns what a job prints that a SIGTERM has stopped."""
    when = "before the first step"
    if steps_done:
        when = f"after step {steps_done}; a checkpoint was saved"
    return f"stopped by SIGTERM {when}; continue with --resume"


def create_flags():
    """Returns the flags of the command line, before they are parsed."""
    from absl import flags

    from horovod_recipes.configs import _config_flag

    values = flags.FlagValues()
    _config_flag.define_config(values)
    flags.DEFINE_string("workdir", None, "The folder for the results.", values)
    flags.DEFINE_bool("resume", False, "Resume the run in workdir.", values)
    flags.DEFINE_bool("overwrite", False, "Delete the run in workdir.", values)
    flags.DEFINE_bool(
        "rehearse",
        False,
        "Train two short epochs on generated images, with small batches.",
        values,
    )
    return values


def run(flags, argv, callbacks):
    """Parses the command line and runs the job; returns its summary."""
    import horovod_recipes.keras as hvd
    from horovod_recipes.configs import _config_flag
    from horovod_recipes.training import process
    from horovod_recipes.training import rehearsal
    from horovod_recipes.training.failures import raised_on_every_rank
    from horovod_recipes.training.job import train_and_evaluate

    process.start()
    with raised_on_every_rank():
        process.choose_gpu()
        config_name = _config_flag.parse(flags, argv)
        process.make_updates_fast(flags.config)
        if flags.config.deterministic:
            process.run_operations_one_by_one()
        mode = run_mode(flags)
        if flags.rehearse:
            images = flags.workdir.rstrip("/") + "-images"
            rehearsal.make_small(flags.config, images, hvd.size())
            config_name += " --rehearse"
    with raised_on_every_rank():
        if flags.rehearse and hvd.rank() == 0:
            rehearsal.write_dataset(images)
    return train_and_evaluate(
        flags.config, config_name, flags.workdir, mode, callbacks
    )


def run_mode(flags):
    """Returns the `mode` of `train_and_evaluate` that the flags select."""
    if not flags.workdir:
        raise JobError("--workdir is missing; it names the folder for results")
    if flags.resume and flags.overwrite:
        raise JobError("--resume and --overwrite exclude each other; drop one")
    if flags.resume:
        return "resume"
    return "overwrite" if flags.overwrite else "new"


if __name__ == "__main__":
    _sigterm.note_while_starting()
    status = main(sys.argv)
    # Otherwise Python collects garbage once more at its end, which is slow.
    gc.freeze()
    sys.exit(status)
