"""A rehearsal: any ImageNet recipe, whole but small, on generated images.

Before a cluster is rented: JPEGs in tars as ImageNet has them, TFDS's real
builder, and a few updates of the recipe with small images and batches.
"""

import io
import pathlib
import tarfile

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

BATCH_PER_RANK = 8
MICRO_BATCH = 4
TEST_IMAGES = 32
TRAIN_IMAGES_PER_CLASS = 2
# The smallest that AlexNet takes.
IMAGE_SIZE = 67


def make_small(config, data_dir, ranks):
    """Changes a recipe's config, in place, to one that CPUs can run.

    The network and its optimizer stay; the schedule is 2 epochs, one of them
    to warm up if there was a warm-up, with the rate scaled to the small batch,
    linearly. The dataset, whatever it was, is what `write_dataset` writes.

    Args:
        config: The recipe's `ConfigDict`.
        data_dir: String, where `write_dataset` writes to.
        ranks: Integer, 7 at most: each takes 8 of the images at once.
    """
    classes = validation_classes()[:TEST_IMAGES]
    batch = BATCH_PER_RANK * ranks
    config.schedule.peak_learning_rate *= batch / config.global_batch_size
    config.schedule.warmup_epochs = min(1, config.schedule.warmup_epochs)
    config.update(
        global_batch_size=batch,
        max_micro_batch_size=MICRO_BATCH,
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
        image_size=IMAGE_SIZE,
    )


def write_dataset(data_dir):
    """Prepares TFDS's imagenet2012 from tars of generated JPEGs, once."""
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
    """Returns a JPEG of a size of its own: a colour, a gradient and noise."""
    height, width = rng.integers(70, 140, 2)
    ramp = np.linspace(-30, 30, width)[None, :, None]
    noise = rng.normal(0, 10, (height, width, 3))
    pixels = np.clip(colour + ramp + noise, 0, 255).astype(np.uint8)
    return tf.io.encode_jpeg(pixels).numpy()


def write_tars(folder, train, validation):
    """Writes images as the tars that ImageNet comes in.

    Args:
        folder: `pathlib.Path`, TFDS's folder for manual downloads.
        train: Dict of lists of JPEGs, bytes, by class, such as `"n01440764"`.
        validation: List of JPEGs; they are of the classes that
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
    """Returns the classes of ImageNet's validation images, in their order."""
    path = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt")
    return path.read_text().split()


def _add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
