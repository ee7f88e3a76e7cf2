"""What whole jobs leave behind: summaries, tables, checkpoints, weights."""

import csv
import hashlib
import json

import numpy as np


def read_summary(workdir):
    return json.loads((workdir / "summary.json").read_text())


def read_metrics(workdir):
    """Returns the rows of metrics.csv, as dicts of strings."""
    with (workdir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def checkpoint(workdir, step):
    """Returns the path of the checkpoint after so many updates."""
    return workdir / "checkpoints" / f"step-{step:08d}.keras"


def digest(variables):
    """Returns a hash of the values of variables, in hex."""
    parts = [np.asarray(variable).tobytes() for variable in variables]
    return hashlib.sha256(b"".join(parts)).hexdigest()
