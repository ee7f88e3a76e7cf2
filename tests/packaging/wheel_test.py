"""The wheel works in a folder of its own, without Horovod and TFDS."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def run(*command, cwd):
    return subprocess.run(
        command,
        cwd=cwd,
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    ).stdout


def test_version():
    out = run(sys.executable, "setup.py", "--version", cwd=ROOT)
    assert out.splitlines()[-1] == "0.1.0"


def test_wheel_works_without_horovod_and_tfds(tmp_path):
    pip = (sys.executable, "-m", "pip", "--quiet")
    run(
        *pip,
        "wheel",
        "--no-deps",
        "--wheel-dir",
        "wheels",
        str(ROOT),
        cwd=tmp_path,
    )
    (wheel,) = (tmp_path / "wheels").glob("keras_lars-0.1.0-*.whl")
    run(
        *pip,
        "install",
        "--no-deps",
        "--target",
        "site",
        str(wheel),
        cwd=tmp_path,
    )
    script = f"""
import sys
sys.path.insert(0, {str(tmp_path / "site")!r})
for name in ("horovod", "horovod_recipes", "tensorflow_datasets"):
    sys.modules[name] = None
import keras_lars
from keras_lars import LARS
assert keras_lars.__file__.startswith({str(tmp_path)!r}), keras_lars.__file__
print(LARS(2.0).get_config()["learning_rate"])
"""
    assert run(sys.executable, "-c", script, cwd=tmp_path).strip() == "2.0"
    packages = {path.name for path in (tmp_path / "site").iterdir()}
    assert packages == {
        "keras_lars",
        "horovod_recipes",
        "keras_lars-0.1.0.dist-info",
    }
    recipes = tmp_path / "site" / "horovod_recipes"
    assert (recipes / "configs" / "demo.py").exists()
    assert (recipes / "launch" / "hostfile").exists()
