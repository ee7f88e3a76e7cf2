"""Prepares a TFDS dataset on disk. Run it once, before the training jobs.

    python -m horovod_recipes.data mnist5k [--data_dir=DIR]

Every TFDS name works. TFDS cannot download some datasets, such as
imagenet2012: put their archives into DIR/downloads/manual first.
"""

import argparse
import sys
import tarfile

from horovod_recipes._quiet import without_banner
from horovod_recipes.errors import JobError
from horovod_recipes.errors import missing_package
from horovod_recipes.errors import one_line


def main(arguments):
    """Prepares the dataset that `arguments` name; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m horovod_recipes.data",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("name", help="the name of a TFDS dataset")
    parser.add_argument(
        "--data_dir", help="TFDS's data folder; default: TFDS_DATA_DIR"
    )
    options = parser.parse_args(arguments)
    try:
        with without_banner():
            from horovod_recipes.data.sources import find_builder
    except ModuleNotFoundError as error:
        print(f"error: {missing_package(error)}", file=sys.stderr)
        return 1
    try:
        builder = find_builder(options.name, options.data_dir)
        prepare(builder)
    except JobError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{builder.info.full_name} is in {builder.data_path}")
    return 0


def prepare(builder):
    """Downloads a dataset and writes it, unless it is already on disk.

    Raises:
        JobError: If an archive or a package is missing.
    """
    import tensorflow as tf
    import tensorflow_datasets as tfds

    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    try:
        builder.download_and_prepare()
    except ModuleNotFoundError as error:
        raise JobError(
            f"{builder.name} needs the package {error.name}; install it with: "
            f"pip install {error.name}"
        ) from None
    except (
        AssertionError,  # TFDS raises it if the archives' folder is missing.
        tarfile.ReadError,
        tf.errors.NotFoundError,
        tf.errors.OutOfRangeError,
        OSError,
    ) as error:
        raise JobError(
            f"cannot prepare {builder.name}: {one_line(error)}; is an archive "
            f"in {builder.data_path.parents[1]}/downloads/manual missing or "
            "cut short?"
        ) from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
