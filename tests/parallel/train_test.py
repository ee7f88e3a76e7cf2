"""Training jobs on two ranks: what they write, and how they refuse."""

import csv
import json
import os
import pathlib
import resource
import signal

import keras
import numpy as np
import pytest
import tensorflow as tf
from mlperf_logging.compliance_checker.mlp_parser import parse_file

import horovod_recipes.keras as hvd
from horovod_recipes import train
from horovod_recipes.configs import demo
from horovod_recipes.configs._check import job_size
from horovod_recipes.data.sources import load_source
from horovod_recipes.errors import JobError
from horovod_recipes.models.small_cnn import small_cnn
from horovod_recipes.training.callbacks import StoppedBySigterm
from keras_lars import LARS
from tests.corrupt_dataset import write_corrupt_copy

pytestmark = pytest.mark.filterwarnings("ignore:Your input ran out of data")


def tiny_config(**changes):
    config = demo.get_config()
    config.model.filters = 2
    config.epochs = 3
    config.schedule.warmup_epochs = 1
    config.checkpoint_every_epochs = 1
    config.keep_checkpoints = 2
    # Never, but where a test asks for it.
    config.log_trust_ratios_every_steps = 1000
    config.update_from_flattened_dict(changes)
    return config


def job(workdir, mode="new", **changes):
    return train.train_and_evaluate(
        tiny_config(**changes), "tiny", workdir, mode
    )


def assert_refused(match, workdir, mode="new", **changes):
    """The same error, in one line, on both ranks; returns it."""
    with pytest.raises(JobError, match=match) as error:
        job(workdir, mode, **changes)
    messages = hvd.allgather_object(str(error.value))
    assert messages[0] == messages[1]
    assert "\n" not in messages[0]
    return messages[0]


def table(workdir):
    with (workdir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def interrupted_job(workdir, monkeypatch, epoch):
    """Runs a job that all ranks leave when the given epoch begins."""

    def on_epoch_begin(self, begun_epoch, logs=None):
        if begun_epoch == epoch:
            raise JobError("stopped by the test")

    with monkeypatch.context() as patch:
        patch.setattr(
            training_callbacks.StopOnNonFinite, "on_epoch_begin", on_epoch_begin
        )
        with pytest.raises(JobError, match="stopped by the test"):
            job(workdir)


def final_weights(workdir):
    path = workdir / "checkpoints" / "step-00000009.keras"
    model = keras.saving.load_model(path)
    return [w.numpy() for w in model.weights + model.optimizer.variables]


def test_results_of_a_job(shared_folder):
    workdir = shared_folder / "run"
    summary = job(workdir, log_trust_ratios_every_steps=3)
    assert (
        hvd.allgather_object(summary)[1 - hvd.rank()].keys() == summary.keys()
    )
    assert summary["config"] == "tiny"
    assert summary["ranks"] == 2
    assert summary["global_batch_size"] == 1024
    assert summary["steps"] == 9
    assert summary["epochs"] == 3
    assert summary["images_per_second"] > 0
    assert summary["workdir"] == str(workdir)
    top1 = hvd.allgather_object(summary["top1"])
    assert top1[0] == top1[1]
    # Of 1,000 examples that each count once, top-1 has one decimal.
    assert round(summary["top1"] * 10, 6) == round(summary["top1"] * 10)

    assert json.loads((workdir / "summary.json").read_text())["top1"] == top1[0]
    rows = table(workdir)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [row["step"] for row in rows] == ["3", "6", "9"]
    rates = [float(row["learning_rate"]) for row in rows]
    assert rates == pytest.approx(
        [20 * 2 / 3, 20 * (4 / 6) ** 2, 20 * (1 / 6) ** 2], rel=1e-5
    )
    assert float(rows[-1]["test_top1_percent"]) == pytest.approx(top1[0])
    assert (workdir / "metrics.png").read_bytes().startswith(b"\x89PNG")
    assert list((workdir / "tensorboard" / "train").iterdir())
    assert list((workdir / "tensorboard" / "validation").iterdir())
    ratios = (workdir / "trust_ratios" / "trust_ratios.csv").read_text()
    steps, *rows = ratios.splitlines()
    assert steps.startswith("step,conv1/kernel,")
    assert [row.split(",")[0] for row in rows] == ["3", "6", "9"]
    checkpoints = sorted(p.name for p in (workdir / "checkpoints").iterdir())
    assert checkpoints == [
        f"step-0000000{steps}.{suffix}"
        for steps in (6, 9)
        for suffix in ("json", "keras")
    ]
    assert json.loads((workdir / "config.json").read_text())["epochs"] == 3


def test_table_has_what_one_process_measures(shared_folder):
    """The saved model, on the whole test set at once, gives the table's row."""
    workdir = shared_folder / "run"
    job(workdir)
    model = keras.saving.load_model(
        workdir / "checkpoints" / "step-00000009.keras"
    )
    config = tiny_config().dataset
    batches = input_pipeline.evaluation_batches(
        load_source("mnist5k", None),
        config,
        rank=0,
        ranks=1,
        batch_size=1000,
        threads=2,
        corrupt_images=input_pipeline.CorruptImages("stop"),
    ).map(lambda images, labels: (images, tf.one_hot(labels, 10)))
    results = model.evaluate(batches, verbose=0, return_dict=True)
    row = table(workdir)[-1]
    assert float(row["test_loss"]) == pytest.approx(results["loss"], rel=1e-4)
    assert float(row["test_top1_percent"]) == pytest.approx(
        100 * results["top1"], rel=1e-5
    )


def test_accumulation_keeps_the_global_batch_and_the_schedule(shared_folder):
    workdir = shared_folder / "run"
    summary = job(workdir, max_micro_batch_size=256)
    assert summary["global_batch_size"] == 1024
    assert summary["steps"] == 9
    model = keras.saving.load_model(
        workdir / "checkpoints" / "step-00000009.keras"
    )
    assert int(model.optimizer.iterations) == 9
    rates = [float(row["learning_rate"]) for row in table(workdir)]
    assert rates[-1] == pytest.approx(20 * (1 / 6) ** 2, rel=1e-5)


def assert_same_training(workdir, other):
    """Both jobs measured and ended with the same, to the bit."""
    for row, other_row in zip(table(workdir), table(other), strict=True):
        del row["images_per_second"], other_row["images_per_second"]
        assert row == other_row
    for a, b in zip(final_weights(workdir), final_weights(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_resumed_run_equals_an_uninterrupted_one(shared_folder, monkeypatch):
    whole, parts = shared_folder / "whole", shared_folder / "parts"
    job(whole)
    interrupted_job(parts, monkeypatch, epoch=2)
    assert not (parts / "summary.json").exists()
    summary = job(parts, mode="resume")
    assert summary["steps"] == 9
    assert_same_training(whole, parts)


def send_sigterm_to_rank_1(monkeypatch, step):
    """Has the system send the signal after an update, as to a killed job."""
    on_train_batch_end = training_callbacks.Throughput.on_train_batch_end

    def send(self, batch, logs=None):
        on_train_batch_end(self, batch, logs)
        if hvd.rank() == 1 and int(self.model.optimizer.iterations) == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(
        training_callbacks.Throughput, "on_train_batch_end", send
    )


def test_sigterm_to_one_rank_saves_and_stops_all(shared_folder, monkeypatch):
    """In the middle of an epoch; the resumed job is as if nothing was."""
    whole, parts = shared_folder / "whole", shared_folder / "parts"
    changes = {"max_micro_batch_size": 256}
    job(whole, **changes)
    with monkeypatch.context() as patch:
        send_sigterm_to_rank_1(patch, step=5)
        with pytest.raises(StoppedBySigterm) as stop:
            job(parts, **changes)
    assert stop.value.steps_done == 5
    # The job no longer listens to signals.
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    names = sorted(path.name for path in (parts / "checkpoints").iterdir())
    assert names[-1] == "step-00000005.keras"
    summary = job(parts, "resume", **changes)
    assert summary["steps"] == 9

    # Batch norm's moving statistics were averaged once more; for the rest, the
    # job is the same to the bit.
    for name in ("epoch", "step", "learning_rate"):
        assert [r[name] for r in table(whole)] == [
            r[name] for r in table(parts)
        ]
    for name in ("train_loss", "train_top1_percent"):
        np.testing.assert_allclose(
            *([float(r[name]) for r in table(w)] for w in (whole, parts)),
            rtol=1e-6,
        )
    models = [saved_model(workdir) for workdir in (whole, parts)]
    states = [
        {v.path: v.numpy() for v in model.weights + model.optimizer.variables}
        for model in models
    ]
    for path in states[0]:
        is_statistic = "moving" in path
        np.testing.assert_allclose(
            states[0][path],
            states[1][path],
            rtol=1e-5 if is_statistic else 0,
            err_msg=path,
        )


def saved_model(workdir):
    path = workdir / "checkpoints" / "step-00000009.keras"
    return keras.saving.load_model(path)


def test_sigterm_at_the_last_step_of_an_epoch(shared_folder, monkeypatch):
    """The epoch ends as usual, with its evaluation; then the job stops."""
    workdir = shared_folder / "run"
    changes = {"global_batch_size": 4000, "evaluate_every_epochs": 1}
    with monkeypatch.context() as patch:
        send_sigterm_to_rank_1(patch, step=1)
        with pytest.raises(StoppedBySigterm) as stop:
            job(workdir, **changes)
    assert stop.value.steps_done == 1
    (row,) = table(workdir)
    assert float(row["test_loss"]) > 0
    assert job(workdir, "resume", **changes)["steps"] == 3
    assert [row["epoch"] for row in table(workdir)] == ["1", "2", "3"]


def test_full_disk_keeps_the_older_checkpoints(shared_folder, monkeypatch):
    """The system refuses to let rank 0's second checkpoint grow."""
    workdir = shared_folder / "run"
    save = checkpoints.save

    def save_within_a_limit(workdir, model, steps_done, *others):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if steps_done == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            save(workdir, model, steps_done, *others)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save", save_within_a_limit)
        assert_refused(
            r"on rank 0: cannot write the checkpoint .*/step-00000006.keras: "
            r"File too large; those before it are good: make room, and go on",
            workdir,
        )
    names = sorted(path.name for path in (workdir / "checkpoints").iterdir())
    assert [name for name in names if name.endswith(".keras")] == [
        "step-00000003.keras"
    ]
    assert not list(workdir.rglob(".part-*"))
    assert job(workdir, "resume")["steps"] == 9


def test_job_stops_at_its_target(shared_folder):
    workdir = shared_folder / "run"
    summary = job(
        workdir,
        evaluate_every_epochs=1,
        target_top1=1.0,
        stop_at_target=True,
    )
    assert summary["epochs"] == summary["epochs_to_target"] == 1
    assert summary["steps"] == 3
    assert 0 < summary["seconds_to_target"] <= summary["seconds"]
    assert [row["epoch"] for row in table(workdir)] == ["1"]
    names = [path.name for path in (workdir / "checkpoints").glob("*.keras")]
    assert names == ["step-00000003.keras"]
    # Nor does it train on when it is resumed without a summary.
    hvd.allgather_object(None)
    if hvd.rank() == 0:
        (workdir / "summary.json").unlink()
    hvd.allgather_object(None)
    resumed = job(
        workdir,
        "resume",
        evaluate_every_epochs=1,
        target_top1=1.0,
        stop_at_target=True,
    )
    for key in ("epochs", "steps", "top1", "seconds_to_target"):
        assert resumed[key] == summary[key] or key == "seconds_to_target"


def test_best_checkpoints_target_and_mlperf_log(shared_folder):
    workdir = shared_folder / "run"
    summary = job(
        workdir,
        evaluate_every_epochs=1,
        keep_best_checkpoints=2,
        target_top1=1.0,
    )
    top1 = [float(row["test_top1_percent"]) for row in table(workdir)]
    best = sorted(zip(top1, (3, 6, 9), strict=True))[-2:]
    names = sorted(path.name for path in (workdir / "best").iterdir())
    assert names == [f"top1-{t:07.3f}-step-{s:08d}.keras" for t, s in best]
    model = keras.saving.load_model(workdir / "best" / names[-1])
    assert int(model.optimizer.iterations) == best[-1][1]

    # The target is noted; the job was not asked to stop there.
    assert summary["epochs"] == 3
    assert summary["epochs_to_target"] == 1
    assert summary["seconds_to_target"] < summary["seconds"]

    # The log's intervals are closed, and its values are those of the job.
    lines, errors = parse_file(str(workdir / "mlperf.log"), ruleset="5.1.0")
    assert not errors
    keys = [line.key for line in lines]
    begin, end = keys.index("run_start"), keys.index("run_stop")
    assert keys[begin + 1 : end] == 3 * [
        "epoch_start",
        "eval_start",
        "eval_accuracy",
        "eval_stop",
        "epoch_stop",
    ]
    values = {line.key: line.value["value"] for line in lines}
    assert values["global_batch_size"] == 1024
    assert values["opt_name"] == "lars"
    assert values["opt_base_learning_rate"] == 20
    assert values["eval_accuracy"] == pytest.approx(top1[-1] / 100)
    assert lines[-1].value["metadata"]["status"] == "success"


def test_mixed_precision(shared_folder):
    # CPUs take long for float16: one epoch of 3 steps.
    changes = {"epochs": 1, "schedule.warmup_epochs": 0}
    job(shared_folder / "run", precision="mixed_float16", **changes)
    path = shared_folder / "run" / "checkpoints" / "step-00000003.keras"
    model = keras.saving.load_model(path)
    assert model.get_layer("conv2").compute_dtype == "float16"
    assert model.output.dtype == "float32"
    assert int(model.optimizer.inner_optimizer.iterations) == 3


def test_xla_trains_the_same_network(shared_folder):
    weights = {}
    for xla in (False, True):
        changes = {"epochs": 1, "schedule.warmup_epochs": 0}
        # At the demo's rate, 20, three steps enlarge rounding too much.
        changes["schedule.peak_learning_rate"] = 1.0
        changes["max_micro_batch_size"] = 256
        job(shared_folder / str(xla), xla=xla, **changes)
        model = keras.saving.load_model(
            shared_folder / str(xla) / "checkpoints" / "step-00000003.keras"
        )
        weights[xla] = model.get_weights()
    # Probably because XLA on a CPU adds the 200,000 numbers of a batch norm
    # one by one, they differ by 1.4e-4. They move by 1e-2; xla_test.py compares
    # small sums closely.
    for a, b in zip(weights[False], weights[True], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=5e-4)


def test_resuming_a_finished_run_trains_no_more(shared_folder):
    workdir = shared_folder / "run"
    summary = job(workdir)
    before = final_weights(workdir)
    again = job(workdir, mode="resume")
    assert again == hvd.broadcast_object(summary, root_rank=0)
    # As if it was killed between its last checkpoint and its summary.
    hvd.allgather_object(None)
    if hvd.rank() == 0:
        (workdir / "summary.json").unlink()
    hvd.allgather_object(None)
    assert job(workdir, mode="resume")["top1"] == summary["top1"]
    assert len(table(workdir)) == 3
    for a, b in zip(before, final_weights(workdir), strict=True):
        np.testing.assert_array_equal(a, b)


def test_corrupt_images_are_skipped_and_counted(shared_folder):
    folder, names = None, None
    if hvd.rank() == 0:
        folder, names = write_corrupt_copy(
            shared_folder / "data", "train", [7, 3000]
        )
    folder, names = hvd.broadcast_object((folder, names), root_rank=0)
    summary = job(
        shared_folder / "run",
        **{"dataset.data_dir": folder, "dataset.corrupt_images": "skip"},
    )
    assert summary["corrupt_images_skipped"] == 2
    assert summary["steps"] == 9


def test_loss_that_is_not_finite_stops_all_ranks(shared_folder):
    workdir = shared_folder / "run"
    message = assert_refused(
        r"step 3 left infinities or NaN in 17 of 17 variables \(conv1/kernel",
        workdir,
        **{"schedule.peak_learning_rate": 1e38},
    )
    assert "lower the learning rate" in message
    assert not (workdir / "summary.json").exists()
    assert not list(workdir.glob("checkpoints/*"))


class LossOfOneRank(keras.losses.CategoricalCrossentropy):
    """NaN on rank 1."""

    def call(self, y_true, y_pred):
        loss = super().call(y_true, y_pred)
        return loss * (np.nan if hvd.rank() == 1 else 1.0)


def test_nan_loss_on_one_rank_stops_all_ranks(shared_folder, monkeypatch):
    monkeypatch.setattr(keras.losses, "CategoricalCrossentropy", LossOfOneRank)
    workdir = shared_folder / "run"
    assert_refused("step 1 left infinities or NaN in 17 of 17", workdir)
    assert not (workdir / "summary.json").exists()


def test_nan_loss_with_finite_weights_stops_at_the_epoch(
    shared_folder, monkeypatch
):
    class NanBesideTheGradient(keras.losses.CategoricalCrossentropy):
        def call(self, y_true, y_pred):
            loss = super().call(y_true, y_pred)
            return loss + (np.nan if hvd.rank() == 1 else 0.0)

    monkeypatch.setattr(
        keras.losses, "CategoricalCrossentropy", NanBesideTheGradient
    )
    workdir = shared_folder / "run"
    assert_refused(r"loss is nan after epoch 1", workdir)
    assert not (workdir / "summary.json").exists()


def test_replicas_that_differ_stop_all_ranks(shared_folder, monkeypatch):
    finite = training_callbacks.StopOnNonFinite.on_train_batch_end

    def changes_a_weight(self, batch, logs=None):
        finite(self, batch, logs)
        if hvd.rank() == 1 and int(self.model.optimizer.iterations) == 3:
            kernel = self.model.trainable_variables[0]
            kernel.assign(kernel * (1 + 2**-23))

    monkeypatch.setattr(
        training_callbacks.StopOnNonFinite,
        "on_train_batch_end",
        changes_a_weight,
    )
    assert_refused(
        r"The replicas differ after update 3: 1 of \d+ variables, "
        r"conv1/kernel \(rank 1, unlike rank 0\)",
        shared_folder / "run",
        check_replicas_every_steps=3,
    )
    assert not (shared_folder / "run" / "summary.json").exists()


def test_weights_of_the_ranks_are_bit_equal(shared_folder, monkeypatch):
    """After the real job, batch-norm statistics and optimizer state too."""
    models = []
    create_model = train.create_model

    def remember(*arguments):
        models.append(create_model(*arguments))
        return models[-1]

    monkeypatch.setattr(train, "create_model", remember)
    job(shared_folder / "run")
    (model,) = models
    variables = model.weights + model.optimizer.variables
    first, second = hvd.allgather_object([v.numpy() for v in variables])
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"global_batch_size": 1023},
            r"1023 is not divisible by 2 ranks; the nearest that is: 1022",
        ),
        ({"max_micro_batch_size": 0}, "max_micro_batch_size must be 1 or more"),
        ({"precision": "float8"}, "precision must be one of float32, mixed_"),
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
            "corrupt_images=skip counts .* use stop",
        ),
        (
            {"dataset.num_classes": 9},
            "num_classes=9, but .* 'mnist5k' .* has 10",
        ),
        (
            {"dataset.train_examples": 5000},
            "train_examples=5000, but .* has 4000: was an archive cut short",
        ),
        ({"dataset.test_split": "dev"}, "has no split 'dev', only t"),
        ({"global_batch_size": 1}, "the nearest that is: 2"),
        ({"global_batch_size": 8000}, "more than the 4000 .* works is 4000"),
        ({"global_batch_size": 0}, "global_batch_size must be 1 or more"),
        ({"epochs": 0}, "epochs must be 1 or more"),
        ({"schedule.warmup_epochs": 3}, "warmup_epochs .* below the 3 epochs"),
        (
            {"model.name": "vgg"},
            "model.name must be one of alexnet, resnet50, small_cnn",
        ),
        ({"dataset.augmentation": "cutout"}, "augmentation must be one of"),
        ({"dataset.name": "nodigits"}, "unknown dataset 'nodigits'"),
        ({"dataset.name": "mnist/1/2/3"}, "unknown dataset 'mnist/1/2/3'"),
        ({"dataset.data_dir": "/empty"}, "get it with: python -m horovod_rec"),
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
        train.train_and_evaluate(config, "tiny", shared_folder / "run")


def test_more_ranks_than_examples():
    with pytest.raises(JobError, match=r"1001 ranks .* 1000 examples .* test"):
        job_size(tiny_config(), ranks=1001)


def test_workdir_that_cannot_be_written_to(shared_folder):
    if hvd.rank() == 0:
        (shared_folder / "file").touch()
    hvd.allgather_object(None)
    for workdir in (shared_folder / "file" / "run", pathlib.Path("/proc/run")):
        assert_refused("cannot write to --workdir=", workdir)


def test_workdir_that_holds_a_run(shared_folder):
    workdir = shared_folder / "run"
    job(workdir, epochs=2)
    before = (workdir / "config.json").read_text()
    assert_refused(r"--resume.*--overwrite", workdir)
    assert (workdir / "config.json").read_text() == before
    assert job(workdir, mode="overwrite", epochs=3)["steps"] == 9
    assert len(table(workdir)) == 3


def test_workdir_that_holds_other_files_is_never_deleted(shared_folder):
    if hvd.rank() == 0:
        (shared_folder / "thesis.txt").write_text("years of work")
    hvd.allgather_object(None)
    for mode in ("new", "overwrite"):
        assert_refused("files that are not of a run", shared_folder, mode)
    # Nor is one beside a run, or beside a config.json of another kind.
    if hvd.rank() == 0:
        (shared_folder / "config.json").write_text('{"layers": 12}')
    hvd.allgather_object(None)
    assert_refused("files that are not of a run", shared_folder, "overwrite")
    hvd.allgather_object(None)
    if hvd.rank() == 0:
        (shared_folder / "config.json").write_text(tiny_config().to_json())
    hvd.allgather_object(None)
    job(shared_folder, mode="overwrite", epochs=2)
    assert (shared_folder / "thesis.txt").read_text() == "years of work"


def test_resume_without_a_run(shared_folder):
    assert_refused("no run to resume", shared_folder / "run", "resume")


def test_resume_with_another_model_or_optimizer(shared_folder, monkeypatch):
    workdir = shared_folder / "run"
    interrupted_job(workdir, monkeypatch, epoch=1)
    assert_refused(
        r"model.filters was 2 and is 3",
        workdir,
        "resume",
        **{"model.filters": 3},
    )
    assert_refused(
        r"optimizer.momentum was 0.9 and is 0.8",
        workdir,
        "resume",
        **{"optimizer.momentum": 0.8},
    )
    assert not (workdir / "summary.json").exists()


def test_resume_with_other_keys_that_change_no_result(
    shared_folder, monkeypatch
):
    workdir = shared_folder / "run"
    interrupted_job(workdir, monkeypatch, epoch=1)
    changes = {"dataset.corrupt_images": "skip", "keep_checkpoints": 1}
    assert job(workdir, "resume", **changes)["steps"] == 9


def test_resume_from_a_checkpoint_that_is_broken(shared_folder, monkeypatch):
    workdir = shared_folder / "run"
    interrupted_job(workdir, monkeypatch, epoch=2)
    if hvd.rank() == 0:
        (workdir / "checkpoints" / "step-00000006.keras").write_bytes(b"")
    hvd.allgather_object(None)
    assert_refused(
        "cannot load .*step-00000006.keras .*delete it", workdir, "resume"
    )


def test_resume_after_the_code_of_the_optimizer_changed(
    shared_folder, monkeypatch
):
    workdir = shared_folder / "run"
    interrupted_job(workdir, monkeypatch, epoch=1)
    monkeypatch.setattr(
        train, "LARS", lambda schedule, **_: LARS(schedule, momentum=0.5)
    )
    assert_refused("saved from another optimizer", workdir, "resume")


def test_resume_after_the_code_of_the_model_changed(shared_folder, monkeypatch):
    workdir = shared_folder / "run"
    interrupted_job(workdir, monkeypatch, epoch=1)
    with monkeypatch.context() as patch:
        patch.setitem(
            train.MODELS,
            "small_cnn",
            lambda filters, **others: small_cnn(filters=2 * filters, **others),
        )
        assert_refused("saved from another model", workdir, "resume")


def test_failure_on_one_rank_is_raised_on_all(monkeypatch, shared_folder):
    def fail(config):
        raise OSError("disk on fire")

    if hvd.rank() == 1:
        monkeypatch.setattr(train, "check_config", fail)
    assert_refused("on rank 1: OSError: disk on fire", shared_folder / "run")
    assert os.listdir(shared_folder) == []
