"""Shards, labels and names from TFDS and folders; batches from a service."""

import collections
import os
import pathlib
import shutil
import sys
import tarfile

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from horovod_recipes.configs import demo
from horovod_recipes.configs._check import check_source
from horovod_recipes.data import pipeline
from horovod_recipes.data import sources
from horovod_recipes.data.__main__ import main as prepare
from horovod_recipes.data.named_errors import name_in
from horovod_recipes.errors import JobError
from horovod_recipes.training import rehearsal
from tests.horovod_recipes.data.common import rank_input
from tests.jobs.launcher import error_lines
from tests.jobs.launcher import run

TRAIN_IMAGES, TEST_IMAGES, FILES = 24, 16, 4
# The first three classes of ImageNet, in order of their names.
TRAIN_CLASSES = ("n01440764", "n01443537", "n01484850")


def encode(colour, size=8):
    pixels = np.full((size, size, 3), colour, np.uint8)
    return tf.io.encode_jpeg(pixels, quality=100).numpy()


def write_imagenet_tars(data_dir):
    """Writes ImageNet's tars, with one distinct grey per generated image."""
    rehearsal.write_tars(
        data_dir / "downloads" / "manual",
        {
            name: [encode(10 * (8 * c + i)) for i in range(8)]
            for c, name in enumerate(TRAIN_CLASSES)
        },
        [encode(10 * i) for i in range(TEST_IMAGES)],
    )


def digits(folder):
    """Returns a copy of the demo's dataset, and the path of its test shard."""
    original = pathlib.Path(sources.load_builder("mnist5k", None).data_path)
    copy = folder / "mnist5k" / original.name
    shutil.copytree(original, copy)
    return copy, copy / "mnist5k-test.tfrecord-00000-of-00001"


@pytest.mark.parametrize("damage", ["flipped", "cut", "shorter", "empty"])
def test_damaged_shard_is_named(tmp_path, damage):
    """Without an error, a shorter shard would be evaluated as the whole one."""
    _, shard = digits(tmp_path)
    content = bytearray(shard.read_bytes())
    # A record begins with its length in 8 bytes, and has 8 bytes more.
    first = 16 + int.from_bytes(content[:8], "little")
    if damage == "flipped":
        content[100] ^= 1
    shard.write_bytes(
        {
            "flipped": content,
            "cut": content[:-1],
            "shorter": content[first:],
            "empty": b"",
        }[damage]
    )
    source = sources.load_source("mnist5k", str(tmp_path))
    with pytest.raises(tf.errors.InvalidArgumentError) as error:
        examples(source, "test")
    assert name_in(error.value, sources.DAMAGED_SHARD) == str(shard)
    # The other split is whole.
    assert len(examples(source, "train")) == 4000


def test_record_that_lacks_a_part_is_named(tmp_path):
    _, shard = digits(tmp_path)
    records = list(tf.data.TFRecordDataset(str(shard)).as_numpy_iterator())
    example = tf.train.Example.FromString(records[7])
    del example.features.feature["image"]
    records[7] = example.SerializeToString()
    with tf.io.TFRecordWriter(str(shard)) as writer:
        for record in records:
            writer.write(record)
    source = sources.load_source("mnist5k", str(tmp_path))
    match = f"Name: {shard.name}__7, Feature: image .* is required"
    with pytest.raises(tf.errors.InvalidArgumentError, match=match):
        examples(source, "test")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("dataset_info.json", b""),
        ("dataset_info.json", b"\xe4"),
        ("dataset_info.json", b'{"name": "mnist5k"}'),
    ],
)
def test_damaged_description_is_refused(tmp_path, name, content):
    folder, _ = digits(tmp_path)
    (folder / name).write_bytes(content)
    match = "the dataset 'mnist5k'.* prepare it"
    with pytest.raises(JobError, match=match) as error:
        sources.load_source("mnist5k", str(tmp_path)).num_examples("test")
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("imagenet")
    write_imagenet_tars(data_dir)
    tfds.disable_progress_bar()
    builder = tfds.builder("imagenet2012", data_dir=data_dir)
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(num_shards=FILES)
    )
    assert builder.info.splits["train"].num_shards == FILES
    return sources.load_source("imagenet2012", str(data_dir))


def examples(source, split, rank=0, ranks=1, order=None):
    """Returns `(image, label, name)` for each example of a shard, in order."""
    return [
        (image, int(label), name.decode())
        for group in source.records(split, rank, ranks, order)
        .batch(5)
        .map(source.parse)
        .as_numpy_iterator()
        for image, label, name in zip(
            group["image"], group["label"], group["name"], strict=True
        )
    ]


def grey_of(image):
    """Returns the number of a generated image: its grey level / 10."""
    return round(float(tf.io.decode_image(image).numpy().mean()) / 10)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_shards_are_disjoint_and_cover_all(imagenet, split, ranks):
    shards = [examples(imagenet, split, rank, ranks) for rank in range(ranks)]
    sizes = [len(shard) for shard in shards]
    assert max(sizes) - min(sizes) <= 1
    assert sum(sizes) == imagenet.num_examples(split)
    whole = [example for shard in shards for example in shard]
    assert sorted(whole) == sorted(examples(imagenet, split))
    names = {name for _, _, name in whole}
    assert len(names) == len(whole)


def test_images_have_their_labels(imagenet):
    labels = {
        grey_of(image): label for image, label, _ in examples(imagenet, "train")
    }
    assert labels == {number: number // 8 for number in range(TRAIN_IMAGES)}
    names = rehearsal.validation_classes()[:TEST_IMAGES]
    index = {
        name: i
        for i, name in enumerate(sorted(set(rehearsal.validation_classes())))
    }
    labels = {
        grey_of(image): label
        for image, label, _ in examples(imagenet, "validation")
    }
    assert labels == {i: index[name] for i, name in enumerate(names)}
    assert imagenet.num_classes == 1000


def test_names_are_the_file_and_the_place_in_it(imagenet):
    for image, _, name in examples(imagenet, "train", rank=1, ranks=3):
        file, place = name.split("__")
        path = imagenet._builder.data_path / file
        record = list(tf.data.TFRecordDataset(str(path)))[int(place)].numpy()
        features = tf.train.Example.FromString(record).features.feature
        assert features["image"].bytes_list.value[0] == image


def test_order_of_the_files_depends_on_the_seed_alone(imagenet):
    def order(seed):
        return [
            name
            for _, _, name in examples(
                imagenet, "train", order=tf.constant(seed, tf.int64)
            )
        ]

    orders = [order(seed) for seed in range(1, 6)]
    assert order(1) == orders[0]
    assert len({tuple(names) for names in orders}) > 2
    assert all(sorted(names) == sorted(orders[0]) for names in orders)


def test_imagenet_needs_an_image_size(imagenet):
    assert imagenet.image_shape(67) == (67, 67, 3)
    with pytest.raises(JobError, match=r"set dataset\.image_size"):
        imagenet.image_shape(None)


def test_missing_split_is_refused(imagenet):
    match = r"no examples in split 'test'; its splits: train, validation"
    with pytest.raises(JobError, match=match):
        imagenet.num_examples("test")


class LabelsAlone(tfds.core.GeneratorBasedBuilder):
    """A dataset without images."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "text": tfds.features.Text(),
                    "label": tfds.features.ClassLabel(num_classes=2),
                }
            ),
            supervised_keys=("text", "label"),
        )

    def _split_generators(self, dl_manager):
        return {"train": [(0, {"text": "a", "label": 1})]}

    def _generate_examples(self):
        raise AssertionError("the splits are generators already")


def test_dataset_without_images_is_refused(tmp_path):
    builder = LabelsAlone(data_dir=tmp_path)
    builder.download_and_prepare()
    match = "'labels_alone' does not hold images"
    with pytest.raises(JobError, match=match):
        sources.TfdsSource(builder)


@pytest.fixture
def folder(tmp_path):
    """Returns a folder of three classes, where each split lacks one class."""
    for number, path in enumerate(
        [
            "train/cat/0.jpg",
            "train/cat/1.JPEG",
            "train/dog/2.jpg",
            "train/dog/3.jpg",
            "train/dog/4.jpg",
            "test/ant/5.jpg",
            "test/dog/6.jpg",
        ]
    ):
        path = tmp_path / "images" / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(10 * number))
    (tmp_path / "images" / "train" / "cat" / "notes.txt").write_text("no image")
    return tmp_path / "images"


def test_folder_has_the_classes_of_all_its_splits(folder):
    source = sources.load_source("folder", str(folder))
    assert source.num_classes == 3
    assert source.num_examples("train") == 5
    assert source.num_examples("test") == 2
    labels = [(name, label) for _, label, name in examples(source, "train")] + [
        (name, label) for _, label, name in examples(source, "test")
    ]
    classes = ["ant", "cat", "dog"]
    assert len(labels) == 7
    for name, label in labels:
        assert name.split("/")[-2] == classes[label]


def test_hidden_entries_are_neither_classes_nor_images(folder):
    for name in (
        "train/.ipynb_checkpoints/0.jpg",
        "train/__MACOSX/0.jpg",
        ".git/objects/0.jpg",
        "train/cat/._0.jpg",
        "train/dog/.hidden.png",
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    source = sources.load_source("folder", str(folder))
    assert source.num_classes == 3
    assert source.num_examples("train") == 5


def test_classes_are_those_of_the_configured_splits(folder):
    (folder / "old" / "zebra").mkdir(parents=True)
    source = sources.load_source("folder", str(folder), ["train"])
    assert source.num_classes == 2
    source = sources.load_source("folder", str(folder), ["train", "test"])
    assert source.num_classes == 3
    assert sources.load_source("folder", str(folder)).num_classes == 4


def test_error_about_a_folder_names_its_classes(folder):
    (folder / "train" / "empty").mkdir()
    config = demo.get_config()
    config.dataset.update(
        name="folder", num_classes=2, train_examples=5, test_examples=2
    )
    source = sources.load_source("folder", str(folder), ["train", "test"])
    with pytest.raises(JobError) as error:
        check_source(config, source)
    assert str(error.value) == (
        "the config has dataset.num_classes=2, but the dataset 'folder' on "
        "disk has 4: its classes are ant, cat, dog, empty; train has no folder "
        "ant; train has no image in empty; test has no folder cat, empty; does "
        "each folder belong there? To use it as it is: "
        "--config.dataset.num_classes=4"
    )


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_shards_of_a_folder_are_disjoint_and_cover_all(folder, ranks):
    source = sources.load_source("folder", str(folder))
    order = tf.constant(3, tf.int64)
    numbers = [
        [grey_of(i) for i, _, _ in examples(source, "train", r, ranks, order)]
        for r in range(ranks)
    ]
    whole = [number for shard in numbers for number in shard]
    assert sorted(whole) == [0, 1, 2, 3, 4]
    assert max(map(len, numbers)) - min(map(len, numbers)) <= 1


def test_missing_folder_or_folder_without_images_is_refused(folder):
    for path in (None, str(folder / "nowhere")):
        with pytest.raises(JobError, match=r"data_dir must be a folder"):
            sources.load_source("folder", path)
    source = sources.load_source("folder", str(folder))
    with pytest.raises(JobError, match=r"no images .* in .*/images/dev/CLASS"):
        source.num_examples("dev")


def training(source, **changes):
    config = demo.get_config().dataset
    config.update(augmentation="none", image_size=8)
    service = changes.pop("service", None)
    config.update(changes.pop("config", {}), service=service)
    return pipeline.training_batches(
        source,
        config,
        rank_input(batch_size=changes.pop("batch_size", 4)),
        **({"batches_per_epoch": 6} | changes),
    )


def test_error_names_a_file_that_is_not_an_image(folder):
    path = folder / "train" / "dog" / "7.jpg"
    path.write_text("no image")
    source = sources.load_source("folder", str(folder))
    match = f"corrupt image: {path}"
    with pytest.raises(tf.errors.InvalidArgumentError, match=match):
        next(iter(training(source, batch_size=6, batches_per_epoch=1)))


def batches_of(folder, corrupt_images):
    config = demo.get_config().dataset
    config.update(augmentation="none", image_size=8, test_split="test")
    return pipeline.evaluation_batches(
        sources.load_source("folder", str(folder)),
        config,
        rank_input(batch_size=4, corrupt_images=corrupt_images),
    )


# A name that is not UTF-8, one that TensorFlow quotes, and one of two lines.
STRANGE_NAMES = {
    b"\xff7.jpg": r"\xff7.jpg",
    b"a]b)'7\".jpg": "a]b)'7\".jpg",
    b"two\nlines.jpg": r"two\nlines.jpg",
}


@pytest.mark.parametrize("name", STRANGE_NAMES)
@pytest.mark.parametrize("action", ["stop", "skip"])
def test_any_name_of_a_corrupt_image_is_told(folder, name, action, capsys):
    path = os.path.join(os.fsencode(folder), b"test/dog", name)
    with open(path, "wb") as file:
        file.write(b"no image")
    corrupt_images = pipeline.CorruptImages(action)
    batches = batches_of(folder, corrupt_images)
    expected = f"{folder}/test/dog/{STRANGE_NAMES[name]}"
    if action == "skip":
        assert sum(len(labels) for _, labels in batches) == 2
        assert corrupt_images.names == {expected}
        assert capsys.readouterr().err == (
            f"warning: skipped corrupt image {expected}\n"
        )
        return
    with pytest.raises(tf.errors.InvalidArgumentError) as error:
        list(batches)
    assert name_in(error.value, pipeline.CORRUPT_IMAGE) == expected


@pytest.mark.parametrize("action", ["stop", "skip"])
def test_what_cannot_be_read_is_a_corrupt_image(folder, action):
    broken = folder / "test" / "dog" / "broken.jpg"
    broken.symlink_to(folder / "nowhere")
    (folder / "test" / "dog" / "folder.jpg").mkdir()
    corrupt_images = pipeline.CorruptImages(action)
    batches = batches_of(folder, corrupt_images)
    if action == "skip":
        assert sum(len(labels) for _, labels in batches) == 2
        assert len(corrupt_images.names) == 2
        return
    with pytest.raises(tf.errors.InvalidArgumentError) as error:
        list(batches)
    assert name_in(error.value, pipeline.CORRUPT_IMAGE) == str(broken)


def test_error_names_an_image_whose_label_is_out_of_range(folder):
    source = sources.load_source("folder", str(folder))
    source.num_classes = 2
    match = r"label out of the range 0 to 1: .*/train/dog/[234]\.jpg"
    with pytest.raises(tf.errors.InvalidArgumentError, match=match):
        next(iter(training(source, batch_size=5, batches_per_epoch=1)))


def start_service(workers):
    """Starts a tf.data service. It ends when its servers are deleted."""
    service = tf.data.experimental.service
    dispatcher = service.DispatchServer(service.DispatcherConfig(port=0))
    _, address = dispatcher.target.split("://")
    config = service.WorkerConfig(dispatcher_address=address, port=0)
    return dispatcher, [service.WorkerServer(config) for _ in range(workers)]


def as_arrays(batches):
    return [(images.numpy(), labels.numpy()) for images, labels in batches]


def test_jobs_of_a_service_get_their_own_batches(imagenet):
    dispatcher, _workers = start_service(1)
    seen = []
    for seed, first_epoch in ((0, 0), (1, 0), (0, 5)):
        arguments = dict(seed=seed, first_epoch=first_epoch)
        local = as_arrays(training(imagenet, **arguments).take(12))
        served = as_arrays(
            training(imagenet, service=dispatcher.target, **arguments).take(12)
        )
        for ours, theirs in zip(local, served, strict=True):
            np.testing.assert_array_equal(ours[0], theirs[0])
            np.testing.assert_array_equal(ours[1], theirs[1])
        seen.append(b"".join(images.tobytes() for images, _ in served))
    assert len(set(seen)) == 3


def test_workers_of_a_service_repeat_no_batch(imagenet):
    local = as_arrays(training(imagenet).take(200))
    epoch_of = {
        images.tobytes(): index // 6 for index, (images, _) in enumerate(local)
    }
    assert len(epoch_of) == 200
    dispatcher, _workers = start_service(2)
    served = as_arrays(training(imagenet, service=dispatcher.target).take(60))
    batches = [images.tobytes() for images, _ in served]
    assert len(set(batches)) == 60
    # Each worker may be within an epoch. All other epochs are complete.
    counts = collections.Counter(epoch_of[batch] for batch in batches)
    assert sum(count < 6 for count in counts.values()) <= 2


TRAIN_TAR = "ILSVRC2012_img_train.tar"
VALIDATION_TAR = "ILSVRC2012_img_val.tar"


def cut_within_an_image(path):
    with tarfile.open(path) as tar:
        member = tar.getmembers()[1]
    os.truncate(path, member.offset_data + member.size // 2)


def assert_refused(error, data_dir):
    """Checks the one-line error, and that no dataset counts as prepared."""
    assert error.startswith("error: cannot prepare imagenet2012: ")
    assert f"archive in {data_dir}/downloads/manual missing" in error
    assert "\n" not in error
    with pytest.raises(JobError, match="'imagenet2012' is not in"):
        sources.load_source("imagenet2012", str(data_dir))


@pytest.mark.parametrize(
    ("break_tars", "files"),
    [
        (os.remove, [TRAIN_TAR, VALIDATION_TAR]),
        (os.remove, [VALIDATION_TAR]),
        (cut_within_an_image, [TRAIN_TAR]),
        (cut_within_an_image, [VALIDATION_TAR]),
    ],
)
def test_missing_or_truncated_archives_are_refused(
    break_tars, files, tmp_path, capsys
):
    write_imagenet_tars(tmp_path)
    for file in files:
        break_tars(tmp_path / "downloads" / "manual" / file)
    capsys.readouterr()
    assert prepare(["imagenet2012", f"--data_dir={tmp_path}"]) == 1
    *_, error = capsys.readouterr().err.splitlines()
    assert_refused(error, tmp_path)


@pytest.mark.slow
def test_missing_folder_of_archives_is_refused(tmp_path):
    result = run(
        sys.executable,
        "-m",
        "horovod_recipes.data",
        "imagenet2012",
        f"--data_dir={tmp_path}",
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    (error,) = error_lines(result)
    assert_refused(error, tmp_path)
