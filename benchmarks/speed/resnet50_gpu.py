"""What does an update of ResNet-50 at a batch of 32,768 take on one GPU?

    pip install -e '.[bench]' 'jax[cuda12]'
    KERAS_BACKEND=jax python -m benchmarks.speed.resnet50_gpu

It needs neither TensorFlow nor images. A step is 128 micro-batches of 256 and
one update of LARS. One compiled program makes the images of 224 x 224 pixels
and the labels of a micro-batch on the GPU, computes the forward and backward
pass in bfloat16, and accumulates the gradients in float32. The update is a
second program. Batch norm's statistics are those of a micro-batch. At 2,500
images/s, a guess, it takes 2 minutes.

The table has medians with quartiles, and these floors:

- The updates of LARS and of Keras's SGD with momentum are also timed alone, in
  turns, ten calls in a row. Within a step the host prepares the update while
  the GPU computes, so the share of the update is at most the one shown. The
  floor is the speed of the memory, as in `optimizer_step`: 7 passes over the
  parameters for LARS, 5 for SGD.
- The forward and backward pass are the rest of the step. Their floor is the
  arithmetic of convolutions and of the dense layer at the peak of the GPU's
  data sheet. Batch norm, ReLU and additions read and write memory, which this
  floor leaves out. A large product of bfloat16 matrices is timed beside it.

A small run on a CPU, to try it, takes 1 minute:

    KERAS_BACKEND=jax python -m benchmarks.speed.resnet50_gpu \\
        --image_size=32 --micro_batch=4 --global_batch=8 --rounds=2 \\
        --output=runs/resnet50_small.json
"""

import sys
import time

import keras
import numpy as np

from benchmarks import _measure
from benchmarks import _results
from benchmarks.speed import optimizer_step
from horovod_recipes.models.flops import training_flops
from horovod_recipes.models.resnet import resnet50
from horovod_recipes.planning.hardware import HARDWARE
from keras_lars import LARS

PRECISION = "mixed_bfloat16"
CLASSES = 1000
MOMENTUM = 0.9
# Small enough that many updates hardly change the weights.
LEARNING_RATE = 0.001
WEIGHT_DECAY = 5e-5
# How often the updates alone and the matrix product are timed.
UPDATE_ROUNDS = 15
# Rows and columns of the matrices of a product.
MATRIX_SIZE_GPU, MATRIX_SIZE_CPU = 8192, 512
# JAX's name of a GPU, and its name in `HARDWARE`. An H200 is an H100 with more
# and faster memory.
DATA_SHEETS = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h100"}


def measure(image_size, micro_batch, global_batch, rounds):
    """Returns the times of the step and its parts, and their floors."""
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
            "error: the losses are not finite, so the times say little: "
            f"{losses}"
        )
    # The updates alone take more memory.
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

    The function takes over the arrays of the model and of the optimizer, whose
    variables are empty afterwards.

    Args:
        model: A `keras.Model` from uint8 images to logits.
        optimizer: A Keras optimizer that is not built yet.
        micro_batch: Integer, images of a forward and backward pass.
        accumulation: Integer, micro-batches per update.

    Returns:
        A function without arguments that returns weights, mean gradients and
        the loss of the last micro-batch; and the MB that XLA counts for the
        program of a micro-batch.
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
        # Resetting the sum here costs no extra pass.
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
    """Returns random uint8 images and labels, new ones for each `count`."""
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
        # Results that reuse the memory of arguments.
        - memory.alias_size_in_bytes
    )
    return round(size / 1e6)


def peak_memory():
    """Returns the peak MB of JAX, which includes choosing algorithms."""
    import jax

    stats = jax.local_devices()[0].memory_stats()
    # A CPU has no statistics.
    return stats and round(stats["peak_bytes_in_use"] / 1e6)


def time_updates(weights, gradients):
    """Returns `{name: [seconds of an update, each round]}`."""
    # Copies, because each update donates its arrays.
    weights = [np.asarray(w) for w in weights]
    steps = {
        "LARS": optimizer_step.keras_jax_step(lars(), weights, gradients),
        "SGD momentum": optimizer_step.keras_jax_step(
            sgd(), weights, gradients
        ),
        "two passes": optimizer_step.two_passes(weights),
    }
    return optimizer_step.time_calls(steps, UPDATE_ROUNDS)


def matrix_product_flops():
    """Returns the FLOP/s of a product of large bfloat16 matrices."""
    import jax

    size = MATRIX_SIZE_GPU if optimizer_step.on_gpu() else MATRIX_SIZE_CPU
    a, b = (
        jax.random.normal(key, (size, size), "bfloat16")
        for key in jax.random.split(jax.random.key(0))
    )
    product = jax.jit(lambda a, b: a @ b)
    times = optimizer_step.time_calls(
        {"product": lambda: product(a, b)}, UPDATE_ROUNDS
    )
    return 2 * size**3 / np.median(times["product"])


def data_sheet_flops():
    """Returns the peak of the device in FLOP/s, or None if it is unknown."""
    import jax

    name = DATA_SHEETS.get(jax.local_devices()[0].device_kind)
    return name and HARDWARE[name].flops_per_second[PRECISION][0]


def summary(
    images, image_flops, step_s, update_s, pass_s, product_flops, peak_flops
):
    """Returns medians, quartiles, shares and floors, in a table's units.

    Args:
        images: Integer, images of a step.
        image_flops: Integer, FLOPs of an image's forward and backward pass.
        step_s: List, the seconds of each step.
        update_s: Dict `{name: array with the seconds of each round}`, with the
            keys of `optimizer_step.PASSES`.
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
        "step_s": _measure.spread(step_s),
        "images_per_second": _measure.spread(images / step_s, 1),
        "forward_and_backward": {
            "s": _measure.spread(passes_s),
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
                "ms": _measure.spread(1e3 * seconds),
                "floor_ms": round(1e3 * floors[name], 3),
                "x_floor": round(float(np.median(seconds)) / floors[name], 2),
            }
            for name, seconds in update_s.items()
        },
        "lars_to_sgd": _measure.spread_of_ratios(
            update_s["LARS"], update_s["SGD momentum"]
        ),
        "update_percent_of_step": float(
            f"{100 * update / np.median(step_s):.3g}"
        ),
    }


def markdown(result):
    """Returns a table, with a line of arithmetic and a line of memory."""
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
    return "\n\n".join(
        [
            f"ResNet-50, {result['image_size']} x {result['image_size']}, "
            f"{result['global_batch']} images per update, "
            f"{result['micro_batch']} per micro-batch, {PRECISION}",
            _results.table(["part", "time", "floor", "x floor"], rows),
            f"{passes['tflops']:.3g} TFLOP/s: "
            f"{passes['of_data_sheet'] if known else 'an unknown share'} of "
            f"the data sheet's peak, {passes['of_matrix_product']} of a matrix "
            f"product's {passes['matrix_product_tflops']:.3g}",
            f"memory, MB: {memory['peak'] or 'unknown'} at the peak, "
            f"{memory['micro_batch_program']} for a micro-batch's program",
        ]
    )


def spread_text(spread):
    return _results.cell(spread, ".4g")


def main():
    parser = _results.parser(
        __spec__,
        __doc__,
        None,
        "JSON file to write (default on a GPU: docs/results/resnet50_gpu.json)",
    )
    _results.add_integer(
        parser, "image_size", 224, "height and width in pixels", at_least=32
    )
    _results.add_integer(
        parser, "micro_batch", 256, "images on the GPU at once"
    )
    _results.add_integer(
        parser,
        "global_batch",
        32768,
        "images per update, a multiple of --micro_batch",
    )
    _results.add_rounds(parser, 5)
    options = parser.parse_args()
    if optimizer_step.BACKEND != "jax":
        parser.error(
            f"KERAS_BACKEND is {optimizer_step.BACKEND}, but must be jax"
        )
    if options.global_batch % options.micro_batch:
        parser.error(
            f"--global_batch={options.global_batch} is not a multiple of "
            f"--micro_batch={options.micro_batch}"
        )
    if options.output is None and not optimizer_step.on_gpu():
        parser.error(
            "JAX sees no GPU. To try this on the CPU, pass --output and a "
            "small --image_size, --micro_batch and --global_batch"
        )
    result = measure(
        options.image_size,
        options.micro_batch,
        options.global_batch,
        options.rounds,
    )
    print(markdown(result))
    _results.write_json(
        options.output or "docs/results/resnet50_gpu.json", result
    )


if __name__ == "__main__":
    main()
