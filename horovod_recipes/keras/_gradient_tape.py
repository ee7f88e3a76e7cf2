"""DistributedGradientTape: a gradient tape that reduces over the ranks."""

import horovod.tensorflow as hvd
import tensorflow as tf

from horovod_recipes.keras._keras_hooks import copy_recording
from horovod_recipes.keras._reduction import GradientReduction
from horovod_recipes.keras._reduction import ReductionOptions


def DistributedGradientTape(
    gradtape,
    device_dense="",
    device_sparse="",
    compression=hvd.Compression.none,
    sparse_as_dense=False,
    op=hvd.Average,
    gradient_predivide_factor=1.0,
    num_groups=0,
    groups=None,
    process_set=hvd.global_process_set,
    scale_local_gradients=True,
):
    """Returns a tape whose `gradient` is the mean over all ranks.

    Use it in a custom training loop, with an optimizer that is not
    distributed:

    >>> import keras
    >>> import horovod_recipes.keras as hvd
    >>> hvd.init()
    >>> weight = keras.Variable(3.0)
    >>> with tf.GradientTape() as tape:
    ...     loss = weight.value**2
    >>> tape = hvd.DistributedGradientTape(tape)
    >>> float(tape.gradient(loss, weight))
    6.0

    Args:
        gradtape: A `tf.GradientTape`, before or after its `with`. It does not
            change.

    The other arguments are those of `DistributedOptimizer`.

    Returns:
        A `tf.GradientTape`, with a method `register_local_source(variable)`
        that leaves the gradients of a variable to each rank.

    Raises:
        ValueError: If an argument is out of its range.
    """
    if not isinstance(gradtape, tf.GradientTape):
        raise ValueError(
            "Argument `gradtape` must be a tf.GradientTape. "
            f"Received: gradtape={gradtape!r}"
        )
    reduction = GradientReduction(
        "DistributedGradientTape",
        ReductionOptions(
            device_dense=device_dense,
            device_sparse=device_sparse,
            compression=compression,
            sparse_as_dense=sparse_as_dense,
            gradient_predivide_factor=gradient_predivide_factor,
            op=op,
            num_groups=num_groups,
            groups=groups,
            process_set=process_set,
            scale_local_gradients=scale_local_gradients,
        ),
    )
    return _DistributedGradientTape(gradtape, reduction)


class _DistributedGradientTape(tf.GradientTape):
    def __init__(self, gradtape, reduction):
        copy_recording(gradtape, self)
        self._reduction = reduction

    def register_local_source(self, source):
        self._reduction.register_local(source)

    def gradient(
        self,
        target,
        sources,
        output_gradients=None,
        use_generic_names=False,
    ):
        """Returns the gradients, reduced over the ranks.

        Args:
            target: As for `tf.GradientTape.gradient`.
            sources: A variable or a list of them, the same on every rank.
            output_gradients: As for `tf.GradientTape.gradient`.
            use_generic_names: Has no effect. Operations never have the names
                of variables, because these may differ between ranks.
        """
        gradients = super().gradient(target, sources, output_gradients)
        if not isinstance(sources, (list, tuple)):
            return self._reduction([gradients], [sources])[0]
        return self._reduction(gradients, sources)

    def get_local_and_global_gradients(
        self,
        target,
        sources,
        output_gradients=None,
        use_generic_names=False,
    ):
        """Returns two lists of (variable, gradient): local, then reduced."""
        gradients = self.gradient(target, sources, output_gradients)
        local_pairs, global_pairs = [], []
        for pair in zip(sources, gradients, strict=True):
            is_local = self._reduction.is_local(pair[0])
            (local_pairs if is_local else global_pairs).append(pair)
        return local_pairs, global_pairs
