"""What the ranks see of the demo's real data."""

import collections

import numpy as np
import pytest
import tensorflow as tf

from horovod_recipes import input_pipeline
from horovod_recipes.errors import JobError
from tests.corrupt_dataset import write_corrupt_copy


@pytest.fixture(scope="module")
def builder():
    return input_pipeline.load_builder("mnist5k", None)


def training(builder, **arguments):
    defaults = dict(
        rank=0,
        ranks=2,
        batch_size=500,
        batches_per_epoch=4,
        first_epoch=0,
        augmentation=None,
        seed=0,
        corrupt_images=input_pipeline.CorruptImages("stop"),
    )
    return input_pipeline.training_batches(builder, **(defaults | arguments))


def evaluation(builder, rank, ranks, batch_size=500, split="test"):
    return input_pipeline.evaluation_batches(
        builder,
        split,
        rank,
        ranks,
        batch_size,
        input_pipeline.CorruptImages("stop"),
    )


def as_counter(batches):
    """Counts each image with its label."""
    return collections.Counter(
        (image.tobytes(), int(label))
        for images, labels in batches
        for image, label in zip(images.numpy(), labels.numpy(), strict=True)
    )


def test_batches_are_encoded_images_decoded(builder):
    images, labels = next(iter(training(builder)))
    assert images.shape == (500, 28, 28, 1)
    assert images.dtype == tf.uint8
    assert labels.dtype == tf.int64
    # Real digits: black paper, white ink.
    assert images.numpy().min() == 0
    assert images.numpy().max() == 255
    assert 20 < images.numpy().mean() < 50


def test_split_is_stratified(builder):
    for split, count in (("train", 400), ("test", 100)):
        labels = collections.Counter(
            label
            for _, labels in evaluation(builder, 0, 1, split=split)
            for label in labels.numpy().tolist()
        )
        assert labels == {digit: count for digit in range(10)}


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_evaluation_parts_are_disjoint_and_cover_all(builder, ranks):
    parts = [as_counter(evaluation(builder, r, ranks)) for r in range(ranks)]
    sizes = [part.total() for part in parts]
    assert sum(sizes) == 1000
    assert max(sizes) - min(sizes) <= 1
    whole = as_counter(evaluation(builder, 0, 1))
    assert sum(parts, collections.Counter()) == whole


def test_an_epoch_sees_each_training_image_once(builder):
    epochs = [
        as_counter(training(builder, rank=rank).take(4)) for rank in range(2)
    ]
    whole = as_counter(evaluation(builder, 0, 1, split="train"))
    assert whole.total() == 4000
    assert epochs[0] + epochs[1] == whole


def labels_of_epochs(builder, count, **arguments):
    batches = training(builder, **arguments).take(4 * count)
    labels = np.concatenate([labels.numpy() for _, labels in batches])
    return labels.reshape(count, 2000)


def test_order_changes_with_epoch_seed_and_rank(builder):
    first, second = labels_of_epochs(builder, 2)
    assert (first != second).any()
    assert (first != labels_of_epochs(builder, 1, seed=1)[0]).any()
    assert (first != labels_of_epochs(builder, 1, rank=1)[0]).any()


@pytest.mark.parametrize("global_seed", [None, 0, 5])
def test_resuming_at_an_epoch_sees_what_an_uninterrupted_run_sees(
    builder, global_seed
):
    augmentation = input_pipeline.random_affine
    whole = list(training(builder, augmentation=augmentation).take(8))[4:]
    tf.random.set_seed(global_seed)
    resumed = training(builder, augmentation=augmentation, first_epoch=1)
    for (images, labels), (other_images, other_labels) in zip(
        whole, resumed.take(4), strict=True
    ):
        np.testing.assert_array_equal(images, other_images)
        np.testing.assert_array_equal(labels, other_labels)


def test_random_affine_moves_a_little_and_keeps_the_ink():
    image = np.zeros((28, 28, 1), "uint8")
    image[10:18, 11:17] = 200
    centres, inks = [], []
    for seed in range(50):
        moved = input_pipeline.random_affine(tf.constant(image), [seed, 1])
        assert moved.dtype == tf.uint8
        moved = moved.numpy()[:, :, 0].astype(float)
        rows, columns = np.indices(moved.shape)
        ink = moved.sum()
        centres.append(
            [(rows * moved).sum() / ink, (columns * moved).sum() / ink]
        )
        inks.append(ink / image.sum())
    distances = np.abs(np.array(centres) - 13.5)
    assert distances.max() < 2.5
    assert distances.max() > 1.0
    assert 0.75 < min(inks) < 0.95 < 1.05 < max(inks) < 1.3


def test_corrupt_image_is_skipped_and_counted(builder, tmp_path, capsys):
    folder, names = write_corrupt_copy(tmp_path, "test", [3, 700])
    corrupt = input_pipeline.CorruptImages("skip")
    batches = input_pipeline.evaluation_batches(
        input_pipeline.load_builder("mnist5k", folder),
        "test",
        rank=0,
        ranks=1,
        batch_size=500,
        corrupt_images=corrupt,
    )
    for _ in range(2):
        assert sum(len(labels) for _, labels in batches) == 998
    assert corrupt.names == set(names)
    warnings = capsys.readouterr().err
    assert [warnings.count(name) for name in names] == [1, 1]


def test_skipped_images_are_made_up_for_within_the_epoch(tmp_path):
    folder, _ = write_corrupt_copy(tmp_path, "train", [3, 5])
    batches = training(
        input_pipeline.load_builder("mnist5k", folder),
        batch_size=2000,
        batches_per_epoch=1,
        corrupt_images=input_pipeline.CorruptImages("skip"),
    )
    for images, _ in batches.take(2):
        assert len(images) == 2000


def test_shard_without_enough_images_is_an_error_not_a_hang(builder):
    batches = training(builder, batch_size=4001, batches_per_epoch=1)
    with pytest.raises(tf.errors.InvalidArgumentError, match="too few images"):
        next(iter(batches))


def test_corrupt_image_stops_the_pipeline(tmp_path):
    folder, names = write_corrupt_copy(tmp_path, "train", [1500])
    builder = input_pipeline.load_builder("mnist5k", folder)
    corrupt = input_pipeline.CorruptImages("stop")
    with pytest.raises(tf.errors.InvalidArgumentError, match="corrupt image"):
        list(training(builder, corrupt_images=corrupt).take(4))
    assert corrupt.names == set(names)


def test_dataset_that_is_not_on_disk(tmp_path):
    with pytest.raises(JobError, match=r"-m horovod_recipes.datasets mnist5k"):
        input_pipeline.load_builder("mnist5k", str(tmp_path))


def test_unknown_dataset():
    with pytest.raises(JobError, match="unknown dataset 'nodigits'"):
        input_pipeline.load_builder("nodigits", None)
