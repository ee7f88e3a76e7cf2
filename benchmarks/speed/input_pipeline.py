"""How fast are images made for training, beside the JPEG decoder alone?

    python -m benchmarks.speed.input_pipeline

on one core, with 20 photos of ImageNet of 512 x 512 pixels, in TFRecords that
TFDS's imagenet2012 wrote. Time is the processor's, which other processes
disturb less than the clock. It also measures this process's memory over an
epoch.

Beside the decoder's time, an image's is that of resizing it, about a tenth of
the decoder's, and of TensorFlow's operations around it. So what can be is done
once for a group of images (`input_pipeline.GROUP_SIZE`). What was tried, by
scripts that are not kept. Faster: tf.reverse for flips in place of a slice with
a step of -1, resizing from float32 and not from uint8, by more than the cast
takes, seeds made for a group, and no test of each image for being a JPEG.
Slower: crop_and_resize, with or without its flip, ImageProjectiveTransformV3,
QuantizedResizeBilinear. No gain: the decoder's INTEGER_FAST and
fancy_upscaling=False.
"""

import os
import pathlib
import statistics
import tempfile
import time

import tensorflow as tf
import tensorflow_datasets as tfds
from absl import flags

from benchmarks import photos
from benchmarks.speed import report
from horovod_recipes.configs import resnet50
from horovod_recipes.data import pipeline
from horovod_recipes.data.augmentations import CROP_FRACTION
from horovod_recipes.data.sources import load_source
from horovod_recipes.training import rehearsal

# Of its own, because tests import all benchmarks into one process.
FLAGS = flags.FlagValues()
_ROUNDS = flags.DEFINE_integer(
    "rounds", 21, "Rounds.", lower_bound=2, flag_values=FLAGS
)
# Whole batches, and whole groups of input_pipeline.GROUP_SIZE.
_IMAGES = flags.DEFINE_integer(
    "images", 640, "Images in a round.", flag_values=FLAGS
)
_MEMORY_IMAGES = flags.DEFINE_integer(
    "memory_images", 8000, "Images of the epoch for memory.", flag_values=FLAGS
)
_OUTPUT = flags.DEFINE_string(
    "output",
    "docs/results/input_pipeline.json",
    "JSON to write.",
    flag_values=FLAGS,
)
SHAPE = (224, 224, 3)
COPIES = 100
FUSED = "fused decode and crop alone"


def write_photos(data_dir):
    """Prepares imagenet2012 with 100 copies of each photo."""
    jpegs = [path.read_bytes() for path in photos.fetch()]
    classes = rehearsal.validation_classes()[: len(jpegs)]
    train = {
        name: [jpeg] * COPIES
        for name, jpeg in zip(dict.fromkeys(classes), jpegs, strict=False)
    }
    folder = pathlib.Path(data_dir, "downloads", "manual")
    rehearsal.write_tars(folder, train, jpegs)
    tfds.disable_progress_bar()
    tfds.builder("imagenet2012", data_dir=data_dir).download_and_prepare()
    return jpegs


def decoders(jpegs):
    """Returns the limits: datasets of images that the decoder makes."""
    encoded = tf.data.Dataset.from_tensor_slices(jpegs).repeat()

    def fused(index, jpeg):
        size = tf.cast(tf.io.extract_jpeg_shape(jpeg)[:2], tf.float32)
        seed = tf.stack([tf.constant(0, tf.int64), index])
        corner = tf.raw_ops.StatelessRandomUniform(shape=[2], seed=seed)
        window = tf.concat(
            [(1 - CROP_FRACTION) * corner * size, CROP_FRACTION * size], axis=0
        )
        return tf.image.decode_and_crop_jpeg(
            jpeg, tf.cast(window, tf.int32), channels=3
        )

    return {
        "decode alone": encoded.map(tf.io.decode_jpeg),
        FUSED: encoded.enumerate().map(fused),
    }


def tfds_pipeline(data_dir):
    """Returns what a user of TFDS writes: decode, resize, batch."""
    builder = tfds.builder("imagenet2012", data_dir=data_dir)
    # Small sets it would keep in memory, decoded.
    read_config = tfds.ReadConfig(try_autocache=False)
    dataset = builder.as_dataset(
        split="train", as_supervised=True, read_config=read_config
    )
    return dataset.repeat().map(
        lambda image, label: (tf.image.resize(image, SHAPE[:2]), label)
    )


def our_pipeline(source, augmentation, batch_size):
    config = resnet50.get_config().dataset
    config.update(augmentation=augmentation, shuffle_buffer=64)
    return pipeline.training_batches(
        source,
        config,
        pipeline.RankInput(
            rank=0,
            ranks=1,
            batch_size=batch_size,
            threads=1,
            corrupt_images=pipeline.CorruptImages("stop"),
        ),
        batches_per_epoch=source.num_examples("train") // batch_size,
    )


def one_thread(dataset):
    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.threading.max_intra_op_parallelism = 1
    return dataset.with_options(options)


def images_per_second(datasets, images, batch_size, rounds):
    """Returns `{name: [images a second of processor time, a round each]}`."""
    speeds = {name: [] for name in datasets}
    for _ in range(rounds):
        for name, dataset in datasets.items():
            # A new one each time: what is fetched ahead would else be made in
            # the time of the others.
            iterator = iter(dataset)
            # What is made ahead is as much at the end as at the beginning.
            for _ in range(images // 5 // batch_size):
                next(iterator)
            begin = time.process_time()
            for _ in range(images // batch_size):
                next(iterator)
            seconds = time.process_time() - begin
            del iterator
            speeds[name].append(images / seconds)
    return speeds


def memory_over_an_epoch(dataset, images, batch_size):
    """Returns the mean resident MB of each quarter, after the first tenth."""
    pages = pathlib.Path("/proc/self/statm")
    samples = []
    for _ in dataset.take(images // batch_size):
        resident = int(pages.read_text().split()[1])
        samples.append(resident * os.sysconf("SC_PAGE_SIZE") / 2**20)
    samples = samples[len(samples) // 10 :]
    quarter = len(samples) // 4
    return [
        round(statistics.mean(samples[i * quarter : (i + 1) * quarter]), 1)
        for i in range(4)
    ]


def measure(rounds, images, memory_images):
    """Returns the benchmark's result; all runs on one core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    batch_size = 10
    with tempfile.TemporaryDirectory() as data_dir:
        jpegs = write_photos(data_dir)
        source = load_source("imagenet2012", data_dir)
        # Batches of the limits have no cost: a batch would copy the images.
        datasets = {
            name: one_thread(dataset.shard(batch_size, 0))
            for name, dataset in decoders(jpegs).items()
        }
        datasets["TFDS, decode, resize"] = one_thread(
            tfds_pipeline(data_dir).batch(batch_size)
        )
        for augmentation in ("none", "minimal", "inception"):
            datasets[f"ours, {augmentation}"] = our_pipeline(
                source, augmentation, batch_size
            )
        speeds = images_per_second(datasets, images, batch_size, rounds)
        memory = memory_over_an_epoch(
            our_pipeline(source, "minimal", batch_size),
            memory_images,
            batch_size,
        )
    os.sched_setaffinity(0, cores)
    ratios = {
        name: [a / b for a, b in zip(values, speeds[FUSED], strict=True)]
        for name, values in speeds.items()
    }
    return {
        "machine": report.machine(),
        "photos": len(jpegs),
        "rounds": rounds,
        "images_per_second_of_one_core": {
            name: report.spread(values, 1) for name, values in speeds.items()
        },
        "ratio_to_fused_decode_and_crop": {
            name: report.spread(values) for name, values in ratios.items()
        },
        "memory_mb_of_each_quarter_of_an_epoch": memory,
        "memory_images": memory_images,
    }


def markdown(result):
    """Returns the table of a result, and its memory."""
    ratios = result["ratio_to_fused_decode_and_crop"]
    rows = [
        [name, report.cell(speed), report.cell(ratios[name])]
        for name, speed in result["images_per_second_of_one_core"].items()
    ]
    header = ["", "images/s of a core", "x fused decode and crop"]
    quarters = result["memory_mb_of_each_quarter_of_an_epoch"]
    return (
        f"One core, {result['photos']} photos, medians of {result['rounds']} "
        f"rounds with quartiles:\n\n{report.table(header, rows)}\n\n"
        f"Memory in each quarter of an epoch of {result['memory_images']} "
        f"images, MB: {', '.join(map(str, quarters))}."
    )


def draw(result, path):
    report.draw_bars(
        {"one core": result["ratio_to_fused_decode_and_crop"]},
        f"images/s over those of {FUSED}",
        path,
    )


def main():
    report.parse_command_line(FLAGS)
    result = measure(_ROUNDS.value, _IMAGES.value, _MEMORY_IMAGES.value)
    print(markdown(result))
    report.write_json(_OUTPUT.value, result)


if __name__ == "__main__":
    main()
