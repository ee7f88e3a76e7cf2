"""Broadcasts, objects, process sets and join on two ranks."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import horovod_recipes.keras as hvd

DTYPES = (
    "float32 float64 float16 bfloat16 int32 int64 uint8 uint32 bool".split()
)


@pytest.mark.parametrize("inplace", [False, True])
def test_broadcast_of_variables_of_any_type(inplace):
    variables = [
        keras.Variable(np.full((2, 3), hvd.rank()), dtype=dtype)
        for dtype in DTYPES
    ]
    variables.append(tf.Variable([float(hvd.rank())]))
    hvd.broadcast_variables(variables, root_rank=1, inplace=inplace)
    for variable, dtype in zip(variables, [*DTYPES, "float32"], strict=True):
        assert variable.dtype == dtype
        value = tf.cast(tf.convert_to_tensor(variable), "float32")
        assert np.all(value.numpy() == 1.0), dtype


def test_broadcast_in_a_process_set(rank_0_alone):
    variable = keras.Variable([1.0 + hvd.rank()])
    if rank_0_alone.included():
        hvd.broadcast_variables([variable], 0, process_set=rank_0_alone)
    assert float(variable[0]) == 1.0 + hvd.rank()


def test_broadcast_of_global_variables_says_what_to_call_instead():
    with pytest.raises(RuntimeError, match="broadcast_variables"):
        hvd.broadcast_global_variables(0)


def test_objects():
    obj = {"rank": hvd.rank(), "array": np.arange(2 + hvd.rank())}
    received = hvd.broadcast_object(obj, root_rank=1)
    assert received["rank"] == 1
    np.testing.assert_array_equal(received["array"], [0, 1, 2])
    gathered = hvd.allgather_object(obj)
    assert [g["rank"] for g in gathered] == [0, 1]
    assert [len(g["array"]) for g in gathered] == [2, 3]


def test_process_set_has_its_own_rank_and_size(rank_0_alone):
    assert hvd.global_process_set.size() == 2
    assert rank_0_alone.size() == 1
    assert rank_0_alone.included() == (hvd.rank() == 0)


def test_join_lets_a_rank_end_before_the_other():
    """Rank 0 takes two more steps, in which rank 1 counts as zero."""
    variable = keras.Variable([0.0])
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0))
    for _ in range([3, 1][hvd.rank()]):
        optimizer.apply([tf.constant([2.0])], [variable])
    assert int(hvd.join()) == 0
    assert float(variable[0]) == [-4.0, -2.0][hvd.rank()]
    # After that, all ranks take part again.
    np.testing.assert_array_equal(hvd.allreduce([hvd.rank()], op=hvd.Sum), [1])
