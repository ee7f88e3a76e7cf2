"""Times an allreduce of 4 MB, before and after a file appears.

python -m tests.cluster.allreduce_job FILE
"""

import json
import pathlib
import statistics
import sys
import time

import numpy as np
import tensorflow as tf

import horovod_recipes.keras as hvd

FLOATS = 1_000_000
TRIALS = 5


def main():
    hvd.init()
    numbers = np.random.default_rng(hvd.rank()).normal(size=FLOATS)
    numbers = tf.constant(numbers.astype(np.float32))
    fast = seconds(numbers)
    print("fast done", flush=True)
    changed = pathlib.Path(sys.argv[1])
    while not changed.exists():
        time.sleep(0.1)
    slow = seconds(numbers)
    mean = hvd.allreduce(numbers, name="numbers").numpy()
    each = [
        np.random.default_rng(rank).normal(size=FLOATS).astype(np.float32)
        for rank in range(hvd.size())
    ]
    is_right = bool(np.array_equal(mean, sum(each) / np.float32(hvd.size())))
    result = {"fast": fast, "slow": slow, "is_right": is_right}
    print(json.dumps(result), flush=True)


def seconds(numbers):
    """Returns the median time of an allreduce, in seconds."""
    times = []
    for _ in range(TRIALS):
        hvd.allreduce(0.0, name="together")
        begin = time.perf_counter()
        hvd.allreduce(numbers, name="numbers").numpy()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


if __name__ == "__main__":
    main()
