"""This binding keeps every promise that the benchmark of bindings tries."""

import pytest

import horovod_recipes.keras as hvd
from benchmarks.speed.binding_trials import TRIALS


@pytest.mark.parametrize("name", TRIALS)
def test_promise_is_kept(name):
    kept, text = TRIALS[name](hvd)
    assert kept, text
