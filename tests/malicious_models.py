"""Makes saved models that run code, or touch other files, if Keras lets them.

Each maker writes a model to `path`. If loading the model runs the code in it,
the file `mark` appears.
"""

import io
import json
import os
import zipfile

import h5py
import keras
import numpy as np
import tensorflow as tf

CONFIG = "config.json"
WEIGHTS = "model.weights.h5"


def honest_model(**arguments):
    inputs = keras.Input((3,))
    outputs = keras.layers.Dense(2, name="dense")(inputs)
    model = keras.Model(inputs, outputs)
    model.compile(keras.optimizers.SGD(0.1), "mse", **arguments)
    return model


def _changed(path, change):
    """Saves an honest model, whose archive `change`, a function, then edits.

    Args:
        path: `pathlib.Path`.
        change: Function of a dict `{name in the archive: bytes}`.
    """
    honest_model().save(path)
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    change(content)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def _with_config(path, change):
    """Saves an honest model with another config."""

    def change_config(content):
        config = json.loads(content[CONFIG])
        change(config)
        content[CONFIG] = json.dumps(config).encode()

    _changed(path, change_config)


def _with_layer(path, layer, *arguments):
    """Puts another layer in the place of the dense one."""

    def change(config):
        dense = config["config"]["layers"][1]
        dense["build_config"] = None
        dense |= layer
        if arguments:
            dense["inbound_nodes"] = [{"args": list(arguments), "kwargs": {}}]

    _with_config(path, change)


def _function(module, name):
    return {
        "module": module,
        "class_name": "function",
        "config": name,
        "registered_name": name,
    }


def _popen(mark):
    return {
        "module": "subprocess",
        "class_name": "Popen",
        "config": {"args": ["touch", str(mark)]},
        "registered_name": None,
    }


def _calling(module, name):
    """Returns the layer that calls a function of a module with its inputs."""
    return {
        "module": "keras.layers",
        "class_name": "Lambda",
        "config": {"name": "dense", "function": _function(module, name)},
        "registered_name": None,
    }


def bytecode(path, mark):
    inputs = keras.Input((3,))
    file = str(mark)
    # Keras saves the lambda's code, and calls it when it loads the model.
    layer = keras.layers.Lambda(lambda x: (open(file, "w").close(), x)[1])
    keras.Model(inputs, layer(inputs)).save(path)
    mark.unlink()


def popen_as_layer(path, mark):
    _with_layer(path, _popen(mark))


def popen_as_loss(path, mark):
    def change(config):
        config["compile_config"]["loss"] = _popen(mark)

    _with_config(path, change)


def popen_in_trust_ratio(path, mark):
    """An optimizer of this project has an optimizer inside."""

    def change(config):
        config["compile_config"]["optimizer"] = {
            "module": "keras_lars",
            "class_name": "TrustRatio",
            "config": {"name": "trust_ratio", "optimizer": _popen(mark)},
            "registered_name": "keras_lars>TrustRatio",
        }

    _with_config(path, change)


def popen_under_the_name_of_lars(path, mark):
    def change(config):
        config["compile_config"]["optimizer"] = _popen(mark) | {
            "registered_name": "keras_lars>Popen"
        }

    _with_config(path, change)


def system(path, mark):
    _with_layer(path, _calling("os", "system"), f"touch {mark}")


def builtin_exec(path, mark):
    _with_layer(path, _calling("builtins", "exec"), f"open({str(mark)!r}, 'w')")


def get_file(path, mark):
    """A function of Keras that writes a file where the model says."""
    source = path.with_suffix(".txt")
    source.write_text("written by get_file")
    layer = _calling("keras.utils", "get_file")
    _with_layer(path, layer, str(mark), source.as_uri())


def saved_model(path, mark):
    """A layer that runs any graph of TensorFlow, such as one that writes."""

    class Writes(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((None, 3))])
        def __call__(self, x):
            with tf.control_dependencies([tf.io.write_file(str(mark), "")]):
                return tf.identity(x)

    folder = path.with_suffix(".saved_model")
    module = Writes()
    tf.saved_model.save(module, str(folder), signatures=module.__call__)
    _with_layer(
        path,
        {
            "module": "keras.layers",
            "class_name": "TFSMLayer",
            "config": {
                "name": "dense",
                "filepath": str(folder),
                "call_endpoint": "serving_default",
            },
            "registered_name": None,
        },
    )


class _Pickled:
    def __init__(self, mark):
        self._mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self._mark}",)


def pickled_weights(path, mark):
    def change(content):
        del content[WEIGHTS]
        weights = np.empty(1, object)
        weights[0] = _Pickled(mark)
        file = io.BytesIO()
        np.savez(file, **{"layers/dense/vars": weights, "__root__": weights})
        content["model.weights.npz"] = file.getvalue()

    _changed(path, change)


# Each makes a `.keras` file.
MAKERS = (
    bytecode,
    popen_as_layer,
    popen_as_loss,
    popen_in_trust_ratio,
    popen_under_the_name_of_lars,
    system,
    builtin_exec,
    get_file,
    saved_model,
    pickled_weights,
)


def climbing_names(path, outside):
    """An archive with names that lead to the path `outside`, and to others."""

    def change(content):
        content["assets/vocabulary.txt"] = b""
        for name in (
            str(outside),
            f"assets/{'../' * 20}{str(outside).lstrip('/')}",
            *(f"{'../' * depth}{outside.name}" for depth in range(1, 4)),
        ):
            content[name] = b"written by an archive"

    _changed(path, change)


def weights_elsewhere(path, file, kind):
    """Weights that HDF5 reads from another file of the machine.

    Args:
        path: `pathlib.Path` of the model.
        file: `pathlib.Path` of the other file.
        kind: `"dataset"` for raw bytes of the file, or `"link"` for a dataset
            of an HDF5 file.
    """

    def change(content):
        weights = io.BytesIO(content[WEIGHTS])
        with h5py.File(weights, "r+") as opened:
            group = opened["layers/dense/vars"]
            del group["1"]
            if kind == "link":
                group["1"] = h5py.ExternalLink(str(file), "bias")
            else:
                group.create_dataset(
                    "1", (2,), "float32", external=[(str(file), 0, 8)]
                )
        content[WEIGHTS] = weights.getvalue()

    _changed(path, change)
