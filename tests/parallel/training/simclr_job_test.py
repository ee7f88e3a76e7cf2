"""A whole SimCLR job on two ranks: its files, its end, and its evaluation."""

import json
import shutil
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

import horovod_recipes.keras as hvd
from horovod_recipes import evaluate
from horovod_recipes.configs import simclr
from horovod_recipes.data.pipeline import CorruptImages
from horovod_recipes.data.sources import load_source
from horovod_recipes.errors import JobError
from horovod_recipes.training import fixed_features
from horovod_recipes.training import neighbours
from horovod_recipes.training import process
from horovod_recipes.training.evaluation import config_of_classifier
from horovod_recipes.training.evaluation import evaluate_workdir
from horovod_recipes.training.evaluation import linear_top1
from horovod_recipes.training.job import train_and_evaluate
from tests.corrupt_dataset import write_corrupt_copy
from tests.parallel.common import assert_same_on_all_ranks
from tests.parallel.training.tiny_job import assert_same_training
from tests.parallel.training.tiny_job import on_rank_0
from tests.parallel.training.tiny_job import stop_at
from tests.parallel.training.tiny_job import table


def tiny_config(**changes):
    config = simclr.get_config("digits")
    # The smaller split serves for training and evaluation.
    config.dataset.train_split = "test"
    config.dataset.train_examples = 1000
    config.model.update(stage_blocks=(1, 1), width=8)
    config.global_batch_size = 256
    # Two micro-batches, so that the gradient needs two passes.
    config.max_micro_batch_size = 64
    config.epochs = 3
    config.schedule.warmup_epochs = 1
    config.evaluate_every_epochs = 3
    config.checkpoint_every_epochs = 1
    config.keep_checkpoints = 3
    config.log_trust_ratios_every_steps = 3
    config.update_from_flattened_dict(changes)
    return config


def run_job(workdir, mode="new", callbacks=(), **changes):
    config = tiny_config(**changes)
    return train_and_evaluate(config, "tiny", workdir, mode, callbacks)


@pytest.fixture(scope="session")
def finished(session_folder):
    """The folder and the summary of a finished job."""
    workdir = session_folder / "simclr"
    return workdir, run_job(workdir)


def test_files_of_a_job(finished):
    workdir, summary = finished
    assert summary["steps"] == 9
    rows = table(workdir)
    assert list(rows[0]) == [
        *("epoch", "step", "learning_rate", "train_loss"),
        *("train_contrastive_top1_percent", "train_alignment"),
        *("train_uniformity", "train_probe_loss", "train_top1_percent"),
        *("test_probe_loss", "test_top1_percent", "images_per_second"),
    ]
    losses = [float(row["train_loss"]) for row in rows]
    assert losses == sorted(losses, reverse=True)
    assert [row["test_top1_percent"] for row in rows[:2]] == ["", ""]
    assert float(rows[2]["test_top1_percent"]) == pytest.approx(
        summary["top1"], abs=1e-3
    )
    assert (workdir / "metrics.png").stat().st_size > 10_000
    if hvd.rank() == 0:
        encoder = keras.saving.load_model(workdir / "encoder.keras")
        steps = workdir / "checkpoints" / "step-00000009.keras"
        trained = keras.saving.load_model(steps)
        images = np.random.default_rng(0).integers(0, 256, (5, 28, 28, 1))
        np.testing.assert_array_equal(
            encoder(images.astype("uint8")),
            trained(images.astype("uint8"))["features"],
        )


def test_resumed_job_equals_an_uninterrupted_one(finished, shared_folder):
    workdir, _ = finished
    parts = shared_folder / "parts"
    with pytest.raises(JobError, match="stopped by the test"):
        run_job(parts, callbacks=[stop_at(epoch=1)])
    summary = run_job(parts, mode="resume")
    assert summary["steps"] == 9
    assert_same_training(workdir, parts)


def test_evaluation_is_exact(finished, capsys):
    """Its numbers are those that one process computes from all images."""
    workdir, _ = finished
    capsys.readouterr()
    arguments = ["--linear_epochs=2", "--with_random_weights"]
    assert evaluate.main([f"--workdir={workdir}", *arguments]) == 0
    hvd.allgather_object(None)
    results = json.loads((workdir / "evaluation.json").read_text())
    printed = capsys.readouterr().out
    if hvd.rank() == 0:
        assert json.loads(printed) == results
    else:
        assert printed == ""
    assert (results["ranks"], results["linear_epochs"]) == (2, 2)
    check_evaluation(workdir, results)


def check_evaluation(workdir, results):
    assert (workdir / "neighbours.png").stat().st_size > 10_000
    # Chance is 10; so small a network hardly learns in three epochs.
    assert results["knn_top1"] > 20
    assert results["random_knn_top1"] > 20
    for name in ("linear", "random_linear"):
        assert 5 < results[f"{name}_top1"] <= 100
    source = load_source("mnist5k", None)
    records = source.records("test", rank=0, ranks=1).batch(1000)
    (example,) = records.map(source.parse)
    images = np.stack([tf.io.decode_png(x).numpy() for x in example["image"]])
    labels = example["label"].numpy()
    encoder = keras.saving.load_model(workdir / "encoder.keras")
    features = encoder(images).numpy().astype("float64")
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    right = 0
    for query, label in zip(features, labels, strict=True):
        similarity = features @ query
        nearest = np.argsort(-similarity, kind="stable")[:200]
        weights = np.exp(similarity[nearest] / 0.1)
        votes = np.bincount(labels[nearest], weights, minlength=10)
        right += votes.argmax() == label
    # Features in float32 may order two neighbours differently.
    assert results["knn_top1"] == pytest.approx(100 * right / 1000, abs=0.2)


def found_neighbours(encoder, *inputs):
    features = neighbours.features_of_splits(encoder, *inputs)
    return neighbours.find(*features, *inputs)


def test_nearest_image_of_a_training_image_is_itself(finished):
    """The training images are those of the test split here, over ranks."""
    workdir, _ = finished
    encoder = keras.saving.load_model(workdir / "encoder.keras")
    with hvd.callbacks.Watchdog(600) as watchdog:
        nearest = found_neighbours(encoder, *inputs(), watchdog)
        rows = neighbours.images_of(nearest, *inputs(), watchdog)
    assert len(rows) == 8
    for query, first, *others in rows:
        np.testing.assert_array_equal(query, first)
        assert len(others) == 7
    assert_same_on_all_ranks([image for row in rows for image in row])
    # Both ranks have some of the nearest images.
    assert set(nearest.places[..., 0].ravel()) == {0, 1}


def test_classifier_has_crops_and_flips_alone():
    config = simclr.get_config("cifar10")
    changed = config_of_classifier(config, epochs=7)
    assert changed.dataset.augmentation == "inception_small"
    assert (changed.task, changed.epochs) == ("classification", 7)
    assert config.dataset.augmentation == "simclr_small"
    digits = config_of_classifier(simclr.get_config("digits"), epochs=7)
    assert digits.dataset.augmentation == "random_affine"


def inputs():
    """Returns config, source and corrupt images of an evaluation."""
    source = load_source("mnist5k", None)
    return tiny_config(), source, CorruptImages("stop")


class Slow(keras.layers.Layer):
    """Takes a second for a batch."""

    def call(self, inputs):
        def slow(x):
            time.sleep(1.0)
            return x

        flat = keras.ops.reshape(keras.ops.cast(inputs, "float32"), (-1, 784))
        outputs = tf.numpy_function(slow, [flat], tf.float32)
        outputs.set_shape(flat.shape)
        return outputs


def pixels(layer):
    """Returns an encoder whose features are the pixels."""
    images = keras.Input((28, 28, 1), dtype="uint8")
    return keras.Model(images, layer(images))


def test_watchdog_sees_the_progress_of_an_evaluation():
    """Its work takes longer than the watchdog waits, but goes on."""
    config, source, corrupt_images = inputs()
    batches = neighbours.shard_of(config, source, "test", corrupt_images)
    encoder = pixels(Slow())
    with hvd.callbacks.Watchdog(4.0) as watchdog:
        for _ in range(3):
            found, labels = neighbours.features(encoder, batches, watchdog)
    assert found.shape == (500, 784)
    assert labels.shape == (500,)


def test_linear_classifier_learns_pixels():
    """And the same weights come out again."""
    config, source, corrupt_images = inputs()
    config = config_of_classifier(config, epochs=12)
    config.dataset.augmentation = "none"
    scale = keras.Sequential(
        [keras.layers.Flatten(), keras.layers.Rescaling(1 / 64)]
    )
    top1 = []
    for _ in range(2):
        process.set_seeds(config)
        with hvd.callbacks.Watchdog(600) as watchdog:
            top1.append(
                linear_top1(
                    pixels(scale), config, source, corrupt_images, watchdog
                )
            )
    assert top1[0] == pytest.approx(top1[1], abs=0.002)
    assert top1[0] > 0.8
    assert_same_on_all_ranks([top1[0]])


def test_classifier_on_fixed_features_is_that_of_all_ranks():
    """Its weights minimize the loss, as one process with all data sees it."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 6))
    labels = rng.integers(0, 4, 600)
    # Of very different sizes, and one without any information.
    scales = np.array([1, 1, 3, 10, 100, 0])
    features = (centres[labels] + 2 * rng.normal(size=(600, 6))) * scales
    features = features.astype(np.float32)
    # The parts differ in size.
    mine = slice(0, 200) if hvd.rank() == 0 else slice(200, 600)
    with hvd.callbacks.Watchdog(600) as watchdog:
        mean, whitening = fixed_features.whitening_of(features[mine])
        whitened = fixed_features.whitened(features, mean, whitening)
        targets = np.eye(4, dtype=np.float32)[labels]
        weights = fixed_features.regression(
            whitened[mine], targets[mine], watchdog
        )
        part = features[mine], labels[mine]
        top1 = fixed_features.linear_top1(part, part, 4, watchdog)
    assert_same_on_all_ranks([weights, top1])
    logits = whitened @ weights
    errors = tf.nn.softmax(logits).numpy() - targets
    np.testing.assert_allclose(whitened.T @ errors / 600, 0, atol=1e-4)
    assert top1 == pytest.approx(np.mean(logits.argmax(1) == labels))
    assert 0.5 < top1 < 0.99


def test_network_with_labels_is_evaluated_without_its_last_layer(
    finished_job, shared_folder
):
    workdir = shared_folder / "labels"
    on_rank_0(shutil.copytree, finished_job.workdir, workdir)
    arguments = [f"--workdir={workdir}", "--fixed_features"]
    assert evaluate.main(arguments) == 0
    hvd.allgather_object(None)
    results = json.loads((workdir / "evaluation.json").read_text())
    assert (results["fixed_features"], results["linear_epochs"]) == (True, None)
    assert results["linear_top1"] > 50
    assert results["knn_top1"] > 50


def test_corrupt_images_do_not_count_where_the_run_skips_them(
    finished, shared_folder
):
    workdir, _ = finished
    on_rank_0(write_corrupt_copy, shared_folder / "data", "test", [3, 700])
    config, _, _ = inputs()
    config.dataset.data_dir = str(shared_folder / "data")
    source = load_source("mnist5k", config.dataset.data_dir)
    encoder = keras.saving.load_model(workdir / "encoder.keras")
    skipped = CorruptImages("skip")
    with hvd.callbacks.Watchdog(600) as watchdog:
        nearest = found_neighbours(encoder, config, source, skipped, watchdog)
    names = set().union(*hvd.allgather_object(skipped.names))
    assert len(names) == 2
    # The share is that of the 998 images that can be decoded.
    assert nearest.top1 * 998 == pytest.approx(round(nearest.top1 * 998))


def assert_evaluation_refused(match, workdir):
    with pytest.raises(JobError, match=match) as error:
        evaluate_workdir(workdir, 1)
    messages = hvd.allgather_object(str(error.value))
    assert messages[0] == messages[1]
    assert "\n" not in messages[0]


def test_workdir_without_an_encoder(finished, shared_folder):
    assert_evaluation_refused("no run in", shared_folder / "nothing")
    workdir, _ = finished
    copy = shared_folder / "copy"

    def copy_config():
        copy.mkdir()
        (copy / "config.json").write_text((workdir / "config.json").read_text())

    on_rank_0(copy_config)
    assert_evaluation_refused("no encoder in .* not finished", copy)
    on_rank_0(lambda: (copy / "summary.json").write_text('{"top1": 9}'))
    assert_evaluation_refused("restore it, or train again", copy)
    on_rank_0(lambda: (copy / "encoder.keras").write_bytes(b"cut"))
    assert_evaluation_refused("cannot load .*encoder.keras", copy)
