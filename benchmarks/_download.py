"""The folder of data sets, and downloads into it that happen once."""

import os
import pathlib
import tempfile


def data_dir():
    """Returns TFDS's data folder, also where TFDS is not installed."""
    folder = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    return pathlib.Path(folder).expanduser()


def downloaded(name, download):
    """Returns the folder `name` in the data folder.

    Args:
        name: String.
        download: Function that is called if the folder is missing. It is given
            a temporary folder and returns the folder of files inside of it.
    """
    folder = data_dir() / name
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            download(pathlib.Path(temporary)).rename(folder)
    return folder
