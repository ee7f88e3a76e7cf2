"""What a whole update of ResNet-50 at a batch of 32,768 takes on one GPU.

    pip install -e '.[bench]' 'jax[cuda12]'
    KERAS_BACKEND=jax python -m benchmarks.speed.resnet50_gpu

It needs neither TensorFlow nor images. A step is 128 micro-batches of 256, each
a call of one compiled program, which makes images of 224 x 224 and labels on
the GPU, goes forward and backward in bfloat16 and adds the gradients up in
float32; and then one update of LARS, which is a program of its own. Batch
norm's statistics are those of a micro-batch. No image comes from the host.

The table has medians, with the quartiles, and the floors beside them:

- The step is timed as a whole, and the updates of LARS and of Keras's SGD with
  momentum alone, in turns, ten calls in a row, as in `optimizer_step`. In the
  step the host prepares the update while the GPU still computes, so the share
  of the update is at most what is said here. Their floor is the memory's speed,
  as there: 7 passes over the parameters, and 5.
- Forward and backward are what is left of the step. Their floor is arithmetic,
  that of convolutions and of the dense layer, at the peak of the GPU's data
  sheet; beside it is the speed of a large product of bfloat16 matrices, which
  is measured. Batch norm, ReLU and additions read and write memory, and have no
  part in that floor.

On a CPU it runs in small, to try it:

    KERAS_BACKEND=jax python -m benchmarks.speed.resnet50_gpu \
        --image_size=32 --micro_batch=4 --global_batch=8 --rounds=2 \
        --output=runs/resnet50_small.json
"""

import pathlib
import sys
import time

import keras
import numpy as np
from absl import flags

from benchmarks.speed import optimizer_step
from benchmarks.speed import report
from horovod_recipes.models.flops import training_flops
from horovod_recipes.models.resnet import resnet50
from horovod_recipes.planning.hardware import HARDWARE
from keras_lars import LARS

PRECISION = "mixed_bfloat16"
CLASSES = 1000
MOMENTUM = 0.9
# So small that the weights stay what they are, however often they are updated.
LEARNING_RATE = 0.001
WEIGHT_DECAY = 5e-5
UPDATE_ROUNDS = 15
# What JAX calls a device, and what it is in `HARDWARE`. An H200 is an H100 with
# more and faster memory.
DATA_SHEETS = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h100"}

# Of its own, because tests import all benchmarks into one process.
FLAGS = flags.FlagValues()
_IMAGE_SIZE = flags.DEFINE_integer(
    "image_size",
    224,
    "Height and width of the images, in pixels.",
    lower_bound=32,
    flag_values=FLAGS,
)
_MICRO_BATCH = flags.DEFINE_integer(
    "micro_batch",
    256,
    "Images that are on the GPU at once.",
    lower_bound=1,
    flag_values=FLAGS,
)
_GLOBAL_BATCH = flags.DEFINE_integer(
    "global_batch",
    32768,
    "Images of an update; a multiple of --micro_batch.",
    lower_bound=1,
    flag_values=FLAGS,
)
_ROUNDS = flags.DEFINE_integer(
    "rounds", 5, "Whole updates to time.", lower_bound=2, flag_values=FLAGS
)
_OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "JSON to write. Defaults to docs/results/resnet50_gpu.json, on a GPU.",
    flag_values=FLAGS,
)


def measure(image_size, micro_batch, global_batch, rounds):
    """Returns what the step and its parts take, and their floors."""
    keras.config.set_dtype_policy(PRECISION)
    model = resnet50((image_size, image_size, 3), CLASSES)
    begin = time.perf_counter()
    step, program_mb = training_step(
        model, lars(), micro_batch, global_batch // micro_batch
    )
    # The first step compiles the update.
    step()
    first_step_s = time.perf_counter() - begin

    step_s, losses = [], []
    for _ in range(rounds):
        begin = time.perf_counter()
        weights, gradients, loss = step()
        step_s.append(time.perf_counter() - begin)
        losses.append(loss)
    if not np.isfinite(losses).all():
        sys.exit(
            f"error: losses are not finite, so times mean little: {losses}"
        )
    # Before anything else takes memory.
    peak_mb = peak_memory()

    update_s = time_updates(weights, gradients)
    pass_s = np.median(update_s.pop("two passes")) / 2
    return summary(
        images=global_batch,
        image_flops=training_flops(model),
        step_s=step_s,
        update_s=update_s,
        pass_s=pass_s,
        product_flops=matrix_product_flops(),
        peak_flops=data_sheet_flops(),
    ) | {
        "memory_mb": {"peak": peak_mb, "micro_batch_program": program_mb},
        "first_step_s": round(first_step_s, 1),
        "loss": round(losses[-1], 3),
        "image_size": image_size,
        "micro_batch": micro_batch,
        "global_batch": global_batch,
        "precision": PRECISION,
        "variables": len(weights),
        "parameters": sum(w.size for w in weights),
        "command": " ".join(["python -m", __spec__.name, *sys.argv[1:]]),
        "machine": optimizer_step.machine(),
    }


def lars():
    return LARS(LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)


def sgd():
    return keras.optimizers.SGD(LEARNING_RATE, momentum=MOMENTUM)


def training_step(model, optimizer, micro_batch, accumulation):
    """Returns a function that makes one update, and a program's memory.

    The variables of the model and of the optimizer hold nothing afterwards:
    their arrays are the function's.

    Args:
        model: From uint8 images to logits.
        optimizer: Of Keras; not built yet.
        micro_batch: Integer, images of a forward and backward pass.
        accumulation: Integer, micro-batches of an update.

    Returns:
        A function without arguments that returns weights, mean gradients and
        the loss of the last micro-batch; and the MB that the program of a
        micro-batch takes, by XLA's count.
    """
    import jax
    import jax.numpy as jnp

    image_shape = model.input.shape[1:]
    loss_function = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def loss_of(weights, statistics, images, labels):
        logits, statistics = model.stateless_call(
            weights, statistics, images, training=True
        )
        return loss_function(labels, logits), statistics

    def add_micro_batch(weights, statistics, gradients, count):
        """Returns new batch norm statistics, gradients and the loss."""
        images, labels = make_batch(count, micro_batch, image_shape)
        (loss, statistics), new = jax.value_and_grad(loss_of, has_aux=True)(
            weights, statistics, images, labels
        )
        # Starting anew costs no pass of its own here.
        first = count % accumulation == 0
        gradients = [
            jnp.where(first, 0.0, mean) + gradient / accumulation
            for mean, gradient in zip(gradients, new, strict=True)
        ]
        return statistics, gradients, loss

    optimizer.build(model.trainable_variables)
    weights = [v.value for v in model.trainable_variables]
    statistics = [v.value for v in model.non_trainable_variables]
    gradients = [jnp.zeros_like(w) for w in weights]
    state = [v.value for v in optimizer.variables]
    micro_step = (
        jax.jit(add_micro_batch, donate_argnums=(1, 2))
        .lower(weights, statistics, gradients, np.uint32(0))
        .compile()
    )
    update = jax.jit(optimizer.stateless_apply, donate_argnums=(0, 2))
    count = 0

    def step():
        nonlocal weights, statistics, gradients, state, count
        for _ in range(accumulation):
            statistics, gradients, loss = micro_step(
                weights, statistics, gradients, np.uint32(count)
            )
            count += 1
        weights, state = update(state, gradients, weights)
        jax.block_until_ready(weights)
        return weights, gradients, float(loss)

    return step, program_memory(micro_step)


def make_batch(count, size, image_shape):
    """Returns random uint8 images and labels, others for every `count`."""
    import jax

    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), count))
    images = jax.random.bits(keys[0], (size, *image_shape), "uint8")
    return images, jax.random.randint(keys[1], (size,), 0, CLASSES)


def program_memory(compiled):
    """Returns the MB of a program's arguments, results and temporaries."""
    memory = compiled.memory_analysis()
    size = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        # Results that take the place of arguments.
        - memory.alias_size_in_bytes
    )
    return round(size / 1e6)


def peak_memory():
    """Returns the most MB that JAX has held, also to choose algorithms."""
    import jax

    stats = jax.local_devices()[0].memory_stats()
    # The CPU has none.
    return stats and round(stats["peak_bytes_in_use"] / 1e6)


def time_updates(weights, gradients):
    """Returns `{name: [seconds of an update, each round]}`."""
    # Copies, since each update gives its own away.
    weights = [np.asarray(w) for w in weights]
    steps = {
        "LARS": optimizer_step.keras_jax_step(lars(), weights, gradients),
        "SGD momentum": optimizer_step.keras_jax_step(
            sgd(), weights, gradients
        ),
        "two passes": optimizer_step.two_passes(weights),
    }
    return time_calls(steps, UPDATE_ROUNDS)


def time_calls(steps, rounds):
    """Returns `{name: [seconds of a call, each round]}`."""
    # A GPU works while the host goes on: many calls keep it busy.
    calls = 10 if optimizer_step.on_gpu() else 1
    functions = {
        name: optimizer_step.called(step, calls) for name, step in steps.items()
    }
    times = report.interleaved_times(functions, rounds)
    return {name: np.array(s) / calls for name, s in times.items()}


def matrix_product_flops():
    """Returns the FLOP/s of a product of large bfloat16 matrices."""
    import jax

    size = 8192 if optimizer_step.on_gpu() else 512
    a, b = (
        jax.random.normal(key, (size, size), "bfloat16")
        for key in jax.random.split(jax.random.key(0))
    )
    product = jax.jit(lambda a, b: a @ b)
    times = time_calls({"product": lambda: product(a, b)}, UPDATE_ROUNDS)
    return 2 * size**3 / np.median(times["product"])


def data_sheet_flops():
    """Returns the peak of the device in FLOP/s; None if it is not known."""
    import jax

    name = DATA_SHEETS.get(jax.local_devices()[0].device_kind)
    return name and HARDWARE[name].flops[PRECISION][0]


def summary(
    images, image_flops, step_s, update_s, pass_s, product_flops, peak_flops
):
    """Returns medians, quartiles, shares and floors, in units for a table.

    Args:
        images: Integer, of a step.
        image_flops: Integer, FLOPs of forward and backward of an image.
        step_s: List, the seconds of each step.
        update_s: Dict `{name: array of seconds}` with the keys of
            `optimizer_step.PASSES`; the same rounds of each.
        pass_s: Float, seconds of a pass over the parameters.
        product_flops: Float, FLOP/s of a matrix product.
        peak_flops: Float, FLOP/s of the data sheet, or None.
    """
    step_s = np.array(step_s)
    update = float(np.median(update_s["LARS"]))
    passes_s = step_s - update
    flops = float(images * image_flops / np.median(passes_s))
    floors = {
        name: passes * pass_s for name, passes in optimizer_step.PASSES.items()
    }
    return {
        "step_s": report.spread(step_s.tolist()),
        "images_per_second": report.spread((images / step_s).tolist(), 1),
        "forward_and_backward": {
            "s": report.spread(passes_s.tolist()),
            "floor_s": peak_flops
            and round(images * image_flops / peak_flops, 3),
            "gflop_per_image": round(image_flops / 1e9, 3),
            "tflops": round(flops / 1e12, 3),
            "data_sheet_tflops": peak_flops and round(peak_flops / 1e12, 1),
            "of_data_sheet": peak_flops and round(flops / peak_flops, 4),
            "matrix_product_tflops": round(product_flops / 1e12, 3),
            "of_matrix_product": round(flops / product_flops, 4),
        },
        "updates": {
            name: {
                "ms": report.spread((1e3 * seconds).tolist()),
                "floor_ms": round(1e3 * floors[name], 3),
                "x_floor": round(float(np.median(seconds)) / floors[name], 2),
            }
            for name, seconds in update_s.items()
        },
        "lars_to_sgd": report.spread(
            (update_s["LARS"] / update_s["SGD momentum"]).tolist()
        ),
        "update_percent_of_step": float(
            f"{100 * update / np.median(step_s):.3g}"
        ),
    }


def as_text(result):
    """Returns what was measured as a table and two lines, for a person."""
    passes = result["forward_and_backward"]
    known = passes["data_sheet_tflops"] is not None
    rows = [
        ("step", spread_text(result["step_s"]) + " s", "", ""),
        ("images/s", spread_text(result["images_per_second"]), "", ""),
        (
            "forward and backward",
            spread_text(passes["s"]) + " s",
            f"{passes['floor_s']:.3g} s" if known else "not known",
            f"{1 / passes['of_data_sheet']:.2f}" if known else "",
        ),
        *(
            (
                f"update of {name}",
                spread_text(update["ms"]) + " ms",
                f"{update['floor_ms']:.3g} ms",
                update["x_floor"],
            )
            for name, update in result["updates"].items()
        ),
        ("LARS, x SGD", spread_text(result["lars_to_sgd"]), "", ""),
        ("LARS, % of the step", result["update_percent_of_step"], "", ""),
    ]
    memory = result["memory_mb"]
    return "\n".join(
        [
            f"ResNet-50, {result['image_size']} x {result['image_size']}, "
            f"{result['global_batch']} images an update, "
            f"{result['micro_batch']} a micro-batch, {PRECISION}\n",
            report.table(["part", "time", "floor", "x floor"], rows),
            f"\n{passes['tflops']:.3g} TFLOP/s: "
            f"{passes['of_data_sheet'] if known else 'an unknown share'} of "
            f"the data sheet's peak, {passes['of_matrix_product']} of a matrix "
            f"product's {passes['matrix_product_tflops']:.3g}",
            f"memory, MB: {memory['peak'] or 'not known'} at the peak, "
            f"{memory['micro_batch_program']} of a micro-batch's program",
        ]
    )


def spread_text(spread):
    median, low, high = spread
    return f"{median:.4g} ({low:.4g} to {high:.4g})"


def main():
    report.parse_command_line(FLAGS)
    if optimizer_step.BACKEND != "jax":
        sys.exit(
            f"error: KERAS_BACKEND is {optimizer_step.BACKEND}, but must be jax"
        )
    if _GLOBAL_BATCH.value % _MICRO_BATCH.value:
        sys.exit(
            f"error: --global_batch={_GLOBAL_BATCH.value} is not a multiple of "
            f"--micro_batch={_MICRO_BATCH.value}"
        )
    if _OUTPUT.value is None and not optimizer_step.on_gpu():
        sys.exit(
            "error: JAX sees no GPU; to try it on the CPU, name an --output, "
            "and a small --image_size, --micro_batch and --global_batch"
        )
    result = measure(
        _IMAGE_SIZE.value,
        _MICRO_BATCH.value,
        _GLOBAL_BATCH.value,
        _ROUNDS.value,
    )
    print(as_text(result))
    report.write_json(
        pathlib.Path(_OUTPUT.value or "docs/results/resnet50_gpu.json"), result
    )


if __name__ == "__main__":
    main()
