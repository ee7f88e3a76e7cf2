"""Horovod's timeline: when each operation was ready, began and ended."""

import contextlib
import json
import os
import pathlib
import tempfile
import time

import tensorflow as tf

import horovod_recipes.keras as hvd

# Time limit for Horovod's thread to finish the timeline's file, in seconds.
TIMELINE_LIMIT_S = 10


def allow():
    """Lets the timeline start later. Call it before `hvd.init`."""
    os.environ["HOROVOD_TIMELINE"] = "DYNAMIC"


def named_allreduce(name, process_set=hvd.global_process_set):
    """Returns a function that waits for all ranks of a set."""

    # The timeline names only operations of a graph. From a graph TensorFlow
    # removes operations without results or with constant inputs.
    @tf.function(autograph=False)
    def allreduce(tensor):
        return hvd.grouped_allreduce(
            [tensor], name=name, process_set=process_set
        )

    return lambda: allreduce(tf.zeros([1]))


@contextlib.contextmanager
def recorded(barrier):
    """Records what Horovod does in a block, on rank 0.

    Args:
        barrier: Function that waits for all ranks.

    Yields:
        A list. On rank 0, it has the events of the timeline after the block.
    """
    events = []
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "timeline.json")
        barrier()
        if hvd.rank() == 0:
            hvd.start_timeline(str(path))
        barrier()
        yield events
        barrier()
        if hvd.rank() == 0:
            hvd.stop_timeline()
            events += _events(path)


def _events(path):
    """Returns the events of a timeline that has just stopped."""
    deadline = time.monotonic() + TIMELINE_LIMIT_S
    while True:
        try:
            return json.loads(path.read_text())
        except (json.JSONDecodeError, FileNotFoundError):
            if time.monotonic() > deadline:
                raise
        time.sleep(0.1)


def spans(events):
    """Returns `(operation, activity, begin, end)`, with times in us."""
    operations, open_spans, found = {}, {}, []
    for event in events:
        lane = event["pid"]
        if event.get("name") == "process_name":
            operations[lane] = event["args"].get("name", "")
        elif event["ph"] == "B":
            open_spans.setdefault(lane, []).append((event["name"], event["ts"]))
        elif event["ph"] == "E" and open_spans.get(lane):
            name, begin = open_spans[lane].pop()
            found.append((operations[lane], name, begin, event["ts"]))
    return found
