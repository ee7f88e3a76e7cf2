"""All 70,000 images of Fashion-MNIST, downloaded once.

    python -m benchmarks.study.fashion_mnist

The four files are those that Keras and TFDS download. If that download fails,
`apt-get download` gets them from Debian's package dataset-fashion-mnist.
"""

import argparse
import gzip
import hashlib
import pathlib
import subprocess
import sys

import keras
import numpy as np

from benchmarks._download import data_dir
from benchmarks._download import downloaded

FOLDER = "fashion_mnist_files"
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
# Time limit of each command that gets the Debian package, in seconds.
TIME_LIMIT_S = 300


def load():
    """Returns `((images, labels), (images, labels))` to train and to test.

    The parts have 60,000 and 10,000 images. Images are uint8 arrays
    `(n, 28, 28, 1)`, and labels are uint8 arrays `(n,)` from 0 to 9.

    Raises:
        OSError: If the files cannot be downloaded.
    """
    folder = fetch()
    parts = []
    for part in ("train", "t10k"):
        images = _read(folder / f"{part}-images-idx3-ubyte.gz", header=16)
        labels = _read(folder / f"{part}-labels-idx1-ubyte.gz", header=8)
        parts.append((images.reshape(-1, 28, 28, 1), labels))
    return tuple(parts)


def fetch():
    """Returns the folder of the files, and downloads them if needed."""
    return downloaded(FOLDER, _download)


def prepare():
    """Writes TFDS's `fashion_mnist` from the files, unless it is on disk.

    The gzip files of TFDS's own source have other checksums, with the same
    content.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.image_classification import mnist

    if tfds.builder("fashion_mnist").is_prepared():
        return
    splits = dict(zip(("train", "test"), load(), strict=True))
    with tfds.core.registered.skip_registration():

        class FashionMNIST(mnist.FashionMNIST):
            def _split_generators(self, dl_manager):
                return {
                    name: _examples(*arrays) for name, arrays in splits.items()
                }

    tfds.disable_progress_bar()
    FashionMNIST().download_and_prepare()


def _examples(images, labels):
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        yield index, {"image": image, "label": int(label)}


def _download(temporary):
    try:
        return _from_keras(temporary)
    except Exception as error:
        # `get_file` raises many types.
        return _from_debian(temporary, error)


def _from_keras(temporary):
    for name, sha256 in SHA256.items():
        keras.utils.get_file(
            name,
            ORIGIN + name,
            cache_dir=str(temporary),
            cache_subdir="files",
            file_hash=sha256,
        )
    return temporary / "files"


def _from_debian(temporary, reason):
    try:
        _run(["apt-get", "download", DEBIAN_PACKAGE], temporary)
        (package,) = temporary.glob("*.deb")
        _run(["dpkg-deb", "--extract", package, "package"], temporary)
    except (OSError, subprocess.CalledProcessError) as error:
        raise OSError(
            f"cannot download Fashion-MNIST: {reason}; and {error}. On Debian, "
            "try `apt-get update` first. If you have the four files, copy them "
            f"into {data_dir() / FOLDER}."
        ) from error
    folder = temporary / "package/usr/share/datasets/fashion-mnist"
    for name, sha256 in SHA256.items():
        found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        if found != sha256:
            raise OSError(
                f"{name} of {DEBIAN_PACKAGE} does not have the expected content"
            )
    return folder


def _run(command, folder):
    subprocess.run(
        command,
        cwd=folder,
        check=True,
        stdout=subprocess.DEVNULL,
        # As root, apt warns that its own user cannot write here.
        stderr=subprocess.DEVNULL,
        timeout=TIME_LIMIT_S,
    )


def _read(path, header):
    content = gzip.decompress(pathlib.Path(path).read_bytes())
    return np.frombuffer(content, "uint8", -1, offset=header)


if __name__ == "__main__":
    argparse.ArgumentParser(
        prog=f"python -m {__spec__.name}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    try:
        print(f"Fashion-MNIST is in {fetch()}")
    except OSError as error:
        sys.exit(f"error: {error}")
