"""Models of strangers run no code, wherever this project loads a model."""

import contextlib
import pathlib
import warnings

import h5py
import keras
import numpy as np
import pytest

import horovod_recipes.keras as hvd
from horovod_recipes.configs import simclr
from horovod_recipes.errors import JobError
from horovod_recipes.training import checkpoints
from horovod_recipes.training import evaluation
from tests import malicious_models

# Safe mode had holes (docs/security.md).
IS_OLD = tuple(map(int, keras.__version__.split(".")[:2])) < (3, 12)


def as_checkpoint(path):
    """Loads a model as `horovod_recipes.train --resume` does."""
    folder = path.parent / "checkpoints"
    folder.mkdir()
    path.rename(folder / "step-00000005.keras")
    (folder / "step-00000005.json").write_text("{}")
    model = malicious_models.honest_model()
    checkpoints.restore_latest(path.parent, model)
    return model


def as_encoder(path):
    """Loads a model as `horovod_recipes.evaluate` does."""
    path.rename(path.parent / "encoder.keras")
    (path.parent / "summary.json").write_text('{"top1": 50.0}')
    config = simclr.get_config("digits")
    return evaluation.load_encoder(config, path.parent)


LOADERS = (hvd.load_model, as_checkpoint, as_encoder)


@pytest.mark.parametrize("load", LOADERS, ids=lambda f: f.__name__)
def test_honest_model_is_loaded(tmp_path, load):
    """Otherwise the tests below would not test what they say."""
    hvd.init()
    path = tmp_path / "model.keras"
    model = malicious_models.honest_model()
    model.save(path)
    for ours, theirs in zip(load(path).weights, model.weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "make", malicious_models.MAKERS, ids=lambda f: f.__name__
)
@pytest.mark.parametrize("load", LOADERS, ids=lambda f: f.__name__)
def test_model_runs_no_code(tmp_path, make, load):
    if IS_OLD and make is malicious_models.saved_model:
        pytest.skip("safe mode did not cover SavedModels")
    hvd.init()
    path, mark = tmp_path / "model.keras", tmp_path / "mark"
    make(path, mark)
    assert not mark.exists()
    # Keras raises errors of many types.
    error = Exception if load is hvd.load_model else JobError
    with pytest.raises(error):
        load(path)
    assert not mark.exists()


def test_bytecode_would_run_without_safe_mode(tmp_path):
    """The mark appears where the code runs."""
    path, mark = tmp_path / "model.keras", tmp_path / "mark"
    malicious_models.bytecode(path, mark)
    keras.saving.load_model(path, safe_mode=False)
    assert mark.exists()


@pytest.mark.skipif(IS_OLD, reason="safe mode did not cover .h5 files")
def test_bytecode_of_a_legacy_file_does_not_run(tmp_path):
    path, mark = tmp_path / "model.h5", tmp_path / "mark"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        malicious_models.bytecode(path, mark)
    with pytest.raises(Exception, match=r"[Ll]ambda"):
        hvd.load_model(path)
    assert not mark.exists()


@pytest.mark.parametrize("load", LOADERS, ids=lambda f: f.__name__)
def test_archive_writes_nothing_outside(tmp_path, load):
    hvd.init()
    outside = tmp_path / "outside" / "written"
    outside.parent.mkdir()
    path = tmp_path / "model.keras"
    malicious_models.climbing_names(path, outside)
    with warnings.catch_warnings():
        # Keras says which names it skips. Keras 3.12 refuses the archive.
        warnings.simplefilter("ignore")
        with contextlib.suppress(AttributeError, JobError):
            load(path)
    assert list(outside.parent.iterdir()) == []
    above = (tmp_path, *tmp_path.parents, pathlib.Path.cwd())
    assert not [folder for folder in above if (folder / "written").exists()]


@pytest.mark.skipif(IS_OLD, reason="Keras followed such links")
@pytest.mark.parametrize("kind", ["dataset", "link"])
@pytest.mark.parametrize("load", LOADERS, ids=lambda f: f.__name__)
def test_weights_are_not_read_from_other_files(tmp_path, load, kind):
    """Otherwise a checkpoint that a job saves could give a secret away."""
    hvd.init()
    path, secret = tmp_path / "model.keras", tmp_path / "secret"
    if kind == "link":
        with h5py.File(secret, "w") as file:
            file["bias"] = np.ones(2, "float32")
    else:
        secret.write_bytes(np.ones(2, "float32").tobytes())
    malicious_models.weights_elsewhere(path, secret, kind)
    error = Exception if load is hvd.load_model else JobError
    with pytest.raises(error):
        load(path)
