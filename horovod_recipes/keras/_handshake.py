"""The handshake with which a step of `fit` begins, on all ranks.

It is an allreduce of six integers: whether a rank takes the step; whether it
asks to stop, and its rank if it does; whether its data have ended, and its rank
and its step if they have. It runs while the step computes. All other
collectives of the step wait for it.
"""

import horovod.tensorflow as hvd
import tensorflow as tf

from horovod_recipes.keras import _watchdog
from horovod_recipes.keras._folding import not_folded

# Rows of a `TrainFunction.state`: the ranks that ask to stop, which all ranks
# know of; those that all ranks will know of after their next step; the number
# of steps in this epoch. Ranks are two numbers: how many, and their sum.
HEARD, TO_HEAR, STEPS = 0, 1, 2

# The `_Step` that Keras calls, or that TensorFlow traces, now.
_step = None


def with_handshake(function, train_step):
    """Returns the `train_step` of a `TrainFunction`, with a handshake."""

    def step(data):
        global _step
        outer, _step = _step, _Step(function, data)
        try:
            if function.process_set:
                _step.shake_hands()
            return train_step(data)
        finally:
            _step = outer

    return step


class _Step:
    """One call of a `train_step`.

    Args:
        function: The `TrainFunction`.
        data: The nested structure of tensors that the step takes.
    """

    def __init__(self, function, data):
        self._function = function
        parts = tf.nest.flatten(data, expand_composites=True)
        # Without data, TensorFlow would run what does not wait for them.
        self.waits_for = [part for part in parts if tf.is_tensor(part)]
        self._graph = tf.compat.v1.get_default_graph()

    def join(self, process_set):
        """Shakes hands before the first reduction of a gradient tape.

        A tape in a `tf.function` inside of the step does without: what is made
        there, the rest of the step cannot wait for.
        """
        is_in_step = tf.compat.v1.get_default_graph() is self._graph
        if not self._function.process_set and is_in_step:
            self._function.shake_hands_in(process_set)
            if self._function.process_set:
                self.shake_hands()

    def shake_hands(self):
        process_set, state = self._function.process_set, self._function.state
        with tf.control_dependencies(self.waits_for):
            step = not_folded(tf.constant([1, 0, 0, 0, 0, 0], tf.int64))
        first = sum_handshakes(step, process_set)

        def with_ranks_that_asked():
            second = sum_handshakes(step, process_set)
            return tf.concat([second[:1], first[1:3], second[3:]], axis=0)

        # Ranks that ask have not taken the step yet, and take it now.
        sums = tf.cond(
            (first[1] > 0) & tf.equal(first[3], 0),
            with_ranks_that_asked,
            lambda: first,
        )
        self.waits_for = [_check_all_have_data(sums)]
        with tf.control_dependencies(self.waits_for):
            # A call of the function may take several steps.
            heard = state[HEARD] + state[TO_HEAR] + sums[1:3]
            state.assign([heard, tf.zeros_like(heard), state[STEPS] + 1])


def waits_for(process_set=None):
    """Returns what a collective must wait for in a step of `fit`, or None.

    Args:
        process_set: That of a reduction of gradients, or None.
    """
    if _step is None:
        return None
    if process_set is not None:
        _step.join(process_set)
    return _step.waits_for


def sum_handshakes(numbers, process_set):
    """Returns the sums over the ranks of the six integers, in that order."""
    # On a GPU, the result would wait for the operations before it.
    with tf.device("CPU"):
        (sums,) = _watchdog.tracked(
            lambda tensors: [
                hvd.allreduce(
                    *tensors,
                    op=hvd.Sum,
                    name="horovod_recipes_lockstep",
                    process_set=process_set,
                    ignore_name_scope=True,
                )
            ]
        )([numbers])
    return sums


def _check_all_have_data(sums):
    """Returns a tensor that fails if the data of some ranks have ended."""

    def fail(sums):
        raise ValueError(describe_end_of_data(sums))

    if tf.executing_eagerly():
        return tf.constant(True) if sums[3] == 0 else fail(sums)
    return tf.cond(
        tf.equal(sums[3], 0),
        lambda: tf.constant(True),
        lambda: tf.py_function(fail, [sums], tf.bool),
    )


def describe_end_of_data(sums):
    """Returns the error where the data of some ranks have ended, not of all."""
    ranks, sum_of_ranks, sum_of_steps = map(int, sums[3:])
    who = f"rank {sum_of_ranks} has" if ranks == 1 else f"{ranks} ranks have"
    return (
        f"The ranks have different numbers of steps in an epoch: {who} no "
        f"batch left after step {sum_of_steps // ranks}, and other ranks have. "
        "Each step waits for all ranks. Pass the smallest number to fit as "
        "steps_per_epoch, and repeat() a dataset that is shorter."
    )
