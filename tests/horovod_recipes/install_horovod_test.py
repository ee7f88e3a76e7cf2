"""What the installer refuses and caches; `make` tests that it installs."""

import io
import os
import pathlib
import subprocess
import sys
import tarfile

import pytest

from horovod_recipes import install_horovod

ROOT = pathlib.Path(__file__).parents[2]


def run(*arguments, **environment):
    return run_python(sys.executable, *arguments, **environment)


def run_python(python, *arguments, **environment):
    return subprocess.run(
        [python, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=300,
    )


def assert_one_line(result, *parts):
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line


def test_missing_compiler(tmp_path):
    result = run("-m", "horovod_recipes.install_horovod", PATH=str(tmp_path))
    assert_one_line(result, "g++ was not found", "apt-get install g++")


def test_missing_tensorflow():
    # With -S, Python does not find the environment's packages.
    result = run("-S", "-m", "horovod_recipes.install_horovod")
    assert_one_line(
        result, "TensorFlow is not installed", "pip install tensorflow-cpu"
    )


def run_beside(tmp_path, package, *arguments):
    """Runs the installer where only the metadata of a package exist."""
    name, version = package.split("==")
    info = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    return run(
        "-S",
        *("-m", "horovod_recipes.install_horovod", *arguments),
        PYTHONPATH=f"{tmp_path}:{ROOT}",
    )


@pytest.mark.parametrize("version", ["2.15.1", "2.22.0"])
def test_unsupported_tensorflow(tmp_path, version):
    result = run_beside(tmp_path, f"tensorflow=={version}")
    assert_one_line(result, f"TensorFlow {version}", "2.16 to 2.21")


@pytest.mark.parametrize(
    ("package", "message"),
    [
        ("tensorflow-cpu==2.21.0", "--gpu does not work with tensorflow-cpu"),
        ("tensorflow==2.20.0", "--gpu was not tested with TensorFlow 2.20.0"),
    ],
)
def test_gpu_build_needs_a_tensorflow_for_gpus(tmp_path, package, message):
    result = run_beside(tmp_path, package, "--gpu")
    assert_one_line(result, message, "install tensorflow[and-cuda]==2.21.*")


def test_unknown_argument():
    result = run("-m", "horovod_recipes.install_horovod", "--gpus")
    assert_one_line(result, "unknown argument --gpus", "--gpu or --check")


@pytest.mark.parametrize("minor", [9, 14])
def test_unsupported_python(monkeypatch, minor):
    monkeypatch.setattr(sys, "version_info", (3, minor, 0))
    with pytest.raises(install_horovod.InstallError) as error:
        install_horovod.check_machine()
    assert str(error.value) == (
        f"Python 3.{minor} is not supported; use Python 3.10 to 3.13, for "
        "example with: make demo PYTHON=python3.13"
    )


def test_build_uses_a_python_without_spaces(tmp_path, monkeypatch):
    venv = tmp_path / "a b"
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", venv],
        check=True,
        timeout=300,
    )
    monkeypatch.setattr(sys, "prefix", str(venv))
    monkeypatch.setattr(sys, "executable", str(venv / "bin" / "python"))
    link = tmp_path / "link"
    python = install_horovod.python_without_spaces(link)
    assert python == str(link / "bin" / "python")
    # The packages that this Python finds have no space in their path either.
    script = "import sys; print(sys.prefix)"
    assert run_python(python, "-c", script).stdout == f"{link}\n"


def test_failed_build_leaves_no_wheel(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wheel = install_horovod.cached_wheel("2.21.0", ("gloo",))
    with pytest.raises(install_horovod.InstallError, match="pip install"):
        install_horovod.build_wheel(wheel, ("gloo",))
    assert list(tmp_path.rglob("*.whl")) == []


def test_source_with_another_hash_is_not_unpacked(tmp_path, monkeypatch):
    index, folder = tmp_path / "index", tmp_path / "build"
    index.mkdir()
    folder.mkdir()
    name = f"horovod-{install_horovod.HOROVOD_VERSION}"
    with tarfile.open(index / f"{name}.tar.gz", "w:gz") as archive:
        setup = tarfile.TarInfo(f"{name}/setup.py")
        archive.addfile(setup, io.BytesIO(b""))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    with pytest.raises(install_horovod.InstallError, match="HASHES"):
        install_horovod.unpack_source(folder, dict(os.environ))
    assert [path.name for path in folder.iterdir()] == ["horovod.txt"]


def test_wheels_are_cached_by_tensorflow_python_and_options(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wheels = {
        install_horovod.cached_wheel(tensorflow, options)
        for tensorflow in ("2.16.2", "2.21.0")
        for options in (("gloo",), ("gloo", "mpi"))
    }
    assert len(wheels) == 4
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert all(python in wheel.name for wheel in wheels)
    assert all(tmp_path in wheel.parents for wheel in wheels)


def test_what_is_installed_is_current():
    tensorflow = install_horovod.tensorflow_version()
    options = install_horovod.build_options(gpu=False)
    assert install_horovod.why_not_current(tensorflow, options) is None
    assert install_horovod.why_not_current("2.16.2", options) == (
        f"the installed Horovod was built for TensorFlow {tensorflow}"
    )


def test_builds_with_mpi_where_mpicxx_is(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert install_horovod.build_options(gpu=False) == ("gloo",)
    (tmp_path / "mpicxx").touch(mode=0o755)
    assert install_horovod.build_options(gpu=False) == ("gloo", "mpi")
    assert install_horovod.build_options(gpu=True) == (
        *("gloo", "mpi", "cuda", "nccl"),
    )


def test_installed_without_an_option_is_not_current():
    # No build has ddl. Builds lack MPI if it was installed after them.
    with pytest.raises(
        install_horovod.InstallError, match=r"built without ddl$"
    ):
        install_horovod.prove(("gloo", "ddl"))


def test_source_that_is_not_as_expected_is_not_changed(tmp_path):
    path = tmp_path / "CMakeLists.txt"
    for text in ("other\n", "old\nold\n"):
        path.write_text(text)
        with pytest.raises(AssertionError, match="is not as expected"):
            install_horovod.replace(path, "old", "new")
        assert path.read_text() == text


def test_reason_is_the_compilers_error():
    log = """
  horovod/common/mpi.h:7:10: fatal error: mpi.h: No such file or directory
  make: *** [all] Error 2
  ERROR: Failed building wheel for horovod
"""
    assert install_horovod.reason(log).endswith(
        "fatal error: mpi.h: No such file or directory"
    )
    assert (
        install_horovod.reason("ERROR: first\nERROR: last\n") == "ERROR: last"
    )
    assert "network" in install_horovod.reason(
        "WARNING: Retrying after NewConnectionError\nERROR: No matching\n"
    )


def test_build_ignores_settings_that_are_not_in_the_key(tmp_path, monkeypatch):
    monkeypatch.setenv("HOROVOD_GPU_OPERATIONS", "NCCL")
    monkeypatch.setattr(install_horovod, "pip", lambda *_: None)
    environment = install_horovod.build_environment(tmp_path, ("gloo",))
    assert "HOROVOD_GPU_OPERATIONS" not in environment
    assert environment["HOROVOD_WITH_GLOO"] == "1"
    assert environment["HOROVOD_WITHOUT_MPI"] == "1"
    environment = install_horovod.build_environment(tmp_path, ("gloo", "mpi"))
    assert environment["HOROVOD_WITH_MPI"] == "1"
    assert "HOROVOD_WITHOUT_MPI" not in environment


def test_wheel_that_does_not_work_is_uninstalled_and_forgotten(
    tmp_path, monkeypatch
):
    """In an environment of its own, with a real, broken package."""
    subprocess.run(
        [sys.executable, "-m", "venv", tmp_path / "venv"],
        check=True,
        timeout=300,
    )
    package = tmp_path / "source" / "horovod"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('broken')")
    (tmp_path / "source" / "setup.py").write_text(
        "import setuptools; setuptools.setup(name='horovod', "
        "version='0.28.1', packages=['horovod'])"
    )
    python = str(tmp_path / "venv" / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run(
        [
            *pip,
            "wheel",
            "--no-deps",
            "--wheel-dir",
            tmp_path,
            tmp_path / "source",
        ],
        check=True,
        timeout=300,
    )
    (wheel,) = tmp_path.glob("horovod-*.whl")
    monkeypatch.setattr(sys, "executable", python)
    with pytest.raises(install_horovod.InstallError, match="does not work"):
        install_horovod.install_wheel(wheel, ("gloo",))
    assert not wheel.exists()
    shown = subprocess.run(
        [python, "-m", "pip", "show", "horovod"], timeout=300
    )
    assert shown.returncode == 1


TRAIN = ("-m", "horovod_recipes.train", "--config=demo", "--workdir=/never")


def test_job_without_horovod(tmp_path):
    # Python then does not find the installed Horovod.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys; sys.modules['horovod'] = None\n"
    )
    result = run(*TRAIN, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last == (
        "error: Horovod is not installed here; activate the environment that "
        "has it (. .venv/bin/activate), or run: "
        "python -m horovod_recipes.install_horovod"
    )


def test_job_outside_of_the_environment():
    assert_one_line(run("-S", *TRAIN), "Horovod is not installed", "activate")


def test_job_with_horovod_for_another_tensorflow(tmp_path):
    (tmp_path / "horovod").mkdir()
    (tmp_path / "horovod" / "__init__.py").touch()
    (tmp_path / "horovod" / "metadata.json").write_text(
        '{"tensorflow": "2.16.2"}'
    )
    result = run(*TRAIN, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: Horovod was built for TensorFlow 2.16.2, ")
    assert "python -m horovod_recipes.install_horovod" in last


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "value"),
    [("KERAS_BACKEND", "jax"), ("TF_USE_LEGACY_KERAS", "1")],
)
def test_job_with_another_keras(variable, value):
    for command in (TRAIN, ("-c", "import horovod_recipes.keras")):
        result = run(*command, **{variable: value})
        assert result.returncode == 1
        last = result.stderr.splitlines()[-1]
        assert f"rror: {variable}={value} is set, but" in last
        assert "unset it" in last


@pytest.mark.slow
def test_job_with_another_keras_in_its_settings_file(tmp_path):
    (tmp_path / "keras.json").write_text('{"backend": "jax"}')
    for command in (TRAIN, ("-c", "import horovod_recipes.keras")):
        result = run(*command, KERAS_HOME=str(tmp_path), KERAS_BACKEND="")
        assert result.returncode == 1
        last = result.stderr.splitlines()[-1]
        assert "rror: keras.json chooses the backend jax, but" in last
