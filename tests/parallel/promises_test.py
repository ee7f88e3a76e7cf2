"""Our binding keeps every promise of Horovod's Keras binding."""

import pytest

import horovod_recipes.keras as hvd
from tests.parallel.promises import PROMISES


@pytest.mark.parametrize("promise", PROMISES)
def test_promise_is_kept(promise):
    kept, measured = PROMISES[promise](hvd)
    assert kept, measured
