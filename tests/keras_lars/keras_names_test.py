"""Keras has the private names that are used, and their list is complete."""

import pathlib
import re

import keras
import pytest

import keras_lars
from keras_lars._keras_names import WHY
from keras_lars._keras_names import WHY_OF_MUON
from tests.keras_lars.reference import NEEDS_MUON

KERAS_OPTIMIZER = keras.optimizers.SGD()


@pytest.mark.parametrize("name", WHY)
def test_keras_has(name):
    assert hasattr(KERAS_OPTIMIZER, name), (
        f"Keras {keras.__version__} lacks Optimizer.{name}. {WHY[name]}"
    )


@NEEDS_MUON
@pytest.mark.parametrize("name", WHY_OF_MUON)
def test_muon_of_keras_has(name):
    assert hasattr(keras.optimizers.Muon, name), (
        f"Keras {keras.__version__} lacks Muon.{name}. {WHY_OF_MUON[name]}"
    )


def test_list_is_complete():
    folder = pathlib.Path(keras_lars.__file__).parent
    source = "\n".join(file.read_text() for file in folder.glob("*.py"))
    names = set(re.findall(r"\b_[a-z]\w*", source))
    assert names & set(dir(KERAS_OPTIMIZER)) == set(WHY)
