"""Ends every rank with an error where the ranks bring different tensors.

Horovod pairs the tensors of the ranks by their place in a list. Lists that
differ would give wrong sums, or ranks that wait forever.
"""

import collections
import functools
import itertools
import re
import zlib

import horovod.tensorflow as hvd
import keras
import tensorflow as tf

from horovod_recipes.keras import _watchdog
from horovod_recipes.keras._folding import not_folded

# The product of two sums of squared digests fits int64 on 1,024 ranks.
DIGESTS = 2**20
# An error names at most this many tensors, and this many ranks of each.
MAX_TENSORS_NAMED = 5
MAX_RANKS_NAMED = 8


def check_agreement(
    lines, what, fix, name, process_set=hvd.global_process_set, keys=None
):
    """Checks that all ranks bring the same list of tensors to a collective.

    It takes one allreduce of three numbers. In a graph it needs nothing of the
    step but its data, so it runs while the step computes.

    Args:
        lines: List of strings, one per tensor, from `described`.
        what: String, what the tensors are, for example "gradients".
        fix: String, what the error says to do.
        name: String, name of the operation, the same on every rank.
        process_set: The `ProcessSet` that compares. Defaults to all ranks.
        keys: List of strings, what to compare. Defaults to `lines`.

    Returns:
        List of operations that the collective must wait for. In eager mode the
        check is done, and the list is empty.

    Raises:
        ValueError: On every rank. It names the tensors and the ranks. From a
            graph, it comes as a `tf.errors.InvalidArgumentError`.
    """

    def fail():
        of_ranks = hvd.allgather_object(
            (hvd.rank(), lines), process_set=process_set
        )
        raise ValueError(
            f"The ranks bring different {what}: "
            f"{describe_difference(dict(of_ranks))}. {fix}"
        )

    # TensorFlow merges equal operations of a graph, so the name counts too.
    text = "\n".join([name, *(lines if keys is None else keys)])
    digest = zlib.crc32(text.encode()) % DIGESTS
    mine = not_folded(tf.constant([1, digest, digest**2], tf.int64))
    # On a GPU, the result would wait for the operations before it.
    with tf.device("CPU"):
        (sums,) = _watchdog.tracked(
            lambda tensors: [
                hvd.allreduce(
                    *tensors, op=hvd.Sum, name=name, process_set=process_set
                )
            ]
        )([mine])
    # Numbers are equal where the sum of their squares is the least possible.
    # A rank that has called `hvd.join` adds zeros, which changes neither side.
    with tf.device("CPU"):
        ranks, total, squares = tf.unstack(sums)
        agree = tf.equal(ranks * squares, total * total)
    if tf.executing_eagerly():
        if not agree:
            fail()
        return []
    return [
        tf.cond(
            agree,
            lambda: tf.constant(True),
            lambda: tf.py_function(fail, [], tf.bool),
        )
    ]


def described(variables, tensors=None, among=()):
    """Returns a line for each variable that has a tensor.

    The ranks may know a variable by different paths. Keras numbers names by
    what a process has made before: the first layer may be `dense` on one rank
    and `dense_3` on another. So only the order of these numbers counts. In a
    model from a file, a path lacks the name of the model. So only the layer and
    the name of the variable count.

    Args:
        variables: List of `keras.Variable`, `tf.Variable` or tensors.
        tensors: List of a tensor, `tf.IndexedSlices` or None for each variable.
            Defaults to the variables themselves.
        among: List of variables whose names are numbered together with those
            of `variables`. Defaults to none.
    """
    tensors = variables if tensors is None else tensors
    numbers = collections.defaultdict(set)
    for variable in [*among, *variables]:
        name, found = _name_and_numbers(variable)
        numbers[name].add(found)
    order = {name: sorted(found) for name, found in numbers.items()}
    lines = []
    for variable, tensor in zip(variables, tensors, strict=True):
        if tensor is None:
            continue
        name, found = _name_and_numbers(variable)
        place = order[name].index(found)
        name += f", number {place + 1}" * (place > 0)
        lines.append(f"{name} ({kind(tensor)})")
    return lines


def kind(tensor):
    """Returns the dtype and the shape of a tensor in words."""
    dtype = tf.as_dtype(tensor.dtype).name
    # Another rank may have traced a sparse gradient with a known shape.
    if isinstance(tensor, tf.IndexedSlices):
        return f"sparse {dtype}"
    return f"{dtype}, shape {tuple(tensor.shape)}"


def _name_and_numbers(variable):
    """Returns a variable's short path without numbers, and these numbers."""
    if isinstance(variable, keras.Variable):
        return _split(variable.path)
    if isinstance(variable, tf.Variable):
        return _split(variable.name.removesuffix(":0"))
    return "tensor", ()


@functools.cache
def _split(path):
    """Splits `net_1/dense_3/kernel` into `dense/kernel` and (3,)."""
    path = "/".join(path.split("/")[-2:])
    numbers = r"_(\d+)(?=_|/|$)"
    found = tuple(int(number) for number in re.findall(numbers, path))
    return re.sub(numbers, "", path), found


def describe_difference(lines_of_ranks):
    """Returns which tensors only some ranks bring, and those ranks.

    Args:
        lines_of_ranks: Dictionary of a list of lines for each rank.
    """
    counts = {
        rank: collections.Counter(lines)
        for rank, lines in lines_of_ranks.items()
    }
    differences = []
    for line in dict.fromkeys(itertools.chain(*lines_of_ranks.values())):
        most = max(count[line] for count in counts.values())
        ranks = [rank for rank, count in counts.items() if count[line] == most]
        if len(ranks) < len(counts):
            differences.append(f"{line} only on {_named(ranks)}")
    if not differences:
        return _first_in_another_order(lines_of_ranks)
    more = len(differences) - MAX_TENSORS_NAMED
    return "; ".join(
        differences[:MAX_TENSORS_NAMED] + [f"and {more} more"] * (more > 0)
    )


def _named(ranks):
    named = ", ".join(map(str, ranks[:MAX_RANKS_NAMED]))
    if len(ranks) > MAX_RANKS_NAMED:
        named += f" and {len(ranks) - MAX_RANKS_NAMED} more"
    return f"rank{'s' * (len(ranks) > 1)} {named}"


def _first_in_another_order(lines_of_ranks):
    first, *others = lines_of_ranks.items()
    for rank, lines in others:
        for place, pair in enumerate(zip(first[1], lines, strict=True)):
            if pair[0] != pair[1]:
                return (
                    f"in another order: number {place} is {pair[0]} on rank "
                    f"{first[0]} and {pair[1]} on rank {rank}"
                )
    raise AssertionError("equal lists have equal digests")
