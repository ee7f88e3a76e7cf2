"""Copies the demo's data, and makes images undecodable or a file damaged."""

import pathlib
import shutil

import tensorflow as tf

from horovod_recipes.data.sources import load_builder


def write_corrupt_copy(folder, split, indices):
    """Truncates the images at `indices` of a split.

    Returns:
        The TFDS data folder, a string, and the names of these images.
    """
    source = pathlib.Path(load_builder("mnist5k", None).data_path)
    target = pathlib.Path(folder, "mnist5k", source.name)
    shutil.copytree(source, target)
    name = f"mnist5k-{split}.tfrecord-00000-of-00001"
    records = [
        record.numpy() for record in tf.data.TFRecordDataset(str(source / name))
    ]
    with tf.io.TFRecordWriter(str(target / name)) as writer:
        for index, record in enumerate(records):
            if index in indices:
                example = tf.train.Example.FromString(record)
                image = example.features.feature["image"].bytes_list
                image.value[0] = image.value[0][:60]
                record = example.SerializeToString()
            writer.write(record)
    return str(folder), [f"{name}__{index}" for index in indices]


def damage(path):
    """Changes one byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
