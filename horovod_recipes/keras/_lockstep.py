"""Lockstep: the ranks of a `fit` take the same steps, and stop together.

Each step waits for all ranks. A rank that stops alone, or whose data end first,
would leave the others waiting forever. So the allreduce that compares the
gradients of a step (see `_agreement`) also tells whether a rank asks to stop,
and whether its data have ended.
"""

import functools
import warnings

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf

from horovod_recipes.keras import _watchdog
from horovod_recipes.keras._folding import not_folded
from horovod_recipes.keras._folding import variable_outside_of_graphs

# The TrainFunction that runs now, and the data of the step that it traces.
_running = None
_data = None


class TrainFunction:
    """Stands in for the `train_function` of a model, which `fit` calls.

    Args:
        model: The `keras.Model`.
        plain: Keras's own function.
    """

    def __init__(self, model, plain):
        self._model = model
        self._plain = plain
        # The first reduction of a step, once it is known, and its process set.
        self._reduction = None
        self._process_set = None
        # The callbacks of `fit`, while it takes the steps of an epoch.
        self._callbacks = None
        self._steps = 0
        self._asks = False

    def __call__(self, iterator):
        global _running
        outer, _running = _running, self
        try:
            logs = self._plain(iterator)
        except (StopIteration, tf.errors.OutOfRangeError) as error:
            end_of_data = error
        else:
            self._steps += self._model.steps_per_execution
            return logs
        finally:
            _running = outer
        self.end_steps(self._callbacks)
        raise end_of_data

    def note(self, reduction, process_set):
        """Notes that a step has a reduction of this name."""
        if self._reduction is None:
            self._reduction, self._process_set = reduction, process_set

    def begin_epoch(self, callbacks):
        self._callbacks = callbacks
        self._steps = 0
        self._asks = False
        _state().assign(tf.zeros_like(_state()))

    def end_batch(self):
        """Stops all ranks in the same step if one of them asks for it."""
        if not self._has_peers():
            return
        stops, stopping_ranks = _state().numpy()[_HEARD]
        if stops:
            self._stop(stops, stopping_ranks)
        elif self._model.stop_training:
            self._ask_to_stop()

    def _ask_to_stop(self):
        self._asks = True
        sums = self._take_the_place_of_a_step(is_step=0, asks=1, has_ended=0)
        if sums[0] == sums[5]:
            # No rank takes a step: the data of all that do not ask have ended.
            if sums[5]:
                self._callbacks = None
            return
        # Other ranks take one more step, so this one does too.
        self._model.stop_training = False
        _state()[_TO_HEAR].assign(sums[3:5])

    def end_steps(self, callbacks):
        """Raises if another rank has more steps in this epoch.

        Args:
            callbacks: The `keras.callbacks.CallbackList` that ends. It is
                another one where a callback evaluates the model.
        """
        is_in_epoch = callbacks is not None and callbacks is self._callbacks
        if not is_in_epoch or not self._has_peers():
            return
        self._callbacks = None
        sums = self._take_the_place_of_a_step(is_step=1, asks=0, has_ended=1)
        if sums[3]:
            self._stop(*sums[3:5])

    def _take_the_place_of_a_step(self, is_step, asks, has_ended):
        """Sums numbers together with those of steps of other ranks.

        Returns:
            The eight sums, as a NumPy array.

        Raises:
            ValueError: If some ranks take a step, and the data of others ended.
        """
        rank = hvd.rank()
        stop = [asks, asks * rank]
        end = [has_ended, has_ended * rank, has_ended * self._steps]
        numbers = tf.constant([is_step, 0, 0, *stop, *end], tf.int64)
        sums = self._sum_in_step(numbers).numpy()
        if 0 < sums[5] < sums[0]:
            raise ValueError(describe_end_of_data(sums[3:]))
        return sums

    @functools.cached_property
    def _sum_in_step(self):
        def sum_in_step(numbers):
            return sum_integers(numbers, self._reduction, self._process_set)

        # An operation in a graph has a name by which Horovod finds its peers.
        if self._model.run_eagerly:
            return sum_in_step
        return tf.function(sum_in_step, autograph=False)

    def end_epoch(self):
        """Stops all ranks if a callback of one of them has asked for it."""
        self._callbacks = None
        if not self._has_peers():
            return
        stop = int(self._model.stop_training)
        sums = hvd.allreduce(
            tf.constant([stop, stop * hvd.rank()], tf.int64),
            op=hvd.Sum,
            process_set=self._process_set,
        )
        if sums[0]:
            self._stop(*sums.numpy())

    def _has_peers(self):
        return self._reduction is not None and self._process_set.size() > 1

    def _stop(self, number_of_ranks, sum_of_ranks):
        if not (self._model.stop_training or self._asks):
            who = f"{number_of_ranks} ranks"
            if number_of_ranks == 1:
                who = f"a callback of rank {sum_of_ranks}"
            warnings.warn(
                f"Training stops because {who} asked for it. If no callback of "
                "this rank did, do the ranks see different logs? List "
                "MetricAverageCallback or ExactMetrics first.",
                stacklevel=4,
            )
        self._model.stop_training = True


def around_callbacks(callbacks, event, call):
    """Calls the callbacks of an event, and tells the model's `TrainFunction`.

    Args:
        callbacks: The `keras.callbacks.CallbackList`.
        event: String, for example `"on_epoch_end"`.
        call: Function without arguments, which calls the callbacks.
    """
    model = getattr(callbacks, "model", None)
    function = getattr(model, "train_function", None)
    if not isinstance(function, TrainFunction):
        call()
        return
    if event == "on_epoch_begin":
        function.begin_epoch(callbacks)
    if event in ("on_test_begin", "on_epoch_end"):
        function.end_steps(callbacks)
    call()
    if event == "on_train_batch_end":
        function.end_batch()
    if event == "on_epoch_end":
        function.end_epoch()


def knowing_its_data(train_step):
    """Returns the `train_step`, with `data_of_step` inside of it."""

    @functools.wraps(train_step)
    def step(data):
        global _data
        parts = tf.nest.flatten(data, expand_composites=True)
        _data = [part for part in parts if tf.is_tensor(part)]
        try:
            return train_step(data)
        finally:
            _data = None

    return step


def data_of_step():
    """Returns the tensors of the data that the step now takes, or None.

    In a graph, a reduction that does not wait for the data would run on a rank
    without any: TensorFlow runs what it can until it finds that they ended.
    """
    return _data


def note_reduction(name, process_set):
    """Notes that the step that runs now has a reduction of this name."""
    if _running is not None:
        _running.note(name, process_set)


def sum_in_step(numbers, name, process_set):
    """Returns the sums of three numbers and five more over the ranks.

    The five are those of `TrainFunction`: how many ranks ask to stop, and the
    sum of these ranks; how many have no more data, the sum of these ranks, and
    of their steps.
    """
    # TensorFlow orders this after `hear` of another optimizer in the same step.
    # If its gradients differ, this allreduce must not wait for other ranks.
    with tf.control_dependencies([_state().read_value()]):
        numbers = tf.concat([numbers, [0, 0, 0, 0, 0]], axis=0)
    first = sum_integers(numbers, name, process_set)

    def with_those_that_asked():
        second = sum_integers(numbers, name, process_set)
        return tf.concat([second[:3], first[3:5], second[5:]], axis=0)

    # The ranks that ask have not taken part. They take this step too.
    return tf.cond(
        (first[3] > 0) & tf.equal(first[5], 0),
        with_those_that_asked,
        lambda: first,
    )


def hear(news):
    """Keeps what the ranks have told each other, for `TrainFunction`."""
    # A call of the function may take several steps, with several reductions.
    heard = _state()[_HEARD] + _state()[_TO_HEAR] + news[:2]
    _state().assign(tf.stack([heard, tf.zeros_like(heard)]))


def describe_end_of_data(news):
    """Returns what is wrong if the data of some ranks have ended."""
    ranks, sum_of_ranks, sum_of_steps = map(int, news[2:])
    who = f"rank {sum_of_ranks} has" if ranks == 1 else f"{ranks} ranks have"
    return (
        f"The ranks have different numbers of steps in an epoch: {who} no "
        f"batch left after step {sum_of_steps // ranks}, and other ranks have. "
        "Each step waits for all ranks. Pass the smallest number to fit as "
        "steps_per_epoch, and repeat() a dataset that is shorter."
    )


def sum_integers(numbers, name, process_set):
    """Returns the sums over the ranks of a few integers, on a CPU.

    In a graph, operations of the same name meet, in whatever function they are.
    """
    # On a GPU, the result would wait for the operations before it.
    with tf.device("CPU"):
        (sums,) = _watchdog.tracked(
            lambda tensors: [
                hvd.allreduce(
                    *tensors,
                    op=hvd.Sum,
                    name=name,
                    process_set=process_set,
                    ignore_name_scope=True,
                )
            ]
        )([not_folded(numbers)])
    return sums


# Rows of the state: the ranks that ask to stop, which all ranks know of, and
# those that this rank will know of after its next step.
_HEARD, _TO_HEAR = 0, 1


@functools.cache
def _state():
    """Returns two rows: the number of ranks, and the sum of these ranks."""
    return variable_outside_of_graphs(np.zeros([2, 2], np.int64))
