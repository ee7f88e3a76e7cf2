"""Sources of images: a TFDS dataset, or a folder with one folder per class.

`records` of a source reads a rank's shard from disk. `parse` turns a batch of
records into encoded images, labels and names.
"""

import pathlib

import tensorflow as tf
import tensorflow_datasets as tfds

import horovod_recipes.data.datasets  # noqa: F401  registers the builders
from horovod_recipes.errors import JobError
from horovod_recipes.errors import one_line
from horovod_recipes.errors import root_cause

# Files read in turns, which separates images that are neighbours in a file.
INTERLEAVED_FILES = 16
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


def load_source(name, data_dir, splits=None):
    """Returns the source of a dataset that is on disk.

    Args:
        name: String, a TFDS name such as `"mnist5k"`, or `"folder"` for images
            in `data_dir/SPLIT/CLASS/`.
        data_dir: String. For `"folder"`, the folder that holds the splits;
            otherwise TFDS's data folder, or None for its default.
        splits: List of strings, the splits of a `"folder"` whose classes
            count. Defaults to all.

    Raises:
        JobError: If the dataset is unknown or not on disk, or if it does not
            hold images with one class each.
    """
    if name == "folder":
        return FolderSource(data_dir, splits)
    return TfdsSource(load_builder(name, data_dir))


def load_builder(name, data_dir):
    """Returns the TFDS builder of a dataset that is on disk."""
    flag = f" --data_dir={data_dir}" if data_dir else ""
    builder = find_builder(name, data_dir)
    if not builder.is_prepared():
        raise JobError(
            f"the dataset {name!r} is not in {builder.data_path}; prepare it "
            f"with: python -m horovod_recipes.data {name}{flag} (or set "
            "TFDS_DATA_DIR to the folder that holds it)"
        )
    return builder


def find_builder(name, data_dir):
    """Returns the TFDS builder of a dataset, on disk or not."""
    try:
        return tfds.builder(name, data_dir=data_dir)
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        raise JobError(
            f"unknown dataset {name!r}: neither TFDS nor "
            f"horovod_recipes.data.datasets has it ({one_line(error)})"
        ) from None


class TfdsSource:
    """A TFDS image-classification dataset.

    Args:
        builder: From `load_builder`.
    """

    def __init__(self, builder):
        self._builder = builder
        self.name = builder.name
        features = builder.info.features
        self._image, self._label = builder.info.supervised_keys or (None, None)
        if (
            self._image not in features
            or not isinstance(features[self._image], tfds.features.Image)
            or not isinstance(features[self._label], tfds.features.ClassLabel)
        ):
            raise JobError(
                f"the dataset {self.name!r} does not hold images with one "
                "class each"
            )
        self.num_classes = features[self._label].num_classes

    def why_another_number(self):
        """Returns what to look at where a number is not as expected."""
        return "was an archive cut short when it was prepared?"

    def num_examples(self, split):
        """Returns the number of examples; raises `JobError` if it is 0."""
        splits = self._builder.info.splits
        if split not in splits or not splits[split].num_examples:
            raise JobError(
                f"the dataset {self.name!r} in {self._builder.data_path} has "
                f"no examples in split {split!r}; its splits: "
                f"{', '.join(splits) or 'none'}; was an archive missing when "
                "it was prepared?"
            )
        return splits[split].num_examples

    def image_shape(self, image_size):
        """Returns the shape that the model sees."""
        shape = self._builder.info.features[self._image].shape
        return _sized(shape, image_size, self.name)

    def records(self, split, rank, ranks, order=None):
        """Returns the records of a rank's shard as they are on disk.

        Args:
            split: String, the name of the split.
            rank: Integer, this rank.
            ranks: Integer, the number of ranks. Their shards are disjoint and
                cover the split.
            order: Scalar integer tensor, the seed that shuffles the files;
                None for the order on disk.

        Returns:
            A `tf.data.Dataset` with one tuple per example, for `parse`.
        """
        files = self._files(split, rank, ranks)
        # A shard may begin or end in the middle of a file.
        parts = tf.data.Dataset.from_tensor_slices(
            (
                [file.filename for file in files],
                tf.constant([file.skip for file in files], tf.int64),
                tf.constant([file.take for file in files], tf.int64),
            )
        )
        if order is not None:
            parts = parts.shuffle(len(files), seed=order)
        return parts.interleave(
            _read_part,
            cycle_length=INTERLEAVED_FILES,
            num_parallel_calls=tf.data.AUTOTUNE,
        )

    def damage(self, split, rank, ranks):
        """Returns the first damaged file of a rank's shard, or None.

        It reads the shard, up to that file.

        Returns:
            String, the path, and which record of it is damaged.
        """
        for file in self._files(split, rank, ranks):
            records = tf.data.TFRecordDataset(file.filename)
            try:
                # Reads all records, and makes no Python object of any.
                records.reduce(0, lambda count, _: count + 1)
            except tf.errors.DataLossError as error:
                return f"{file.filename}: {root_cause(error)}"
        return None

    def _files(self, split, rank, ranks):
        shard = self._builder.info.splits[tfds.even_splits(split, ranks)[rank]]
        return shard.file_instructions

    def parse(self, record, path, place):
        """Turns a batch of records into a batch of examples.

        Returns:
            A dict of `[batch]` tensors: `image`, the JPEG or PNG as a string;
            `label`, int64; and `name`, the file and the position in it.
        """
        example = tf.io.parse_example(
            record,
            {
                self._image: tf.io.FixedLenFeature([], tf.string),
                self._label: tf.io.FixedLenFeature([], tf.int64),
            },
        )
        file = tf.strings.regex_replace(path, ".*/", "")
        return {
            "image": example[self._image],
            "label": example[self._label],
            "name": tf.strings.join([file, "__", tf.strings.as_string(place)]),
        }


def _read_part(path, skip, take):
    """Returns `(record, path, position in the file)` for a part of a file.

    It zips datasets: a `map` per record would take longer than the reading.
    """
    return tf.data.Dataset.zip(
        tf.data.TFRecordDataset(path).skip(skip).take(take),
        tf.data.Dataset.from_tensors(path).repeat(),
        tf.data.Dataset.range(skip, tf.int64.max),
    )


class FolderSource:
    """Images in `folder/SPLIT/CLASS/NAME.jpg`, labelled by class folder.

    Hidden entries, whose names begin with a dot, and `__MACOSX` do not count.

    Args:
        folder: String. Labels number the sorted class names of its splits.
        splits: As for `load_source`.
    """

    name = "folder"

    def __init__(self, folder, splits=None):
        self._folder = pathlib.Path(folder or "")
        if not folder or not self._folder.is_dir():
            raise JobError(
                "dataset.data_dir must be a folder of images, SPLIT/CLASS/"
                f"NAME.jpg, but {folder!r} is not a folder"
            )
        folders = _visible(self._folder)
        if splits is not None:
            folders = [self._folder / split for split in splits]
        self._classes_of_splits = {
            split.name: {path.name for path in _visible(split) if path.is_dir()}
            for split in folders
            if split.is_dir()
        }
        self._classes = sorted(set().union(*self._classes_of_splits.values()))
        self.num_classes = len(self._classes)

    def why_another_number(self):
        """Returns what to look at where a number is not as expected."""
        notes = [f"its classes are {', '.join(self._classes) or 'none'}"]
        for split, classes in self._classes_of_splits.items():
            missing = sorted(set(self._classes) - classes)
            if missing:
                notes.append(f"{split} has no folder {', '.join(missing)}")
            filled = {path.parent.name for path in self._paths(split)}
            empty = sorted(classes - filled)
            if empty:
                notes.append(f"{split} has no image in {', '.join(empty)}")
        return f"{'; '.join(notes)}; does each folder belong there?"

    def num_examples(self, split):
        """Returns the number of images; raises `JobError` if it is 0."""
        count = len(self._paths(split))
        if not count:
            raise JobError(
                f"no images ({', '.join(IMAGE_SUFFIXES)}) in "
                f"{self._folder / split}/CLASS/"
            )
        return count

    def image_shape(self, image_size):
        """Returns the shape that the model sees."""
        return _sized((None, None, 3), image_size, self.name)

    def records(self, split, rank, ranks, order=None):
        """Returns the contents of a rank's files; see `TfdsSource.records`."""
        paths = self._paths(split)[rank::ranks]
        labels = [self._classes.index(path.parent.name) for path in paths]
        # As bytes, because a name may not be UTF-8.
        names = [bytes(path) for path in paths]
        files = tf.data.Dataset.from_tensor_slices(
            (names, tf.constant(labels, tf.int64))
        )
        if order is not None:
            files = files.shuffle(len(paths), seed=order)
        return files.map(
            lambda path, label: (_content(path), label, path),
            num_parallel_calls=tf.data.AUTOTUNE,
        )

    def damage(self, split, rank, ranks):
        """Returns None: only the records of TFDS have a checksum."""

    def parse(self, image, label, name):
        """Turns records into a batch of examples; see `TfdsSource.parse`."""
        return {"image": image, "label": label, "name": name}

    def _paths(self, split):
        return sorted(
            path
            for class_folder in _visible(self._folder / split)
            for path in _visible(class_folder)
            if path.suffix.lower() in IMAGE_SUFFIXES
        )


def _visible(folder):
    """Returns the entries of a folder that people put there; may be empty."""
    if not folder.is_dir():
        return []
    return [
        path
        for path in folder.iterdir()
        if not path.name.startswith(".") and path.name != "__MACOSX"
    ]


def _content(path):
    """Returns the content of a file, or an empty string if it is unreadable.

    An empty image is corrupt, and handled as such.
    """
    # A graph cannot catch errors. A dataset can drop a failed element.
    return (
        tf.data.Dataset.from_tensors(path)
        .map(tf.io.read_file)
        .ignore_errors()
        .concatenate(tf.data.Dataset.from_tensors(""))
        .take(1)
        .get_single_element()
    )


def _sized(shape, image_size, name):
    *size, channels = shape
    if image_size:
        size = [image_size, image_size]
    if None in size:
        raise JobError(
            f"the images of {name!r} differ in size; set dataset.image_size"
        )
    return (*size, channels)
