"""GradientReduction: the mean or sum of gradients over the ranks.

`DistributedOptimizer` and `DistributedGradientTape` share it. The allreduce of
gradients is called here.
"""

import dataclasses
import functools
import warnings

import horovod.tensorflow as hvd
import keras
import tensorflow as tf

from horovod_recipes import _groups
from horovod_recipes.keras import _watchdog
from horovod_recipes.keras._agreement import check_agreement
from horovod_recipes.keras._agreement import described
from horovod_recipes.keras._folding import not_folded
from horovod_recipes.keras._folding import one_not_folded
from horovod_recipes.keras._handshake import waits_for
from horovod_recipes.keras._keras_hooks import check_outside_xla


@dataclasses.dataclass(frozen=True)
class ReductionOptions:
    """How to reduce gradients: arguments of `DistributedOptimizer`.

    Raises:
        ValueError: If one is out of its range.
    """

    device_dense: str
    device_sparse: str
    compression: type
    sparse_as_dense: bool
    gradient_predivide_factor: float
    op: int
    num_groups: int
    groups: int | list | None
    process_set: hvd.ProcessSet
    scale_local_gradients: bool

    def __post_init__(self):
        _check_op(self.op, self.gradient_predivide_factor)
        if self.process_set.process_set_id is None:
            raise ValueError(
                "Argument `process_set` is not known to Horovod: pass it to "
                "hvd.init(process_sets=[...]), or to hvd.add_process_set."
            )


class GradientReduction:
    """Replaces gradients by their mean, or sum, over the ranks.

    Args:
        name: String, prefix of the operations' names, the same on all ranks.
        options: `ReductionOptions`.

    Raises:
        ValueError: If the option `groups` is out of its range.
    """

    def __init__(self, name, options):
        self._name = name
        self._options = options
        self._groups = _checked_groups(options.groups, options.num_groups)
        self._local_keys = set()

    def register_local(self, var):
        """Leaves the gradients of a variable to each rank from now on."""
        self._local_keys.add(variable_key(var))

    def process_set(self):
        return self._options.process_set

    def is_local(self, variable):
        return variable_key(variable) in self._local_keys

    def has_local_variables(self):
        return bool(self._local_keys)

    # Converting Horovod's code would take seconds in a user's tf.function.
    @tf.autograph.experimental.do_not_convert
    def __call__(self, grads, variables, all_variables=()):
        """Returns the reduced gradients, one per variable; None stays None.

        On a rank outside of the process set, the gradients do not change.

        Args:
            grads: List of a tensor, `tf.IndexedSlices` or None per variable.
            variables: List of variables, the same on every rank.
            all_variables: List of variables that `variables` is a part of, if
                it is known. Names are numbered by it.

        Raises:
            ValueError: On every rank, if the ranks bring different gradients.
                From a graph, it is a `tf.errors.InvalidArgumentError`.
        """
        check_outside_xla(f"The reduction of {self._name}")
        reduced = list(grads)
        if not self._options.process_set.included():
            return reduced
        present = [i for i, grad in enumerate(grads) if grad is not None]
        local = [i for i in present if self.is_local(variables[i])]
        shared = [i for i in present if i not in local]
        groups = _split(shared, variables, self._groups)
        # The backward pass ends at the first layers. Each group waits for the
        # one before, so the group that is complete first must come first.
        groups.sort(key=min, reverse=True)
        with tf.control_dependencies(
            self._check_agreement(
                [variables[i] for i in shared],
                [grads[i] for i in shared],
                all_variables,
            )
        ):
            for number, group in enumerate(groups):
                results = self._reduce_group(
                    [grads[i] for i in group], f"{self._name}_{number}"
                )
                for i, result in zip(group, results, strict=True):
                    reduced[i] = result
        if self._options.scale_local_gradients:
            for i in local:
                reduced[i] = _divide(grads[i], self._size())
        return reduced

    def _check_agreement(self, variables, grads, all_variables):
        if self._options.sparse_as_dense:
            grads = [tf.convert_to_tensor(grad) for grad in grads]
        inputs = waits_for(self._options.process_set)
        if inputs is None:
            inputs = [getattr(grad, "values", grad) for grad in grads]
        with tf.control_dependencies(inputs):
            return check_agreement(
                described(variables, grads, all_variables),
                f"gradients to {self._name}",
                "Compute the gradients of the same variables on every rank: a "
                "part of the loss that one rank lacks counts as 0 there, for "
                "example by tf.GradientTape.gradient(..., "
                "unconnected_gradients='zero')",
                f"{self._name}_agreement",
                self._options.process_set,
            )

    def share_infinities(self, grads, variables):
        """Puts NaN into a shared gradient if a local gradient is not finite.

        After the reduction all ranks have this NaN, so all skip the step.
        Otherwise the rank with the bad local gradient would skip it alone.

        Returns:
            The gradients.
        """
        shared, bad = None, []
        for i, grad in enumerate(grads):
            if grad is None:
                continue
            values = getattr(grad, "values", grad)
            if self.is_local(variables[i]):
                bad.append(~tf.reduce_all(tf.math.is_finite(values)))
            elif shared is None:
                shared = i
        grads = list(grads)
        if bad and shared is not None:
            grad = tf.convert_to_tensor(grads[shared])
            nan = tf.constant(float("nan"), grad.dtype)
            grads[shared] = tf.where(tf.reduce_any(bad), nan, grad)
        return grads

    def _reduce_group(self, grads, name):
        if self._options.sparse_as_dense:
            grads = [tf.convert_to_tensor(grad) for grad in grads]
        results = [None] * len(grads)
        # A grouped operation takes tensors of one dtype.
        dense = {}
        for i, grad in enumerate(grads):
            if isinstance(grad, tf.IndexedSlices):
                results[i] = self._allgather(grad, f"{name}_sparse_{i}")
            else:
                grad = tf.convert_to_tensor(grad)
                dense.setdefault(_sent_dtype(grad.dtype), []).append((i, grad))
        for dtype, members in dense.items():
            received = self._allreduce(
                [tf.cast(grad, dtype) for _, grad in members],
                f"{name}_{dtype.name}",
            )
            for (i, grad), result in zip(members, received, strict=True):
                results[i] = tf.cast(result, grad.dtype)
        return results

    def _allreduce(self, tensors, name):
        allreduce = functools.partial(
            hvd.grouped_allreduce,
            op=self._options.op,
            prescale_factor=1.0 / self._options.gradient_predivide_factor,
            postscale_factor=self._options.gradient_predivide_factor,
            device_dense=self._options.device_dense,
            compression=self._options.compression,
            process_set=self._options.process_set,
            name=name,
        )
        return _watchdog.tracked(allreduce)(one_not_folded(tensors))

    def _allgather(self, slices, name):
        """Returns the sum, or mean, of sparse gradients, each row once.

        Keras's optimizers expect distinct rows in a sparse gradient. They would
        square or clip the parts of a repeated row one by one.
        """
        dtype = slices.values.dtype
        values, context = self._options.compression.compress(
            tf.cast(slices.values, _sent_dtype(dtype))
        )
        gather = functools.partial(
            hvd.allgather, process_set=self._options.process_set
        )
        with tf.device(self._options.device_sparse):
            values, indices = _watchdog.tracked(
                lambda tensors: [
                    gather(tensors[0], name=f"{name}_values"),
                    gather(tensors[1], name=f"{name}_indices"),
                ]
            )([not_folded(values), not_folded(slices.indices)])
        values = self._options.compression.decompress(values, context)
        # On a GPU the order of additions, and so the sum, would differ.
        with tf.device("CPU"):
            rows, positions = tf.unique(indices)
            values = tf.math.unsorted_segment_sum(
                values, positions, tf.size(rows)
            )
        total = tf.IndexedSlices(
            tf.cast(values, dtype), rows, slices.dense_shape
        )
        if self._options.op == hvd.Sum:
            return total
        return _divide(total, self._size())

    def _size(self):
        # An operation, not a number: an elastic job changes its size.
        return hvd.size_op(self._options.process_set.process_set_id)


def _check_op(op, gradient_predivide_factor):
    if op == hvd.Adasum:
        raise ValueError(
            "Argument `op` cannot be Adasum: Horovod does not have it over "
            "Gloo or for Keras's optimizers. Use Average or Sum."
        )
    if op not in (hvd.Average, hvd.Sum):
        raise ValueError(
            f"Argument `op` must be Average or Sum. Received: op={op!r}"
        )
    if not gradient_predivide_factor > 0:
        raise ValueError(
            "Argument `gradient_predivide_factor` must be above 0. Received: "
            f"gradient_predivide_factor={gradient_predivide_factor!r}"
        )
    if gradient_predivide_factor != 1.0 and op != hvd.Average:
        raise ValueError(
            "Argument `gradient_predivide_factor` needs op=Average. "
            f"Received: gradient_predivide_factor={gradient_predivide_factor!r}"
        )


def _checked_groups(groups, num_groups):
    """Returns None, the number of groups, or sets of keys and paths."""
    if num_groups:
        warnings.warn(
            "Argument `num_groups` is deprecated; use groups="
            f"{num_groups} instead.",
            DeprecationWarning,
            stacklevel=4,
        )
        groups = num_groups if groups is None else groups
    if groups is None:
        return None
    if isinstance(groups, (list, tuple)) and all(
        isinstance(group, (list, tuple)) for group in groups
    ):
        return [
            {v if isinstance(v, str) else variable_key(v) for v in group}
            for group in groups
        ]
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
        raise ValueError(
            "Argument `groups` must be None, an integer above 0, or a list of "
            f"lists of variables or of their paths. Received: groups={groups!r}"
        )
    return groups


def _split(indices, variables, groups):
    """Returns lists of indices whose gradients travel together."""
    if groups is None or isinstance(groups, int):
        sizes = [_bytes(variables[i]) for i in indices]
        number = groups or _default_number(sizes)
        return [
            [indices[place] for place in places]
            for places in _groups.split_by_bytes(sizes, number)
        ]
    _check_paths(groups, variables)
    split, left = [], list(indices)
    for group in groups:
        members = [
            i
            for i in left
            if variable_key(variables[i]) in group
            or _path(variables[i]) in group
        ]
        left = [i for i in left if i not in members]
        if members:
            split.append(members)
    return split + [[i] for i in left]


def _default_number(sizes):
    """Returns the number of groups where the user does not choose it."""
    # In eager mode all gradients are there when the first group leaves.
    return 1 if tf.executing_eagerly() else _groups.default_number(sizes)


def _bytes(variable):
    return variable.shape.num_elements() * tf.as_dtype(variable.dtype).size


def _check_paths(groups, variables):
    paths = [_path(v) for v in variables]
    for group in groups:
        for path in group:
            if isinstance(path, str) and path not in paths:
                raise ValueError(
                    f"Argument `groups` names {path!r}, but no trained "
                    f"variable has this path. Their paths: {paths}"
                )


def weights_of_layers(local_layers):
    """Returns the trainable weights of a layer or of a list of layers.

    Raises:
        ValueError: If there is something other than a built layer.
    """
    if isinstance(local_layers, keras.layers.Layer):
        local_layers = [local_layers]
    weights = []
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
        weights += layer.trainable_weights
    return weights


def variable_key(variable):
    """Returns a hashable key of a variable. Names and paths may collide."""
    if isinstance(variable, keras.Variable):
        variable = variable.value
    return variable.ref()


def _path(variable):
    return getattr(variable, "path", None)


def _sent_dtype(dtype):
    """Returns the dtype to send: Horovod does not have bfloat16."""
    return tf.float32 if dtype == tf.bfloat16 else dtype


def _divide(grad, number):
    if isinstance(grad, tf.IndexedSlices):
        values = grad.values / tf.cast(number, grad.values.dtype)
        return tf.IndexedSlices(values, grad.indices, grad.dense_shape)
    return grad / tf.cast(number, grad.dtype)
