"""What does one update of all variables of a model cost, by optimizer?

    pip install '.[bench]'
    python -m benchmarks.speed.optimizer_step

It times LARS, Keras's SGD with momentum and Keras's Lamb on TensorFlow, with
and without XLA, and the peers that are installed: optax, PyTorch, timm. It
takes 20 minutes on 2 cores. On a GPU it needs JAX and no TensorFlow:

    KERAS_BACKEND=jax python -m benchmarks.speed.optimizer_step

All optimizers run in each round. The table has medians with quartiles of the
time, and of its ratio to Keras's SGD with XLA in the same round. The first call
traces and compiles. Peak memory is measured in a new process: the arrays that
the optimizer needs, and the temporary memory of its step.

The floor is the speed of the memory. SGD with momentum reads gradients, weights
and velocities and writes two of them: 5 passes over the parameters. LARS first
reads two of them once more: 7 passes. A pass is half the time that it takes to
negate all parameters in place, on all cores. For many tiny variables the floor
says little, because calls dominate. docs/performance.md says what was tried.
"""

import concurrent.futures
import functools
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import time

import keras
import numpy as np

from benchmarks import _measure
from benchmarks import _results
from benchmarks.speed.peers import timm_lars
from horovod_recipes.models import MODELS as NETWORKS
from keras_lars import LARS
from keras_lars import TrustRatio
from keras_lars import _xla_flags

BACKEND = keras.backend.backend()
BASELINE = (
    "Keras SGD momentum, XLA"
    if BACKEND == "tensorflow"
    else "Keras SGD momentum"
)
# Height and width of the images of each network, in pixels.
IMAGE_SIZES = {"resnet50": 224, "alexnet": 227}
MODELS = (*IMAGE_SIZES, "tiny")
TINY_SHAPES = [(16, 16), (16,)] * 500
# Passes over the parameters that an update needs at least.
PASSES = {"SGD momentum": 5, "LARS": 7}
# Calls in a row on a GPU, which computes while the host continues.
GPU_CALLS = 10


def shapes_of(model):
    if model == "tiny":
        return TINY_SHAPES
    size = IMAGE_SIZES[model]
    # Outside the GPU's memory, because its peak is measured.
    with keras.device("cpu"):
        network = NETWORKS[model]((size, size, 3), num_classes=1000)
    return [tuple(v.shape) for v in network.trainable_variables]


def contenders():
    """Returns `{name: function of (weights, gradients) that makes a step}`."""

    def sgd():
        return keras.optimizers.SGD(0.1, momentum=0.9)

    def lars(jit_compile=True):
        return LARS(1.0, weight_decay=1e-4, jit_compile=jit_compile)

    def popular():
        return LARS(1.0, weight_decay=1e-4, momentum_style="popular")

    def around(inner):
        return TrustRatio(inner, weight_decay=1e-4)

    def lamb():
        return keras.optimizers.Lamb(0.001)

    step = functools.partial
    if BACKEND == "tensorflow":
        found = {
            "LARS, XLA": step(tensorflow_step, lars(), False),
            "LARS": step(tensorflow_step, lars(False), False),
            "LARS popular, XLA": step(tensorflow_step, popular(), False),
            "TrustRatio(SGD), XLA": step(tensorflow_step, around(sgd()), False),
            "TrustRatio(Adam), XLA": step(
                tensorflow_step, around(keras.optimizers.Adam()), False
            ),
            BASELINE: step(tensorflow_step, sgd(), True),
            "Keras SGD momentum": step(tensorflow_step, sgd(), False),
            "Keras Lamb, XLA": step(tensorflow_step, lamb(), True),
            "Keras Lamb": step(tensorflow_step, lamb(), False),
        }
    else:
        found = {
            "LARS": step(keras_jax_step, lars()),
            BASELINE: step(keras_jax_step, sgd()),
            "Keras Lamb": step(keras_jax_step, lamb()),
        }
    if importlib.util.find_spec("optax"):
        import optax

        found["optax.sgd"] = step(optax_step, optax.sgd(0.1, momentum=0.9))
        found["optax.lamb"] = step(
            optax_step, optax.lamb(0.001, weight_decay=1e-4)
        )
        found["optax.lars"] = step(
            optax_step, optax.lars(1.0, weight_decay=1e-4)
        )
    if BACKEND == "tensorflow" and importlib.util.find_spec("torch"):
        found |= torch_contenders()
    return found


def torch_contenders():
    import torch

    found = {
        "torch SGD, fused": functools.partial(
            torch_step, torch.optim.SGD, dict(lr=0.1, momentum=0.9, fused=True)
        )
    }
    lars = timm_lars()
    if lars is not None:
        for name, foreach in {
            "timm Lars": False,
            "timm Lars, foreach": True,
        }.items():
            arguments = dict(
                lr=1.0, momentum=0.9, weight_decay=1e-4, foreach=foreach
            )
            found[name] = functools.partial(torch_step, lars, arguments)
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
    """Returns what each optimizer takes for a model, the fastest first."""
    shapes = shapes_of(model)
    arrays = weights_and_gradients(shapes)
    functions, first_call_s = {}, {}
    for name, make_step in contenders().items():
        functions[name] = make_step(*arrays)
        begin = time.perf_counter()
        wait_for(functions[name]())
        first_call_s[name] = round(time.perf_counter() - begin, 1)
    functions["two passes"] = two_passes(arrays[0])
    seconds = time_calls(functions, rounds)
    del functions
    pass_ms = 1e3 * float(np.median(seconds.pop("two passes"))) / 2
    results = [
        {
            "optimizer": name,
            "ms": _measure.spread(1e3 * own),
            "ratio": _measure.spread_of_ratios(own, seconds[BASELINE]),
            "first_call_s": first_call_s[name],
            # With tiny variables, most of the memory is the interpreter's.
            "peak_mb": (
                None
                if model == "tiny"
                else peak_memory_in_new_process(model, name)
            ),
        }
        for name, own in seconds.items()
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


def time_calls(steps, rounds):
    """Returns `{name: array with the seconds of a call in each round}`."""
    calls = GPU_CALLS if on_gpu() else 1
    functions = {name: called(step, calls) for name, step in steps.items()}
    times = _measure.interleaved_times(functions, rounds)
    return {name: np.array(s) / calls for name, s in times.items()}


def called(step, calls):
    """Returns a function that makes `calls` steps and waits for the last."""

    def function():
        for _ in range(calls):
            result = step()
        wait_for(result)

    return function


def wait_for(result):
    # JAX returns arrays before they are computed; other steps return None.
    if result is not None:
        import jax

        jax.block_until_ready(result)


def machine():
    result = _measure.machine()
    if on_gpu():
        import jax

        result["gpu"] = jax.local_devices()[0].device_kind
    return result


def peak_memory_in_new_process(model, name):
    """Returns the MB of `peak_memory`, measured in a process of its own."""
    command = [sys.executable, "-m", __spec__.name, f"--model={model}"]
    environment = os.environ | {
        # A fixed threshold makes the C library return freed memory at once.
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
    arrays = 4 if re.search("Lamb|lamb|Adam", name) else 3
    # Leave out the memory of the compiler.
    before = _measure.memory_bytes("VmRSS")
    _measure.reset_peak_memory()
    for _ in range(3):
        step()
    temporaries = _measure.memory_bytes("VmHWM") - before
    return round((arrays * sum(w.nbytes for w in weights) + temporaries) / 1e6)


def markdown(models):
    """Returns one table per model of a file of results."""
    blocks = []
    for model, result in models.items():
        floors = ", ".join(
            f"{name} {ms}" for name, ms in result["floor_ms"].items()
        )
        rows = [
            [
                line["optimizer"],
                _results.cell(line["ms"], ".3g"),
                _results.cell(line["ratio"], ".2f"),
                line["first_call_s"],
                line["peak_mb"],
            ]
            for line in result["results"]
        ]
        header = ["optimizer", "ms", f"x {BASELINE}", "first call, s", "MB"]
        blocks += [
            f"{model}: {result['variables']} variables, "
            f"{result['parameters']:,} parameters. The memory's floor in ms: "
            f"{floors}.",
            _results.table(header, rows),
        ]
    return "\n\n".join(blocks)


def draw(models, path):
    panels = {
        model: {line["optimizer"]: line["ratio"] for line in result["results"]}
        for model, result in models.items()
    }
    _results.draw_bars(panels, f"time relative to {BASELINE}", path)


def main():
    parser = _results.parser(
        __spec__,
        __doc__,
        None,
        "JSON file to write; it keeps models that are not run "
        "(default: docs/results/optimizer_step_cpu.json, or _gpu.json)",
    )
    _results.add_rounds(parser, 15)
    parser.add_argument(
        "--model",
        choices=MODELS,
        nargs="+",
        default=MODELS,
        metavar="MODEL",
        help=f"whose variables to update (default: {' '.join(MODELS)})",
    )
    parser.add_argument(
        "--peak_memory_of",
        metavar="OPTIMIZER",
        help="only print the peak memory of this optimizer, in MB",
    )
    options = parser.parse_args()
    check_backend(parser)
    if BACKEND == "tensorflow":
        # As a job does. The flag is for all optimizers of this process.
        _xla_flags.allow_two_outputs()
    if options.peak_memory_of:
        (model,) = options.model
        print(json.dumps(peak_memory(model, options.peak_memory_of)))
        return
    device = "gpu" if on_gpu() else "cpu"
    output = options.output or f"docs/results/optimizer_step_{device}.json"
    for model in options.model:
        result = measure(model, options.rounds)
        print(f"\n{markdown({model: result})}", flush=True)
        _results.add_json(output, model, result)


def check_backend(parser):
    if BACKEND not in ("tensorflow", "jax"):
        parser.error(
            f"KERAS_BACKEND is {BACKEND}, but must be tensorflow or jax"
        )
    if BACKEND == "tensorflow":
        import tensorflow as tf

        if tf.config.list_physical_devices("GPU"):
            parser.error(
                "TensorFlow sees a GPU, whose times this cannot measure: set "
                "KERAS_BACKEND=jax, or CUDA_VISIBLE_DEVICES= for the CPU"
            )
        # TensorFlow warns that each optimizer traces its own function.
        tf.get_logger().setLevel("ERROR")


if __name__ == "__main__":
    main()
