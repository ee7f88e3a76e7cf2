"""Runs an example, then says whether the ranks have equal weights.

python -m tests.examples.compared EXAMPLE
"""

import json
import runpy
import sys

import horovod_recipes.keras as hvd
from tests.jobs.results import digest


def main():
    model = runpy.run_path(sys.argv[1], run_name="__main__")["model"]
    digests = hvd.allgather_object(digest(model.weights))
    if hvd.rank() == 0:
        result = {"ranks": hvd.size(), "different_weights": len(set(digests))}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
