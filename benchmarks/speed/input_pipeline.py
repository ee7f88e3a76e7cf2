"""How fast are images made for training, beside the JPEG decoder alone?

    python -m benchmarks.speed.input_pipeline

It measures one core on 20 photos of ImageNet with 512 x 512 pixels. TFDS's
imagenet2012 has written them as TFRecords. The time is the processor's, which
other processes disturb less than the clock. The memory of this process is
measured over an epoch. It takes 6 minutes, and downloads the photos.

An image takes the decoder's time, a tenth of that to resize, and the time of
TensorFlow's operations. So the pipeline handles groups of images at once if it
can (`pipeline.IMAGES_PER_GROUP`). Scripts that are not kept tried these:

- Faster: `tf.reverse` to flip, instead of a slice with a step of -1; resizing
  from float32 instead of uint8, even with the cast; seeds for a whole group; no
  test whether each image is a JPEG.
- Slower: `crop_and_resize`, `ImageProjectiveTransformV3`, `ScaleAndTranslate`,
  `QuantizedResizeBilinear`, and resizing to the nearest pixel.
- No gain: the decoder's `INTEGER_FAST` and `fancy_upscaling=False`; batches
  that are not copied from groups; no `ignore_errors`.

Without the resize, an image took 2 to 5 % longer than the decoder alone.
"""

import os
import pathlib
import statistics
import tempfile
import time

import tensorflow as tf
import tensorflow_datasets as tfds

from benchmarks import _measure
from benchmarks import _results
from benchmarks import photos
from horovod_recipes.configs import resnet50
from horovod_recipes.data import pipeline
from horovod_recipes.data.augmentations import CROP_FRACTION
from horovod_recipes.data.sources import load_source
from horovod_recipes.training import rehearsal

# Height, width and channels of the images that the pipelines make.
SHAPE = (224, 224, 3)
# Copies of each photo in the data set.
COPIES = 100
# Images per batch.
BATCH_SIZE = 10
FUSED = "fused decode and crop alone"
MIB = 2**20


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
    """Returns the limits: datasets of images from the decoder alone."""
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
    """Returns what a user of TFDS writes: decode and resize."""
    builder = tfds.builder("imagenet2012", data_dir=data_dir)
    # TFDS would keep a small set in memory, decoded.
    read_config = tfds.ReadConfig(try_autocache=False)
    dataset = builder.as_dataset(
        split="train", as_supervised=True, read_config=read_config
    )
    return dataset.repeat().map(
        lambda image, label: (tf.image.resize(image, SHAPE[:2]), label)
    )


def our_pipeline(source, augmentation):
    config = resnet50.get_config().dataset
    config.update(augmentation=augmentation, shuffle_buffer=64)
    return pipeline.training_batches(
        source,
        config,
        pipeline.RankInput(
            rank=0,
            ranks=1,
            batch_size=BATCH_SIZE,
            threads=1,
            corrupt_images=pipeline.CorruptImages("stop"),
        ),
        batches_per_epoch=source.num_examples("train") // BATCH_SIZE,
    )


def one_thread(dataset):
    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.threading.max_intra_op_parallelism = 1
    return dataset.with_options(options)


def images_per_second(datasets, images, rounds):
    """Returns `{name: [images per second of the processor, each round]}`."""
    speeds = {name: [] for name in datasets}
    for _ in range(rounds):
        for name, dataset in datasets.items():
            # A kept iterator would fetch ahead in the time of the others.
            iterator = iter(dataset)
            # Fill the buffers, which are as full at the end.
            for _ in range(images // 5 // BATCH_SIZE):
                next(iterator)
            begin = time.process_time()
            for _ in range(images // BATCH_SIZE):
                next(iterator)
            seconds = time.process_time() - begin
            del iterator
            speeds[name].append(images / seconds)
    return speeds


def memory_over_an_epoch(dataset, images):
    """Returns the mean resident MiB of each quarter, after the first tenth."""
    samples = [
        _measure.memory_bytes("VmRSS") / MIB
        for _ in dataset.take(images // BATCH_SIZE)
    ]
    samples = samples[len(samples) // 10 :]
    quarter = len(samples) // 4
    return [
        round(statistics.mean(samples[i * quarter : (i + 1) * quarter]), 1)
        for i in range(4)
    ]


def measure(rounds, images, memory_images):
    """Returns the benchmark's result; everything runs on one core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    with tempfile.TemporaryDirectory() as data_dir:
        jpegs = write_photos(data_dir)
        source = load_source("imagenet2012", data_dir)
        # One image stands for a batch, because a batch would copy images.
        datasets = {
            name: one_thread(dataset.shard(BATCH_SIZE, 0))
            for name, dataset in decoders(jpegs).items()
        }
        datasets["TFDS, decode, resize"] = one_thread(
            tfds_pipeline(data_dir).batch(BATCH_SIZE)
        )
        for augmentation in ("none", "minimal", "inception"):
            datasets[f"ours, {augmentation}"] = our_pipeline(
                source, augmentation
            )
        speeds = images_per_second(datasets, images, rounds)
        memory = memory_over_an_epoch(
            our_pipeline(source, "minimal"), memory_images
        )
    os.sched_setaffinity(0, cores)
    return {
        "machine": _measure.machine(),
        "photos": len(jpegs),
        "rounds": rounds,
        "images_per_second_of_one_core": {
            name: _measure.spread(values, 1) for name, values in speeds.items()
        },
        "ratio_to_fused_decode_and_crop": {
            name: _measure.spread_of_ratios(values, speeds[FUSED])
            for name, values in speeds.items()
        },
        "memory_mib_of_each_quarter_of_an_epoch": memory,
        "memory_images": memory_images,
    }


def markdown(result):
    """Returns the table of a result, and its memory."""
    ratios = result["ratio_to_fused_decode_and_crop"]
    rows = [
        [name, _results.cell(speed), _results.cell(ratios[name])]
        for name, speed in result["images_per_second_of_one_core"].items()
    ]
    header = ["", "images/s of a core", "x fused decode and crop"]
    quarters = result["memory_mib_of_each_quarter_of_an_epoch"]
    return (
        f"One core, {result['photos']} photos, medians of {result['rounds']} "
        f"rounds with quartiles:\n\n{_results.table(header, rows)}\n\n"
        f"Memory in each quarter of an epoch of {result['memory_images']} "
        f"images, MiB: {', '.join(map(str, quarters))}."
    )


def draw(result, path):
    _results.draw_bars(
        {"one core": result["ratio_to_fused_decode_and_crop"]},
        f"images/s relative to {FUSED}",
        path,
    )


def main():
    parser = _results.parser(
        __spec__, __doc__, "docs/results/input_pipeline.json"
    )
    _results.add_rounds(parser, 21)
    # Whole batches, and whole groups of the pipeline.
    _results.add_integer(parser, "images", 640, "images per round")
    _results.add_integer(
        parser, "memory_images", 8000, "images of the epoch for memory"
    )
    options = parser.parse_args()
    result = measure(options.rounds, options.images, options.memory_images)
    print(markdown(result))
    _results.write_json(options.output, result)


if __name__ == "__main__":
    main()
