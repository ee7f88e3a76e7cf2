"""The `apply` of a distributed optimizer: accumulates, reduces, updates."""

import contextlib

import keras
import tensorflow as tf

from horovod_recipes.keras._handshake import waits_for
from horovod_recipes.keras._keras_hooks import trained_variables
from horovod_recipes.keras._reduction import variable_key


def is_distributed(optimizer):
    """Whether the optimizer came from `DistributedOptimizer`."""
    return isinstance(getattr(optimizer, "apply", None), DistributedApply)


def is_local(optimizer, variable):
    """Whether each rank trains its own values of a variable."""
    return is_distributed(optimizer) and optimizer.apply.is_local(variable)


def is_within_update(optimizer):
    """Whether gradients wait for more micro-batches before the next update."""
    return is_distributed(optimizer) and optimizer.apply.passes_done() > 0


def discard_accumulated(optimizer):
    """Forgets the gradients that wait for the next update."""
    if is_within_update(optimizer):
        optimizer.apply.discard()


def distribute_loss_scale(loss_scale, inner):
    """Distributes a `LossScaleOptimizer` if the optimizer inside it is.

    Keras's own looks for infinities in the gradients of its rank, and calls the
    inner optimizer only if there are none. One rank's infinity would then leave
    the other ranks waiting in the allreduce forever.
    """
    if is_distributed(inner):
        loss_scale.apply = inner.apply.around(loss_scale)
        loss_scale.register_local_var = inner.register_local_var


class DistributedApply:
    """Replaces the `apply` of one optimizer.

    It is an attribute of the instance, not a method of a subclass, because a
    saved file names the class.

    Args:
        optimizer: The `keras.optimizers.Optimizer`.
        reduction: The `GradientReduction`.
        arguments: Dictionary, the arguments of `DistributedOptimizer`.
    """

    def __init__(self, optimizer, reduction, arguments):
        self.arguments = arguments
        self._optimizer = optimizer
        self._local_apply = optimizer.apply
        self._reduction = reduction
        self._passes = arguments["backward_passes_per_step"]
        self._average = arguments["average_aggregated_gradients"]
        # Not the optimizer's variables: plain Keras must load its saved state.
        self._accumulators = None
        self._passes_done = None
        self._positions = {}
        # Positions of the variables that had a gradient in any pass.
        self._with_gradient = set()
        self._held_back = None
        # The apply of a distributed optimizer inside this optimizer.
        self._inner = None
        self._gets_reduced_gradients = False

    def process_set(self):
        return self._reduction.process_set()

    def is_local(self, variable):
        return self._reduction.is_local(variable)

    def has_local_variables(self):
        return self._reduction.has_local_variables()

    def around(self, optimizer):
        """Returns the `apply` for an optimizer that calls this one inside."""
        outer = DistributedApply(optimizer, self._reduction, self.arguments)
        outer._inner = self
        return outer

    @contextlib.contextmanager
    def held_back(self):
        """Yields a list that receives gradients, which are not applied.

        An XLA program uses it to return its gradients.
        """
        self._held_back = []
        try:
            yield self._held_back
        finally:
            self._held_back = None

    # Converting this and Keras's code would slow down a user's tf.function.
    @tf.autograph.experimental.do_not_convert
    def __call__(self, grads, trainable_variables=None):
        grads = list(grads)
        if self._held_back is not None:
            self._held_back += grads
            return
        if self._gets_reduced_gradients:
            self._local_apply(grads, trainable_variables)
            return
        optimizer = self._optimizer
        if trainable_variables is None and not optimizer.built:
            self._local_apply(grads)  # Raises Keras's own error.
        if trainable_variables is None:
            trainable_variables = trained_variables(optimizer)
        trainable_variables = list(trainable_variables)
        if self._passes == 1:
            self._reduce_and_apply(grads, trainable_variables)
            return
        # A branch of a cond cannot create variables.
        if not optimizer.built:
            optimizer.build(trainable_variables)
        if self._accumulators is None:
            self._create_accumulators()
        self._accumulate(grads, trainable_variables)
        # A step without data must not count.
        with tf.control_dependencies(waits_for() or []):
            passes_done = self._passes_done.assign_add(1)
        tf.cond(
            passes_done >= self._passes, self._apply_accumulated, lambda: None
        )

    def _reduce_and_apply(self, grads, variables):
        if isinstance(self._optimizer, keras.optimizers.LossScaleOptimizer):
            grads = self._reduction.share_infinities(grads, variables)
        optimizer = self._optimizer
        trained = trained_variables(optimizer) if optimizer.built else []
        if tf.executing_eagerly() or any(grad is not None for grad in grads):
            grads = self._reduction(grads, variables, trained)
        else:
            # Keras will raise an error, while it traces. This rank then takes
            # no step in which the ranks could find that they differ.
            with tf.init_scope():
                tf.function(self._reduction)(grads, variables, trained)
        # TensorFlow could not make variables that wait for something.
        if not optimizer.built and any(grad is not None for grad in grads):
            optimizer.build(variables)
        # Keras counts an update that has no data: nothing there waits for them.
        with tf.control_dependencies(waits_for() or []):
            if self._inner is None:
                self._local_apply(grads, variables)
                return
            self._inner._gets_reduced_gradients = True
            try:
                self._local_apply(grads, variables)
            finally:
                self._inner._gets_reduced_gradients = False

    def passes_done(self):
        """Returns the number of micro-batches since the last update."""
        return 0 if self._passes_done is None else int(self._passes_done)

    def discard(self):
        """Forgets the gradients of those micro-batches."""
        for accumulator in self._accumulators:
            accumulator.assign(tf.zeros_like(accumulator))
        self._passes_done.assign(0)

    def _create_accumulators(self):
        variables = trained_variables(self._optimizer)
        self._positions = {
            variable_key(v): position for position, v in enumerate(variables)
        }
        with tf.init_scope():
            self._passes_done = tf.Variable(0, trainable=False)
            self._accumulators = [
                tf.Variable(
                    tf.zeros(v.shape, _accumulation_dtype(v.dtype)),
                    trainable=False,
                )
                for v in variables
            ]

    def _accumulate(self, grads, variables):
        for grad, variable in zip(grads, variables, strict=True):
            if grad is None:
                continue
            position = self._positions[variable_key(variable)]
            self._with_gradient.add(position)
            accumulator = self._accumulators[position]
            accumulator.assign_add(
                tf.cast(tf.convert_to_tensor(grad), accumulator.dtype)
            )

    def _apply_accumulated(self):
        variables = trained_variables(self._optimizer)
        divisor = self._passes if self._average else 1
        grads = [None] * len(variables)
        for position in self._with_gradient:
            accumulator = self._accumulators[position]
            mean = accumulator / tf.cast(divisor, accumulator.dtype)
            grads[position] = tf.cast(mean, variables[position].dtype)
        self._reduce_and_apply(grads, variables)
        for position in self._with_gradient:
            accumulator = self._accumulators[position]
            accumulator.assign(tf.zeros_like(accumulator))
        self._passes_done.assign(0)


def _accumulation_dtype(dtype):
    """Returns the dtype to add up in: sums in half precision lose addends."""
    return tf.float32 if dtype in ("float16", "bfloat16") else dtype
