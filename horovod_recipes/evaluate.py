"""Evaluates the encoder of a job: how well do its features tell classes apart?

horovodrun -np 2 python -m horovod_recipes.evaluate --workdir=DIR
    [--linear_epochs=90 | --fixed_features] [--with_random_weights]

It trains a linear classifier on the encoder's features, and classifies by the
nearest neighbours. It prints the results, and writes evaluation.json and
neighbours.png.
It also evaluates a network trained with labels, without its last layer.
"""

import argparse
import json
import pathlib
import sys

from horovod_recipes._quiet import without_banner
from horovod_recipes.errors import JobError
from horovod_recipes.errors import missing_package
from horovod_recipes.install_horovod import check_installed


def main(arguments):
    """Runs the evaluation of a command line; returns the exit status."""
    options = create_parser().parse_args(arguments)
    try:
        check_installed()
        with without_banner():
            import horovod_recipes.keras as hvd
            from horovod_recipes.training import evaluation
            from horovod_recipes.training import process
            from horovod_recipes.training.failures import raised_on_every_rank
    except ModuleNotFoundError as error:
        print(f"error: {missing_package(error)}", file=sys.stderr)
        return 1
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1

    try:
        process.start()
        with raised_on_every_rank():
            process.choose_gpu()
            if options.linear_epochs < 1:
                raise JobError("--linear_epochs must be 1 or more")
        results = evaluation.evaluate_workdir(
            options.workdir,
            None if options.fixed_features else options.linear_epochs,
            options.with_random_weights,
        )
    except JobError as error:
        process.end_with_error(error)
        return 1
    if hvd.rank() == 0:
        print(json.dumps(results), flush=True)
    return 0


def create_parser():
    parser = argparse.ArgumentParser(
        prog="python -m horovod_recipes.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--workdir",
        required=True,
        type=pathlib.Path,
        help="the folder of a finished run",
    )
    protocol = parser.add_mutually_exclusive_group()
    protocol.add_argument(
        "--linear_epochs",
        type=int,
        default=90,
        help="epochs of the linear classifier (default: 90, as in the paper)",
    )
    protocol.add_argument(
        "--fixed_features",
        action="store_true",
        help="train the linear classifier for 500 steps on features of whole "
        "images, which are computed once; for small datasets",
    )
    parser.add_argument(
        "--with_random_weights",
        action="store_true",
        help="evaluate the network with random weights too",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
