"""The batches that each rank gets from the demo's real data."""

import collections

import numpy as np
import pytest
import tensorflow as tf

from horovod_recipes.configs import demo
from horovod_recipes.data import augmentations
from horovod_recipes.data import pipeline
from horovod_recipes.data.sources import load_source
from horovod_recipes.errors import JobError
from tests.corrupt_dataset import write_corrupt_copy
from tests.horovod_recipes.data.common import rank_input


@pytest.fixture(scope="module")
def source():
    return load_source("mnist5k", None)


def dataset_config(**changes):
    config = demo.get_config().dataset
    config.augmentation = "none"
    config.update(changes)
    return config


def training(source, changes=(), **arguments):
    of_rank = {
        name: arguments.pop(name)
        for name in ("rank", "ranks", "batch_size", "corrupt_images")
        if name in arguments
    }
    return pipeline.training_batches(
        source,
        dataset_config(**dict(changes)),
        rank_input(**({"ranks": 2} | of_rank)),
        **({"batches_per_epoch": 4} | arguments),
    )


def evaluation(source, rank, ranks, batch_size=500, **changes):
    return pipeline.evaluation_batches(
        source, dataset_config(**changes), rank_input(rank, ranks, batch_size)
    )


def as_counter(batches):
    """Returns how often each pair of image and label occurs."""
    return collections.Counter(
        (image.tobytes(), int(label))
        for images, labels in batches
        for image, label in zip(images.numpy(), labels.numpy(), strict=True)
    )


def test_batches_are_encoded_images_decoded(source):
    images, labels = next(iter(training(source)))
    assert images.shape == (500, 28, 28, 1)
    assert images.dtype == tf.uint8
    assert labels.dtype == tf.int64
    # The digits are white on black.
    assert images.numpy().min() == 0
    assert images.numpy().max() == 255
    assert 20 < images.numpy().mean() < 50


def test_nothing_is_tuned_from_a_thread_that_sleeps(source):
    """With autotuning, each evaluation and job could end a minute late."""
    for batches in training(source), evaluation(source, rank=0, ranks=1):
        assert batches.options().autotune.enabled is False


def test_split_is_stratified(source):
    for split, count in (("train", 400), ("test", 100)):
        labels = collections.Counter(
            label
            for _, labels in evaluation(source, 0, 1, test_split=split)
            for label in labels.numpy().tolist()
        )
        assert labels == {digit: count for digit in range(10)}


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_evaluation_parts_are_disjoint_and_cover_all(source, ranks):
    parts = [as_counter(evaluation(source, r, ranks)) for r in range(ranks)]
    sizes = [part.total() for part in parts]
    assert sum(sizes) == 1000
    assert max(sizes) - min(sizes) <= 1
    whole = as_counter(evaluation(source, 0, 1))
    assert sum(parts, collections.Counter()) == whole


def test_an_epoch_sees_each_training_image_once(source):
    epochs = [
        as_counter(training(source, rank=rank).take(4)) for rank in range(2)
    ]
    whole = as_counter(evaluation(source, 0, 1, test_split="train"))
    assert whole.total() == 4000
    assert epochs[0] + epochs[1] == whole


def labels_of_epochs(source, count, **arguments):
    batches = training(source, **arguments).take(4 * count)
    labels = np.concatenate([labels.numpy() for _, labels in batches])
    return labels.reshape(count, 2000)


def test_order_changes_with_epoch_seed_and_rank(source):
    first, second = labels_of_epochs(source, 2)
    assert (first != second).any()
    assert (first != labels_of_epochs(source, 1, seed=1)[0]).any()
    assert (first != labels_of_epochs(source, 1, rank=1)[0]).any()


@pytest.mark.parametrize(
    ("global_seed", "action", "cache"),
    [
        (None, "stop", False),
        (0, "skip", False),
        (5, "stop", False),
        (None, "stop", True),
        (None, "skip", True),
    ],
)
def test_resuming_at_a_step_sees_what_an_uninterrupted_run_sees(
    source, global_seed, action, cache
):
    changes = {"augmentation": "random_affine", "cache": cache}
    corrupt = pipeline.CorruptImages(action)
    whole = list(training(source, changes, corrupt_images=corrupt).take(10))
    tf.random.set_seed(global_seed)
    resumed = training(
        source, changes, first_epoch=1, first_batch=2, corrupt_images=corrupt
    )
    for (images, labels), (other_images, other_labels) in zip(
        whole[6:], resumed.take(4), strict=True
    ):
        np.testing.assert_array_equal(images, other_images)
        np.testing.assert_array_equal(labels, other_labels)


def test_random_affine_moves_a_little_and_keeps_the_ink():
    image = np.zeros((28, 28, 1), "uint8")
    image[10:18, 11:17] = 200
    encoded = tf.io.encode_png(image)
    centres, inks = [], []
    for seed in range(50):
        moved = augmentations.random_affine(encoded, [seed, 1], (28, 28, 1))
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


def test_corrupt_image_is_skipped_and_counted(source, tmp_path, capsys):
    folder, names = write_corrupt_copy(tmp_path, "test", [3, 700])
    corrupt = pipeline.CorruptImages("skip")
    batches = pipeline.evaluation_batches(
        load_source("mnist5k", folder),
        dataset_config(),
        rank_input(corrupt_images=corrupt),
    )
    for _ in range(2):
        assert sum(len(labels) for _, labels in batches) == 998
    assert corrupt.names == set(names)
    warnings = capsys.readouterr().err
    assert [warnings.count(name) for name in names] == [1, 1]


def photos_of_greys(folder, corrupt):
    """Writes 40 images. Every eighth is a PNG whose name ends in .jpg."""
    (folder / "test" / "grey").mkdir(parents=True)
    for number in range(40):
        pixels = np.full((8, 8, 3), 6 * number, np.uint8)
        encode = tf.io.encode_png if number % 8 == 7 else tf.io.encode_jpeg
        encoded = encode(pixels).numpy()
        path = folder / "test" / "grey" / f"{number:02d}.jpg"
        path.write_bytes(b"" if number in corrupt else encoded)
    return load_source("folder", str(folder))


# A group has 32 images: all good, a corrupt one at each end, or none good.
@pytest.mark.parametrize("corrupt", [[], [0, 31, 39], range(32, 40)])
def test_groups_of_jpegs_and_pngs_and_corrupt_images(tmp_path, corrupt):
    action = pipeline.CorruptImages("skip")
    batches = pipeline.evaluation_batches(
        photos_of_greys(tmp_path, corrupt),
        dataset_config(test_split="test", image_size=8),
        rank_input(batch_size=7, corrupt_images=action),
    )
    sizes, greys = [], []
    for images, labels in batches:
        sizes.append(len(labels))
        greys += [round(grey / 6) for grey in images.numpy().mean((1, 2, 3))]
    good = [number for number in range(40) if number not in corrupt]
    assert greys == good
    assert set(sizes[:-1]) == {7}
    assert len(action.names) == len(corrupt)


def test_skipped_images_are_replaced_within_the_epoch(tmp_path):
    folder, _ = write_corrupt_copy(tmp_path, "train", [3, 5])
    batches = training(
        load_source("mnist5k", folder),
        batch_size=2000,
        batches_per_epoch=1,
        corrupt_images=pipeline.CorruptImages("skip"),
    )
    for images, _ in batches.take(2):
        assert len(images) == 2000


def test_shard_without_enough_images_is_an_error_not_a_hang(source):
    batches = training(source, batch_size=4001, batches_per_epoch=1)
    with pytest.raises(tf.errors.InvalidArgumentError, match="too few images"):
        next(iter(batches))


def test_corrupt_image_stops_the_pipeline(tmp_path):
    folder, (name,) = write_corrupt_copy(tmp_path, "train", [1500])
    source = load_source("mnist5k", folder)
    match = f"corrupt image: {name}"
    with pytest.raises(tf.errors.InvalidArgumentError, match=match):
        list(training(source).take(4))


def test_dataset_that_is_not_on_disk(tmp_path):
    with pytest.raises(JobError, match=r"-m horovod_recipes.data mnist5k"):
        load_source("mnist5k", str(tmp_path))


def test_unknown_dataset():
    with pytest.raises(JobError, match="unknown dataset 'nodigits'"):
        load_source("nodigits", None)


def test_views_of_an_image(source):
    """Two random views, the same in a resumed job, with their own crops."""
    changes = {"augmentation": "simclr_digits"}
    first = list(training(source, changes, views=2).take(3).as_numpy_iterator())
    for images, labels in first:
        assert images.shape == (500, 2, 28, 28, 1)
        assert images.dtype == np.uint8
        assert labels.shape == (500,)
        different = np.any(images[:, 0] != images[:, 1], axis=(1, 2, 3))
        assert different.mean() > 0.99
    resumed = training(source, changes, views=2, first_batch=2)
    for a, b in zip(first[2], next(iter(resumed)), strict=True):
        np.testing.assert_array_equal(a, b)
    # Without an augmentation, each view is the image itself.
    images, _ = next(iter(training(source, views=2)))
    alone, _ = next(iter(training(source)))
    np.testing.assert_array_equal(images[:, 0], alone)
    np.testing.assert_array_equal(images[:, 1], alone)
