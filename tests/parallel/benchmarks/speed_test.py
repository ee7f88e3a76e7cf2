"""The benchmarks of communication, in small, on two ranks."""

import functools
import time

import keras
import pytest
import tensorflow as tf

import horovod_recipes.keras as hvd
from benchmarks.speed import _timeline
from benchmarks.speed import allreduce
from benchmarks.speed import callbacks
from benchmarks.speed import job
from benchmarks.speed import overlap
from benchmarks.speed import scaling
from benchmarks.speed import xla_step


def network():
    inputs = keras.Input((8, 8, 3), dtype="uint8")
    x = keras.layers.Rescaling(1 / 255)(inputs)
    x = keras.layers.Flatten()(keras.layers.Conv2D(8, 3)(x))
    return keras.Model(inputs, keras.layers.Dense(10)(x))


def test_ways_of_averaging_give_the_means():
    shapes = [(3, 4), (5,)]
    tf.random.set_seed(hvd.rank())
    ways = allreduce.contenders(shapes)
    tf.random.set_seed(hvd.rank())
    own = [tf.random.normal(shape) for shape in shapes]
    means = [
        sum(pair) / 2 for pair in zip(*hvd.allgather_object(own), strict=True)
    ]
    for name, average in ways.items():
        found = average()
        if name.endswith("flat"):
            found = [tf.reshape(found[0][:12], (3, 4)), found[0][12:]]
        for a, b in zip(found, means, strict=True):
            tf.debugging.assert_near(a, b, rtol=2e-3, atol=2e-3, message=name)


def test_allreduce_reports_each_way():
    result = allreduce.measure([(3, 4), (5,)], rounds=3)
    assert (result["variables"], result["parameters"]) == (2, 17)
    lines = {line["way"]: line for line in result["results"]}
    assert lines[allreduce.BARE]["ratio"] == [1.0, 1.0, 1.0]
    assert all(line["ms"][1] <= line["ms"][2] for line in lines.values())
    assert {allreduce.OURS, f"{allreduce.OURS}, fp16"} <= lines.keys()


@pytest.mark.slow
def test_xla_step_compares_the_two():
    lines = xla_step.measure(network, micro_batch=2, accumulation=2, rounds=2)
    assert [line["xla"] for line in lines] == [False, True]
    assert lines[0]["ratio"] == [1.0, 1.0, 1.0]
    assert lines[1]["images_per_second"][0] > 0


@pytest.mark.slow
def test_job_is_timed_beside_fit(monkeypatch, shared_folder):
    monkeypatch.setattr(job, "EPOCH_SECONDS", 0.01)
    monkeypatch.setattr(job, "MIN_STEPS", 3)
    with hvd.callbacks.Watchdog() as watchdog:
        times = job.measure(4, 2, shared_folder / "run", watchdog)
    ways = job.summary(times)
    assert {"bare fit", "job", "without the handshake"} < ways.keys()
    assert ways["bare fit"]["speed"] == [1.0, 1.0, 1.0]
    assert all(way["ms"][0] > 0 for way in ways.values())
    table = job.markdown({"results": {4: ways}})
    assert "| StopOnSigterm | " in table


def test_callbacks_are_timed_on_rank_0():
    steps, seconds = callbacks.measure(network(), micro_batch=2, steps=3)
    assert len(steps) == len(seconds["ReplicaCheck"]) == 3
    # The other rank does not log.
    assert len(seconds["TrustRatioLogger"]) == (3 if hvd.rank() == 0 else 0)
    assert min(steps + seconds["ReplicaCheck"]) > 0


def test_speeds_of_ranks_together_apart_and_alone():
    calls = {"all": 0, "alone": 0}

    def update(kind):
        calls[kind] += 1
        # The time of the slowest rank that takes part counts.
        time.sleep(0.05 + 0.2 * hvd.rank())

    found = scaling.speeds(
        {kind: functools.partial(update, kind) for kind in calls},
        images=10,
        barrier=_timeline.named_allreduce("barrier_of_test"),
        rounds=3,
    )
    assert calls == {"all": 3, "alone": 3 if hvd.rank() else 6}
    # 10 images per rank in at least 0.25 s; rank 0 alone needs 0.05 s.
    for kind, most in {"all": 80, "apart": 80, "alone": 200}.items():
        assert len(found[kind]) == 3
        assert 0 < max(found[kind]) <= most


def test_launched_ranks_are_those_of_horovod():
    assert scaling.launched_ranks() == hvd.size()


def lane(pid, name):
    args = {"name": name}
    return {"name": "process_name", "ph": "M", "pid": pid, "args": args}


def span(pid, name, begin, end):
    return [
        {"ph": "B", "name": name, "ts": begin * 1e6, "pid": pid},
        {"ph": "E", "ts": end * 1e6, "pid": pid},
    ]


def test_parts_of_an_update_from_a_timeline():
    """Rank 0 computes for 5 s, waits for 1, reduces for 2, updates for 3."""

    events = [
        lane(1, "barrier_1of1"),
        lane(2, "mark_begins_1of1"),
        lane(3, "gradients_1of2"),
        lane(4, "gradients_2of2"),
        lane(5, "mark_ends_1of1"),
        *span(2, "NEGOTIATE_ALLREDUCE", 8, 9),
        *span(2, "ALLREDUCE", 9, 10),
        *span(1, "NEGOTIATE_ALLREDUCE", 10, 30),
        *span(3, "NEGOTIATE_ALLREDUCE", 15, 16),
        *span(4, "NEGOTIATE_ALLREDUCE", 15.1, 16),
        *span(3, "ALLREDUCE", 16, 17),
        *span(4, "ALLREDUCE", 16.5, 18),
        *span(5, "NEGOTIATE_ALLREDUCE", 21, 22),
        *span(5, "ALLREDUCE", 22, 23),
    ]
    assert scaling.parts_of_update(events) == pytest.approx(
        {"compute": 5, "wait": 1, "allreduce": 2, "update": 3}
    )


def test_groups_of_a_step_from_a_timeline():
    """Two groups are ready after 3 and 5 s, and take 1 and 2 s."""
    events = [
        lane(1, "mark_begins_1of1"),
        lane(2, "Distributed_1_float32_1of1"),
        lane(3, "Distributed_0_float32_1of2"),
        lane(4, "Distributed_0_float32_2of2"),
        lane(5, "mark_ends_1of1"),
        *span(1, "NEGOTIATE_ALLREDUCE", 8, 9),
        *span(1, "ALLREDUCE", 9, 10),
        *span(3, "NEGOTIATE_ALLREDUCE", 12, 13.5),
        *span(4, "NEGOTIATE_ALLREDUCE", 13, 13.5),
        *span(3, "ALLREDUCE", 13.5, 14.5),
        *span(4, "ALLREDUCE", 13.5, 14.5),
        *span(2, "NEGOTIATE_ALLREDUCE", 15, 15.5),
        *span(2, "ALLREDUCE", 15.5, 17.5),
        *span(5, "NEGOTIATE_ALLREDUCE", 19, 20),
    ]
    assert overlap.groups_of_step(events) == {
        "seconds": pytest.approx(9),
        "groups": [[3, 3.5, 4.5], [5, 5.5, 7.5]],
    }
