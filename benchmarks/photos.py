"""Twenty real photos of ImageNet, for tests and benchmarks: fetched once.

    python -m benchmarks.photos

They are in PyPI's foolbox, 512 x 512 pixels, to decode and not to redistribute.
"""

import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile

import tensorflow_datasets as tfds

WHEEL = "foolbox-3.3.4-py3-none-any.whl"
REQUIREMENT = (
    "foolbox==3.3.4 --hash=sha256:"
    "11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb\n"
)


def fetch(folder=None):
    """Returns the paths of the photos, after a download if there are none.

    Args:
        folder: String or path. Defaults to `photos` in TFDS's data folder.

    Returns:
        List of 20 `pathlib.Path`, `imagenet_NUMBER_CLASS.jpg`, with the index
        of the class, 0 to 999.

    Raises:
        subprocess.CalledProcessError: If pip cannot get them, after it has
            said why.
    """
    folder = pathlib.Path(folder or os.path.join(data_dir(), "photos"))
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            _download(pathlib.Path(temporary)).rename(folder)
    return sorted(folder.glob("imagenet_*.jpg"))


def data_dir():
    return os.path.expanduser(tfds.core.constants.DATA_DIR)


def _download(temporary):
    """Returns a folder with the photos, in the folder `temporary`."""
    # pip checks hashes of what a file of requirements has.
    requirements = temporary / "requirements.txt"
    requirements.write_text(REQUIREMENT)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    subprocess.run(
        [*pip, "--dest", temporary, "--requirement", requirements], check=True
    )
    photos = temporary / "photos"
    photos.mkdir()
    with zipfile.ZipFile(temporary / WHEEL) as wheel:
        for name in wheel.namelist():
            if name.startswith("foolbox/data/imagenet_"):
                (photos / os.path.basename(name)).write_bytes(wheel.read(name))
    return photos


if __name__ == "__main__":
    print(f"{len(fetch())} photos are in {data_dir()}/photos")
