"""Settings of a job's process."""

import os

import pytest

from horovod_recipes.configs import demo
from horovod_recipes.training import process
from keras_lars import _xla_flags


@pytest.mark.parametrize("xla", [False, True])
def test_updates_are_fast_unless_xla_compiles_the_network(monkeypatch, xla):
    monkeypatch.setenv("XLA_FLAGS", "")
    config = demo.get_config()
    config.xla = xla
    process.make_updates_fast(config)
    assert (_xla_flags.OPTION in os.environ["XLA_FLAGS"]) == (not xla)
