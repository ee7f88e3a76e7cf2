"""Saves time: Python does not collect the garbage of finished tests."""

import gc

import pytest


@pytest.fixture(autouse=True)
def _garbage_stays():
    """Python does not look at the objects of finished tests again.

    Collecting the graphs of hundreds of functions pauses a process for half a
    minute.
    """
    yield
    gc.freeze()
