"""Estimates a job's size, memory and time, also for other numbers of ranks."""

import functools
import math

import keras
import numpy as np
from keras import layers
from ml_collections import ConfigDict

from horovod_recipes.configs._check import check_config
from horovod_recipes.data.sources import TfdsSource
from horovod_recipes.data.sources import find_builder
from horovod_recipes.errors import JobError
from horovod_recipes.models.flops import training_flops
from horovod_recipes.models.heads import VIEWS
from horovod_recipes.planning.hardware import allreduce_seconds
from horovod_recipes.planning.hardware import find_hardware
from horovod_recipes.planning.overlap import allreduce_times
from horovod_recipes.planning.overlap import gradients_of
from horovod_recipes.training.build import create_network
from horovod_recipes.training.build import create_optimizer
from horovod_recipes.training.build import create_schedule
from horovod_recipes.training.job_size import job_size

# Numbers of ranks in the scaling table.
TABLE_RANKS = [2**power for power in range(3, 13)]
# How often a LARS update under XLA reads or writes all parameters.
# docs/performance.md counts them.
UPDATE_PASSES = 7
# Share of the backward pass in the time of a step. It has two products for each
# product of the forward pass.
BACKWARD_SHARE = 2 / 3
# Images below which the plan warns about batch norm's statistics.
# Goyal et al., arXiv 1706.02677, section 5.1, never use fewer.
FEWEST_BATCH_NORM_IMAGES = 32
# Layers whose gradients do not read the layer's input.
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
# Layers whose gradients read the layer's output.
GRADIENT_WITH_OUTPUT = (layers.Activation, layers.ReLU)


def make_plan(config, ranks, hardware_name):
    """Returns the plan of a job.

    Args:
        config: A `ConfigDict` like those in `horovod_recipes.configs`.
        ranks: Integer, the number of ranks. Each has one device.
        hardware_name: String, a key of `planning.hardware.HARDWARE`.

    Returns:
        A dict of dicts and lists that JSON can hold. Times are in seconds, and
        memory is in bytes.

    Raises:
        JobError: If the config, the number of ranks or the hardware does not
            work.
    """
    check_config(config)
    hardware = find_hardware(hardware_name, config.precision)
    peak, achieved = hardware.flops_per_second[config.precision]
    job = job_size(config, ranks)
    optimizer = create_optimizer(config, create_schedule(config, job))
    model = planned_network(config)
    gradients = gradients_of(model)

    def seconds(job):
        image_flops = flops_per_image(config, model, job)
        return step_seconds(hardware, achieved, image_flops, gradients, job)

    views = VIEWS if config.task == "simclr" else 1
    return {
        "hardware": {
            "name": hardware_name,
            "description": hardware.description,
            "precision": config.precision,
            "peak_flops": peak,
            "achieved_fraction": achieved / peak,
            "speed_source": hardware.speed_source,
            "memory": hardware.memory_bytes,
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
        "memory": memory_per_device(
            model, optimizer, config.precision, job, views
        ),
        "training_flops_per_image": flops_per_image(config, model, job),
        "allreduce_bytes": sum(size for size, _ in gradients),
        "step": seconds(job),
        "scaling": [scaling_row(config, n, seconds) for n in TABLE_RANKS],
    }


def planned_network(config):
    """Returns the network of a config, without layers that need Horovod."""
    config = ConfigDict(config.to_dict())
    if "batch_norm" in config.model:
        config.model.batch_norm = "micro_batch"
    return create_network(config, image_shape(config.dataset))


def flops_per_image(config, model, job):
    """Returns the FLOPs to train on one image, with all of its views."""
    flops = training_flops(model)
    if config.task == "simclr":
        flops *= VIEWS
        if job.accumulation_steps > 1:
            # Gradient caching has one more forward pass.
            flops = flops * 4 // 3
    return flops


def image_shape(dataset):
    """Returns the image shape of a dataset, which need not be on disk."""
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


def memory_per_device(model, optimizer, precision, job, views=1):
    """Returns the bytes of each part of a device's memory.

    They count what the device holds at the end of a forward pass over all views
    of a micro-batch. The optimizer gets built.
    """
    parameters = trainable_parameters(model)
    memory = {
        "weights": 4 * model.count_params(),
        "weights in half precision": 2 * parameters * (precision != "float32"),
        "gradients": 4 * parameters,
        "accumulated gradients": 4 * parameters * (job.accumulation_steps > 1),
        "optimizer's state": optimizer_bytes(optimizer, model),
        "Horovod's copy of the gradients": 4 * parameters * (job.ranks > 1),
        "activations": views * job.micro_batch_size * activation_bytes(model),
    }
    return {name: size for name, size in memory.items() if size}


def optimizer_bytes(optimizer, model):
    """Returns the bytes of an optimizer's moments, without its scalars."""
    optimizer.build(model.trainable_variables)
    moments = [v for v in optimizer.variables if v.shape != ()]
    return sum(4 * math.prod(v.shape) for v in moments)


def activation_bytes(model):
    """Returns the bytes per image that the backward pass needs.

    The forward pass keeps each tensor that a gradient reads: the input of most
    layers, and the output of some. Batch norm reads its input in float32 at any
    precision.
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


def step_seconds(hardware, achieved, image_flops, gradients, job):
    """Returns the seconds of an update's parts.

    Args:
        hardware: A `Hardware`.
        achieved: Float, the FLOP/s that a device achieves.
        image_flops: Integer, the FLOPs to train on one image.
        gradients: List of `(bytes, ready)`, as `gradients_of` returns it.
        job: A `JobSize`.

    Returns:
        A dict. `"exposed_allreduce"` is the part after the backward pass, and
        `"hidden_allreduce"` the part during it. `"total"` leaves out the hidden
        part.
    """
    micro_batch = job.micro_batch_size * image_flops / achieved
    compute = job.accumulation_steps * micro_batch
    # Accumulated gradients wait for the end of the last backward pass.
    is_hidden = job.accumulation_steps == 1
    busy, exposed = allreduce_times(
        gradients,
        BACKWARD_SHARE * micro_batch if is_hidden else 0.0,
        functools.partial(allreduce_seconds, hardware, job.ranks),
    )
    parameter_bytes = sum(size for size, _ in gradients)
    update = UPDATE_PASSES * parameter_bytes / hardware.memory_bytes_per_second
    return {
        "forward_and_backward": compute,
        "exposed_allreduce": exposed,
        "hidden_allreduce": busy - exposed,
        "update": update,
        "total": compute + exposed + update,
    }


def scaling_row(config, ranks, seconds):
    """Returns the speed, efficiency and training time for a number of ranks.

    Args:
        config: A `ConfigDict`.
        ranks: Integer.
        seconds: Function that returns the `step_seconds` of a `JobSize`.

    Returns:
        A dict. It only has `ranks` and `note` if the job does not work on that
        number of ranks.
    """
    try:
        job = job_size(config, ranks)
    except JobError as error:
        return {"ranks": ranks, "note": str(error)}
    step = seconds(job)
    note = ""
    if job.micro_batch_size < FEWEST_BATCH_NORM_IMAGES:
        note = f"micro-batch below {FEWEST_BATCH_NORM_IMAGES}"
    return {
        "ranks": ranks,
        "micro_batch_size": job.micro_batch_size,
        "accumulation_steps": job.accumulation_steps,
        "step": step,
        "images_per_second": job.global_batch_size / step["total"],
        # Relative to the same devices without an allreduce.
        "efficiency": 1 - step["exposed_allreduce"] / step["total"],
        "training_seconds": job.steps * step["total"],
        "note": note,
    }


def schedule_points(config, job):
    """Returns the highest learning rate, and up to 500 points of a plot."""
    rates = np.asarray(create_schedule(config, job)(np.arange(job.steps)))
    steps = np.unique(np.linspace(0, job.steps - 1, 500).astype(int))
    return {
        "highest": float(rates.max()),
        "steps": steps.tolist(),
        "learning_rates": rates[steps].tolist(),
    }
