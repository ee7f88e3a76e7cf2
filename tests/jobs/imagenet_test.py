"""ImageNet's recipes as whole jobs on two ranks, from tars of real JPEGs.

TFDS's imagenet2012 builder reads the tars. A small ResNet trains, stops at a
SIGTERM, resumes, and is evaluated. Rehearsals run the whole networks.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_lars  # noqa: F401  to load its optimizer
from benchmarks import photos
from horovod_recipes.configs import resnet50
from horovod_recipes.data import pipeline
from horovod_recipes.data.sources import load_source
from horovod_recipes.training import rehearsal
from tests.jobs.launcher import HOROVODRUN
from tests.jobs.launcher import TRAIN
from tests.jobs.launcher import TWO_RANKS
from tests.jobs.launcher import error_lines
from tests.jobs.launcher import python
from tests.jobs.launcher import run
from tests.jobs.launcher import run_until_sigterm
from tests.jobs.results import checkpoint
from tests.jobs.results import read_metrics
from tests.jobs.results import read_summary

CROPS = 8
# The classes of the validation images, in their order.
LABELS = rehearsal.validation_classes()[:20]
CLASSES = list(dict.fromkeys(LABELS))
EPOCHS = 12
STEPS = EPOCHS * (CROPS * len(CLASSES) // 32)
IMAGE_SIZE = 64

SMALL_RESNET = f"""
from horovod_recipes.configs import resnet50


def get_config():
    config = resnet50.get_config("32k")
    config.model.update(stage_blocks=(1, 1, 1, 1), width=16)
    config.dataset.update(
        train_examples={CROPS * len(CLASSES)},
        test_examples={len(LABELS)},
        image_size={IMAGE_SIZE},
    )
    config.update(
        global_batch_size=32, max_micro_batch_size=8, epochs={EPOCHS}
    )
    config.schedule.update(peak_learning_rate=2.0, warmup_epochs=1)
    return config
"""


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Crops of a photo per class, prepared by the documented command."""
    data_dir = tmp_path_factory.mktemp("imagenet")
    rng = np.random.default_rng(0)
    pictures = dict(zip(CLASSES, photos.fetch(), strict=False))
    train = {
        name: [random_crop(path, rng) for _ in range(CROPS)]
        for name, path in pictures.items()
    }
    validation = [random_crop(pictures[name], rng) for name in LABELS]
    rehearsal.write_tars(data_dir / "downloads" / "manual", train, validation)
    command = python("horovod_recipes.data", "imagenet2012")
    result = run(*command, f"--data_dir={data_dir}")
    assert result.returncode == 0, result.stderr
    return data_dir


def random_crop(path, rng):
    """Returns a JPEG of random size with a random part of a photo."""
    side = int(rng.integers(300, 512))
    top, left = rng.integers(0, 512 - side, 2)
    image = tf.io.decode_and_crop_jpeg(
        path.read_bytes(), [top, left, side, side]
    )
    image = tf.image.resize(image, [int(rng.integers(80, 120))] * 2)
    return tf.io.encode_jpeg(tf.cast(image, tf.uint8)).numpy()


# Keras prints this for every dataset whose length is unknown.
@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_from_tars_to_top1(data_dir, tmp_path):
    config = tmp_path / "small_resnet.py"
    config.write_text(SMALL_RESNET)
    workdir = tmp_path / "run"
    job = (
        *(*TWO_RANKS, *TRAIN, f"--config={config}", f"--workdir={workdir}"),
        f"--config.dataset.data_dir={data_dir}",
    )
    status, output = run_until_sigterm(
        *job, rank=0, path=workdir / "metrics.csv", seconds=600
    )
    assert status == 0, output
    assert "stopped by SIGTERM after step" in output
    result = run(*job, "--resume", seconds=600)
    assert result.returncode == 0, result.stderr
    summary = read_summary(workdir)
    assert summary["ranks"] == 2
    assert summary["steps"] == STEPS
    assert summary["top1"] >= 50
    rows = read_metrics(workdir)
    assert [int(row["epoch"]) for row in rows] == list(range(1, EPOCHS + 1))
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    assert top1_of(checkpoint(workdir, STEPS), data_dir) == pytest.approx(
        summary["top1"]
    )
    assert len(list((workdir / "best").iterdir())) == 1


def top1_of(path, data_dir):
    """Returns the top-1 of a checkpoint on the whole test split, in percent."""
    dataset = resnet50.get_config().dataset
    dataset.image_size = IMAGE_SIZE
    batches = pipeline.evaluation_batches(
        load_source("imagenet2012", str(data_dir)),
        dataset,
        pipeline.RankInput(
            rank=0,
            ranks=1,
            batch_size=5,
            threads=2,
            corrupt_images=pipeline.CorruptImages("stop"),
        ),
    ).map(lambda images, labels: (images, tf.one_hot(labels, 1000)))
    model = keras.saving.load_model(path)
    return 100 * model.evaluate(batches, verbose=0, return_dict=True)["top1"]


@pytest.mark.parametrize(
    ("config", "ranks"),
    [
        ("alexnet:8k", 2),
        ("alexnet_bn:8k_sgd", 1),
        ("resnet50:32k", 1),
        ("resnet50_mlperf:32k", 2),
    ],
)
def test_rehearsal(config, ranks, tmp_path):
    """The network of resnet50:32k is that of resnet50_mlperf:32k."""
    workdir = tmp_path / "run"
    result = run(
        *(HOROVODRUN, "--gloo", "-np", str(ranks)),
        *(*TRAIN, f"--config={config}", f"--workdir={workdir}", "--rehearse"),
        seconds=600,
    )
    assert result.returncode == 0, error_lines(result)
    summary = read_summary(workdir)
    assert summary["config"] == f"{config} --rehearse"
    assert summary["global_batch_size"] == 4 * ranks
    assert summary["epochs"] == 2
    assert (workdir / "best").is_dir()
