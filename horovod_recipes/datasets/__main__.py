"""Writes a TFDS dataset to disk, once, before the jobs that read it.

    python -m horovod_recipes.datasets mnist5k [--data_dir=DIR]

Takes any TFDS name; those that TFDS cannot download, such as imagenet2012,
want their archives in DIR/downloads/manual.
"""

import argparse

import tensorflow_datasets as tfds

import horovod_recipes.datasets  # noqa: F401  registers the builders


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("name")
    parser.add_argument("--data_dir", default=None)
    arguments = parser.parse_args()
    builder = tfds.builder(arguments.name, data_dir=arguments.data_dir)
    builder.download_and_prepare()
    print(f"{builder.info.full_name} is in {builder.data_path}")


if __name__ == "__main__":
    main()
