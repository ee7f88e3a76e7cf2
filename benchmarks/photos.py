"""Twenty real photos of ImageNet for tests and benchmarks, downloaded once.

    python -m benchmarks.photos

The photos are in PyPI's foolbox, 512 x 512 pixels. Decode and time them, but do
not redistribute them.
"""

import argparse
import subprocess
import sys
import zipfile

from benchmarks._download import downloaded

WHEEL = "foolbox-3.3.4-py3-none-any.whl"
REQUIREMENT = (
    "foolbox==3.3.4 --hash=sha256:"
    "11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb\n"
)
PHOTOS_IN_WHEEL = "foolbox/data/imagenet_"


def fetch():
    """Returns the paths of the photos in TFDS's data folder.

    Returns:
        List of 20 `pathlib.Path`, `imagenet_NUMBER_CLASS.jpg`. The class is an
        index from 0 to 999.

    Raises:
        subprocess.CalledProcessError: If pip cannot download the photos. pip
            has then printed the reason.
    """
    return sorted(downloaded("photos", _download).glob("imagenet_*.jpg"))


def _download(temporary):
    # pip checks hashes only in files of requirements.
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
            if name.startswith(PHOTOS_IN_WHEEL):
                photo = photos / name.rpartition("/")[2]
                photo.write_bytes(wheel.read(name))
    return photos


if __name__ == "__main__":
    argparse.ArgumentParser(
        prog=f"python -m {__spec__.name}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    paths = fetch()
    print(f"{len(paths)} photos are in {paths[0].parent}")
