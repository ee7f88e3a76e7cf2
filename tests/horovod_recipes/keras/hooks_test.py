"""What the binding reaches for inside Keras and TensorFlow, and when."""

import ast
import pathlib
import subprocess
import sys

import pytest

import horovod_recipes.keras
from horovod_recipes.keras._keras_hooks import PRIVATE_NAMES


@pytest.mark.parametrize(
    ("owner", "name", "why"), PRIVATE_NAMES, ids=[p.name for p in PRIVATE_NAMES]
)
def test_this_version_has_the_private_name(owner, name, why):
    assert hasattr(owner(), name), f"{owner()!r} lacks {name}. {why}"


def test_list_is_complete():
    """Every `object._name` of the package is its own, or is in the list."""
    used = set()
    own = {"_exit", "_current_frames"}  # Python documents these two.
    package = pathlib.Path(horovod_recipes.keras.__file__).parents[1]
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute):
                is_set = isinstance(node.ctx, ast.Store)
                (own if is_set else used).add(node.attr)
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                own.update(alias.name for alias in node.names)
    private = {name for name in used - own if name[0] == "_" != name[1]}
    assert private <= {name for _, name, _ in PRIVATE_NAMES}


def test_keras_is_patched_once_and_only_when_needed():
    script = """
import inspect
import keras

def classes():
    modules = [keras, keras.callbacks, keras.layers, keras.metrics]
    modules += [keras.models, keras.optimizers]
    found = {v for m in modules for v in vars(m).values() if inspect.isclass(v)}
    return {base for cls in found for base in cls.__mro__ if base is not object}

def methods():
    return {
        (cls, name): value
        for cls in classes()
        for name, value in vars(cls).items()
        if callable(value)
    }

def changed(before):
    now = methods()
    return {
        f"{cls.__name__}.{name}"
        for cls, name in before.keys() | now.keys()
        if before.get((cls, name)) is not now.get((cls, name))
    }

plain = methods()
assert len(plain) > 1000

import horovod_recipes.keras as hvd
import horovod_recipes.keras.callbacks
import horovod_recipes.keras.elastic
hvd.init()
hvd.callbacks.BroadcastGlobalVariablesCallback(0)
assert changed(plain) == set(), changed(plain)

hvd.DistributedOptimizer(keras.optimizers.SGD())
assert changed(plain) == {
    "LossScaleOptimizer.__init__",
    "CallbackList.on_epoch_begin",
    "CallbackList.on_epoch_end",
    "CallbackList.on_test_begin",
    "CallbackList.on_train_batch_end",
    "Model.__reduce__",
    "Model.make_train_function",
    "Optimizer.__reduce__",
}, changed(plain)

patched = methods()
hvd.SyncBatchNormalization()
hvd.DistributedOptimizer(keras.optimizers.Adam())
assert changed(patched) == set(), changed(patched)
"""
    subprocess.run([sys.executable, "-c", script], check=True)
