"""One update at a global batch of 32,768, on two ranks, equals another way."""

import numpy as np

import horovod_recipes.keras as hvd
from benchmarks.speed import large_update
from horovod_recipes.plan import activation_bytes


def tiny_config(batch_norm):
    config = large_update.small_config(32768)
    config.model.update(stage_blocks=(1, 1), width=4, batch_norm=batch_norm)
    config.dataset.num_classes = 10
    config.max_micro_batch_size = 128
    return config


def test_update_equals_another_computation():
    config = tiny_config("micro_batch")
    update = large_update.update_of_job(config, image_size=16)
    assert update["job"].ranks == 2
    assert update["job"].accumulation_steps == 128
    assert update["calls"] == 1
    optimizer = update["model"].optimizer
    assert int(optimizer.iterations) == 1
    expected = large_update.update_another_way(config, update)
    difference = large_update.largest_difference(update, expected)
    assert difference < 1e-4
    # It would see a micro-batch that is missing, and a wrong decay.
    wrong = tiny_config("micro_batch")
    wrong.optimizer.weight_decay = 6e-4
    others = large_update.update_another_way(wrong, update)
    assert large_update.largest_difference(update, others) > 1e-4
    # Both ranks hold the same.
    ours = [v.numpy() for v in update["model"].trainable_variables]
    for first, second in zip(*hvd.allgather_object(ours), strict=True):
        np.testing.assert_array_equal(first, second)


def test_memory_does_not_grow_with_the_accumulation_steps():
    peaks = []
    for batch in (2048, 32768):
        config = tiny_config("micro_batch")
        config.global_batch_size = batch
        config.model.width = 16
        update = large_update.update_of_job(config, image_size=16)
        peaks.append(update["peak_mb"])
    # A second job in one process takes some; all activations would take more.
    allowed = 200
    job = update["job"]
    images = job.micro_batch_size * job.accumulation_steps
    activations_mb = images * activation_bytes(update["model"]) / 2**20
    assert activations_mb > 3 * allowed
    assert peaks[1] - peaks[0] < allowed
