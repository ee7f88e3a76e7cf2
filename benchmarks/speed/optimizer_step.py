"""What one update of all variables of a model costs, by optimizer.

    pip install '.[bench]'
    python -m benchmarks.speed.optimizer_step

times, with TensorFlow, LARS, Keras's SGD with momentum and Lamb, with XLA and
without, and the peers that are installed: optax, PyTorch, timm. On a GPU, where
TensorFlow is not needed:

    KERAS_BACKEND=jax python -m benchmarks.speed.optimizer_step

All take turns in each round; the table has medians, with the quartiles, of the
time and of its ratio to Keras's SGD with XLA in the same round, the seconds of
the first call, which traces and compiles, and the peak memory: the arrays that
the optimizer needs, and what its step takes beside them, in a process of its
own. The floor is the memory's speed: SGD with momentum must read gradients,
weights and velocities and write two of them, 5 passes over the parameters; LARS
must read two of them once more before, 7 passes. A pass is half of what it
takes to change the sign of all parameters where they are, on all cores. For
many tiny variables the floor says little: their cost is in the calls.
What was tried to come near it is in docs/optimizer_step.md.
"""

import concurrent.futures
import importlib.util
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import time

import keras
import numpy as np
from absl import flags

from benchmarks.speed import report
from benchmarks.speed.peers import timm_lars
from keras_lars import LARS

# Of its own, because tests import all benchmarks into one process.
FLAGS = flags.FlagValues()
_MODELS = flags.DEFINE_multi_enum(
    "model",
    ["resnet50", "alexnet", "tiny"],
    ["resnet50", "alexnet", "tiny"],
    "Whose variables to update; may be given several times.",
    flag_values=FLAGS,
)
_ROUNDS = flags.DEFINE_integer(
    "rounds", 15, "How often each is timed.", lower_bound=2, flag_values=FLAGS
)
_OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "JSON to write; models that it holds and that are not run stay. Defaults "
    "to docs/results/optimizer_step_cpu.json, or _gpu.json.",
    flag_values=FLAGS,
)
_PEAK_MEMORY_OF = flags.DEFINE_string(
    "peak_memory_of",
    None,
    "Only print the peak memory of this optimizer, in MB.",
    flag_values=FLAGS,
)

BACKEND = keras.backend.backend()
BASELINE = (
    "Keras SGD momentum, XLA"
    if BACKEND == "tensorflow"
    else "Keras SGD momentum"
)
PASSES = {"SGD momentum": 5, "LARS": 7}


def shapes_of(model):
    if model == "resnet50":
        # Not in the GPU's memory, whose peak is measured.
        with keras.device("cpu"):
            network = keras.applications.ResNet50(weights=None)
        return [tuple(v.shape) for v in network.trainable_variables]
    if model == "alexnet":
        kernels = [
            (11, 11, 3, 96),
            (5, 5, 48, 256),
            (3, 3, 256, 384),
            (3, 3, 192, 384),
            (3, 3, 192, 256),
            (9216, 4096),
            (4096, 4096),
            (4096, 1000),
        ]
        return [s for kernel in kernels for s in (kernel, kernel[-1:])]
    return [(16, 16), (16,)] * 500


def contenders():
    """Returns `{name: function of (weights, gradients) that makes a step}`."""

    def sgd():
        return keras.optimizers.SGD(0.1, momentum=0.9)

    def lars(jit_compile=True):
        return LARS(1.0, weight_decay=1e-4, jit_compile=jit_compile)

    def lamb():
        return keras.optimizers.Lamb(0.001)

    if BACKEND == "tensorflow":
        found = {
            "LARS, XLA": lambda *a: tensorflow_step(lars(), False, *a),
            "LARS": lambda *a: tensorflow_step(lars(False), False, *a),
            BASELINE: lambda *a: tensorflow_step(sgd(), True, *a),
            "Keras SGD momentum": lambda *a: tensorflow_step(sgd(), False, *a),
            "Keras Lamb, XLA": lambda *a: tensorflow_step(lamb(), True, *a),
            "Keras Lamb": lambda *a: tensorflow_step(lamb(), False, *a),
        }
    else:
        found = {
            "LARS": lambda *a: keras_jax_step(lars(), *a),
            BASELINE: lambda *a: keras_jax_step(sgd(), *a),
            "Keras Lamb": lambda *a: keras_jax_step(lamb(), *a),
        }
    if importlib.util.find_spec("optax"):
        import optax

        found["optax.sgd"] = lambda *a: optax_step(
            optax.sgd(0.1, momentum=0.9), *a
        )
        found["optax.lars"] = lambda *a: optax_step(
            optax.lars(1.0, weight_decay=1e-4), *a
        )
    if BACKEND == "tensorflow" and importlib.util.find_spec("torch"):
        import torch

        found["torch SGD, fused"] = lambda *a: torch_step(
            torch.optim.SGD, dict(lr=0.1, momentum=0.9, fused=True), *a
        )
        peer = timm_lars()
        if peer is not None:
            arguments = dict(lr=1.0, momentum=0.9, weight_decay=1e-4)
            found["timm Lars"] = lambda *a: torch_step(
                peer, arguments | dict(foreach=False), *a
            )
            found["timm Lars, foreach"] = lambda *a: torch_step(
                peer, arguments | dict(foreach=True), *a
            )
    return found


def tensorflow_step(optimizer, jit_compile, weights, gradients):
    import tensorflow as tf

    variables = [keras.Variable(w) for w in weights]
    gradients = [tf.constant(g) for g in gradients]
    optimizer.build(variables)

    @tf.function(jit_compile=jit_compile)
    def update(gradients):
        optimizer.apply(gradients, variables)

    return lambda: update(gradients)


def keras_jax_step(optimizer, weights, gradients):
    import jax

    variables = [keras.Variable(w) for w in weights]
    gradients = [jax.numpy.asarray(g) for g in gradients]
    optimizer.build(variables)
    update = jax.jit(optimizer.stateless_apply, donate_argnums=(0, 2))
    state = [v.value for v in optimizer.variables]
    values = [v.value for v in variables]

    def step():
        nonlocal state, values
        values, state = update(state, gradients, values)
        return values

    return step


def optax_step(transformation, weights, gradients):
    import jax
    import optax

    values = [jax.numpy.asarray(w) for w in weights]
    gradients = [jax.numpy.asarray(g) for g in gradients]
    state = transformation.init(values)

    def apply(state, gradients, values):
        updates, state = transformation.update(gradients, state, values)
        return state, optax.apply_updates(values, updates)

    update = jax.jit(apply, donate_argnums=(0, 2))

    def step():
        nonlocal state, values
        state, values = update(state, gradients, values)
        return values

    return step


def torch_step(optimizer_class, arguments, weights, gradients):
    import torch

    parameters = [torch.nn.Parameter(torch.tensor(w)) for w in weights]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = torch.tensor(gradient)
    return optimizer_class(parameters, **arguments).step


def weights_and_gradients(shapes):
    rng = np.random.default_rng(0)
    weights = [rng.normal(scale=0.05, size=s).astype("float32") for s in shapes]
    gradients = [
        rng.normal(scale=0.01, size=s).astype("float32") for s in shapes
    ]
    return weights, gradients


def two_passes(weights):
    """Returns a function that reads and writes all weights once, in place."""
    flat = np.concatenate([w.ravel() for w in weights])
    if on_gpu():
        import jax

        flat = jax.numpy.asarray(flat)
        negate = jax.jit(lambda x: -x, donate_argnums=0)

        def step():
            nonlocal flat
            flat = negate(flat)
            return flat

        return step
    cores = len(os.sched_getaffinity(0))
    parts = np.array_split(flat, cores)
    pool = concurrent.futures.ThreadPoolExecutor(cores)

    def step():
        for _ in pool.map(lambda x: np.negative(x, out=x), parts):
            pass

    return step


def on_gpu():
    if BACKEND != "jax":
        return False
    import jax

    return jax.default_backend() == "gpu"


def measure(model, rounds):
    shapes = shapes_of(model)
    arrays = weights_and_gradients(shapes)
    # A GPU works while the host goes on: many calls keep it busy.
    calls = 10 if on_gpu() else 1
    functions, first_calls = {}, {}
    for name, make_step in contenders().items():
        functions[name] = called(make_step(*arrays), calls)
        start = time.perf_counter()
        functions[name]()
        first_calls[name] = time.perf_counter() - start
    functions["two passes"] = called(two_passes(arrays[0]), calls)
    seconds = report.interleaved_times(functions, rounds)
    del functions
    times = {name: 1e3 * np.array(s) / calls for name, s in seconds.items()}
    pass_ms = float(np.median(times.pop("two passes"))) / 2
    results = [
        {
            "optimizer": name,
            "ms": report.spread(ms.tolist()),
            "ratio": report.spread((ms / times[BASELINE]).tolist()),
            "first_call_s": round(first_calls[name], 1),
            "peak_mb": (
                None
                if model == "tiny"
                else peak_memory_in_new_process(model, name)
            ),
        }
        for name, ms in times.items()
    ]
    return {
        "machine": machine(),
        "variables": len(shapes),
        "parameters": sum(math.prod(shape) for shape in shapes),
        "floor_ms": {
            name: round(passes * pass_ms, 3) for name, passes in PASSES.items()
        },
        "results": sorted(results, key=lambda result: result["ms"][0]),
    }


def called(step, calls):
    """Returns a function that makes `calls` steps and waits for the last."""

    def function():
        for _ in range(calls):
            result = step()
        # Arrays of JAX, of whichever Keras backend; others return None.
        if result is not None:
            import jax

            jax.block_until_ready(result)

    return function


def machine():
    result = report.machine()
    if on_gpu():
        import jax

        result["gpu"] = jax.local_devices()[0].device_kind
    return result


def peak_memory_in_new_process(model, name):
    command = [sys.executable, "-m", __spec__.name, f"--model={model}"]
    # With a fixed threshold the C library gives what is freed back at once.
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    result = subprocess.run(
        [*command, f"--peak_memory_of={name}"],
        stdout=subprocess.PIPE,
        check=True,
        env=environment,
        text=True,
        timeout=600,
    )
    return json.loads(result.stdout.splitlines()[-1])


def peak_memory(model, name):
    """Returns the MB of weights, gradients, state and temporaries."""
    weights, gradients = weights_and_gradients(shapes_of(model))
    step = called(contenders()[name](weights, gradients), 1)
    step()
    if on_gpu():
        import jax

        step()
        peak = jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]
        return round(peak / 1e6)
    # Weights, gradients and velocities; Lamb has two moments.
    arrays = 4 if "Lamb" in name else 3
    before = memory("VmRSS")
    # From here the peak counts anew, without that of the compiler.
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    for _ in range(3):
        step()
    temporaries = memory("VmHWM") - before
    return round(arrays * sum(w.nbytes for w in weights) / 1e6 + temporaries)


def memory(field):
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+)", status).group(1)) * 1024 / 1e6


def markdown(models):
    """Returns the table of each model of a file of results."""
    lines = []
    for model, result in models.items():
        rows = [
            [
                line["optimizer"],
                "{:.3g} ({:.3g} to {:.3g})".format(*line["ms"]),
                "{:.2f} ({:.2f} to {:.2f})".format(*line["ratio"]),
                line["first_call_s"],
                line["peak_mb"],
            ]
            for line in result["results"]
        ]
        floors = ", ".join(
            f"{name} {ms}" for name, ms in result["floor_ms"].items()
        )
        header = ["optimizer", "ms", f"x {BASELINE}", "first call, s", "MB"]
        lines += [
            f"{model}: {result['variables']} variables, "
            f"{result['parameters']:,} parameters; the memory's floor, ms: "
            f"{floors}.",
            report.table(header, rows),
        ]
    return "\n\n".join(lines)


def draw(models, path):
    panels = {
        model: {line["optimizer"]: line["ratio"] for line in result["results"]}
        for model, result in models.items()
    }
    report.draw_bars(panels, f"time over that of {BASELINE}", path)


def main():
    report.parse_command_line(FLAGS)
    check_backend()
    if _PEAK_MEMORY_OF.value:
        (model,) = _MODELS.value
        print(json.dumps(peak_memory(model, _PEAK_MEMORY_OF.value)))
        return
    device = "gpu" if on_gpu() else "cpu"
    output = pathlib.Path(
        _OUTPUT.value or f"docs/results/optimizer_step_{device}.json"
    )
    for model in _MODELS.value:
        measured = measure(model, _ROUNDS.value)
        print(f"\n{markdown({model: measured})}", flush=True)
        report.add_json(output, model, measured)


def check_backend():
    if BACKEND == "tensorflow":
        import tensorflow as tf

        if tf.config.list_physical_devices("GPU"):
            sys.exit(
                "TensorFlow sees a GPU, on which this times nothing right: "
                "set KERAS_BACKEND=jax, or CUDA_VISIBLE_DEVICES= for the CPU"
            )
        # It warns that each contender traces a function of its own.
        tf.get_logger().setLevel("ERROR")
    elif BACKEND != "jax":
        sys.exit(f"KERAS_BACKEND is {BACKEND}, but must be tensorflow or jax")


if __name__ == "__main__":
    main()
