"""DistributedOptimizer: any Keras 3 optimizer, fed with all ranks' gradients.

Order inside a step: local accumulation, allreduce, then all that the optimizer
itself does: unscaling and the check for infinities, clipping, the update.
"""

import contextlib

import horovod.tensorflow as hvd
import keras
import tensorflow as tf

from horovod_recipes.keras.xla import check_outside_xla


def DistributedOptimizer(
    optimizer,
    name=None,
    *,
    compression=hvd.Compression.none,
    op=hvd.Average,
    backward_passes_per_step=1,
    average_aggregated_gradients=False,
    process_set=hvd.global_process_set,
):
    """Makes a Keras optimizer apply the mean of all ranks' gradients.

    The optimizer is changed and returned; its class, config and state stay
    what they were, so that a model saved with it loads without Horovod. Under
    the global policy `mixed_float16` it is put inside a `LossScaleOptimizer`,
    as `compile()` would do, so that all ranks check the same gradients for
    infinities and skip or take a step together.

    Args:
        optimizer: A `keras.optimizers.Optimizer`, built or not.
        name: String, prefix of the allreduce operations' names, the same on
            every rank. Defaults to `"Distributed"` and the class name.
        compression: `Compression.none` or `Compression.fp16`, the form in
            which gradients travel. Defaults to `Compression.none`.
        op: `Average` or `Sum` of the ranks' gradients. Defaults to `Average`.
        backward_passes_per_step: Integer >= 1: add up the gradients of this
            many calls of `apply`, then allreduce and update once. The
            optimizer's `iterations`, and so its learning-rate schedule, count
            updates. Defaults to `1`.
        average_aggregated_gradients: Whether to divide the sum by
            `backward_passes_per_step`. Defaults to `False`, as in Horovod.
        process_set: The `ProcessSet` to reduce over. Defaults to all ranks.

    Returns:
        `optimizer`, or the `LossScaleOptimizer` around it.

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
    if op not in (hvd.Average, hvd.Sum):
        raise ValueError(
            f"Argument `op` must be Average or Sum. Received: op={op!r}"
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
    name = name or f"Distributed{type(optimizer).__name__}"
    mixed_float16 = keras.config.dtype_policy().name == "mixed_float16"
    loss_scale = keras.optimizers.LossScaleOptimizer
    if mixed_float16 and not isinstance(optimizer, loss_scale):
        optimizer = loss_scale(optimizer, name="loss_scale_optimizer")
    optimizer.apply = _DistributedApply(
        optimizer,
        lambda grads: _allreduce(grads, name, compression, op, process_set),
        backward_passes_per_step,
        average_aggregated_gradients,
    )
    return optimizer


def is_distributed(optimizer):
    """Whether the optimizer came from `DistributedOptimizer`."""
    return isinstance(optimizer.apply, _DistributedApply)


class _DistributedApply:
    """Stands in for an optimizer's `apply`: accumulates, reduces, applies.

    An attribute of the instance rather than a subclass, because the class is
    what a saved file names.
    """

    def __init__(self, optimizer, reduce, passes, average):
        self._optimizer = optimizer
        self._local_apply = optimizer.apply
        self._reduce = reduce
        self._passes = passes
        self._divisor = passes if average else 1
        # They stay out of the optimizer's variables, and so out of its saved
        # state, which plain Keras must be able to load.
        self._accumulators = None
        self._passes_done = None
        # Indices of the variables that had a gradient in any pass.
        self._with_gradient = set()
        self._held_back = None

    @contextlib.contextmanager
    def held_back(self):
        """Yields a list that gets the gradients of a call, which does no more.

        For what has to leave an XLA program before it goes on.
        """
        self._held_back = []
        try:
            yield self._held_back
        finally:
            self._held_back = None

    def __call__(self, grads, trainable_variables=None):
        grads = list(grads)
        if self._held_back is not None:
            self._held_back += grads
            return
        check_outside_xla("The apply of a DistributedOptimizer")
        optimizer = self._optimizer
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
        if self._passes == 1:
            self._local_apply(self._reduce(grads), trainable_variables)
            return
        # Variables are created here: a branch of a cond cannot.
        if not optimizer.built:
            optimizer.build(trainable_variables)
        if self._accumulators is None:
            self._create_accumulators(optimizer._trainable_variables)
        if trainable_variables is None:
            trainable_variables = optimizer._trainable_variables
        self._accumulate(grads, trainable_variables)
        tf.cond(
            tf.equal(self._passes_done.assign_add(1), self._passes),
            self._apply_accumulated,
            lambda: None,
        )

    def _create_accumulators(self, variables):
        with tf.init_scope():
            self._passes_done = tf.Variable(0, trainable=False)
            self._accumulators = [
                tf.Variable(
                    tf.zeros(v.shape, accumulation_dtype(v.dtype)),
                    trainable=False,
                )
                for v in variables
            ]

    def _accumulate(self, grads, variables):
        for grad, variable in zip(grads, variables, strict=True):
            index = self._optimizer._get_variable_index(variable)
            if grad is None:
                continue
            self._with_gradient.add(index)
            accumulator = self._accumulators[index]
            accumulator.assign_add(
                tf.cast(tf.convert_to_tensor(grad), accumulator.dtype)
            )

    def _apply_accumulated(self):
        variables = self._optimizer._trainable_variables
        grads = [None] * len(variables)
        for index in self._with_gradient:
            accumulator = self._accumulators[index]
            mean = accumulator / tf.cast(self._divisor, accumulator.dtype)
            grads[index] = tf.cast(mean, variables[index].dtype)
        self._local_apply(self._reduce(grads), variables)
        for index in self._with_gradient:
            accumulator = self._accumulators[index]
            accumulator.assign(tf.zeros_like(accumulator))
        self._passes_done.assign(0)


def accumulation_dtype(dtype):
    """Returns the dtype to add up gradients in: half precision would stall."""
    return tf.float32 if dtype in ("float16", "bfloat16") else dtype


def _allreduce(grads, name, compression, op, process_set):
    """Returns the gradients reduced over the ranks; None stays None."""
    present = [i for i, grad in enumerate(grads) if grad is not None]
    dense = [tf.convert_to_tensor(grads[i]) for i in present]
    # Horovod has no bfloat16.
    sent = [
        tf.cast(g, tf.float32) if g.dtype == tf.bfloat16 else g for g in dense
    ]
    received = hvd.grouped_allreduce(
        sent,
        op=op,
        compression=compression,
        name=name,
        process_set=process_set,
    )
    reduced = list(grads)
    for i, before, after in zip(present, dense, received, strict=True):
        reduced[i] = tf.cast(after, before.dtype)
    return reduced
