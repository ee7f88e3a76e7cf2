"""A job on two ranks refuses bad input with the same line on both ranks."""

import os
import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf

import horovod_recipes.keras as hvd
from horovod_recipes.errors import JobError
from horovod_recipes.models import MODELS
from horovod_recipes.models.small_cnn import small_cnn
from horovod_recipes.training.failures import raised_on_every_rank
from horovod_recipes.training.job import train_and_evaluate
from tests.parallel.training.tiny_job import assert_refused
from tests.parallel.training.tiny_job import on_rank_0
from tests.parallel.training.tiny_job import run_job
from tests.parallel.training.tiny_job import table
from tests.parallel.training.tiny_job import tiny_config


class NanLogits(keras.layers.Layer):
    """Makes the loss and the gradients NaN on rank 1."""

    def call(self, inputs):
        return inputs * (np.nan if hvd.rank() == 1 else 1.0)


class NanBesideTheGradients(keras.layers.Layer):
    """Makes the loss NaN on rank 1, but keeps the gradients finite."""

    def call(self, inputs):
        if hvd.rank() == 1:
            self.add_loss(np.nan * tf.stop_gradient(tf.reduce_sum(inputs)))
        return inputs


@pytest.fixture
def network_ending_in(monkeypatch):
    """Registers a network named "faulty" that ends in a given layer."""

    def register(layer):
        def create(**arguments):
            network = small_cnn(**arguments)
            return keras.Model(network.input, layer(network.output))

        monkeypatch.setitem(MODELS, "faulty", create)

    return register


class ChangeWeight(keras.callbacks.Callback):
    """Changes the last bit of one variable on rank 1 after update 3."""

    def on_train_batch_end(self, batch, logs=None):
        if hvd.rank() == 1 and int(self.model.optimizer.iterations) == 3:
            kernel = self.model.trainable_variables[0]
            kernel.assign(kernel * (1 + 2**-23))


def test_weights_that_are_not_finite_stop_all_ranks(shared_folder):
    workdir = shared_folder / "run"
    # How many variables it spoils has differed between processors.
    message = assert_refused(
        r"step 3 left infinities or NaN in \d+ of 11 variables \(conv1/kernel",
        workdir,
        **{"schedule.peak_learning_rate": 1e38},
    )
    assert "lower the learning rate" in message
    assert not (workdir / "summary.json").exists()
    assert not list(workdir.glob("checkpoints/*"))


def test_nan_loss_on_one_rank_stops_all_ranks(shared_folder, network_ending_in):
    network_ending_in(NanLogits())
    workdir = shared_folder / "run"
    assert_refused(
        "step 1 left infinities or NaN in 11 of 11",
        workdir,
        **{"model.name": "faulty"},
    )
    assert not (workdir / "summary.json").exists()


@pytest.mark.slow
def test_nan_loss_with_finite_weights_stops_at_the_epoch(
    shared_folder, network_ending_in
):
    network_ending_in(NanBesideTheGradients())
    workdir = shared_folder / "run"
    assert_refused(
        r"loss is nan after epoch 1", workdir, **{"model.name": "faulty"}
    )
    assert not (workdir / "summary.json").exists()


def test_replicas_that_differ_stop_all_ranks(shared_folder):
    assert_refused(
        r"The replicas differ after update 3: 1 of \d+ variables, "
        r"conv1/kernel \(rank 1, unlike rank 0\)",
        shared_folder / "run",
        callbacks=[ChangeWeight()],
        check_replicas_every_steps=3,
    )
    assert not (shared_folder / "run" / "summary.json").exists()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"global_batch_size": 1023},
            "1023 is not divisible by 2 .* nearest divisible size is 1022",
        ),
        ({"max_micro_batch_size": 0}, "max_micro_batch_size must be 1 or more"),
        ({"precision": "float8"}, "precision must be one of float32, mixed_"),
        (
            {"optimizer.exclude_from_layer_adaptation": [".*"]},
            "leaves no layer to adapt; use optimizer_name=sgd",
        ),
        (
            {"optimizer_name": "adam"},
            "optimizer_name must be one of lars, sgd, lamb, trust_ratio:NAME",
        ),
        (
            {"optimizer_name": "trust_ratio:adamm"},
            "trust_ratio:adamm names no optimizer of Keras",
        ),
        (
            {"optimizer_name": "trust_ratio:optimizer"},
            "trust_ratio:optimizer names no optimizer of Keras",
        ),
        (
            {"optimizer_name": "trust_ratio:lamb", "optimizer": {}},
            "cannot be Lamb: it has a trust ratio already",
        ),
        (
            {"optimizer_name": "lamb"},
            "the config has optimizer.momentum, but TrustRatio takes trust_coe",
        ),
        (
            {
                "optimizer_name": "trust_ratio:sgd",
                "optimizer": {"inner": {"momentun": 0.9}},
            },
            "momentun",
        ),
        ({"task": "detection"}, "task must be one of classification"),
        (
            {"xla": True, "model.batch_norm": "synchronized"},
            "xla cannot compile the allreduce of model.batch_norm=synchronized",
        ),
        ({"label_smoothing": 1.0}, "label_smoothing must be 0 or more and bel"),
        ({"stop_at_target": True}, "stop_at_target needs target_top1"),
        ({"target_top1": 0.759}, "target_top1 must be from 1 to 100, in per"),
        ({"keep_best_checkpoints": -1}, "keep_best_checkpoints must be 0 or"),
        ({"dataset.threads": -3}, "dataset.threads must be 1 or more, or No"),
        (
            {"dataset.service": "grpc://a:1", "dataset.corrupt_images": "skip"},
            "corrupt_images=skip does not work .*_images=stop",
        ),
        (
            {"dataset.service": "grpc://localhost:1"},
            r"service grpc://localhost:1 \(.*refused\); start it, or correct",
        ),
        (
            {"dataset.num_classes": 9},
            "num_classes=9, but .* 'mnist5k' .* has 10",
        ),
        (
            {"dataset.train_examples": 5000},
            "train_examples=5000, but .* has 1000: was an archive cut short",
        ),
        ({"dataset.test_split": "dev"}, "has no examples in split 'dev'"),
        ({"global_batch_size": 1}, "the nearest divisible size is 2"),
        ({"global_batch_size": 8000}, "more than the 1000 .* works is 1000"),
        ({"global_batch_size": 0}, "global_batch_size must be 1 or more"),
        ({"epochs": 0}, "epochs must be 1 or more"),
        ({"schedule.warmup_epochs": 3}, "warmup_epochs .* below the 3 epochs"),
        (
            {"model.name": "vgg"},
            "model.name must be one of alexnet, resnet18, resnet50",
        ),
        ({"dataset.augmentation": "cutout"}, "augmentation must be one of"),
        ({"dataset.name": "nodigits"}, "unknown dataset 'nodigits'"),
        ({"dataset.name": "mnist/1/2/3"}, "unknown dataset 'mnist/1/2/3'"),
        ({"dataset.data_dir": "/empty"}, "prepare it with: python -m horov"),
        ({"optimizer.momentum": 1.5}, "Argument `momentum` must be"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_config_is_refused(shared_folder, changes, match):
    assert_refused(match, shared_folder / "run", **changes)
    assert not (shared_folder / "run").exists()


def test_config_that_lacks_a_key(shared_folder):
    config = tiny_config()
    del config.schedule.power
    with pytest.raises(JobError, match=r"the config has no schedule.power"):
        train_and_evaluate(config, "tiny", shared_folder / "run")


def test_failure_on_one_rank_is_raised_on_all(shared_folder):
    missing = {"dataset.data_dir": "/nowhere"} if hvd.rank() == 1 else {}
    assert_refused(
        "on rank 1: the dataset 'mnist5k' is not in /nowhere",
        shared_folder / "run",
        **missing,
    )
    assert os.listdir(shared_folder) == []


def test_any_error_on_one_rank_is_raised_on_all():
    @raised_on_every_rank()
    def fail_on_rank_1():
        if hvd.rank() == 1:
            raise OSError("disk on fire")

    with pytest.raises(JobError, match=r"^on rank 1: OSError: disk on fire$"):
        fail_on_rank_1()


def test_workdir_that_cannot_be_written_to(shared_folder):
    on_rank_0((shared_folder / "file").touch)
    for workdir in (shared_folder / "file" / "run", pathlib.Path("/proc/run")):
        assert_refused("cannot write to --workdir=", workdir)


@pytest.mark.slow
def test_workdir_that_holds_a_run(finished_copy):
    before = (finished_copy / "config.json").read_text()
    assert_refused(r"--resume.*--overwrite", finished_copy)
    assert (finished_copy / "config.json").read_text() == before
    assert run_job(finished_copy, mode="overwrite", epochs=2)["steps"] == 6
    assert len(table(finished_copy)) == 2


@pytest.mark.slow
def test_workdir_that_holds_other_files_is_never_deleted(shared_folder):
    on_rank_0((shared_folder / "thesis.txt").write_text, "years of work")
    for mode in ("new", "overwrite"):
        assert_refused("files that do not belong to a run", shared_folder, mode)
    # A config.json of another program does not make the folder a run.
    config = shared_folder / "config.json"
    on_rank_0(config.write_text, '{"layers": 12}')
    assert_refused(
        "files that do not belong to a run", shared_folder, "overwrite"
    )
    # Overwriting a run keeps other files in its folder.
    on_rank_0(config.write_text, tiny_config().to_json())
    run_job(shared_folder, mode="overwrite", epochs=2)
    assert (shared_folder / "thesis.txt").read_text() == "years of work"
