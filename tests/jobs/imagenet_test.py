"""From tars of real JPEGs through TFDS's imagenet2012 to evaluated networks.

On two ranks: trained, stopped by SIGTERM, resumed, evaluated. And each family
of recipes is rehearsed.
"""

import csv
import json
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_lars  # noqa: F401  to load its optimizer
from benchmarks import photos
from horovod_recipes import models  # noqa: F401  to load AlexNet
from horovod_recipes.configs import resnet50
from horovod_recipes.data import pipeline
from horovod_recipes.data.sources import load_source
from horovod_recipes.training import rehearsal
from tests.jobs.launcher import HOROVODRUN
from tests.jobs.launcher import TRAIN
from tests.jobs.launcher import error_lines
from tests.jobs.launcher import run
from tests.jobs.launcher import run_until_sigterm

pytestmark = pytest.mark.filterwarnings("ignore:Your input ran out of data")

CROPS = 8
# Of the validation images, whose labels are by their place.
LABELS = rehearsal.validation_classes()[:20]
CLASSES = list(dict.fromkeys(LABELS))

SMALL = """
from horovod_recipes.configs import {family}


def get_config():
    config = {family}.get_config("{variant}")
    config.model.update({model})
    config.dataset.update(
        data_dir="{data_dir}",
        train_examples={train},
        test_examples={test},
        image_size={image_size},
    )
    config.update(global_batch_size=32, max_micro_batch_size=8, epochs={epochs})
    config.schedule.update(peak_learning_rate={rate}, warmup_epochs=1)
    return config
"""


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Crops of photos, a class each, prepared by the README's command."""
    data_dir = tmp_path_factory.mktemp("imagenet")
    rng = np.random.default_rng(0)
    pictures = dict(zip(CLASSES, photos.fetch(), strict=False))
    train = {
        name: [random_crop(path, rng) for _ in range(CROPS)]
        for name, path in pictures.items()
    }
    validation = [random_crop(pictures[name], rng) for name in LABELS]
    rehearsal.write_tars(data_dir / "downloads" / "manual", train, validation)
    result = run(
        *(
            sys.executable,
            "-m",
            "horovod_recipes.data.datasets",
            "imagenet2012",
        ),
        f"--data_dir={data_dir}",
    )
    assert result.returncode == 0, result.stderr
    return data_dir


def random_crop(path, rng):
    """Returns a JPEG of a part of a photo, of a size of its own."""
    side = int(rng.integers(300, 512))
    top, left = rng.integers(0, 512 - side, 2)
    image = tf.io.decode_and_crop_jpeg(
        path.read_bytes(), [top, left, side, side]
    )
    image = tf.image.resize(image, [int(rng.integers(80, 120))] * 2)
    return tf.io.encode_jpeg(tf.cast(image, tf.uint8)).numpy()


@pytest.mark.parametrize(
    ("family", "variant", "model", "image_size", "epochs", "rate", "enough"),
    [
        (
            *("resnet50", "32k", "stage_blocks=(1, 1, 1, 1), width=16"),
            *(64, 12, 2.0, 50),
        ),
        ("alexnet", "8k", "", 67, 3, 2.0, 0),
    ],
    ids=["resnet50", "alexnet"],
)
def test_from_tars_to_top1(
    data_dir, tmp_path, family, variant, model, image_size, epochs, rate, enough
):
    config = tmp_path / "small.py"
    config.write_text(
        SMALL.format(
            family=family,
            variant=variant,
            model=model,
            data_dir=data_dir,
            train=CROPS * len(CLASSES),
            test=len(LABELS),
            image_size=image_size,
            epochs=epochs,
            rate=rate,
        )
    )
    workdir = tmp_path / "run"
    job = (*HOROVODRUN, *TRAIN, f"--config={config}", f"--workdir={workdir}")
    status, output = run_until_sigterm(
        *job, rank=0, path=workdir / "metrics.csv", seconds=600
    )
    assert status == 0, output
    assert "stopped by SIGTERM after step" in output
    result = run(*job, "--resume", seconds=600)
    assert result.returncode == 0, result.stderr
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["ranks"] == 2
    steps = epochs * (CROPS * len(CLASSES) // 32)
    assert summary["steps"] == steps
    assert summary["top1"] >= enough
    with (workdir / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == list(range(1, epochs + 1))
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    # The checkpoint, on the whole test split, has the top-1 of the summary.
    path = workdir / "checkpoints" / f"step-{steps:08d}.keras"
    model = keras.saving.load_model(path)
    dataset = resnet50.get_config().dataset
    dataset.image_size = image_size
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
    results = model.evaluate(batches, verbose=0, return_dict=True)
    assert 100 * results["top1"] == pytest.approx(summary["top1"])
    assert len(list((workdir / "best").iterdir())) == 1


@pytest.mark.parametrize(
    "config",
    ["alexnet:8k", "alexnet_bn:8k_sgd", "resnet50:32k", "resnet50_mlperf:32k"],
)
def test_rehearsal(config, tmp_path):
    workdir = tmp_path / "run"
    result = run(
        *(*HOROVODRUN, *TRAIN, f"--config={config}", f"--workdir={workdir}"),
        "--rehearse",
        seconds=600,
    )
    assert result.returncode == 0, error_lines(result)
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["config"] == f"{config} --rehearse"
    assert summary["global_batch_size"] == 16
    assert summary["epochs"] == 2
    assert (workdir / "best").is_dir()
