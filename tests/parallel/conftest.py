"""Fixtures of all parallel tests, which need two ranks.

horovodrun -np 2 python -m pytest tests/parallel
"""

import keras
import pytest

import horovod_recipes.keras as hvd

RANKS_ALONE = [hvd.ProcessSet([0]), hvd.ProcessSet([1])]
hvd.init(process_sets=RANKS_ALONE)


@pytest.fixture(scope="session", autouse=True)
def _two_ranks():
    if hvd.size() != 2:
        pytest.exit("run with: horovodrun -np 2 python -m pytest ...", 2)


@pytest.fixture
def rank_0_alone():
    """A process set that rank 1 is not in."""
    return RANKS_ALONE[0]


@pytest.fixture
def this_rank_alone():
    """A process set of this rank, where nothing is exchanged."""
    return RANKS_ALONE[hvd.rank()]


@pytest.fixture
def shared_folder(tmp_path_factory):
    """A new folder that is the same for all ranks."""
    folder = tmp_path_factory.mktemp("shared") if hvd.rank() == 0 else None
    return hvd.broadcast_object(folder, root_rank=0)


@pytest.fixture
def _mixed_float16():
    """The global dtype policy is mixed_float16 during the test."""
    keras.config.set_dtype_policy("mixed_float16")
    yield
    keras.config.set_dtype_policy("float32")
