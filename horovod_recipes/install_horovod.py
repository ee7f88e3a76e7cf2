"""Builds and installs Horovod against the TensorFlow that is installed.

    python -m horovod_recipes.install_horovod [--check]

With `--check` it only looks whether this machine can build it.

Horovod's last release does not compile against TensorFlow 2.16 and later: one
source file, of XLA operations for GPUs, includes headers that moved. Without
them it holds no code, so this leaves it out. The wheel is cached by Python,
TensorFlow and build options under the user's cache folder.
"""

import importlib.metadata
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile

HOROVOD_VERSION = "0.28.1"
HOROVOD_SHA256 = (
    "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"
)
PYTHON_VERSIONS = ((3, 10), (3, 11), (3, 12))
TENSORFLOW_VERSIONS = ((2, 16), (2, 21))
RUN_REQUIREMENTS = ("cloudpickle", "packaging", "psutil", "pyyaml")
# Horovod's setup.py also needs those of the run while it builds.
BUILD_REQUIREMENTS = ("setuptools==80.9.0", "wheel==0.48.0", *RUN_REQUIREMENTS)
CMAKE_REQUIREMENT = "cmake==3.31.6"
FIX = "run: python -m horovod_recipes.install_horovod"


class InstallError(Exception):
    """What is missing, in one line with the fix."""


def main(arguments):
    try:
        check_machine()
        if arguments != ["--check"]:
            install()
    except InstallError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"error: {error}; is the disk full or read-only?", file=sys.stderr
        )
        return 1
    return 0


def install():
    """Installs Horovod into this Python, or raises `InstallError`."""
    tensorflow = tensorflow_version()
    if is_current(tensorflow):
        print(f"Horovod {HOROVOD_VERSION} for TensorFlow {tensorflow} is here")
        return
    wheel = cached_wheel(tensorflow)
    was_cached = wheel.exists()
    if not was_cached:
        build_wheel(wheel)
    try:
        install_wheel(wheel)
    except InstallError:
        if not was_cached:
            raise
        # It may be of another machine that shares the folder, say.
        build_wheel(wheel)
        install_wheel(wheel)
    print(f"installed Horovod {HOROVOD_VERSION} for TensorFlow {tensorflow}")


def install_wheel(wheel):
    """Installs a wheel and proves that it works; if not, leaves neither."""
    pip("install", *RUN_REQUIREMENTS)
    try:
        pip("install", "--force-reinstall", "--no-deps", str(wheel))
        prove()
    except BaseException:
        pip("uninstall", "--yes", "horovod")
        wheel.unlink(missing_ok=True)
        raise


def check_machine():
    """Raises `InstallError` where a build cannot work."""
    version = sys.version_info[:2]
    if version not in PYTHON_VERSIONS:
        raise InstallError(
            f"Python {version[0]}.{version[1]} is not supported; use Python "
            "3.10, 3.11 or 3.12"
        )
    if not sys.platform.startswith("linux"):
        raise InstallError(
            f"{sys.platform} is not supported; use Linux (or WSL, or a "
            "container)"
        )
    for program in ("g++", "make"):
        if shutil.which(program) is None:
            raise InstallError(
                f"{program} was not found; install it, for example with: "
                f"apt-get install {program}"
            )


def tensorflow_version():
    """Returns the version of the TensorFlow that is installed."""
    lowest, highest = TENSORFLOW_VERSIONS
    supported = f"{lowest[0]}.{lowest[1]} to {highest[0]}.{highest[1]}"
    for package in ("tensorflow", "tensorflow-cpu"):
        try:
            version = importlib.metadata.version(package)
            break
        except importlib.metadata.PackageNotFoundError:
            continue
    else:
        raise InstallError(
            f"TensorFlow is not installed; install one of {supported}, for "
            "example with: pip install tensorflow-cpu"
        )
    if not lowest <= tuple(map(int, version.split(".")[:2])) <= highest:
        raise InstallError(
            f"TensorFlow {version} is not supported; install one of {supported}"
        )
    return version


def is_current(tensorflow):
    """Whether a Horovod as this would build it is installed, and works."""
    try:
        if importlib.metadata.version("horovod") != HOROVOD_VERSION:
            return False
        if built_for() != tensorflow:
            return False
        prove()
    except (importlib.metadata.PackageNotFoundError, InstallError):
        return False
    return True


def built_for():
    """Returns the TensorFlow version that the installed Horovod was built for.

    None if it was built without TensorFlow, or its files are not there.
    """
    spec = importlib.util.find_spec("horovod")
    if spec is None:
        return None
    folder = pathlib.Path(spec.submodule_search_locations[0])
    try:
        metadata = json.loads((folder / "metadata.json").read_text())
    except FileNotFoundError:
        return None
    return metadata.get("tensorflow")


def check_installed():
    """Raises `ImportError` unless a Horovod that fits is installed."""
    if importlib.util.find_spec("horovod") is None:
        raise ImportError(
            "Horovod is not installed here; activate the environment that has "
            f"it (. .venv/bin/activate), or {FIX}"
        )
    try:
        tensorflow = tensorflow_version()
    except InstallError as error:
        raise ImportError(str(error)) from None
    if built_for() != tensorflow:
        raise ImportError(
            f"Horovod was built for TensorFlow {built_for()}, but TensorFlow "
            f"{tensorflow} is installed; {FIX}"
        )


def mpi_is_there():
    return shutil.which("mpicxx") is not None


def cached_wheel(tensorflow):
    """Returns where the wheel is, or will be once it is built."""
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    options = "gloo-mpi" if mpi_is_there() else "gloo"
    platform = sysconfig.get_platform().replace("-", "_")
    return (
        pathlib.Path(cache, "keras-lars")
        / f"horovod-tensorflow-{tensorflow}-{options}"
        / f"horovod-{HOROVOD_VERSION}-{python}-{python}-{platform}.whl"
    )


def build_wheel(wheel):
    """Builds Horovod from its source on PyPI and puts the wheel in place."""
    print("building Horovod: takes 2 to 4 minutes on 2 cores", flush=True)
    wheel.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="horovod-build-") as folder:
        folder = pathlib.Path(folder)
        environment = build_environment(folder / "requirements")
        source = unpack_source(folder, environment)
        leave_out_xla_operations(source)
        pip(
            "wheel",
            "--no-deps",
            "--no-build-isolation",
            "--wheel-dir",
            str(folder / "wheel"),
            str(source),
            environment=environment,
        )
        (built,) = (folder / "wheel").glob("horovod-*.whl")
        # A rename within one folder is atomic: no half-written wheel is seen.
        part = wheel.with_name(f".{wheel.name}.{os.getpid()}")
        shutil.copy(built, part)
        os.replace(part, wheel)


def build_environment(folder):
    """Installs what the build needs into a folder; returns the environment."""
    requirements = list(BUILD_REQUIREMENTS)
    if shutil.which("cmake") is None:
        requirements.append(CMAKE_REQUIREMENT)
    pip("install", "--target", str(folder), *requirements)
    # The caller's settings for Horovod's build are not in the cache's key.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("HOROVOD_")
    }
    environment |= {
        "PYTHONPATH": str(folder),
        "PATH": os.pathsep.join(
            [
                str(folder / "bin"),
                str(pathlib.Path(sys.executable).parent),
                os.environ.get("PATH", ""),
            ]
        ),
        # CMake 4 refuses the third-party folders' old minimum versions.
        "CMAKE_POLICY_VERSION_MINIMUM": "3.5",
        "MAKEFLAGS": f"-j{len(os.sched_getaffinity(0))}",
        "HOROVOD_WITH_TENSORFLOW": "1",
        "HOROVOD_WITHOUT_PYTORCH": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
        "HOROVOD_WITH_GLOO": "1",
    }
    mpi = "HOROVOD_WITH_MPI" if mpi_is_there() else "HOROVOD_WITHOUT_MPI"
    environment[mpi] = "1"
    return environment


def unpack_source(folder, environment):
    """Downloads Horovod's source, with its hash checked, and unpacks it."""
    pinned = folder / "horovod.txt"
    pinned.write_text(
        f"horovod=={HOROVOD_VERSION} --hash=sha256:{HOROVOD_SHA256}\n"
    )
    pip(
        "download",
        "--no-deps",
        "--no-binary=horovod",
        "--no-build-isolation",
        "--dest",
        str(folder),
        "--require-hashes",
        "--requirement",
        str(pinned),
        environment=environment,
    )
    archive = folder / f"horovod-{HOROVOD_VERSION}.tar.gz"
    with tarfile.open(archive) as tar:
        tar.extractall(folder)
    return folder / f"horovod-{HOROVOD_VERSION}"


def leave_out_xla_operations(source):
    path = source / "horovod" / "tensorflow" / "CMakeLists.txt"
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if "xla_mpi_ops.cc" not in line]
    assert len(kept) == len(lines) - 1, f"{path} is not as expected"
    path.write_text("".join(kept))


def prove():
    """Imports the installed Horovod in a new process and runs a collective."""
    script = (
        "import horovod.tensorflow as hvd, tensorflow as tf; hvd.init(); "
        "assert hvd.allreduce(tf.ones(3), op=hvd.Sum).numpy().sum() == 3; "
        f"assert hvd.gloo_built() and hvd.mpi_built() >= {mpi_is_there()}"
    )
    run("the installed Horovod does not work", [sys.executable, "-c", script])


def pip(*arguments, environment=None):
    run(
        f"pip {arguments[0]} failed",
        [sys.executable, "-m", "pip", *arguments],
        environment,
    )


def run(failure, command, environment=None):
    """Runs a command quietly; raises `InstallError` with what went wrong."""
    result = subprocess.run(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if result.returncode != 0:
        with tempfile.NamedTemporaryFile(
            "w", prefix="horovod-", suffix=".log", delete=False
        ) as log:
            log.write(result.stdout)
        raise InstallError(
            f"{failure}: {reason(result.stdout)} (all of it: {log.name})"
        )


def reason(log):
    """Returns the line of a log that says what went wrong."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    if any("NewConnectionError" in line for line in lines):
        return "the package index cannot be reached; check the network"
    for mark in (": fatal error: ", ": error: ", "CMake Error"):
        for line in lines:
            if mark in line:
                return line
    errors = [line for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or ["no output"])[-1]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
