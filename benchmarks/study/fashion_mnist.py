"""The whole of Fashion-MNIST, 70,000 images of clothes: fetched once.

    python -m benchmarks.study.fashion_mnist

The four files are those that Keras and TFDS download. Where there is no
internet access, Debian's package dataset-fashion-mnist has them; root is not
needed to fetch it.
"""

import gzip
import hashlib
import os
import pathlib
import subprocess
import sys
import tempfile

import keras
import numpy as np

SHA256 = {
    "train-images-idx3-ubyte.gz": (
        "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7"
    ),
    "train-labels-idx1-ubyte.gz": (
        "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056"
    ),
    "t10k-images-idx3-ubyte.gz": (
        "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa"
    ),
    "t10k-labels-idx1-ubyte.gz": (
        "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05"
    ),
}
ORIGIN = "https://storage.googleapis.com/tensorflow/tf-keras-datasets/"
DEBIAN_PACKAGE = "dataset-fashion-mnist"


def load():
    """Returns `((images, labels), (images, labels))`, to train and to test.

    60,000 and 10,000: images are uint8 arrays `(n, 28, 28, 1)`, labels uint8
    arrays `(n,)` of 0 to 9.

    Raises:
        OSError: If the files are neither there nor to be had.
    """
    folder = fetch()
    return tuple(
        (
            _read(folder / f"{part}-images-idx3-ubyte.gz", 16).reshape(
                -1, 28, 28, 1
            ),
            _read(folder / f"{part}-labels-idx1-ubyte.gz", 8),
        )
        for part in ("train", "t10k")
    )


def fetch():
    """Returns the folder of the files, after a download if there is none."""
    data_dir = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    folder = pathlib.Path(data_dir).expanduser() / "fashion_mnist_files"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            try:
                found = _from_keras(temporary)
            except Exception as error:
                # What `get_file` raises has no type of its own.
                found = _from_debian(temporary, error)
            found.rename(folder)
    return folder


def _from_keras(temporary):
    for name, sha256 in SHA256.items():
        keras.utils.get_file(
            name,
            ORIGIN + name,
            cache_dir=temporary,
            cache_subdir="files",
            file_hash=sha256,
        )
    return pathlib.Path(temporary, "files")


def _from_debian(temporary, reason):
    try:
        _run(["apt-get", "download", DEBIAN_PACKAGE], temporary)
        (package,) = pathlib.Path(temporary).glob("*.deb")
        _run(["dpkg-deb", "--extract", package, "package"], temporary)
    except (OSError, subprocess.CalledProcessError) as error:
        raise OSError(
            f"Fashion-MNIST is not to be had: {reason}; and {error}. On Debian "
            "try `apt-get update` first. With the four files at hand, put them "
            "into fashion_mnist_files in the folder that TFDS_DATA_DIR names."
        ) from error
    folder = pathlib.Path(temporary, "package/usr/share/datasets/fashion-mnist")
    for name, sha256 in SHA256.items():
        found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        if found != sha256:
            raise OSError(f"{name} of {DEBIAN_PACKAGE} is not the known file")
    return folder


def _run(command, folder):
    subprocess.run(
        command,
        cwd=folder,
        check=True,
        stdout=subprocess.DEVNULL,
        # As root, apt would warn that its own user cannot write here.
        stderr=subprocess.DEVNULL,
        timeout=300,
    )


def _read(path, offset):
    return np.frombuffer(
        gzip.decompress(path.read_bytes()), "uint8", -1, offset
    )


if __name__ == "__main__":
    try:
        print(f"Fashion-MNIST is in {fetch()}")
    except OSError as error:
        sys.exit(f"error: {error}")
