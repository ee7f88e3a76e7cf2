"""The step of ResNet-50, in small on a CPU, as where TensorFlow is missing."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.speed import resnet50_gpu
from horovod_recipes.planning.hardware import HARDWARE

# A None in sys.modules would do for imports, but Keras looks there for whether
# TensorFlow may be in use.
NO_TENSORFLOW = """
import sys

class NoTensorFlow:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "tensorflow":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NoTensorFlow)
import functools
import json
import keras
import numpy as np
from benchmarks.speed import resnet50_gpu

resnet50_gpu.resnet50 = functools.partial(
    resnet50_gpu.resnet50, stage_blocks=(1,), width=8
)
"""


def on_jax(script, *arguments):
    return subprocess.run(
        [sys.executable, "-c", NO_TENSORFLOW + script, *arguments],
        capture_output=True,
        env=os.environ | {"KERAS_BACKEND": "jax"},
        text=True,
        timeout=300,
    )


def test_command_without_tensorflow(tmp_path):
    path = tmp_path / "result.json"
    result = on_jax(
        "resnet50_gpu.main()",
        *("--image_size=32", "--micro_batch=4", "--global_batch=12"),
        *("--rounds=2", f"--output={path}"),
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(path.read_text())
    assert found["parameters"] == sum(np.prod(s) for s in small_shapes())
    assert found["global_batch"] == 12
    # Of 1,000 classes, and the network has learned nothing.
    assert found["loss"] == pytest.approx(np.log(1000), abs=1)
    seconds = found["step_s"][0]
    assert found["images_per_second"][0] == pytest.approx(12 / seconds, rel=0.2)
    passes = found["forward_and_backward"]["s"][0]
    update = found["updates"]["LARS"]["ms"][0] / 1e3
    assert passes + update == pytest.approx(seconds, abs=2e-3)
    # Nothing is known of a CPU.
    assert found["memory_mb"]["peak"] is None
    assert found["forward_and_backward"]["of_data_sheet"] is None
    # Weights and gradients, at least, and what the micro-batch needs.
    assert found["memory_mb"]["micro_batch_program"] > (
        2 * 4 * found["parameters"] / 1e6
    )
    assert "| update of SGD momentum |" in result.stdout
    assert "| forward and backward | " in result.stdout


def small_shapes():
    model = resnet50_gpu.resnet50((32, 32, 3), 1000, stage_blocks=(1,), width=8)
    return [v.shape for v in model.trainable_variables]


COMPARE = """
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
print(json.dumps([errors, losses, expected_losses]))
"""


def test_steps_are_those_of_keras():
    """Errors are beside how far each variable has moved in two updates."""
    result = on_jax(COMPARE)
    assert result.returncode == 0, result.stderr
    errors, losses, expected = json.loads(result.stdout.splitlines()[-1])
    assert losses == pytest.approx(expected[1::2])
    assert len(errors) == len(small_shapes())
    assert max(errors) < 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--micro_batch=4", "--global_batch=10"), "10 is not a multiple of"),
        ((), "JAX sees no GPU; to try it on the CPU, name an --output"),
    ],
)
def test_errors(arguments, message):
    result = on_jax("resnet50_gpu.main()", *arguments)
    assert result.returncode == 1
    assert message in result.stderr


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
    # 2 TFLOP in 2 s, which would take 0.2 s at the peak.
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
    text = resnet50_gpu.as_text(
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
    assert "5000 at the peak, 4000 of" in text


def test_the_peak_of_each_gpu_is_known():
    for name in resnet50_gpu.DATA_SHEETS.values():
        assert resnet50_gpu.PRECISION in HARDWARE[name].flops
