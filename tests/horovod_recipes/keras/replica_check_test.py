"""ReplicaCheck's checksums, and its description of differences."""

import keras
import numpy as np
import pytest

from horovod_recipes.keras.callbacks import _replica_check

DTYPES = [
    "float16",
    "float32",
    "float64",
    "bfloat16",
    "int8",
    "uint8",
    "int32",
    "uint32",
    "int64",
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_counts(dtype):
    rng = np.random.default_rng(0)
    variable = keras.Variable(np.zeros((2, 3)), dtype=dtype, trainable=False)
    size = variable.numpy().itemsize
    value = rng.integers(256, size=(2, 3, size), dtype="uint8")
    checksums = _replica_check.checksum_function([variable])

    def checksum_of(value):
        variable.value.assign(value.view(variable.numpy().dtype)[..., 0])
        return int(checksums()[0])

    seen = {checksum_of(value)}
    for place in np.ndindex(2, 3, size):
        for bit in range(8):
            value[place] ^= 1 << bit
            seen.add(checksum_of(value))
            value[place] ^= 1 << bit
    assert len(seen) == 1 + 2 * 3 * 8 * size
    assert checksum_of(value) in seen


def test_places_and_signs_count():
    variable = keras.Variable(np.zeros(3), trainable=False)
    checksums = _replica_check.checksum_function([variable])
    seen = set()
    # Swaps, swapped signs, and changes that add up to 0.
    rows = [[1, 2, 3], [2, 1, 3], [3, 2, 1], [1, -1, 0], [-1, 1, 0]]
    rows += [[0, 0, 0], [-0.0, 0, 0], [0, -0.0, 0], [2, 0, 4], [np.nan, 0, 0]]
    for row in rows:
        variable.assign(row)
        seen.add(int(checksums()[0]))
    assert len(seen) == len(rows)
    variable.assign([np.nan, 0, 0])
    assert int(checksums()[0]) in seen


def test_checksums_of_many_variables():
    """A checksum equals one computed by hand in Python's integers."""
    mask = 2**64 - 1
    bits = np.array([1.5, -2.0], "float32").view("uint32")
    expected = 0
    for position, number in enumerate(map(int, bits)):
        x = (number + (position + 1) * 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        expected += x ^ (x >> 31)
    variables = [
        keras.Variable([True, False], dtype="bool", trainable=False),
        keras.Variable([1.5, -2.0]),
        keras.Variable([False, True], dtype="bool", trainable=False),
    ]
    checksums = _replica_check.checksum_function(variables)().numpy().tolist()
    assert checksums[1] == expected & mask
    assert len(set(checksums)) == 3


def test_description_names_the_rarer_ranks():
    describe = _replica_check.describe_difference
    paths = ["a", "b", "c", "d", "e"]
    ranks = [[1, 1, 1, 1, 1] for _ in range(20)]
    ranks[0] = [2, 1, 1, 1, 1]
    assert (
        describe(paths, ranks) == "1 of 5 variables, a (rank 0, unlike rank 1)"
    )
    ranks[7] = [3, 2, 1, 2, 2]
    assert describe(paths, ranks) == (
        "4 of 5 variables, a (ranks 0, 7, unlike rank 1), "
        "b (rank 7, unlike rank 0), d (rank 7, unlike rank 0), ..."
    )
    for rank in range(10, 20):
        ranks[rank] = [rank + 10, 1, 1, 1, 1]
    assert "a (ranks 0, 7, 10, 11, 12, 13, 14, 15 and 4 more, unlike r" in (
        describe(paths, ranks)
    )
    assert describe(paths, [[1], [1, 2]]) == (
        "the ranks have different numbers of variables: [1, 2]"
    )
