"""DistributedOptimizer: any Keras 3 optimizer, fed with all ranks' gradients.

Order inside a step: local accumulation, allreduce, then all that the optimizer
itself does: unscaling and the check for infinities, clipping, the update.
"""

import contextlib
import functools

import horovod.tensorflow as hvd
import keras
import tensorflow as tf

from horovod_recipes.keras._reduction import GradientReduction


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

    The optimizer is changed and returned; its class, config and state stay
    what they were, so that a model saved with it loads without Horovod. Where a
    `LossScaleOptimizer` is inside it, or is put around it, as `compile()` does
    under the policy `mixed_float16`, all ranks check the same gradients for
    infinities, and skip or take a step together.

    Where a model is compiled with `jit_compile`, as it is by default on a
    machine with a GPU, XLA compiles its training step up to the allreduce.

    `register_local_var(var)` of the result leaves the gradients of a
    trainable variable to each rank; call it before the first step.

    Args:
        optimizer: A `keras.optimizers.Optimizer`, built or not.
        name: String, prefix of the operations' names, the same on every rank.
            Defaults to `"Distributed"` and the class name.
        device_dense: String, the TensorFlow device that reduces dense
            gradients. Defaults to `""`, TensorFlow's choice.
        device_sparse: String, the same for sparse gradients.
        compression: `Compression.none` or `Compression.fp16`, the form in
            which gradients travel. Defaults to `Compression.none`.
        sparse_as_dense: Whether to make sparse gradients (`tf.IndexedSlices`)
            dense before they travel. Otherwise all ranks get the rows of all
            ranks. The mean is the same. Defaults to `False`.
        gradient_predivide_factor: Float above 0: gradients are divided by it
            before they are added up over the ranks, and multiplied by it
            after the division by their number; for small or large numbers in
            half precision. Needs `op=Average`. Defaults to `1.0`.
        op: `Average` or `Sum` of the ranks' gradients. Defaults to `Average`.
        backward_passes_per_step: Integer >= 1: add up the gradients of this
            many calls of `apply`, then reduce and update once. The
            optimizer's `iterations`, and so its learning-rate schedule, count
            updates. Sparse gradients are made dense. Defaults to `1`.
        average_aggregated_gradients: Whether to divide the sum by
            `backward_passes_per_step`. Defaults to `False`, as in Horovod.
        num_groups: Deprecated by Horovod in favour of `groups`.
        groups: Which gradients travel together, in one operation for each
            type: an integer >= 1, the number of groups; or a list of lists of
            variables or of their paths, where each variable in no list is
            on its own. The result is the same. Defaults to all together.
        process_set: The `ProcessSet` to reduce over; other ranks keep their
            own gradients. Defaults to all ranks.
        scale_local_gradients: Whether to divide the gradients of local
            variables by the number of ranks. Where each rank's loss is a mean
            over its own examples, they then are as large as those of the
            global batch's mean. Defaults to `True`.

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
    reduction = GradientReduction(
        name or f"Distributed{type(optimizer).__name__}",
        device_dense,
        device_sparse,
        compression,
        sparse_as_dense,
        gradient_predivide_factor,
        op,
        num_groups,
        groups,
        process_set,
        scale_local_gradients,
    )
    optimizer.apply = _DistributedApply(
        optimizer,
        reduction,
        backward_passes_per_step,
        average_aggregated_gradients,
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
        local_layers: A `keras.layers.Layer` or a list of them, built: each
            rank trains its own weights of these. Defaults to none.

    The other arguments, and the result, are those of `DistributedOptimizer`.

    Raises:
        ValueError: As `DistributedOptimizer`; or if a local layer is no layer
            or is not built.
    """
    if isinstance(local_layers, keras.layers.Layer):
        local_layers = [local_layers]
    for layer in local_layers or []:
        if not isinstance(layer, keras.layers.Layer):
            raise ValueError(
                "Argument `local_layers` must hold keras.layers.Layer. "
                f"Received: {layer!r}"
            )
        if not layer.built:
            raise ValueError(
                f"Argument `local_layers` has {layer.name!r}, which has no "
                "weights yet: build the model first."
            )
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
    for layer in local_layers or []:
        for variable in layer.trainable_weights:
            optimizer.register_local_var(variable)
    return optimizer


def is_distributed(optimizer):
    """Whether the optimizer came from `DistributedOptimizer`."""
    return isinstance(getattr(optimizer, "apply", None), _DistributedApply)


def is_local(optimizer, variable):
    """Whether each rank trains its own values of a variable."""
    return is_distributed(optimizer) and optimizer.apply._reduction.is_local(
        variable
    )


def is_within_update(optimizer):
    """Whether gradients wait for more micro-batches before the next update."""
    apply = optimizer.apply
    return isinstance(apply, _DistributedApply) and apply.passes_done() > 0


def discard_accumulated(optimizer):
    """Forgets the gradients that wait for the next update."""
    if is_within_update(optimizer):
        optimizer.apply.discard()


class _DistributedApply:
    """Stands in for an optimizer's `apply`: accumulates, reduces, applies.

    An attribute of the instance rather than a subclass, because the class is
    what a saved file names.
    """

    def __init__(self, optimizer, reduction, passes, average):
        self._optimizer = optimizer
        self._local_apply = optimizer.apply
        self._reduction = reduction
        self._passes = passes
        self._divisor = passes if average else 1
        # They stay out of the optimizer's variables, and so out of its saved
        # state, which plain Keras must be able to load.
        self._accumulators = None
        self._passes_done = None
        # Indices of the variables that had a gradient in any pass.
        self._with_gradient = set()
        self._held_back = None
        # The optimizer's inner one if that is distributed too, and whether it
        # is given gradients that are reduced already.
        self._inner = None
        self._gets_reduced = False

    def around(self, optimizer):
        """Returns the stand-in for `optimizer`, which calls this one inside."""
        outer = _DistributedApply(
            optimizer, self._reduction, self._passes, self._divisor > 1
        )
        outer._inner = self
        return outer

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
        if self._gets_reduced:
            self._local_apply(grads, trainable_variables)
            return
        optimizer = self._optimizer
        if trainable_variables is None and not optimizer.built:
            self._local_apply(grads)  # It raises Keras's own error.
        if trainable_variables is None:
            trainable_variables = optimizer._trainable_variables
        trainable_variables = list(trainable_variables)
        if self._passes == 1:
            self._reduce_and_apply(grads, trainable_variables)
            return
        # Variables are created here: a branch of a cond cannot.
        if not optimizer.built:
            optimizer.build(trainable_variables)
        if self._accumulators is None:
            self._create_accumulators(optimizer._trainable_variables)
        self._accumulate(grads, trainable_variables)
        tf.cond(
            tf.equal(self._passes_done.assign_add(1), self._passes),
            self._apply_accumulated,
            lambda: None,
        )

    def _reduce_and_apply(self, grads, variables):
        if isinstance(self._optimizer, keras.optimizers.LossScaleOptimizer):
            grads = self._reduction.share_infinities(grads, variables)
        grads = self._reduction(grads, variables)
        if self._inner is None:
            self._local_apply(grads, variables)
            return
        self._inner._gets_reduced = True
        try:
            self._local_apply(grads, variables)
        finally:
            self._inner._gets_reduced = False

    def passes_done(self):
        """Returns the number of micro-batches since the last update."""
        return 0 if self._passes_done is None else int(self._passes_done)

    def discard(self):
        """Forgets the gradients of those micro-batches."""
        for accumulator in self._accumulators:
            accumulator.assign(tf.zeros_like(accumulator))
        self._passes_done.assign(0)

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
        self._reduce_and_apply(grads, variables)
        for index in self._with_gradient:
            accumulator = self._accumulators[index]
            accumulator.assign(tf.zeros_like(accumulator))
        self._passes_done.assign(0)


def accumulation_dtype(dtype):
    """Returns the dtype to add up gradients in: half precision would stall."""
    return tf.float32 if dtype in ("float16", "bfloat16") else dtype


def _distribute_loss_scale_optimizers():
    """Makes a LossScaleOptimizer around a distributed optimizer distributed.

    Keras's own looks for infinities in the gradients of its rank, and calls the
    optimizer inside only if there are none: one rank's infinity would leave the
    others waiting in the allreduce for ever. `compile()` makes one, of which
    nobody else knows, so Keras's class is changed.
    """
    loss_scale = keras.optimizers.LossScaleOptimizer
    plain_init = loss_scale.__init__

    @functools.wraps(plain_init)
    def init(self, inner_optimizer, *args, **kwargs):
        plain_init(self, inner_optimizer, *args, **kwargs)
        if is_distributed(inner_optimizer):
            self.apply = inner_optimizer.apply.around(self)
            self.register_local_var = inner_optimizer.register_local_var

    loss_scale.__init__ = init


_distribute_loss_scale_optimizers()
