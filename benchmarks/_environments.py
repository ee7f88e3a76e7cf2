"""Python environments of peers, which cannot share that of this project."""

import pathlib
import subprocess
import sys

FOLDER = pathlib.Path("build/peers")


def python_of(name, requirements):
    """Returns the Python of the environment `name`, which it makes once.

    Args:
        name: String.
        requirements: List of strings, what pip installs.
    """
    folder = FOLDER / name
    python, done = folder / "bin" / "python", folder / "installed.txt"
    if not done.exists() or done.read_text() != str(requirements):
        install = [python, "-m", "pip", "install", "--quiet", *requirements]
        make = [sys.executable, "-m", "venv", "--clear", folder]
        subprocess.run(make, check=True)
        subprocess.run(install, check=True)
        done.write_text(str(requirements))
    return python
