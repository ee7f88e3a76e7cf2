"""What a training job will do, before it runs: sizes, memory, time.

python -m horovod_recipes.plan --config=resnet50:32k --ranks=256
    --hardware=a100 [--config.key=value ...] [--output=DIR]

Prints how the global batch is made up, the schedule, the memory that a device
needs, and the time of a step and its parts, also for other numbers of ranks. It
needs no dataset, no GPU and no other rank. How the numbers come about, and how
far they are from published ones: docs/plan.md.
"""

import functools
import json
import math
import pathlib
import sys
import textwrap

import keras
import matplotlib.figure
import numpy as np
from absl import flags
from keras import layers

from horovod_recipes import command_line
from horovod_recipes.errors import JobError
from horovod_recipes.hardware import HARDWARE
from horovod_recipes.hardware import allreduce_seconds
from horovod_recipes.hardware import find_hardware
from horovod_recipes.job import check_config
from horovod_recipes.job import job_size
from horovod_recipes.models import MODELS
from horovod_recipes.models.flops import training_flops
from horovod_recipes.sources import TfdsSource
from horovod_recipes.sources import find_builder
from horovod_recipes.train import create_schedule

TABLE_RANKS = [2**power for power in range(3, 13)]
# Passes over the parameters of an update of LARS under XLA, as counted in
# docs/optimizer_step.md.
UPDATE_PASSES = 9
# Batch norm's statistics are of a micro-batch; Goyal et al., arXiv 1706.02677,
# section 5.1, take 32 images throughout.
SMALLEST_MICRO_BATCH = 32
# What they pass back does not depend on what came in ...
GRADIENT_WITHOUT_INPUT = (
    layers.Activation,
    layers.Add,
    layers.Flatten,
    layers.GlobalAveragePooling2D,
    layers.InputLayer,
    layers.ReLU,
    layers.Rescaling,
    layers.ZeroPadding2D,
)
# ... but that of these on what went out.
GRADIENT_WITH_OUTPUT = (layers.Activation, layers.ReLU)


def make_plan(config, ranks, hardware_name):
    """Returns all that is known of a job before it runs.

    Args:
        config: A `ConfigDict`, as those in `horovod_recipes.configs`.
        ranks: Integer, one device each.
        hardware_name: String, a key of `horovod_recipes.hardware.HARDWARE`.

    Returns:
        A dict of dicts and lists that JSON can hold; times in seconds, memory
        in bytes.

    Raises:
        JobError: If the config, the number of ranks or the hardware do not
            serve.
    """
    check_config(config)
    hardware = find_hardware(hardware_name, config.precision)
    peak, achieved = hardware.flops[config.precision]
    job = job_size(config, ranks)
    model = create_model(config)
    image_flops = training_flops(model)
    message_bytes = 4 * trainable_parameters(model)
    seconds = functools.partial(
        step_seconds, hardware, achieved, image_flops, message_bytes
    )
    return {
        "hardware": {
            "name": hardware_name,
            "description": hardware.description,
            "precision": config.precision,
            "peak_flops": peak,
            "achieved_fraction": achieved / peak,
            "speed_source": hardware.speed_source,
            "memory": hardware.memory,
        },
        "job": {
            "ranks": job.ranks,
            "micro_batch_size": job.micro_batch_size,
            "accumulation_steps": job.accumulation_steps,
            "global_batch_size": job.global_batch_size,
            "epochs": job.epochs,
            "steps_per_epoch": job.steps_per_epoch,
            "steps": job.steps,
        },
        "schedule": schedule_points(config, job),
        "memory": memory_per_device(model, config.precision, job),
        "training_flops_per_image": image_flops,
        "allreduce_bytes": message_bytes,
        "step": seconds(job),
        "scaling": [scaling_row(config, n, seconds) for n in TABLE_RANKS],
    }


def create_model(config):
    """Returns the network of a config, in its precision."""
    arguments = dict(config.model)
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(config.precision)
    try:
        return MODELS[arguments.pop("name")](
            image_shape=image_shape(config.dataset),
            num_classes=config.dataset.num_classes,
            **arguments,
        )
    finally:
        keras.config.set_dtype_policy(policy)


def image_shape(dataset):
    """Returns the shape that the model sees; the dataset need not be there."""
    if dataset.name == "folder":
        if not dataset.image_size:
            raise JobError(
                "the images of a folder may differ in size; set "
                "--config.dataset.image_size"
            )
        return dataset.image_size, dataset.image_size, 3
    builder = find_builder(dataset.name, dataset.data_dir)
    return TfdsSource(builder).image_shape(dataset.image_size)


def trainable_parameters(model):
    return sum(math.prod(v.shape) for v in model.trainable_variables)


def memory_per_device(model, precision, job):
    """Returns what a device holds at the end of a forward pass, in bytes."""
    parameters = trainable_parameters(model)
    memory = {
        "weights": 4 * model.count_params(),
        "weights in half precision": 2 * parameters * (precision != "float32"),
        "gradients": 4 * parameters,
        "accumulated gradients": 4 * parameters * (job.accumulation_steps > 1),
        "momentum": 4 * parameters,
        "Horovod's copy of the gradients": 4 * parameters * (job.ranks > 1),
        "activations": job.micro_batch_size * activation_bytes(model),
    }
    return {name: size for name, size in memory.items() if size}


def activation_bytes(model):
    """Returns what the forward pass keeps of an image for the backward pass.

    That is each tensor that a gradient reads: the input of most layers, the
    output of some. Batch norm reads its input in float32 in any precision.
    """
    kept = {}
    for layer in model.layers:
        tensors = []
        if not isinstance(layer, GRADIENT_WITHOUT_INPUT):
            tensors += keras.tree.flatten(layer.input)
        if isinstance(layer, GRADIENT_WITH_OUTPUT):
            tensors += keras.tree.flatten(layer.output)
        for tensor in tensors:
            item_bytes = 2 if "float16" in tensor.dtype else 4
            if isinstance(layer, layers.BatchNormalization):
                item_bytes = 4
            size = item_bytes * math.prod(tensor.shape[1:])
            kept[id(tensor)] = max(size, kept.get(id(tensor), 0))
    return sum(kept.values())


def step_seconds(hardware, achieved, image_flops, message_bytes, job):
    """Returns the time of an update and of its parts, one after the other.

    Args:
        hardware: A `Hardware`.
        achieved: Float, FLOP/s of a device.
        image_flops: Integer, FLOPs of an image.
        message_bytes: Integer, of the gradients.
        job: A `JobSize`.
    """
    images = job.micro_batch_size * job.accumulation_steps
    parts = {
        "forward_and_backward": images * image_flops / achieved,
        "allreduce": allreduce_seconds(hardware, job.ranks, message_bytes),
        "update": UPDATE_PASSES * message_bytes / hardware.memory_bandwidth,
    }
    return parts | {"total": sum(parts.values())}


def scaling_row(config, ranks, seconds):
    """Returns speed, efficiency and time to train of a number of ranks.

    Args:
        config: A `ConfigDict`.
        ranks: Integer.
        seconds: Function that returns the `step_seconds` of a `JobSize`.

    Returns:
        A dict; where the job does not work out, of `ranks` and `note` alone.
    """
    try:
        job = job_size(config, ranks)
    except JobError as error:
        return {"ranks": ranks, "note": str(error)}
    step = seconds(job)
    small = job.micro_batch_size < SMALLEST_MICRO_BATCH
    return {
        "ranks": ranks,
        "micro_batch_size": job.micro_batch_size,
        "accumulation_steps": job.accumulation_steps,
        "step": step,
        "images_per_second": job.global_batch_size / step["total"],
        # Beside as many devices that need not wait for each other.
        "efficiency": 1 - step["allreduce"] / step["total"],
        "training_seconds": job.steps * step["total"],
        "note": f"micro-batch below {SMALLEST_MICRO_BATCH}" if small else "",
    }


def schedule_points(config, job):
    """Returns the highest learning rate, and what a picture needs of all."""
    rates = np.asarray(create_schedule(config, job)(np.arange(job.steps)))
    steps = np.unique(np.linspace(0, job.steps - 1, 500).astype(int))
    return {
        "highest": float(rates.max()),
        "steps": steps.tolist(),
        "learning_rates": rates[steps].tolist(),
    }


def as_text(plan, name):
    """Returns a plan as a page for a person.

    Args:
        plan: From `make_plan`.
        name: String, the config's.
    """
    job, hardware = plan["job"], plan["hardware"]
    speed = (
        f"{hardware['description']}; {hardware['achieved_fraction']:.0%} of "
        f"{hardware['peak_flops'] / 1e12:.4g} TFLOP/s, as in "
        f"{hardware['speed_source']}"
    )
    rates = plan["schedule"]["learning_rates"]
    return "\n".join(
        [
            f"{name} on {job['ranks']} ranks of {hardware['name']} in "
            f"{hardware['precision']}",
            *(f"  {line}" for line in textwrap.wrap(speed, 76)),
            "",
            f"global batch   {job['global_batch_size']} = {job['ranks']} ranks "
            f"x {job['micro_batch_size']} micro-batch x "
            f"{job['accumulation_steps']} accumulation",
            f"steps          {job['steps']} = {job['epochs']} epochs x "
            f"{job['steps_per_epoch']}",
            f"learning rate  {bars(rates)}",
            f"               highest {plan['schedule']['highest']:.4g}, last "
            f"{rates[-1]:.3g}",
            "",
            *memory_lines(plan["memory"], hardware["memory"]),
            "",
            *step_lines(plan),
            "",
            *scaling_lines(plan["scaling"]),
        ]
    )


def memory_lines(memory, available):
    total = sum(memory.values())
    return [
        "memory of a device, GB",
        *(f"  {size / 1e9:8.3f}  {part}" for part, size in memory.items()),
        f"  {total / 1e9:8.3f}  of {available / 1e9:g}, and temporaries"
        + (": DOES NOT FIT" if total > available else ""),
    ]


def step_lines(plan):
    job, step = plan["job"], plan["step"]
    images = job["micro_batch_size"] * job["accumulation_steps"]
    speed = job["global_batch_size"] / step["total"]
    return [
        "step, ms",
        f"  {1e3 * step['forward_and_backward']:8.2f}  forward and backward of "
        f"{images} images, {plan['training_flops_per_image'] / 1e9:.1f} GFLOP "
        "each",
        f"  {1e3 * step['allreduce']:8.2f}  allreduce of "
        f"{plan['allreduce_bytes'] / 1e6:.1f} MB, after the last backward pass",
        f"  {1e3 * step['update']:8.2f}  update",
        f"  {1e3 * step['total']:8.2f}  in all: {speed:,.0f} images/s, "
        f"{speed / job['ranks']:,.0f} a rank; "
        f"{duration(job['steps'] * step['total'])} to train",
    ]


def scaling_lines(rows):
    lines = [
        "ranks  micro-batch  accum.  allreduce ms   step ms    images/s  "
        "efficiency  to train"
    ]
    for row in rows:
        if "step" not in row:
            lines.append(f"{row['ranks']:5}  {row['note']}")
            continue
        lines.append(
            f"{row['ranks']:5}  {row['micro_batch_size']:11}"
            f"{'*' if row['note'] else ' '} "
            f"{row['accumulation_steps']:6}  "
            f"{1e3 * row['step']['allreduce']:12.2f}  "
            f"{1e3 * row['step']['total']:8.1f}  "
            f"{row['images_per_second']:10,.0f}  {row['efficiency']:10.1%}  "
            f"{duration(row['training_seconds'])}"
        )
    if any("*" in line for line in lines):
        lines.append(
            f"* below {SMALLEST_MICRO_BATCH} images: few for batch norm, and "
            "for the device to be as fast"
        )
    return lines


def bars(values, width=60):
    """Returns values from 0 up as a line of bars."""
    indices = np.linspace(0, len(values) - 1, width).round().astype(int)
    heights = np.array(values)[indices] / max(values)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * height)] for height in heights)


def duration(seconds):
    """Returns a time as hours and minutes, or as minutes and seconds."""
    if seconds >= 3600:
        minutes = round(seconds / 60)
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{round(seconds) // 60} min {round(seconds) % 60:02} s"


def write_plan(plan, folder):
    """Writes plan.json and the picture of the schedule, schedule.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(json.dumps(plan, indent=1) + "\n")
    figure = matplotlib.figure.Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(plan["schedule"]["steps"], plan["schedule"]["learning_rates"])
    axes.set_xlabel("step (update)")
    axes.set_ylabel("learning rate")
    axes.grid(alpha=0.3)
    figure.savefig(folder / "schedule.png", dpi=120)


def main(argv):
    """Prints a plan from its command line; returns the exit status."""
    if "--help" in argv:
        print(__doc__, FLAGS, sep="")
        return 0
    try:
        name = command_line.parse(FLAGS, argv)
        for flag in ("ranks", "hardware"):
            if FLAGS[flag].value is None:
                raise JobError(f"--{flag} is missing: {FLAGS[flag].help}")
        plan = make_plan(FLAGS.config, FLAGS.ranks, FLAGS.hardware)
    # The last two are of models and schedules that get unfit arguments.
    except (JobError, TypeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(as_text(plan, name))
    if FLAGS.output:
        write_plan(plan, pathlib.Path(FLAGS.output))
    return 0


FLAGS = flags.FlagValues()
command_line.define_config(FLAGS)
flags.DEFINE_integer(
    "ranks", None, "The number of ranks, one a device.", 1, flag_values=FLAGS
)
flags.DEFINE_string(
    "hardware",
    None,
    f"What to run on: {', '.join(HARDWARE)}.",
    FLAGS,
)
flags.DEFINE_string(
    "output", None, "A folder for plan.json and schedule.png.", FLAGS
)

if __name__ == "__main__":
    sys.exit(main(sys.argv))
