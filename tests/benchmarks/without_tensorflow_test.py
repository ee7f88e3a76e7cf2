"""The benchmarks for GPUs run on JAX alone, here in small on a CPU."""

import functools
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.speed import optimizer_step
from benchmarks.speed import resnet50_gpu
from horovod_recipes.planning.hardware import HARDWARE
from tests.benchmarks.small_data import write_fashion_mnist

pytestmark = pytest.mark.slow

SCRIPT = '''
import sys

class NoTensorFlow:
    """Stands for a machine without TensorFlow."""

    # A None in sys.modules would do for imports, but Keras looks for the name.
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in ("tensorflow", "tensorflow_datasets"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NoTensorFlow)
import functools
import json
import pathlib
import keras
import numpy as np
from benchmarks.speed import optimizer_step
from benchmarks.speed import resnet50_gpu
from benchmarks.study import training

folder = pathlib.Path(sys.argv[1])

def command(module, *options):
    path = folder / f"{module.__name__}.json"
    sys.argv = ["command", *options, f"--output={path}"]
    module.main()
    return json.loads(path.read_text())

optimizer_step.TINY_SHAPES = [(8, 4), (4,)]
found = {"optimizer_step": command(
    optimizer_step, "--model=tiny", "--rounds=2"
)}

resnet50_gpu.resnet50 = functools.partial(
    resnet50_gpu.resnet50, stage_blocks=(1,), width=8
)

def network():
    keras.utils.set_random_seed(0)
    return resnet50_gpu.resnet50((32, 32, 3), 1000)

def optimizer(**arguments):
    return resnet50_gpu.LARS(1.0, weight_decay=1e-3, **arguments)

step, _ = resnet50_gpu.training_step(network(), optimizer(), 4, 2)
losses = [step()[2]]
weights, _, loss = step()
losses.append(loss)

same = network()
start = [v.numpy() for v in same.trainable_variables]
same.compile(
    optimizer(gradient_accumulation_steps=2),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
)
expected_losses = [
    float(same.train_on_batch(*resnet50_gpu.make_batch(i, 4, (32, 32, 3))))
    for i in range(4)
]
errors = [
    float(np.linalg.norm(w - v.numpy()) / np.linalg.norm(v.numpy() - s))
    for w, v, s in zip(weights, same.trainable_variables, start, strict=True)
]
found["steps"] = [errors, losses, expected_losses[1::2]]

# Last, because it changes the precision.
setting = training.Setting((512,), 10, 0, 1024, 1, 1)
def top1s(name, recipe, rate, times):
    run = training.Run(name, recipe, 512, rate, 1)
    return [training.train(run, setting)["test_top1"] for _ in range(times)]

found["top1"] = {
    name: top1s(name, "sgd_linear", 0.1, times=2) for name in training.NETWORKS
}
found["top1_of_recipes"] = {
    "lamb": top1s("resnet", "lamb", 0.03, times=1),
    "orscale": top1s("resnet", "orscale", 0.15, times=1),
}
found["resnet50_gpu"] = command(
    resnet50_gpu, "--image_size=32", "--micro_batch=4", "--global_batch=12",
    "--rounds=2",
)
(folder / "found.json").write_text(json.dumps(found))
'''


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("without_tensorflow")
    write_fashion_mnist(folder)
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, folder],
        capture_output=True,
        env=os.environ | {"KERAS_BACKEND": "jax", "TFDS_DATA_DIR": str(folder)},
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads((folder / "found.json").read_text())
    return found | {"output": result.stdout}


def test_optimizer_step(found):
    lines = found["optimizer_step"]["tiny"]["results"]
    assert {line["optimizer"] for line in lines} == {
        "LARS",
        "Keras SGD momentum",
        "Keras Lamb",
        "optax.sgd",
        "optax.lamb",
        "optax.lars",
    }


@functools.cache
def small_shapes():
    model = resnet50_gpu.resnet50((32, 32, 3), 1000, stage_blocks=(1,), width=8)
    return [v.shape for v in model.trainable_variables]


def test_resnet50_gpu(found):
    result = found["resnet50_gpu"]
    assert result["parameters"] == sum(np.prod(s) for s in small_shapes())
    assert result["global_batch"] == 12
    # The network has learned nothing about its 1,000 classes.
    assert result["loss"] == pytest.approx(np.log(1000), abs=1)
    seconds = result["step_s"][0]
    assert result["images_per_second"][0] == pytest.approx(
        12 / seconds, rel=0.2
    )
    passes = result["forward_and_backward"]["s"][0]
    update = result["updates"]["LARS"]["ms"][0] / 1e3
    assert passes + update == pytest.approx(seconds, abs=2e-3)
    # A CPU has no data sheet here, and no memory statistics.
    assert result["memory_mb"]["peak"] is None
    assert result["forward_and_backward"]["of_data_sheet"] is None
    # At least weights and gradients.
    assert result["memory_mb"]["micro_batch_program"] > (
        2 * 4 * result["parameters"] / 1e6
    )
    assert "| update of SGD momentum |" in found["output"]
    assert "| forward and backward | " in found["output"]


def test_steps_are_those_of_keras(found):
    """Errors are relative to how far two updates move each variable."""
    errors, losses, expected_losses = found["steps"]
    assert losses == pytest.approx(expected_losses)
    assert len(errors) == len(small_shapes())
    assert max(errors) < 1e-3


def test_study_learns_and_repeats(found):
    for network, (top1, again) in found["top1"].items():
        assert top1 == again, network
        assert top1 > 30, network
    for recipe, (top1,) in found["top1_of_recipes"].items():
        assert top1 > 30, recipe


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--micro_batch=4", "--global_batch=10"), "10 is not a multiple of"),
        ((), "JAX sees no GPU. To try this on the CPU, pass --output"),
    ],
)
def test_errors(options, message, monkeypatch, capsys):
    monkeypatch.setattr(optimizer_step, "BACKEND", "jax")
    monkeypatch.setattr(sys, "argv", ["command", *options])
    with pytest.raises(SystemExit):
        resnet50_gpu.main()
    assert message in " ".join(capsys.readouterr().err.split())


RESULT = {
    "images": 1000,
    "image_flops": 2e9,
    "step_s": [2.0, 2.1, 2.2],
    "update_s": {
        "LARS": np.array([0.1, 0.1, 0.1]),
        "SGD momentum": np.array([0.05, 0.04, 0.08]),
    },
    "pass_s": 0.01,
    "product_flops": 4e12,
    "peak_flops": 10e12,
}


def test_summary():
    found = resnet50_gpu.summary(**RESULT)
    assert found["images_per_second"][0] == pytest.approx(1000 / 2.1, abs=0.1)
    passes = found["forward_and_backward"]
    # 2 TFLOP take 2 s, and 0.2 s at the peak.
    assert passes["s"] == [2.0, 1.9, 2.1]
    assert passes["tflops"] == 1
    assert passes["floor_s"] == 0.2
    assert passes["of_data_sheet"] == 0.1
    assert passes["of_matrix_product"] == 0.25
    # 7 passes, and 5.
    assert found["updates"]["LARS"] == {
        "ms": [100.0, 100.0, 100.0],
        "floor_ms": 70.0,
        "x_floor": 1.43,
    }
    assert found["updates"]["SGD momentum"]["floor_ms"] == 50
    assert found["updates"]["SGD momentum"]["x_floor"] == 1
    assert found["lars_to_sgd"][0] == 2
    assert found["update_percent_of_step"] == 4.76


def test_table():
    text = resnet50_gpu.markdown(
        resnet50_gpu.summary(**RESULT)
        | {
            "image_size": 224,
            "global_batch": 1000,
            "micro_batch": 100,
            "memory_mb": {"peak": 5000, "micro_batch_program": 4000},
        }
    )
    assert "| forward and backward | 2 (1.9 to 2.1) s | 0.2 s | 10.00 |" in text
    assert "| update of LARS | 100 (100 to 100) ms | 70 ms | 1.43 |" in text
    assert "1 TFLOP/s: 0.1 of the data sheet's peak, 0.25 of a" in text
    assert "5000 at the peak, 4000 for" in text


def test_the_peak_of_each_gpu_is_known():
    for name in resnet50_gpu.DATA_SHEETS.values():
        assert resnet50_gpu.PRECISION in HARDWARE[name].flops_per_second
