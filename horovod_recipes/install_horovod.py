"""Builds and installs Horovod for the TensorFlow that is installed.

    python -m horovod_recipes.install_horovod [--gpu] [--check]

The build supports Gloo, and MPI if `mpicxx` is found. With `--gpu` it also
supports CUDA and NCCL, from NVIDIA's packages on PyPI (docs/horovod.md). With
`--check` the command only checks that this machine can build Horovod.

Horovod's last release does not compile against TensorFlow 2.16 and later,
because one source file includes headers that have moved. The file holds XLA
operations for GPUs, and is empty in other builds. This command leaves it out.
It caches the wheel by Python, TensorFlow and build options, in the user's cache
folder. This file imports the standard library alone, since it runs before
anything is installed.
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
# Part of a cached wheel's path; add 1 after a change to Horovod's source.
SOURCE_REVISION = 2
# First and last supported versions, both included.
PYTHON_VERSIONS = ((3, 10), (3, 13))
TENSORFLOW_VERSIONS = ((2, 16), (2, 21))
# Packages that Horovod imports when it runs.
RUN_REQUIREMENTS = ("cloudpickle", "packaging", "psutil", "pyyaml")
# Packages that Horovod's setup.py imports.
BUILD_REQUIREMENTS = ("setuptools==80.9.0", "wheel==0.48.0", *RUN_REQUIREMENTS)
# Installed for the build if the machine has no CMake.
CMAKE_REQUIREMENT = "cmake==3.31.6"
# PyPI has a complete compiler from CUDA 13 on. Its kernels need driver 580 or
# later. At run time, Horovod uses the CUDA runtime that TensorFlow loads.
CUDA_REQUIREMENTS = (
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
)
# Compute capabilities, times 10, of GPUs from the T4 to Blackwell.
CUDA_ARCHITECTURES = "75,80,86,89,90,100,120"
# Horovod shares NCCL with TensorFlow; tensorflow[and-cuda] requires this one.
NCCL_REQUIREMENT = "nvidia-nccl-cu12>=2.27.7,<3"
# The only TensorFlow that the GPU build was tested with.
GPU_TENSORFLOW = "2.21"
# The file in which horovodrun checks its build, and the line that hides stderr.
CHECKS_FILE = "common/util.py"
HIDE_STDERR = "os.dup2(sys.stderr.fileno(), 2)"
FIX = "run: python -m horovod_recipes.install_horovod"
MPI_FIX = "mpicxx was not found (Debian: libopenmpi-dev, openmpi-bin)"


class InstallError(Exception):
    """Says in one line what is missing, and how to fix it."""


def main(arguments):
    """Runs the command; returns its exit status."""
    try:
        unknown = set(arguments) - {"--gpu", "--check"}
        if unknown:
            raise InstallError(
                f"unknown argument {min(unknown)}; use --gpu or --check"
            )
        check_machine()
        if "--check" not in arguments:
            install(gpu="--gpu" in arguments)
    except (InstallError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def install(gpu):
    """Installs Horovod into this Python, or raises `InstallError`."""
    tensorflow, options = tensorflow_version(), build_options(gpu)
    if gpu:
        check_tensorflow_for_gpu(tensorflow)
    what = (
        f"Horovod {HOROVOD_VERSION} for TensorFlow {tensorflow} with "
        f"{' and '.join(options)}"
    )
    reason_to_build = why_not_current(tensorflow, options)
    if reason_to_build is None:
        print(f"{what} is installed")
        return
    print(reason_to_build, flush=True)
    if "mpi" not in options:
        print(f"building without MPI: {MPI_FIX}", flush=True)
    pip("install", *run_requirements(options))
    wheel = cached_wheel(tensorflow, options)
    was_cached = wheel.exists()
    if not was_cached:
        build_wheel(wheel, options)
    try:
        install_wheel(wheel, options)
    except InstallError:
        if not was_cached:
            raise
        # The cache may hold a wheel from another machine.
        build_wheel(wheel, options)
        install_wheel(wheel, options)
    print(f"installed {what}")


def install_wheel(wheel, options):
    """Installs a wheel and proves that it works; otherwise removes both."""
    try:
        pip("install", "--force-reinstall", "--no-deps", str(wheel))
        prove(options)
    except BaseException:
        pip("uninstall", "--yes", "horovod")
        wheel.unlink(missing_ok=True)
        raise


def check_machine():
    """Raises `InstallError` if this machine cannot build Horovod."""
    version, (first, last) = sys.version_info[:2], PYTHON_VERSIONS
    if not first <= version <= last:
        raise InstallError(
            f"Python {dotted(version)} is not supported; use Python "
            f"{dotted(first)} to {dotted(last)}, for example with: "
            f"make demo PYTHON=python{dotted(last)}"
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


def dotted(version):
    return ".".join(map(str, version))


def tensorflow_version():
    """Returns the version of the installed TensorFlow."""
    first, last = TENSORFLOW_VERSIONS
    supported = f"{dotted(first)} to {dotted(last)}"
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
    if not first <= tuple(map(int, version.split(".")[:2])) <= last:
        raise InstallError(
            f"TensorFlow {version} is not supported; install one of {supported}"
        )
    return version


def check_tensorflow_for_gpu(version):
    """Raises `InstallError` unless TensorFlow can build for GPUs."""
    fix = f"install tensorflow[and-cuda]=={GPU_TENSORFLOW}.*"
    if not version.startswith(f"{GPU_TENSORFLOW}."):
        raise InstallError(
            f"--gpu was not tested with TensorFlow {version}; {fix}"
        )
    try:
        importlib.metadata.version("tensorflow")
    except importlib.metadata.PackageNotFoundError:
        raise InstallError(
            f"--gpu does not work with tensorflow-cpu; {fix}"
        ) from None


def build_options(gpu):
    """Returns what to build Horovod with, each as in `hvd.NAME_built()`."""
    mpi = ("mpi",) if shutil.which("mpicxx") else ()
    return ("gloo", *mpi, *(("cuda", "nccl") if gpu else ()))


def run_requirements(options):
    """Returns the packages that Horovod needs to run."""
    nccl = (NCCL_REQUIREMENT,) if "nccl" in options else ()
    return (*RUN_REQUIREMENTS, *nccl)


def why_not_current(tensorflow, options):
    """Returns why Horovod has to be installed, in one line, or None."""
    try:
        version = importlib.metadata.version("horovod")
    except importlib.metadata.PackageNotFoundError:
        return "Horovod is not installed"
    if version != HOROVOD_VERSION:
        return f"Horovod {version} is installed"
    if built_for() != tensorflow:
        return f"the installed Horovod was built for TensorFlow {built_for()}"
    if HIDE_STDERR not in (installed_folder() / CHECKS_FILE).read_text():
        return "the installed Horovod prints TensorFlow's banner"
    try:
        prove(options)
    except InstallError as error:
        return str(error)
    return None


def installed_folder():
    """Returns the folder of the installed Horovod, or None."""
    spec = importlib.util.find_spec("horovod")
    return spec and pathlib.Path(spec.submodule_search_locations[0])


def built_for():
    """Returns the TensorFlow version that the installed Horovod was built for.

    Returns None if Horovod was built without TensorFlow, or is incomplete.
    """
    folder = installed_folder()
    if folder is None:
        return None
    try:
        metadata = json.loads((folder / "metadata.json").read_text())
    except FileNotFoundError:
        return None
    return metadata.get("tensorflow")


def check_installed():
    """Raises `ImportError` unless Horovod is here for Keras 3 on TensorFlow."""
    if installed_folder() is None:
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
    backend = os.environ.get("KERAS_BACKEND") or "tensorflow"
    if backend != "tensorflow":
        raise ImportError(
            f"KERAS_BACKEND={backend} is set, but Horovod needs Keras on "
            "TensorFlow; unset it, or set KERAS_BACKEND=tensorflow"
        )
    legacy = os.environ.get("TF_USE_LEGACY_KERAS", "")
    if legacy.lower() in ("1", "true"):
        raise ImportError(
            f"TF_USE_LEGACY_KERAS={legacy} is set, but this is Horovod for "
            "Keras 3; unset it"
        )


def cached_wheel(tensorflow, options):
    """Returns the path of the wheel, which may not exist yet."""
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    platform = sysconfig.get_platform().replace("-", "_")
    return (
        pathlib.Path(cache, "keras-lars")
        / f"horovod-r{SOURCE_REVISION}-tensorflow-{tensorflow}"
        / "-".join(options)
        / f"horovod-{HOROVOD_VERSION}-{python}-{python}-{platform}.whl"
    )


def build_wheel(wheel, options):
    """Builds Horovod from its source on PyPI, and caches the wheel."""
    print("building Horovod: 2 to 4 minutes on 2 cores", flush=True)
    wheel.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="horovod-build-") as folder:
        folder = pathlib.Path(folder)
        environment = build_environment(folder / "requirements", options)
        python = python_without_spaces(folder / "python")
        source = unpack_source(folder, environment)
        leave_out_xla_operations(source)
        silence_checks_of_horovodrun(source)
        if "cuda" in options:
            environment |= cuda_environment(folder / "cuda", environment)
            take_streams_from_their_handles(source)
            find_nccl_beside_horovod(source)
        pip(
            "wheel",
            "--no-deps",
            "--no-build-isolation",
            "--wheel-dir",
            str(folder / "wheel"),
            str(source),
            environment=environment,
            python=python,
        )
        (built,) = (folder / "wheel").glob("horovod-*.whl")
        # A rename within one folder is atomic.
        part = wheel.with_name(f".{wheel.name}.{os.getpid()}")
        shutil.copy(built, part)
        os.replace(part, wheel)


def python_without_spaces(link):
    """Returns the path of this Python; links to it if that has a space.

    Horovod's CMake files split TensorFlow's compiler flags at spaces.
    """
    if " " not in sys.executable:
        return sys.executable
    link.symlink_to(sys.prefix)
    return str(link / pathlib.Path(sys.executable).relative_to(sys.prefix))


def build_environment(folder, options):
    """Installs the build's packages in a folder; returns the environment."""
    requirements = list(BUILD_REQUIREMENTS)
    if shutil.which("cmake") is None:
        requirements.append(CMAKE_REQUIREMENT)
    pip("install", "--target", str(folder), *requirements)
    # The name of the cached wheel does not hold the user's build settings.
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
        # CMake 4 otherwise refuses Horovod's third-party libraries.
        "CMAKE_POLICY_VERSION_MINIMUM": "3.5",
        "MAKEFLAGS": f"-j{len(os.sched_getaffinity(0))}",
        "HOROVOD_WITH_TENSORFLOW": "1",
        "HOROVOD_WITHOUT_PYTORCH": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
        "HOROVOD_WITH_GLOO": "1",
    }
    with_mpi = "WITH" if "mpi" in options else "WITHOUT"
    environment[f"HOROVOD_{with_mpi}_MPI"] = "1"
    return environment


def unpack_source(folder, environment):
    """Downloads Horovod's source, checks its hash, and unpacks it."""
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
        # Old patch releases of Python 3.10 and 3.11 do not have the filter.
        tar.extraction_filter = getattr(tarfile, "data_filter", None)
        tar.extractall(folder)
    return folder / f"horovod-{HOROVOD_VERSION}"


def cuda_environment(folder, environment):
    """Installs CUDA's compiler in a folder; returns the build's variables."""
    pip("install", "--no-deps", "--target", str(folder), *CUDA_REQUIREMENTS)
    home = folder / "nvidia" / "cu13"
    nccl = pathlib.Path(sysconfig.get_path("purelib"), "nvidia", "nccl")
    # The packages lack the names that linkers look for. CMake reads lib64.
    (home / "lib64").symlink_to("lib")
    (home / "lib" / "libcudart.so").symlink_to("libcudart.so.13")
    (home / "lib" / "libnccl.so").symlink_to(nccl / "lib" / "libnccl.so.2")
    (home / "nccl").symlink_to(nccl)
    return {
        "PATH": os.pathsep.join([str(home / "bin"), environment["PATH"]]),
        "HOROVOD_CUDA_HOME": str(home),
        "HOROVOD_BUILD_CUDA_CC_LIST": CUDA_ARCHITECTURES,
        "HOROVOD_GPU": "CUDA",
        "HOROVOD_GPU_OPERATIONS": "NCCL",
        "HOROVOD_NCCL_INCLUDE": str(home / "nccl" / "include"),
        "HOROVOD_NCCL_LIB": str(home / "lib"),
        "HOROVOD_NCCL_LINK": "SHARED",
        "HOROVOD_WITHOUT_NVTX": "1",
    }


def leave_out_xla_operations(source):
    """Removes the source file that does not compile from the build."""
    path = source / "horovod" / "tensorflow" / "CMakeLists.txt"
    operations = '"${PROJECT_SOURCE_DIR}/horovod/tensorflow/xla_mpi_ops.cc"'
    replace(path, f"list(APPEND TF_SOURCES {operations})\n", "")


def silence_checks_of_horovodrun(source):
    """Keeps TensorFlow's banner out of what horovodrun prints.

    horovodrun imports TensorFlow in a process whose output it hides, but only
    what Python prints there.
    """
    hidden = "            sys.stderr = open(os.devnull, 'w')\n"
    replace(
        source / "horovod" / CHECKS_FILE,
        hidden,
        f"{hidden}            {HIDE_STDERR}\n",
    )


def take_streams_from_their_handles(source):
    """Defines a function that TensorFlow no longer exports."""
    path = source / "horovod" / "tensorflow" / "mpi_ops.cc"
    before = "#endif // HAVE_GPU\n\n// Undef LOG macro from TensorFlow\n"
    definition = """
namespace stream_executor {
namespace gpu {
GpuStreamHandle AsGpuStreamValue(Stream* stream) {
  auto handle = stream->platform_specific_handle();
  return static_cast<GpuStreamHandle>(handle.stream);
}
} // namespace gpu
} // namespace stream_executor
"""
    replace(path, before, definition + before)


def find_nccl_beside_horovod(source):
    """Makes the library load NCCL from its own environment."""
    path = source / "horovod" / "tensorflow" / "CMakeLists.txt"
    name = 'set_target_properties(${TF_TARGET_LIB} PROPERTIES PREFIX "")\n'
    search_path = (
        "set_target_properties(${TF_TARGET_LIB} PROPERTIES\n"
        "    BUILD_WITH_INSTALL_RPATH TRUE\n"
        '    INSTALL_RPATH "$ORIGIN/../../nvidia/nccl/lib")\n'
    )
    replace(path, name, name + search_path)


def replace(path, old, new):
    """Replaces text that must occur once in a file."""
    text = path.read_text()
    assert text.count(old) == 1, f"{path} is not as expected"
    path.write_text(text.replace(old, new))


def prove(options):
    """Imports the installed Horovod in a new process, and runs an allreduce.

    Raises `InstallError` if that fails, or if Horovod lacks one of the options.
    """
    script = (
        "import horovod.tensorflow as hvd, tensorflow as tf; hvd.init(); "
        "assert hvd.allreduce(tf.ones(3), op=hvd.Sum).numpy().sum() == 3; "
        f"options = {options}; "
        "missing = [o for o in options if not getattr(hvd, o + '_built')()]; "
        "print('missing:', *missing)"
    )
    output = run(
        "the installed Horovod does not work", [sys.executable, "-c", script]
    )
    (line,) = [s for s in output.splitlines() if s.startswith("missing:")]
    if missing := line.split()[1:]:
        raise InstallError(
            f"the installed Horovod was built without {' and '.join(missing)}"
        )


def pip(*arguments, environment=None, python=None):
    """Runs pip with this Python, or with another path of it."""
    run(
        f"pip {arguments[0]} failed",
        [python or sys.executable, "-m", "pip", *arguments],
        environment,
    )


def run(failure, command, environment=None):
    """Runs a command, and returns its output.

    Raises `InstallError` with the reason if the command fails.
    """
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
            f"{failure}: {reason(result.stdout)} (full log: {log.name})"
        )
    return result.stdout


def reason(log):
    """Returns the line of a log that says why a command failed."""
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
