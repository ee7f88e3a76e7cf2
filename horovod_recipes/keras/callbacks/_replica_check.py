"""A callback that finds ranks whose replicas of a model differ."""

import collections
import hashlib

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf

from horovod_recipes.keras._distributed_apply import is_local
from horovod_recipes.keras._optimizers_of import optimizers_of

# An error names at most this many variables, and this many ranks of each.
MAX_VARIABLES_NAMED = 3
MAX_RANKS_NAMED = 8


class ReplicasDiffer(RuntimeError):
    """The ranks hold different values of the same variables."""


class ReplicaCheck(keras.callbacks.Callback):
    """Ends training on every rank when the ranks' replicas differ.

    It compares checksums over all bits of the trainable weights and the
    variables of the model's optimizers. They change if one number changes or
    two numbers are swapped. A NaN equals the same NaN. A check takes one pass
    over the variables and one allgather of 8 bytes per rank. It leaves out the
    states of random generators. It also leaves out variables given to an
    optimizer's `register_local_var`, with their optimizer state.

    Args:
        every_n_steps: Integer >= 1, the calls of the training step between two
            checks. A call is `steps_per_execution` batches. There is one more
            check when training ends. Defaults to `100`.
        non_trainable_weights: Whether to compare these too. The moving
            statistics of batch norm differ between ranks, but not those of
            `SyncBatchNormalization`. Defaults to `False`.

    Raises:
        ValueError: If `every_n_steps` is out of its range.
        ReplicasDiffer: On every rank. It names the first variables that
            differ, and the ranks.
    """

    def __init__(self, every_n_steps=100, non_trainable_weights=False):
        super().__init__()
        if (
            isinstance(every_n_steps, bool)
            or not isinstance(every_n_steps, int)
            or every_n_steps < 1
        ):
            raise ValueError(
                "Argument `every_n_steps` must be an integer 1 or more. "
                f"Received: every_n_steps={every_n_steps!r}"
            )
        self._every_n_steps = every_n_steps
        self._non_trainable_weights = non_trainable_weights

    def on_train_begin(self, logs=None):
        # All ranks must check after the same step. The optimizer's
        # `iterations` may differ.
        self._steps = 0
        self._checksums = None

    def on_train_batch_end(self, batch, logs=None):
        self._steps += 1
        if self._steps % self._every_n_steps == 0:
            self._check()

    def on_train_end(self, logs=None):
        if self._steps % self._every_n_steps:
            self._check()

    def _check(self):
        if self._checksums is None:
            # The first step may have built the optimizer.
            self._variables = self._replicated_variables()
            self._checksums = checksum_function(self._variables)
        checksums = self._checksums().numpy()
        digest = hashlib.sha256(checksums.tobytes()).digest()[:8]
        digests = hvd.allgather(
            tf.constant(np.frombuffer(digest, "int64")), name="replica_check"
        )
        if len(set(digests.numpy())) == 1:
            return
        paths = [variable.path for variable in self._variables]
        optimizers = optimizers_of(self.model).values()
        update = max(int(optimizer.iterations) for optimizer in optimizers)
        of_ranks = hvd.allgather_object((update, paths, checksums.tolist()))
        update, paths, _ = of_ranks[0]
        difference = describe_difference(
            paths, [checksums for _, _, checksums in of_ranks]
        )
        raise ReplicasDiffer(
            f"The replicas differ after update {update}: {difference}. Usual "
            "causes: training began without BroadcastGlobalVariablesCallback; "
            "something other than the optimizer changed a variable on some "
            "ranks; faulty memory."
        )

    def _replicated_variables(self):
        optimizers = optimizers_of(self.model).values()
        trainable = self.model.trainable_variables

        def is_replicated(variable):
            return not any(is_local(o, variable) for o in optimizers)

        variables = [v for v in trainable if is_replicated(v)]
        if self._non_trainable_weights:
            variables += self.model.non_trainable_weights
        for state in [s for o in optimizers for s in o.variables]:
            owner = _owner(state, trainable)
            if owner is None or is_replicated(owner):
                variables.append(state)
        return variables


def _owner(state, variables):
    """Returns the variable that an optimizer variable belongs to, or None.

    Keras names the state by the variable's path and a word, for example
    `net_dense_kernel_momentum`. One path may be the beginning of another.
    """
    owners = [
        variable
        for variable in variables
        if state.name.startswith(variable.path.replace("/", "_") + "_")
    ]
    return max(owners, key=lambda owner: len(owner.path), default=None)


def checksum_function(variables):
    """Returns a compiled function of no arguments that returns checksums.

    It returns a uint64 per variable. Each is a sum of integers, so it does not
    depend on the processor or the order of summation.
    """
    # It is compiled once per shape and dtype.
    compiled = tf.function(_checksum, jit_compile=True, autograph=False)

    @tf.function(autograph=False)
    def checksums():
        return tf.stack([compiled(v.value.read_value()) for v in variables])

    return checksums


def _checksum(tensor):
    """Returns the sum of a hash of each number's bits and its position.

    The hash is the finalizer of SplitMix64. At one position, it maps different
    numbers to different hashes. A plain sum would miss swapped numbers.
    """
    bits = tf.reshape(_bits(tensor), [-1])
    position = tf.cast(tf.range(tf.size(bits, tf.int64)), tf.uint64)
    hashed = bits + (position + 1) * _uint64(0x9E3779B97F4A7C15)
    hashed = _xor_shifted(hashed, 30) * _uint64(0xBF58476D1CE4E5B9)
    hashed = _xor_shifted(hashed, 27) * _uint64(0x94D049BB133111EB)
    return tf.reduce_sum(_xor_shifted(hashed, 31))


def _bits(tensor):
    if tensor.dtype == tf.bool:
        return tf.cast(tensor, tf.uint64)
    unsigned = {1: tf.uint8, 2: tf.uint16, 4: tf.uint32, 8: tf.uint64}
    bits = tf.bitcast(tensor, unsigned[tensor.dtype.size])
    return tf.cast(bits, tf.uint64)


def _xor_shifted(value, places):
    shifted = tf.bitwise.right_shift(value, _uint64(places))
    return tf.bitwise.bitwise_xor(value, shifted)


def _uint64(value):
    return tf.constant(value, tf.uint64)


def describe_difference(paths, checksums_of_ranks):
    """Returns which variables differ, and the ranks with the rarer values.

    Args:
        paths: List of strings, the variables' names on rank 0.
        checksums_of_ranks: For each rank, a list with one for each variable.
    """
    numbers = [len(checksums) for checksums in checksums_of_ranks]
    if len(set(numbers)) > 1:
        return f"the ranks have different numbers of variables: {numbers}"
    named = []
    by_variable = zip(*checksums_of_ranks, strict=True)
    for path, checksums in zip(paths, by_variable, strict=True):
        if len(set(checksums)) > 1:
            named.append(f"{path} ({_odd_ranks(checksums)})")
    text = f"{len(named)} of {len(paths)} variables, "
    text += ", ".join(named[:MAX_VARIABLES_NAMED])
    return text + (", ..." if len(named) > MAX_VARIABLES_NAMED else "")


def _odd_ranks(checksums):
    # If several are equally frequent, this is the one of the lowest rank.
    ((usual, _),) = collections.Counter(checksums).most_common(1)
    odd = [str(rank) for rank, c in enumerate(checksums) if c != usual]
    named = ", ".join(odd[:MAX_RANKS_NAMED])
    if len(odd) > MAX_RANKS_NAMED:
        named += f" and {len(odd) - MAX_RANKS_NAMED} more"
    plural = "s" if len(odd) > 1 else ""
    return f"rank{plural} {named}, unlike rank {checksums.index(usual)}"
