"""DistributedGradientTape: a gradient tape that reduces over the ranks."""

import contextlib

import horovod.tensorflow as hvd
import keras
import tensorflow as tf

from horovod_recipes.keras._install_hooks import install_hooks
from horovod_recipes.keras._keras_hooks import copy_recording
from horovod_recipes.keras._reduction import GradientReduction
from horovod_recipes.keras._reduction import ReductionOptions
from horovod_recipes.keras._reduction import weights_of_layers


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
    install_hooks()
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


def PartialDistributedGradientTape(
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
    local_layers=None,
    scale_local_gradients=True,
):
    """Returns a tape that reduces the gradients of all but some layers.

    Args:
        gradtape: As for `DistributedGradientTape`.
        local_layers: As for `PartialDistributedOptimizer`.

    The other arguments and the result are those of `DistributedGradientTape`.

    Raises:
        ValueError: As `DistributedGradientTape`, or if `local_layers` holds
            something other than a built layer.
    """
    tape = DistributedGradientTape(
        gradtape,
        device_dense=device_dense,
        device_sparse=device_sparse,
        compression=compression,
        sparse_as_dense=sparse_as_dense,
        op=op,
        gradient_predivide_factor=gradient_predivide_factor,
        num_groups=num_groups,
        groups=groups,
        process_set=process_set,
        scale_local_gradients=scale_local_gradients,
    )
    for variable in weights_of_layers(local_layers):
        tape.register_local_source(variable)
    return tape


_has_reduced = False


def tape_has_reduced():
    """Whether a `DistributedGradientTape` of this process has been used."""
    return _has_reduced


class _DistributedGradientTape(tf.GradientTape):
    def __init__(self, gradtape, reduction):
        copy_recording(gradtape, self)
        self._reduction = reduction
        self._reduces = True

    def register_local_source(self, source):
        self._reduction.register_local(source)

    def gradient(
        self,
        target,
        sources,
        output_gradients=None,
        unconnected_gradients=tf.UnconnectedGradients.NONE,
        use_generic_names=False,
    ):
        """Returns the gradients, reduced over the ranks.

        Args:
            target: As for `tf.GradientTape.gradient`.
            sources: A variable, or any nest of variables in lists, tuples and
                dictionaries, the same on every rank.
            output_gradients: As for `tf.GradientTape.gradient`.
            unconnected_gradients: As for `tf.GradientTape.gradient`. With
                `"zero"`, a variable that the loss of this rank does not need
                counts as 0. Otherwise it must be unconnected on all ranks.
            use_generic_names: Has no effect. Operations never have the names
                of variables, because these may differ between ranks.

        Raises:
            ValueError: On every rank, if the ranks have gradients of different
                variables.
        """
        gradients = super().gradient(
            target,
            _of_tensorflow(sources),
            output_gradients,
            unconnected_gradients,
        )
        return self._reduced(gradients, sources)

    def jacobian(self, target, sources, *args, **kwargs):
        """Returns the Jacobians, reduced over the ranks.

        Args:
            target: A tensor of the same shape on every rank.
            sources: As for `gradient`.

        The other arguments are those of `tf.GradientTape.jacobian`.
        """
        with self._left_to_this_rank():
            jacobians = super().jacobian(
                target, _of_tensorflow(sources), *args, **kwargs
            )
        return self._reduced(jacobians, sources)

    def batch_jacobian(self, *args, **kwargs):
        """Raises an error: its rows are examples, which ranks do not share."""
        raise ValueError(
            "DistributedGradientTape has no batch_jacobian: its rows belong to "
            "the examples of one rank, so that the ranks have no mean. Call it "
            "on the tf.GradientTape."
        )

    @contextlib.contextmanager
    def _left_to_this_rank(self):
        """TensorFlow's `jacobian` calls `gradient` for each row."""
        self._reduces = False
        try:
            yield
        finally:
            self._reduces = True

    def _reduced(self, gradients, sources):
        if not self._reduces:
            return gradients
        global _has_reduced
        _has_reduced = True
        reduced = self._reduction(
            tf.nest.flatten(gradients), tf.nest.flatten(sources)
        )
        return tf.nest.pack_sequence_as(sources, reduced)

    def get_local_and_global_gradients(
        self,
        target,
        sources,
        output_gradients=None,
        unconnected_gradients=tf.UnconnectedGradients.NONE,
        use_generic_names=False,
    ):
        """Returns two lists of (variable, gradient): local, then reduced."""
        gradients = self.gradient(
            target, sources, output_gradients, unconnected_gradients
        )
        local_pairs, global_pairs = [], []
        for pair in zip(
            tf.nest.flatten(sources), tf.nest.flatten(gradients), strict=True
        ):
            is_local = self._reduction.is_local(pair[0])
            (local_pairs if is_local else global_pairs).append(pair)
        return local_pairs, global_pairs


def _of_tensorflow(sources):
    """Returns the sources with the `tf.Variable` of each Keras variable.

    TensorFlow cannot make zeros like a Keras variable.
    """
    return tf.nest.map_structure(
        lambda v: v.value if isinstance(v, keras.Variable) else v, sources
    )
