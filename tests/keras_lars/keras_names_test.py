"""Keras has the private names that LARS uses, and their list is complete."""

import pathlib
import re

import keras
import pytest

import keras_lars
from keras_lars._keras_names import WHY

KERAS_OPTIMIZER = keras.optimizers.SGD()


@pytest.mark.parametrize("name", WHY)
def test_keras_has(name):
    assert hasattr(KERAS_OPTIMIZER, name), (
        f"Keras {keras.__version__} lacks Optimizer.{name}. {WHY[name]}"
    )


def test_list_is_complete():
    folder = pathlib.Path(keras_lars.__file__).parent
    source = "\n".join(file.read_text() for file in folder.glob("*.py"))
    names = set(re.findall(r"\b_[a-z]\w*", source))
    assert names & set(dir(KERAS_OPTIMIZER)) == set(WHY)
