"""Lockstep: the ranks of a `fit` take the same steps, and stop together.

Each step waits for all ranks. A rank that stops alone, or whose data end first,
would leave the others waiting forever. So each step begins with a handshake.
"""

import functools
import warnings

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf

from horovod_recipes.keras._distributed_apply import is_distributed
from horovod_recipes.keras._handshake import HEARD
from horovod_recipes.keras._handshake import STEPS
from horovod_recipes.keras._handshake import TO_HEAR
from horovod_recipes.keras._handshake import describe_end_of_data
from horovod_recipes.keras._handshake import sum_handshakes
from horovod_recipes.keras._optimizers_of import optimizers_of


class TrainFunction:
    """Stands in for the `train_function` of a model, which `fit` calls.

    Ranks shake hands only if all optimizers of the model have one process set,
    of several ranks.

    Args:
        model: The `keras.Model`.
    """

    def __init__(self, model):
        self.plain = None  # Keras's own function, once it is made.
        self.state = tf.Variable(np.zeros([3, 2], np.int64), trainable=False)
        self.process_set = None
        self._model = model
        # The callbacks of `fit`, while it takes the steps of an epoch.
        self._callbacks = None
        self._epochs_left = 0
        self._asks = False
        sets = {
            id(optimizer.apply.process_set()): optimizer.apply.process_set()
            for optimizer in optimizers_of(model).values()
            if is_distributed(optimizer)
        }
        if len(sets) == 1:
            self.shake_hands_in(*sets.values())

    def shake_hands_in(self, process_set):
        """Has the steps of this function begin with a handshake."""
        if process_set.included() and process_set.size() > 1:
            self.process_set = process_set

    def __call__(self, iterator):
        try:
            return self.plain(iterator)
        except (StopIteration, tf.errors.OutOfRangeError) as error:
            end_of_data = error
        self.end_steps(self._callbacks)
        raise end_of_data

    def begin_epoch(self, callbacks, epoch):
        self._callbacks = callbacks
        self._epochs_left = callbacks.params.get("epochs", 0) - epoch - 1
        self._asks = False
        self.state.assign(tf.zeros_like(self.state))

    def end_batch(self):
        """Stops all ranks in the same step if one of them asks for it."""
        if self.process_set is None:
            return
        stops, stopping_ranks = self.state.numpy()[HEARD]
        if stops:
            self._stop(stops, stopping_ranks)
        elif self._model.stop_training:
            self._ask_to_stop()

    def _ask_to_stop(self):
        self._asks = True
        sums = self._shake_hands(takes_step=0, asks=1, has_ended=0)
        if sums[0] == sums[3]:
            # All other ranks ask too, or their data have ended.
            if sums[3]:
                self._callbacks = None
            return
        # Other ranks take one more step, so this one does too.
        self._model.stop_training = False
        self.state[TO_HEAR].assign(sums[1:3])

    def end_steps(self, callbacks):
        """Raises if another rank has more steps; stops if one asks for it.

        Args:
            callbacks: The `keras.callbacks.CallbackList` that ends. It is
                another one where a callback evaluates the model.
        """
        is_in_epoch = callbacks is not None and callbacks is self._callbacks
        if not is_in_epoch or self.process_set is None:
            return
        self._callbacks = None
        sums = self._shake_hands(takes_step=1, asks=0, has_ended=1)
        if sums[1]:
            self._stop(*sums[1:3])

    def _shake_hands(self, takes_step, asks, has_ended):
        """Shakes hands with other ranks that begin a step, or have none.

        Returns:
            The sums over the ranks, as a NumPy array.

        Raises:
            ValueError: If some ranks begin a step, and others have no data.
        """
        rank, steps = hvd.rank(), self.state.numpy()[STEPS, 0]
        stop = [asks, asks * rank]
        end = [has_ended, has_ended * rank, has_ended * steps]
        numbers = tf.constant([takes_step, *stop, *end], tf.int64)
        sums = self._add_up(numbers).numpy()
        if 0 < sums[3] < sums[0]:
            raise ValueError(describe_end_of_data(sums))
        return sums

    @functools.cached_property
    def _add_up(self):
        """Adds up the numbers of this rank's handshake and of the others'."""

        def add_up(numbers):
            return sum_handshakes(numbers, self.process_set)

        # Only an operation in a graph has a name by which those of other graphs
        # find it. Eager ones are found by their order.
        is_eager = self._model.run_eagerly
        return add_up if is_eager else tf.function(add_up, autograph=False)

    def end_epoch(self):
        """Stops all ranks if a callback of one of them has asked for it.

        Raises:
            ValueError: If the ranks have different numbers of epochs left.
        """
        self._callbacks = None
        if self.process_set is None:
            return
        # `elastic.UpdateBatchStateCallback` goes on after a short epoch.
        stop = self._model.stop_training or self.state.numpy()[HEARD, 0] > 0
        left = self._epochs_left
        mine = [1, int(stop), stop * hvd.rank(), left, left**2]
        ranks, stops, stopping_ranks, total, squares = hvd.allreduce(
            tf.constant(mine, tf.int64),
            op=hvd.Sum,
            process_set=self.process_set,
        ).numpy()
        if stops:
            self._stop(stops, stopping_ranks)
        elif ranks * squares != total**2:
            raise ValueError(
                f"The ranks have different numbers of epochs left: {left} on "
                f"rank {hvd.rank()}, and {total} on all {ranks} together. Pass "
                "fit the same epochs and initial_epoch on every rank."
            )

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


def around_callbacks(callbacks, event, call, number=None):
    """Calls the callbacks of an event, and tells the model's `TrainFunction`.

    Args:
        callbacks: The `keras.callbacks.CallbackList`.
        event: String, for example `"on_epoch_end"`.
        call: Function without arguments, which calls the callbacks.
        number: Integer, the number of the epoch or of the batch.
    """
    if event in ("on_test_begin", "on_epoch_end"):
        _tell(callbacks, "end_steps", callbacks)
    call()
    if event == "on_epoch_begin":
        _tell(callbacks, "begin_epoch", callbacks, number)
    if event == "on_train_batch_end":
        _tell(callbacks, "end_batch")
    if event == "on_epoch_end":
        _tell(callbacks, "end_epoch")


def _tell(callbacks, method, *arguments):
    model = getattr(callbacks, "model", None)
    function = getattr(model, "train_function", None)
    if isinstance(function, TrainFunction):
        getattr(function, method)(*arguments)
