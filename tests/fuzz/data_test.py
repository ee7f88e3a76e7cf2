"""Images, TFRecord shards and folders of a dataset, damaged on disk."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies as st

import horovod_recipes.keras as hvd
from horovod_recipes.configs import demo
from horovod_recipes.data.pipeline import CorruptImages
from horovod_recipes.data.pipeline import RankInput
from horovod_recipes.data.pipeline import evaluation_batches
from horovod_recipes.data.sources import load_builder
from horovod_recipes.data.sources import load_source
from horovod_recipes.errors import JobError
from horovod_recipes.training.failures import explained
from tests.fuzz import fuzzing
from tests.fuzz.fuzzing import ERROR
from tests.fuzz.fuzzing import RIGHT
from tests.fuzz.fuzzing import tries

IMAGES = 6
SHARD = "mnist5k-test.tfrecord-00000-of-00001"


@pytest.fixture(scope="module", autouse=True)
def _one_rank():
    hvd.init()


def batches_of(source, split, corrupt_images, image_size):
    dataset = demo.get_config().dataset
    dataset.test_split, dataset.image_size = split, image_size
    rank_input = RankInput(
        rank=0,
        ranks=1,
        batch_size=IMAGES,
        threads=1,
        corrupt_images=corrupt_images,
    )
    return evaluation_batches(source, dataset, rank_input)


class Pipeline:
    """One pipeline, made once: each pass reads the files again."""

    def __init__(self, source, split, action, image_size=None):
        self._corrupt_images = CorruptImages(action)
        self._batches = batches_of(
            source, split, self._corrupt_images, image_size
        )

    def read(self):
        """Returns the images, the labels and the names that were skipped."""
        self._corrupt_images.names.clear()
        read = list(self._batches.as_numpy_iterator())
        images, labels = (
            np.concatenate(part) for part in zip(*read, strict=True)
        )
        return images, labels, set(self._corrupt_images.names)


def encoded_images():
    """Returns images of each format, of random noise."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (9, 12, 3), np.uint8)
    bitmap = (
        b"BM"
        + (54 + 324).to_bytes(4, "little")
        + bytes(4)
        + (54).to_bytes(4, "little")
        + (40).to_bytes(4, "little")
        + (12).to_bytes(4, "little")
        + (9).to_bytes(4, "little")
        + (1).to_bytes(2, "little")
        + (24).to_bytes(2, "little")
        + bytes(24)
        + pixels.tobytes()
    )
    return {
        "jpeg": tf.io.encode_jpeg(pixels).numpy(),
        "progressive": tf.io.encode_jpeg(pixels, progressive=True).numpy(),
        "grey": tf.io.encode_jpeg(pixels[..., :1]).numpy(),
        "png": tf.io.encode_png(pixels).numpy(),
        "alpha": tf.io.encode_png(
            np.concatenate([pixels, pixels[..., :1]], axis=-1)
        ).numpy(),
        "bmp": bitmap,
    }


ENCODED = encoded_images()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder dataset of two classes, and its pipelines."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, encoded in enumerate(ENCODED.values()):
        path = folder / "test" / f"class{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded)
    source = load_source("folder", str(folder))
    pipelines = {
        action: Pipeline(source, "test", action, image_size=8)
        for action in ("stop", "skip")
    }
    whole = pipelines["skip"].read()
    assert whole[2] == set()
    assert len(whole[0]) == IMAGES
    return sorted(folder.rglob("*.jpg")), pipelines, whole


@tries(
    full=400,
    short=6,
    data=st.data(),
    number=st.integers(0, IMAGES - 1),
    action=st.sampled_from(["stop", "skip"]),
)
def test_image(pictures, data, number, action):
    """The other images are as they were."""
    paths, pipelines, (images, labels, _) = pictures
    path = paths[number]
    before = path.read_bytes()
    path.write_bytes(data.draw(fuzzing.damaged(before, [*ENCODED.values()])))
    try:
        with fuzzing.captured() as printed, explained():
            read, read_labels, skipped = pipelines[action].read()
    except JobError as error:
        assert action == "stop"
        found = f"found a corrupt image: {path}; replace it"
        fuzzing.assert_clear(error, found)
        return ERROR
    finally:
        path.write_bytes(before)
    others = np.arange(IMAGES) != number
    if skipped:
        assert (action, skipped) == ("skip", {str(path)})
        assert printed() == [f"warning: skipped corrupt image {path}"]
        kept = np.ones(IMAGES - 1, bool)
        np.testing.assert_array_equal(read_labels, labels[others])
    else:
        assert printed() == []
        kept = others
        np.testing.assert_array_equal(read_labels, labels)
    np.testing.assert_array_equal(read[kept], images[others])
    return RIGHT


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    """The demo's dataset with a few test images, and its pipelines."""
    original = pathlib.Path(load_builder("mnist5k", None).data_path)
    folder = tmp_path_factory.mktemp("data")
    copy = folder / "mnist5k" / original.name
    copy.mkdir(parents=True)
    records = tf.data.TFRecordDataset(str(original / SHARD)).take(IMAGES)
    with tf.io.TFRecordWriter(str(copy / SHARD)) as writer:
        for record in records.as_numpy_iterator():
            writer.write(record)
    shutil.copy(original / "features.json", copy)
    for path in original.glob("*.labels.txt"):
        shutil.copy(path, copy)
    info = json.loads((original / "dataset_info.json").read_text())
    (split,) = (s for s in info["splits"] if s["name"] == "test")
    split["shardLengths"] = [str(IMAGES)]
    info["splits"] = [split]
    (copy / "dataset_info.json").write_text(json.dumps(info))
    source = load_source("mnist5k", str(folder))
    pipelines = {
        action: Pipeline(source, "test", action) for action in ("stop", "skip")
    }
    whole = pipelines["stop"].read()
    assert len(whole[0]) == IMAGES
    return copy, pipelines, whole


@tries(
    full=400,
    short=6,
    data=st.data(),
    action=st.sampled_from(["stop", "skip"]),
)
def test_shard(shard, data, action):
    """TFRecords have checksums, so a damaged shard is never read as another."""
    folder, pipelines, (images, labels, _) = shard
    path = folder / SHARD
    before = path.read_bytes()
    path.write_bytes(data.draw(fuzzing.damaged(before, [b"epoch,step\n1,4\n"])))
    try:
        with fuzzing.captured() as printed, explained():
            read, read_labels, skipped = pipelines[action].read()
    except JobError as error:
        fuzzing.assert_clear(error, SHARD)
        return ERROR
    finally:
        path.write_bytes(before)
    assert printed() == []
    assert skipped == set()
    np.testing.assert_array_equal(read, images)
    np.testing.assert_array_equal(read_labels, labels)
    return RIGHT


@st.composite
def examples(draw, whole):
    """Draws a record of another content, with the right checksum."""
    example = tf.train.Example.FromString(whole)
    features = example.features.feature
    kind = draw(st.sampled_from(["image", "label", "record", "lacks", "type"]))
    if kind == "image":
        image = features["image"].bytes_list.value
        image[0] = draw(fuzzing.damaged(image[0], [*ENCODED.values()]))
    elif kind == "label":
        label = draw(st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 12))
        features["label"].int64_list.value[0] = label
    elif kind == "record":
        return draw(fuzzing.damaged(whole))
    else:
        name = draw(st.sampled_from(["image", "label"]))
        del features[name]
        if kind == "type":
            features[name].float_list.value.append(1.5)
    return example.SerializeToString()


@tries(
    full=400,
    short=6,
    data=st.data(),
    number=st.integers(0, IMAGES - 1),
    action=st.sampled_from(["stop", "skip"]),
)
def test_record(shard, data, number, action):
    """A damaged record ends the job, or is left out; the others stay."""
    folder, pipelines, (images, labels, _) = shard
    path = folder / SHARD
    before = path.read_bytes()
    records = list(tf.data.TFRecordDataset(str(path)).as_numpy_iterator())
    records[number] = data.draw(examples(records[number]))
    with tf.io.TFRecordWriter(str(path)) as writer:
        for record in records:
            writer.write(record)
    try:
        with fuzzing.captured() as printed, explained():
            read, read_labels, skipped = pipelines[action].read()
    except JobError as error:
        is_parsed = "no example of TensorFlow" not in str(error)
        fuzzing.assert_clear(error, *([SHARD] if is_parsed else []))
        return ERROR
    finally:
        path.write_bytes(before)
    others = np.arange(IMAGES) != number
    if skipped:
        assert (action, skipped) == ("skip", {f"{SHARD}__{number}"})
        assert len(printed()) == 1
        np.testing.assert_array_equal(read, images[others])
        np.testing.assert_array_equal(read_labels, labels[others])
    else:
        np.testing.assert_array_equal(read[others], images[others])
        np.testing.assert_array_equal(read_labels[others], labels[others])
        assert 0 <= read_labels[number] < 10
    return RIGHT


INFO_FILES = ("dataset_info.json", "features.json")


@tries(full=2000, short=15, data=st.data(), name=st.sampled_from(INFO_FILES))
def test_description(shard, data, name):
    """The files beside the shards, which TFDS reads."""
    folder, _, _ = shard
    path = folder / name
    before = path.read_bytes()
    value = json.loads(before)
    content = st.one_of(
        fuzzing.damaged(before, [b"epoch,step\n1,4\n"]),
        fuzzing.OTHER_JSON.map(lambda value: json.dumps(value).encode()),
        st.sampled_from(sorted(value)).map(
            lambda key: json.dumps(value | {key: None}).encode()
        ),
    )
    path.write_bytes(data.draw(content))
    try:
        source = load_source("mnist5k", str(folder.parents[1]))
        source.num_examples("test")
        source.image_shape(None)
    except JobError as error:
        fuzzing.assert_clear(error)
        return ERROR
    finally:
        path.write_bytes(before)
    return RIGHT


names = st.sampled_from(
    ("a", "b", ".a", "__MACOSX", "a.jpg", "a.JPG", "b.png", "c.jpeg", "d.gif")
    + ("ü.jpg", "a b.jpg", "\udcff.jpg", "-.jpg", "x.jpg.jpg", "*.jpg")
)
trees = st.dictionaries(
    st.sampled_from(["train", "test", "dev", ".hidden", "a.jpg"]),
    st.dictionaries(names, st.dictionaries(names, st.booleans(), max_size=3))
    | st.none(),
    max_size=3,
)


def write_tree(folder, tree):
    """Writes folders, files of no content, and links to nowhere."""
    folder.mkdir()
    for name, value in tree.items():
        path = folder / name
        if isinstance(value, dict):
            write_tree(path, value)
        elif value is False:
            path.symlink_to("nowhere")
        else:
            path.touch()


@tries(full=1500, short=15, tree=trees, size=st.sampled_from([None, 8]))
def test_folder(tmp_path_factory, tree, size):
    folder = tmp_path_factory.getbasetemp() / "folder"
    shutil.rmtree(folder, ignore_errors=True)
    write_tree(folder, tree)
    try:
        source = load_source("folder", str(folder), ["train", "test"])
        assert isinstance(source.why_another_number(), str)
        source.image_shape(size)
        examples = [source.num_examples(split) for split in ("train", "test")]
    except JobError as error:
        fuzzing.assert_clear(error)
        return ERROR
    assert min(examples) > 0
    return RIGHT
