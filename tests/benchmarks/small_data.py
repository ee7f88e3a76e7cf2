"""Small files of data sets, for the tests of benchmarks."""

import gzip

import keras
import numpy as np


def write_fashion_mnist(data_dir):
    """Writes 1,024 images to train and to test; returns their labels.

    Three rows are bright, from row 3 * label on.
    """
    labels = np.random.default_rng(0).integers(0, 10, 1024).astype("uint8")
    bright = np.arange(28) // 3 == labels[:, None]
    images = np.repeat(255 * bright.astype("uint8"), 28)
    folder = data_dir / "fashion_mnist_files"
    folder.mkdir()
    for part in ("train", "t10k"):
        for name, header, content in (
            ("images-idx3", 16, images),
            ("labels-idx1", 8, labels),
        ):
            path = folder / f"{part}-{name}-ubyte.gz"
            path.write_bytes(gzip.compress(bytes(header) + content.tobytes()))
    return labels


def write_photos(data_dir):
    """Writes a black photo of class 7 and a white one of class 990."""
    folder = data_dir / "photos"
    folder.mkdir()
    for name, grey in (("imagenet_00_7", 0), ("imagenet_01_990", 255)):
        image = np.full((300, 300, 3), grey, "uint8")
        keras.utils.save_img(folder / f"{name}.jpg", image, scale=False)
