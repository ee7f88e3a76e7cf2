"""The results that a training job on two ranks computes and writes."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from mlperf_logging.compliance_checker.mlp_parser import parse_file

import horovod_recipes.keras as hvd
from horovod_recipes.data import pipeline
from horovod_recipes.data.sources import load_source
from keras_lars import TrustRatio
from keras_lars.muon import ConvMuon
from tests.corrupt_dataset import write_corrupt_copy
from tests.parallel.training.tiny_job import assert_same_training
from tests.parallel.training.tiny_job import checkpoint
from tests.parallel.training.tiny_job import on_rank_0
from tests.parallel.training.tiny_job import run_job
from tests.parallel.training.tiny_job import run_until
from tests.parallel.training.tiny_job import table
from tests.parallel.training.tiny_job import tiny_config


def test_summary(finished_job):
    summary, workdir = finished_job.summary, finished_job.workdir
    keys = hvd.allgather_object(list(summary))
    assert keys[0] == keys[1]
    assert summary["config"] == "tiny"
    assert summary["ranks"] == 2
    assert summary["global_batch_size"] == 256
    assert summary["steps"] == 9
    assert summary["epochs"] == 3
    assert summary["images_per_second"] > 0
    assert summary["workdir"] == str(workdir)
    top1 = hvd.allgather_object(summary["top1"])
    assert top1[0] == top1[1]
    # Each of 1,000 examples counts once, so top-1 has one decimal.
    assert round(summary["top1"] * 10, 6) == round(summary["top1"] * 10)
    assert json.loads((workdir / "summary.json").read_text())["top1"] == top1[0]


def test_files_of_a_run(finished_job):
    workdir = finished_job.workdir
    rows = table(workdir)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [row["step"] for row in rows] == ["3", "6", "9"]
    rates = [float(row["learning_rate"]) for row in rows]
    assert rates == pytest.approx(
        [20 * 2 / 3, 20 * (4 / 6) ** 2, 20 * (1 / 6) ** 2], rel=1e-5
    )
    top1 = finished_job.summary["top1"]
    assert float(rows[-1]["test_top1_percent"]) == pytest.approx(top1)
    assert (workdir / "metrics.png").read_bytes().startswith(b"\x89PNG")
    assert list((workdir / "tensorboard" / "train").iterdir())
    assert list((workdir / "tensorboard" / "validation").iterdir())
    ratios = (workdir / "trust_ratios" / "trust_ratios.csv").read_text()
    header, *rows = ratios.splitlines()
    assert header.startswith("step,conv1/kernel,")
    assert [row.split(",")[0] for row in rows] == ["3", "6", "9"]
    names = sorted(p.name for p in (workdir / "checkpoints").iterdir())
    assert names == [
        f"step-0000000{steps}.{suffix}"
        for steps in (6, 9)
        for suffix in ("json", "keras")
    ]
    assert json.loads((workdir / "config.json").read_text())["epochs"] == 3


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_table_has_what_one_process_measures(finished_job):
    """Evaluating the saved model in one process gives the table's last row."""
    model = keras.saving.load_model(checkpoint(finished_job.workdir))
    batches = pipeline.evaluation_batches(
        load_source("mnist5k", None),
        tiny_config().dataset,
        pipeline.RankInput(
            rank=0,
            ranks=1,
            batch_size=1000,
            threads=1,
            corrupt_images=pipeline.CorruptImages("stop"),
        ),
    ).map(lambda images, labels: (images, tf.one_hot(labels, 10)))
    results = model.evaluate(batches, verbose=0, return_dict=True)
    row = table(finished_job.workdir)[-1]
    assert float(row["test_loss"]) == pytest.approx(results["loss"], rel=1e-4)
    assert float(row["test_top1_percent"]) == pytest.approx(
        100 * results["top1"], rel=1e-5
    )


def test_states_of_the_ranks_are_bit_equal(finished_job):
    """This includes batch norm's statistics and the optimizer's state."""
    model = finished_job.model
    variables = model.weights + model.optimizer.variables
    first, second = hvd.allgather_object([v.numpy() for v in variables])
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


def test_accumulation_keeps_the_global_batch_and_the_schedule(accumulated_job):
    assert accumulated_job.summary["global_batch_size"] == 256
    assert accumulated_job.summary["steps"] == 9
    model = keras.saving.load_model(checkpoint(accumulated_job.workdir))
    assert int(model.optimizer.iterations) == 9
    rows = table(accumulated_job.workdir)
    rates = [float(row["learning_rate"]) for row in rows]
    assert rates[-1] == pytest.approx(20 * (1 / 6) ** 2, rel=1e-5)


@pytest.mark.slow
def test_sgd_is_momentum_with_l2_decay(shared_folder):
    """The saved optimizer adapts no layer, and has SGD's hyper-parameters."""
    workdir = shared_folder / "run"
    run_job(
        workdir,
        optimizer_name="sgd",
        epochs=1,
        global_batch_size=1000,
        **{"schedule.peak_learning_rate": 0.1, "schedule.warmup_epochs": 0},
    )
    optimizer = keras.saving.load_model(checkpoint(workdir, step=1)).optimizer
    assert set(optimizer.trust_ratios().values()) == {1.0}
    assert optimizer.momentum == 0.9
    assert optimizer.weight_decay == 5e-4
    assert not (workdir / "trust_ratios").exists()


@pytest.mark.parametrize(
    ("name", "inner"),
    [
        ("lamb", keras.optimizers.Adam),
        pytest.param("trust_ratio:conv_muon", ConvMuon, marks=pytest.mark.slow),
    ],
)
def test_trust_ratio(shared_folder, name, inner):
    """A resumed job ends as one that ran through, and it learns."""
    changes = {
        "optimizer_name": name,
        "optimizer": {"weight_decay": 0.01},
        "schedule.peak_learning_rate": 0.05,
        "log_trust_ratios_every_steps": 3,
    }
    whole, parts = shared_folder / "whole", shared_folder / "parts"
    summary = run_job(whole, **changes)
    run_until(parts, epoch=2, **changes)
    run_job(parts, "resume", **changes)
    assert_same_training(whole, parts)

    assert summary["top1"] > 20
    optimizer = keras.saving.load_model(checkpoint(whole)).optimizer
    assert type(optimizer) is TrustRatio
    assert type(optimizer.optimizer) is inner
    assert int(optimizer.iterations) == 9
    ratios = (whole / "trust_ratios" / "trust_ratios.csv").read_text()
    assert [row[:2] for row in ratios.splitlines()[1:]] == ["3,", "6,", "9,"]


@pytest.mark.slow
def test_job_stops_at_its_target(shared_folder):
    workdir = shared_folder / "run"
    changes = {
        "evaluate_every_epochs": 1,
        "target_top1": 1.0,
        "stop_at_target": True,
    }
    summary = run_job(workdir, **changes)
    assert summary["epochs"] == summary["epochs_to_target"] == 1
    assert summary["steps"] == 3
    assert 0 < summary["seconds_to_target"] <= summary["seconds"]
    assert [row["epoch"] for row in table(workdir)] == ["1"]
    names = [path.name for path in (workdir / "checkpoints").glob("*.keras")]
    assert names == ["step-00000003.keras"]
    # Resuming without the summary does not train further either.
    on_rank_0((workdir / "summary.json").unlink)
    resumed = run_job(workdir, "resume", **changes)
    for key in ("epochs", "steps", "top1"):
        assert resumed[key] == summary[key]
    # Every rank gets the time that rank 0 has restored.
    seconds = hvd.broadcast_object(summary["seconds_to_target"], root_rank=0)
    assert resumed["seconds_to_target"] == seconds


@pytest.mark.slow
def test_best_checkpoints_target_and_mlperf_log(shared_folder):
    workdir = shared_folder / "run"
    summary = run_job(
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

    # The job records the target, and still trains to its end.
    assert summary["epochs"] == 3
    assert summary["epochs_to_target"] == 1
    assert summary["seconds_to_target"] < summary["seconds"]

    # The log closes its intervals, and has the values of the job.
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
    assert values["global_batch_size"] == 256
    assert values["opt_name"] == "lars"
    assert values["opt_base_learning_rate"] == 20
    assert values["eval_accuracy"] == pytest.approx(top1[-1] / 100)
    assert lines[-1].value["metadata"]["status"] == "success"


@pytest.mark.slow
def test_mixed_precision(shared_folder):
    # float16 is slow on CPUs, so the job has one update.
    run_job(
        shared_folder / "run",
        precision="mixed_float16",
        epochs=1,
        global_batch_size=1000,
        max_micro_batch_size=500,
        **{"schedule.warmup_epochs": 0},
    )
    model = keras.saving.load_model(checkpoint(shared_folder / "run", step=1))
    assert model.get_layer("conv2").compute_dtype == "float16"
    assert model.output.dtype == "float32"
    assert int(model.optimizer.inner_optimizer.iterations) == 1
    # The job restores the dtype policy of the process.
    assert keras.config.dtype_policy().name == "float32"


@pytest.mark.slow
def test_xla_trains_the_same_network(shared_folder):
    weights = {}
    for xla in (False, True):
        run_job(
            shared_folder / str(xla),
            xla=xla,
            epochs=1,
            max_micro_batch_size=64,
            **{
                "schedule.warmup_epochs": 0,
                # The demo's rate would amplify rounding errors too much.
                "schedule.peak_learning_rate": 1.0,
            },
        )
        model = keras.saving.load_model(
            checkpoint(shared_folder / str(xla), step=3)
        )
        weights[xla] = model.get_weights()
    # The weights differ by up to 1.4e-4, but move by 1e-2.
    # Probably XLA sums batch norm's statistics in another order.
    for a, b in zip(weights[False], weights[True], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=5e-4)


@pytest.mark.slow
def test_corrupt_images_are_skipped_and_counted(shared_folder):
    folder = None
    if hvd.rank() == 0:
        folder, _ = write_corrupt_copy(
            shared_folder / "data", "train", [7, 3000]
        )
    folder = hvd.broadcast_object(folder, root_rank=0)
    summary = run_job(
        shared_folder / "run",
        **{
            "dataset.data_dir": folder,
            "dataset.corrupt_images": "skip",
            "dataset.train_split": "train",
            "dataset.train_examples": 4000,
        },
        global_batch_size=1024,
        max_micro_batch_size=512,
    )
    assert summary["corrupt_images_skipped"] == 2
    assert summary["steps"] == 9
