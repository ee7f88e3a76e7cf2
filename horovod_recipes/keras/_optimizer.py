"""DistributedOptimizer: any Keras 3 optimizer, fed with all ranks' gradients.

Order inside a step: local accumulation, allreduce, then what the optimizer
itself does, which is unscaling, the check for infinities, clipping, the update.
"""

import horovod.tensorflow as hvd
import keras

from horovod_recipes.keras._distributed_apply import DistributedApply
from horovod_recipes.keras._distributed_apply import is_distributed
from horovod_recipes.keras._install_hooks import install_hooks
from horovod_recipes.keras._reduction import GradientReduction
from horovod_recipes.keras._reduction import ReductionOptions
from horovod_recipes.keras._reduction import weights_of_layers


def DistributedOptimizer(
    optimizer,
    name=None,
    device_dense="",
    device_sparse="",
    compression=hvd.Compression.none,
    sparse_as_dense=False,
    gradient_predivide_factor=1.0,
    op=hvd.Average,
    backward_passes_per_step=1,
    average_aggregated_gradients=False,
    num_groups=0,
    groups=None,
    process_set=hvd.global_process_set,
    scale_local_gradients=True,
):
    """Makes a Keras optimizer apply the mean of all ranks' gradients.

    This changes the optimizer and returns it. Its class, config and state stay
    the same, so a model saved with it loads without Horovod. What is loaded
    from a file, made by `from_config` or compiled after
    `keras.models.clone_model` must be distributed again. What `copy` or
    `pickle` copies is distributed.

    A `LossScaleOptimizer` may be inside the optimizer or around it. `compile()`
    puts one around it under the policy `mixed_float16`. In both cases all ranks
    check the same gradients for infinities, and skip or take a step together.

    If a model is compiled with `jit_compile`, XLA compiles its training step up
    to the allreduce. Keras turns `jit_compile` on where there is a GPU.

    The returned optimizer has a method `register_local_var(var)`. It leaves the
    gradients of a trainable variable to each rank. Call it before the first
    step.

    Args:
        optimizer: A `keras.optimizers.Optimizer`, built or not.
        name: String, prefix of the operations' names, the same on every rank.
            Defaults to `"Distributed"` and the class name.
        device_dense: String, the TensorFlow device that reduces dense
            gradients. Defaults to `""`, TensorFlow's choice.
        device_sparse: String, the device that reduces sparse gradients.
            Defaults to `""`, TensorFlow's choice.
        compression: `Compression.none` or `Compression.fp16`, the form in
            which gradients travel. Defaults to `Compression.none`.
        sparse_as_dense: Whether to make sparse gradients (`tf.IndexedSlices`)
            dense before they travel. Otherwise each rank receives the rows of
            all ranks. The mean is the same. Defaults to `False`.
        gradient_predivide_factor: Float above 0. Gradients are divided by it
            before the sum over ranks. Their mean is multiplied by it. Use it
            for large or small gradients in half precision. Needs
            `op=Average`. Defaults to `1.0`.
        op: `Average` or `Sum` of the ranks' gradients. Defaults to `Average`.
        backward_passes_per_step: Integer >= 1. Adds up the gradients of this
            many calls of `apply`, then reduces and updates once. The
            optimizer's `iterations` and its learning-rate schedule count
            updates. Sparse gradients are made dense. Defaults to `1`.
        average_aggregated_gradients: Whether to divide the sum by
            `backward_passes_per_step`. Defaults to `False`, as in Horovod.
        num_groups: Deprecated by Horovod in favour of `groups`.
        groups: Which gradients travel together, in one operation per dtype. A
            group travels as soon as the backward pass has made its gradients.
            An integer >= 1 is the number of groups, of about equal bytes; with
            1, all wait for the last. A list holds lists of variables or of
            their paths; each variable in no list travels alone. The result is
            the same. Defaults to a group for each MiB, and at most 16; in eager
            mode, to 1.
        process_set: The `ProcessSet` to reduce over; other ranks keep their
            own gradients. Defaults to all ranks.
        scale_local_gradients: Whether to divide the gradients of local
            variables by the number of ranks. Use `True` if each rank's loss is
            a mean over its own examples: their gradients then have the scale
            of the global batch's mean. Defaults to `True`.

    Returns:
        `optimizer`.

    Raises:
        ValueError: If an argument is out of its range, or the optimizer is
            distributed already.
    """
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ValueError(
            "Argument `optimizer` must be a keras.optimizers.Optimizer. "
            f"Received: optimizer={optimizer!r}"
        )
    if is_distributed(optimizer):
        raise ValueError(
            "Argument `optimizer` is distributed already: call "
            "DistributedOptimizer once."
        )
    if (
        not isinstance(backward_passes_per_step, int)
        or backward_passes_per_step < 1
    ):
        raise ValueError(
            "Argument `backward_passes_per_step` must be an integer above 0. "
            "Received: "
            f"backward_passes_per_step={backward_passes_per_step!r}"
        )
    options = {
        "device_dense": device_dense,
        "device_sparse": device_sparse,
        "compression": compression,
        "sparse_as_dense": sparse_as_dense,
        "gradient_predivide_factor": gradient_predivide_factor,
        "op": op,
        "num_groups": num_groups,
        "groups": groups,
        "process_set": process_set,
        "scale_local_gradients": scale_local_gradients,
    }
    passes = {
        "backward_passes_per_step": backward_passes_per_step,
        "average_aggregated_gradients": average_aggregated_gradients,
    }
    reduction = GradientReduction(
        name or f"Distributed{type(optimizer).__name__}",
        ReductionOptions(**options),
    )
    install_hooks()
    optimizer.apply = DistributedApply(
        optimizer, reduction, {"name": name} | options | passes
    )
    optimizer.register_local_var = reduction.register_local
    return optimizer


def PartialDistributedOptimizer(
    optimizer,
    name=None,
    device_dense="",
    device_sparse="",
    compression=hvd.Compression.none,
    sparse_as_dense=False,
    gradient_predivide_factor=1.0,
    op=hvd.Average,
    groups=None,
    process_set=hvd.global_process_set,
    local_layers=None,
    scale_local_gradients=True,
):
    """Makes a Keras optimizer reduce the gradients of all but some layers.

    Args:
        local_layers: A built `keras.layers.Layer` or a list of them. Each rank
            trains its own weights of these layers. Defaults to none.

    The other arguments and the result are those of `DistributedOptimizer`.

    Raises:
        ValueError: As `DistributedOptimizer`, or if `local_layers` holds
            something other than a built layer.
    """
    local_variables = weights_of_layers(local_layers)
    optimizer = DistributedOptimizer(
        optimizer,
        name=name,
        device_dense=device_dense,
        device_sparse=device_sparse,
        compression=compression,
        sparse_as_dense=sparse_as_dense,
        gradient_predivide_factor=gradient_predivide_factor,
        op=op,
        groups=groups,
        process_set=process_set,
        scale_local_gradients=scale_local_gradients,
    )
    for variable in local_variables:
        optimizer.register_local_var(variable)
    return optimizer
