"""Writes a TFDS dataset to disk, once, before the jobs that read it.

    python -m horovod_recipes.data mnist5k [--data_dir=DIR]

Takes any TFDS name; those that TFDS cannot download, such as imagenet2012,
want their archives in DIR/downloads/manual.
"""

import argparse
import sys
import tarfile

import tensorflow as tf

from horovod_recipes.errors import JobError
from horovod_recipes.errors import one_line
from horovod_recipes.data.sources import find_builder


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("name")
    parser.add_argument("--data_dir", default=None)
    arguments = parser.parse_args()
    try:
        builder = find_builder(arguments.name, arguments.data_dir)
        builder.download_and_prepare()
    except JobError as error:
        sys.exit(f"error: {error}")
    except ModuleNotFoundError as error:
        sys.exit(
            f"error: {arguments.name} needs the package {error.name}; install "
            f"it with: pip install {error.name}"
        )
    except (
        AssertionError,  # TFDS's, where there is no folder of archives
        tarfile.ReadError,
        tf.errors.NotFoundError,
        tf.errors.OutOfRangeError,
        OSError,
    ) as error:
        sys.exit(
            f"error: cannot prepare {arguments.name}: {one_line(error)}; is an "
            f"archive in {builder.data_path.parents[1]}/downloads/manual "
            "missing or cut short?"
        )
    print(f"{builder.info.full_name} is in {builder.data_path}")


if __name__ == "__main__":
    main()
