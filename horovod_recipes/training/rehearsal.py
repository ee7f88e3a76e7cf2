"""Rehearses an ImageNet recipe on generated images, before you rent a cluster.

A rehearsal writes JPEGs into tars like ImageNet's, and prepares them with
TFDS's real builder. Then it trains two short epochs of the recipe, with small
images and small batches.
"""

import io
import pathlib
import tarfile

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from horovod_recipes.models.alexnet import SMALLEST_SIDE_PIXELS

IMAGES_PER_RANK = 4
IMAGES_PER_MICRO_BATCH = 2
TEST_IMAGES = 32
TRAIN_IMAGES_PER_CLASS = 1


def make_small(config, data_dir, ranks):
    """Changes a recipe's config in place, so that CPUs can run it.

    The network and its optimizer stay. The schedule has 2 epochs, and its rate
    is scaled linearly to the small batch. The first epoch is the warm-up if the
    recipe has one. The dataset becomes the one that `write_dataset` writes.

    Args:
        config: The recipe's `ConfigDict`.
        data_dir: String, the folder that `write_dataset` writes to.
        ranks: Integer, the number of ranks, at most 7. The images do not fill
            a larger batch.
    """
    classes = validation_classes()[:TEST_IMAGES]
    batch = IMAGES_PER_RANK * ranks
    config.schedule.peak_learning_rate *= batch / config.global_batch_size
    config.schedule.warmup_epochs = min(1, config.schedule.warmup_epochs)
    config.update(
        global_batch_size=batch,
        max_micro_batch_size=IMAGES_PER_MICRO_BATCH,
        epochs=2,
        evaluate_every_epochs=1,
        checkpoint_every_epochs=1,
        log_trust_ratios_every_steps=1,
        check_replicas_every_steps=1,
    )
    config.dataset.update(
        name="imagenet2012",
        data_dir=str(data_dir),
        train_split="train",
        test_split="validation",
        num_classes=1000,
        train_examples=len(set(classes)) * TRAIN_IMAGES_PER_CLASS,
        test_examples=TEST_IMAGES,
        image_size=SMALLEST_SIDE_PIXELS,
    )


def write_dataset(data_dir):
    """Prepares TFDS's imagenet2012 from generated JPEGs, unless it is there."""
    builder = tfds.builder("imagenet2012", data_dir=data_dir)
    if builder.is_prepared():
        return
    rng = np.random.default_rng(0)
    classes = validation_classes()[:TEST_IMAGES]
    colours = {name: rng.integers(40, 216, 3) for name in classes}
    write_tars(
        pathlib.Path(data_dir, "downloads", "manual"),
        {
            name: [
                generated_jpeg(colour, rng)
                for _ in range(TRAIN_IMAGES_PER_CLASS)
            ]
            for name, colour in colours.items()
        },
        [generated_jpeg(colours[name], rng) for name in classes],
    )
    tfds.disable_progress_bar()
    builder.download_and_prepare()


def generated_jpeg(colour, rng):
    """Returns a JPEG of random size, with a colour, a gradient and noise."""
    height, width = rng.integers(70, 140, 2)
    ramp = np.linspace(-30, 30, width)[None, :, None]
    noise = rng.normal(0, 10, (height, width, 3))
    pixels = np.clip(colour + ramp + noise, 0, 255).astype(np.uint8)
    return tf.io.encode_jpeg(pixels).numpy()


def write_tars(folder, train, validation):
    """Writes images into tars with the names and layout of ImageNet's.

    Args:
        folder: `pathlib.Path`, TFDS's folder for manual downloads.
        train: Dict from class names, such as `"n01440764"`, to lists of JPEGs
            as bytes.
        validation: List of JPEGs as bytes. Their classes are those that
            `validation_classes` returns.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as tar:
        for name, images in train.items():
            class_tar = io.BytesIO()
            with tarfile.open(fileobj=class_tar, mode="w") as inner:
                for number, image in enumerate(images):
                    _add(inner, f"{name}_{number}.JPEG", image)
            _add(tar, f"{name}.tar", class_tar.getvalue())
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as tar:
        for number, image in enumerate(validation, start=1):
            _add(tar, f"ILSVRC2012_val_{number:08d}.JPEG", image)


def validation_classes():
    """Returns the class of each ImageNet validation image, in their order."""
    path = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt")
    return path.read_text().split()


def _add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
