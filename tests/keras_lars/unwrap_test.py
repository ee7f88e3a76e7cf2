"""The optimizer inside wrappers is found, however many there are."""

import keras
import pytest

from keras_lars import LARS
from keras_lars._unwrap import innermost


@pytest.mark.parametrize("wrappers", [0, 1, 2])
def test_innermost(wrappers):
    optimizer = wrapped = LARS()
    for _ in range(wrappers):
        wrapped = keras.optimizers.LossScaleOptimizer(wrapped)
    assert innermost(wrapped) is optimizer
