"""The reduction of a list of gradients over the ranks, in all its variants.

`DistributedOptimizer` and `DistributedGradientTape` share it.
"""

import functools
import warnings

import horovod.tensorflow as hvd
import keras
import tensorflow as tf

from horovod_recipes.keras import _watchdog
from horovod_recipes.keras._keras_hooks import check_outside_xla


class GradientReduction:
    """Replaces gradients by their mean, or sum, over the ranks.

    Args:
        name: String, prefix of the operations' names, the same on all ranks.

    The other arguments are those of `DistributedOptimizer`.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        name,
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
    ):
        _check_op(op, gradient_predivide_factor)
        if process_set.process_set_id is None:
            raise ValueError(
                "Argument `process_set` is not known to Horovod: pass it to "
                "hvd.init(process_sets=[...]), or to hvd.add_process_set."
            )
        self._groups = _checked_groups(groups, num_groups)
        self._name = name
        self._device_dense = device_dense
        self._device_sparse = device_sparse
        self._compression = compression
        self._sparse_as_dense = sparse_as_dense
        self._predivide_factor = gradient_predivide_factor
        self._op = op
        self._process_set = process_set
        self._scale_local_gradients = scale_local_gradients
        self._local_keys = set()

    def register_local(self, var):
        """Leaves a variable's gradients to each rank, from now on."""
        self._local_keys.add(_key(var))

    def is_local(self, variable):
        return _key(variable) in self._local_keys

    def __call__(self, grads, variables):
        """Returns the reduced gradients, one for each; None stays None.

        On a rank outside of the process set they stay what they are.
        """
        check_outside_xla(f"The reduction of {self._name}")
        reduced = list(grads)
        if not self._process_set.included():
            return reduced
        present = [i for i, grad in enumerate(grads) if grad is not None]
        local = [i for i in present if self.is_local(variables[i])]
        shared = [i for i in present if i not in local]
        groups = _split(shared, variables, self._groups)
        for number, group in enumerate(groups):
            results = self._reduce_group(
                [grads[i] for i in group], f"{self._name}_{number}"
            )
            for i, result in zip(group, results, strict=True):
                reduced[i] = result
        if self._scale_local_gradients:
            for i in local:
                reduced[i] = _divide(grads[i], self._size())
        return reduced

    def share_infinities(self, grads, variables):
        """Returns the gradients with NaN in a shared one if a local one is bad.

        After the reduction all ranks have that NaN, and so skip a step that a
        rank's local gradients would have one rank alone skip.
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
        if self._sparse_as_dense:
            grads = [tf.convert_to_tensor(grad) for grad in grads]
        results = [None] * len(grads)
        # One grouped operation takes tensors of one type.
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
            op=self._op,
            prescale_factor=1.0 / self._predivide_factor,
            postscale_factor=self._predivide_factor,
            device_dense=self._device_dense,
            compression=self._compression,
            process_set=self._process_set,
            name=name,
        )
        return _watchdog.noted(allreduce)(tensors)

    def _allgather(self, slices, name):
        """Returns the sum, or mean, of sparse gradients, each row once.

        Keras's optimizers take the rows of a sparse gradient to be distinct:
        they would square a row's parts, or clip them, one by one.
        """
        dtype = slices.values.dtype
        values, context = self._compression.compress(
            tf.cast(slices.values, _sent_dtype(dtype))
        )
        gather = functools.partial(hvd.allgather, process_set=self._process_set)
        with tf.device(self._device_sparse):
            values, indices = _watchdog.noted(
                lambda tensors: [
                    gather(tensors[0], name=f"{name}_values"),
                    gather(tensors[1], name=f"{name}_indices"),
                ]
            )([values, slices.indices])
        values = self._compression.decompress(values, context)
        # On a GPU the order of these additions, and so the last bit of their
        # sum, would differ between ranks.
        with tf.device("CPU"):
            rows, positions = tf.unique(indices)
            values = tf.math.unsorted_segment_sum(
                values, positions, tf.size(rows)
            )
        total = tf.IndexedSlices(
            tf.cast(values, dtype), rows, slices.dense_shape
        )
        if self._op == hvd.Sum:
            return total
        return _divide(total, self._size())

    def _size(self):
        # An operation rather than a number: an elastic job changes its size.
        return hvd.size_op(self._process_set.process_set_id)


def _check_op(op, gradient_predivide_factor):
    if op == hvd.Adasum:
        raise ValueError(
            "Argument `op` cannot be Adasum: Horovod has none over Gloo, and "
            "none for Keras's optimizers at all. Use Average or Sum."
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
            "Argument `gradient_predivide_factor` splits the division of an "
            "average: it needs op=Average."
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
            {v if isinstance(v, str) else _key(v) for v in group}
            for group in groups
        ]
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
        raise ValueError(
            "Argument `groups` must be None, an integer above 0, or a list of "
            f"lists of variables or of their paths. Received: groups={groups!r}"
        )
    return groups


def _split(indices, variables, groups):
    """Returns lists of indices: those whose gradients go together."""
    if not indices:
        return []
    if groups is None:
        return [indices]
    if isinstance(groups, int):
        size, larger = divmod(len(indices), groups)
        ends = [(n + 1) * size + min(n + 1, larger) for n in range(groups)]
        return [
            indices[begin:end]
            for begin, end in zip([0] + ends[:-1], ends, strict=True)
            if begin < end
        ]
    _check_paths(groups, variables)
    split, left = [], list(indices)
    for group in groups:
        members = [
            i
            for i in left
            if _key(variables[i]) in group or _path(variables[i]) in group
        ]
        left = [i for i in left if i not in members]
        if members:
            split.append(members)
    return split + [[i] for i in left]


def _check_paths(groups, variables):
    paths = [_path(v) for v in variables]
    for group in groups:
        for path in group:
            if isinstance(path, str) and path not in paths:
                raise ValueError(
                    f"Argument `groups` names {path!r}, which is the path of "
                    f"no trained variable. Their paths are: {paths}"
                )


def _key(variable):
    """Returns what identifies a variable: names and paths may collide."""
    if isinstance(variable, keras.Variable):
        variable = variable.value
    return variable.ref()


def _path(variable):
    return getattr(variable, "path", None)


def _sent_dtype(dtype):
    """Returns the type to send: Horovod has no bfloat16."""
    return tf.float32 if dtype == tf.bfloat16 else dtype


def _divide(grad, number):
    if isinstance(grad, tf.IndexedSlices):
        values = grad.values / tf.cast(number, grad.values.dtype)
        return tf.IndexedSlices(values, grad.indices, grad.dense_shape)
    return grad / tf.cast(number, grad.dtype)
