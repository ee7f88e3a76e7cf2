"""Fixtures for the tests of benchmarks."""

import pytest

from benchmarks.study import training


@pytest.fixture
def data_folder(monkeypatch, tmp_path):
    """A new data folder."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    training.data.cache_clear()
    yield tmp_path
    training.data.cache_clear()
