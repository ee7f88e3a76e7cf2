"""Elastic training, which continues while ranks join and leave a job.

It has the names of Horovod's `hvd.elastic`. A `KerasState` holds the weights,
the optimizer state, and your own attributes. `commit` keeps a copy of them.
When the ranks change, `run` gives every rank the state of the last commit.

docs/elastic.md says what `horovodrun` does when a rank dies.
"""

import copy
import functools

import keras
import numpy as np
import tensorflow as tf
from horovod.common.exceptions import HorovodInternalError
from horovod.common.exceptions import HostsUpdatedInterrupt
from horovod.tensorflow import allgather
from horovod.tensorflow import allgather_object
from horovod.tensorflow import broadcast_object
from horovod.tensorflow import init
from horovod.tensorflow import rank
from horovod.tensorflow import shutdown
from horovod.tensorflow import size

from horovod_recipes.keras._distributed_apply import discard_accumulated
from horovod_recipes.keras._distributed_apply import is_within_update
from horovod_recipes.keras._keras_hooks import State
from horovod_recipes.keras._keras_hooks import is_seed
from horovod_recipes.keras._keras_hooks import notification_manager
from horovod_recipes.keras._optimizers_of import optimizers_of
from horovod_recipes.keras._variables import broadcast_variables
from horovod_recipes.keras._watchdog import is_lost_rank

__all__ = [
    "CommitStateCallback",
    "ElasticSampler",
    "KerasState",
    "TensorFlowKerasState",
    "UpdateBatchStateCallback",
    "UpdateEpochStateCallback",
    "run",
]


def run(func):
    """Restarts a function from the last commit whenever the ranks change.

    Before each start, all ranks get the same state. When a rank is lost, the
    others restore the last commit. When hosts are added or removed, all ranks
    stop at the next commit. Then they start the function again, with another
    `hvd.size()`. So the loop over the remaining work belongs in the function,
    with everything that depends on `hvd.size()`.

    Args:
        func: A function whose first argument is the state. The script must not
            call a collective before it: a new rank would wait there forever.

    Returns:
        The wrapped function. It returns what `func` returns.

    Raises:
        Exception: Any exception of `func` other than a failed collective. This
            rank then ends, and the job continues without its host.
    """

    @functools.wraps(func)
    def wrapper(state, *args, **kwargs):
        notification_manager.init()
        notification_manager.register_listener(state)
        try:
            while True:
                try:
                    state.sync()
                    return func(state, *args, **kwargs)
                except HostsUpdatedInterrupt:
                    pass
                except (HorovodInternalError, tf.errors.UnknownError) as error:
                    if not is_lost_rank(error):
                        raise
                    state.restore()
                # Unlike Horovod, always synchronize after this: a rank may
                # have joined since the interrupt.
                shutdown()
                init()
                state.on_reset()
        finally:
            notification_manager.remove_listener(state)

    return wrapper


class KerasState(State):
    """What all ranks of an elastic job share: a model and your own values.

    Example:

    >>> import keras
    >>> import horovod_recipes.keras as hvd
    >>> hvd.init()
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD()), "mse")
    >>> state = hvd.elastic.KerasState(model, batch=0, epoch=0)
    >>> state.epoch = 3
    >>> state.restore()
    >>> state.epoch
    0

    Args:
        model: A built `keras.Model`.
        optimizer: The model's optimizer. Defaults to all optimizers that are
            attributes of the model, such as the one it was compiled with.
        **kwargs: Values to share. Each becomes an attribute of the state. A
            value is an `ElasticSampler`, or any object that can be pickled.

    Raises:
        ValueError: If the model is not built or has no optimizer, or if an
            optimizer other than the compiled one is not built.
    """

    def __init__(self, model, optimizer=None, **kwargs):
        if not model.built:
            raise ValueError(
                "Argument `model` must be built first: call "
                "`model.build(input_shape)`."
            )
        self.model = model
        self.optimizer = optimizer or getattr(model, "optimizer", None)
        self._optimizers = (
            [optimizer] if optimizer else list(optimizers_of(model).values())
        )
        if not self._optimizers:
            raise ValueError(
                "Argument `optimizer` is missing: pass it, or compile the "
                "model with it first."
            )
        if self.optimizer is not None and not self.optimizer.built:
            self.optimizer.build(model.trainable_variables)
        for other in self._optimizers:
            if not other.built:
                raise ValueError(
                    f"The optimizer {other.name!r} of the model must be built "
                    "first: call `optimizer.build(variables)` with the "
                    "variables that it trains."
                )
        super().__init__(bcast_object=broadcast_object, get_rank=rank)
        for name, value in kwargs.items():
            setattr(self, name, value)
        self.samplers = [
            v for v in kwargs.values() if isinstance(v, ElasticSampler)
        ]
        self._value_names = [
            name
            for name, value in kwargs.items()
            if not isinstance(value, ElasticSampler)
        ]
        self._after_reset = []
        self._commits = 0
        self._keep()

    def commit(self):
        """Keeps a copy of the state, and stops if the hosts have changed.

        All ranks call it together. Within an update it does nothing: a lost
        rank would lose its accumulated gradients.

        Raises:
            HostsUpdatedInterrupt: For `run`.
        """
        if not any(map(is_within_update, self._optimizers)):
            super().commit()

    def check_host_updates(self):
        """Keeps a copy of the state and stops if the hosts have changed."""
        if any(map(is_within_update, self._optimizers)):
            return
        try:
            super().check_host_updates()
        except HostsUpdatedInterrupt:
            # All ranks are here, so no work since the last commit is lost.
            self.save()
            raise

    def save(self):
        """Keeps a copy of the state. All ranks call it together."""
        for sampler in self.samplers:
            sampler.add_up()
        self._keep()
        self._commits += 1

    def restore(self):
        """Restores the state of the last commit."""
        for variable, value in zip(
            self._variables(), self._saved_variables, strict=True
        ):
            variable.assign(value)
        for optimizer in self._optimizers:
            discard_accumulated(optimizer)
        for sampler, saved in zip(
            self.samplers, self._saved_samplers, strict=True
        ):
            sampler.load_state_dict(saved)
        self._restore_values()

    def sync(self):
        """Gives all ranks the state of the rank with the most commits.

        Usually this is rank 0. Rank 0 has fewer commits if it is new, or if a
        rank died before rank 0 knew that the last commit had succeeded.
        """
        commits = allgather_object(self._commits)
        root = int(np.argmax(commits))
        broadcast_variables(self.model.weights + self._states(), root)
        for optimizer in self._optimizers:
            discard_accumulated(optimizer)
        samplers, self._saved_values, self._commits = broadcast_object(
            (self._saved_samplers, self._saved_values, self._commits), root
        )
        for sampler, saved in zip(self.samplers, samplers, strict=True):
            sampler.load_state_dict(saved)
        self._restore_values()
        self._keep()

    def register_reset_callbacks(self, callbacks):
        """Adds functions without arguments to call when the ranks change."""
        self._after_reset.extend(callbacks)

    def on_reset(self):
        """Prepares for other ranks; `run` calls it before `sync`.

        Unlike Horovod's method, it keeps notifications about hosts. More hosts
        may become available while ranks start.
        """
        self.reset()
        for callback in self._after_reset:
            callback()

    def reset(self):
        """Makes Keras trace its functions again: they may contain the size."""
        self.model.train_function = None
        self.model.test_function = None
        self.model.predict_function = None

    def _keep(self):
        self._saved_variables = [
            np.array(variable) for variable in self._variables()
        ]
        self._saved_samplers = [s.state_dict() for s in self.samplers]
        self._saved_values = {
            name: copy.deepcopy(getattr(self, name))
            for name in self._value_names
        }

    def _restore_values(self):
        for name, value in self._saved_values.items():
            setattr(self, name, copy.deepcopy(value))

    def _variables(self):
        """Returns the variables of a commit, with random generators' states."""
        return (
            self.model.weights
            + [v for v in self.model.variables if is_seed(v)]
            + self._states()
        )

    def _states(self):
        return [v for o in self._optimizers for v in o.variables]


class TensorFlowKerasState(KerasState):
    """`KerasState` with the arguments of Horovod's class of this name.

    Args:
        model: As for `KerasState`.
        optimizer: As for `KerasState`.
        backend: Has no effect: Horovod needs it for TensorFlow 1.
        **kwargs: As for `KerasState`.
    """

    def __init__(self, model, optimizer=None, backend=None, **kwargs):
        super().__init__(model, optimizer, **kwargs)


class ElasticSampler:
    """Distributes the examples of each epoch over the ranks, each once.

    Make it an attribute of a `KerasState`. It then counts, over all ranks, how
    often committed work has used each example. When the ranks change, it
    distributes the examples that are left. The number of ranks changes how a
    batch is split, but not which examples it has. So an epoch always has the
    same number of batches, and a schedule that counts updates stays right.

    If the ranks do not divide a batch, their shares differ by one example. Each
    rank's mean has the same weight, so the examples' weights then differ.

    Example:

    >>> import horovod_recipes.keras as hvd
    >>> hvd.init()
    >>> sampler = hvd.elastic.ElasticSampler(10, 4, shuffle=False)
    >>> batches = sampler.batches()
    >>> [next(batches).tolist() for _ in range(sampler.steps_per_epoch)]
    [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]]
    >>> sampler.record_batch()
    >>> sampler.add_up()
    >>> sampler.report()
    {'epoch': 0, 'used_once': 4, 'never_used': 6, 'used_again': 0}

    Args:
        num_examples: Integer, the examples in an epoch.
        global_batch_size: Integer, the most examples in a batch of all ranks
            together. An epoch has as few batches as this allows. Their sizes
            differ by at most one example.
        shuffle: Whether each epoch has its own order. Defaults to `True`.
        seed: Integer, the same on every rank. Defaults to `0`.

    Raises:
        ValueError: If a batch has more examples than an epoch.
    """

    def __init__(self, num_examples, global_batch_size, shuffle=True, seed=0):
        if not 1 <= global_batch_size <= num_examples:
            raise ValueError(
                "Argument `global_batch_size` must be from 1 to the "
                f"{num_examples} examples of an epoch. "
                f"Received: global_batch_size={global_batch_size}"
            )
        self._num_examples = num_examples
        self._global_batch_size = global_batch_size
        self._shuffle = shuffle
        self._seed = seed
        self.epoch = 0
        # The result of `report` for every epoch that has ended.
        self.reports = []
        self._uses = np.zeros(num_examples, np.int64)
        self._begin()

    @property
    def steps_per_epoch(self):
        """The number of batches of a whole epoch."""
        return -(-self._num_examples // self._global_batch_size)

    def batches(self):
        """Yields this rank's share of each remaining batch, without end.

        Yields:
            int64 array of the indices of examples. The batches of the next
            epochs follow those of this epoch.
        """
        epoch, left = self.epoch, self._left()
        this_rank, ranks = rank(), size()
        while True:
            yield from self._shares(left, this_rank, ranks)
            epoch += 1
            left = self._order(epoch)

    def dataset(self):
        """Returns `batches` as a `tf.data.Dataset`, for `map` and `fit`.

        tf.data does not tune what is made from it. Its tuning thread sleeps for
        up to a minute, and the end of a training would wait for it.

        Returns:
            Dataset of int64 tensors `[n]`, the indices of examples.
        """
        options = tf.data.Options()
        options.autotune.enabled = False
        return tf.data.Dataset.from_generator(
            self.batches, output_signature=tf.TensorSpec([None], tf.int64)
        ).with_options(options)

    def record_batch(self):
        """Records that this rank has trained on its next share.

        Raises:
            ValueError: If no batch of this epoch is left.
        """
        if self._shares_left is None:
            shares = self._shares(self._left(), rank(), size())
            self._shares_left = iter(shares)
        share = next(self._shares_left, None)
        if share is None:
            raise ValueError(
                f"Epoch {self.epoch} of an ElasticSampler continued after its "
                "last batch. The argument `steps_per_epoch` of fit must be the "
                f"sampler's, {self.steps_per_epoch}, and `steps_per_execution` "
                "of compile() must divide the batches that are left."
            )
        self._recorded.append(share)

    def add_up(self):
        """Adds up the records of all ranks. All ranks call it together."""
        recorded = np.concatenate([*self._recorded, np.empty(0, np.int64)])
        used = allgather(tf.constant(recorded), name="elastic_sampler")
        np.add.at(self._uses, used.numpy(), 1)
        self._recorded = []

    def end_epoch(self):
        """Keeps the report of this epoch and begins the next one.

        All ranks call it together.
        """
        self.add_up()
        self.reports.append(self.report())
        self.epoch += 1
        self._uses[:] = 0
        self._begin()

    def report(self):
        """Returns how often this epoch's examples were used, up to `add_up`.

        Returns:
            Dictionary with `epoch` and three numbers of examples: `used_once`,
            `never_used` and `used_again`.
        """
        return {
            "epoch": self.epoch,
            "used_once": int(np.sum(self._uses == 1)),
            "never_used": int(np.sum(self._uses == 0)),
            "used_again": int(np.sum(self._uses > 1)),
        }

    def state_dict(self):
        return copy.deepcopy(
            {"epoch": self.epoch, "uses": self._uses, "reports": self.reports}
        )

    def load_state_dict(self, state):
        state = copy.deepcopy(state)
        self.epoch = state["epoch"]
        self._uses = state["uses"]
        self.reports = state["reports"]
        self._begin()

    def _begin(self):
        """Forgets this epoch's records and shares."""
        self._recorded = []
        self._shares_left = None

    def _left(self):
        """Returns the examples of this epoch that are not used yet."""
        order = self._order(self.epoch)
        return order[self._uses[order] == 0]

    def _order(self, epoch):
        if not self._shuffle:
            return np.arange(self._num_examples)
        rng = np.random.default_rng([self._seed, epoch])
        return rng.permutation(self._num_examples)

    def _shares(self, indices, this_rank, ranks):
        """Returns this rank's part of each batch of these examples."""
        number = -(-len(indices) // self._global_batch_size)
        return [
            np.array_split(batch, ranks)[this_rank]
            for batch in np.array_split(indices, max(number, 1))
            if len(batch)
        ]


class CommitStateCallback(keras.callbacks.Callback):
    """Commits the state every few batches, and when an epoch ends.

    List it after the callbacks that update the state.

    Args:
        state: A `KerasState`.
        batches_per_commit: Integer, the batches of an epoch between commits.
            Defaults to `1`. A commit copies the weights and the optimizer
            state to host memory, and sends one message between the ranks.
    """

    def __init__(self, state, batches_per_commit=1):
        super().__init__()
        self.state = state
        self.batches_per_commit = batches_per_commit
        self._committed = 0

    def on_train_begin(self, logs=None):
        self._committed = 0

    def on_train_batch_end(self, batch, logs=None):
        # The end of the epoch commits the last batch. Committing here could
        # make a restarted job begin an empty epoch, which Keras does not
        # support.
        batches_done = max(batch + 1, getattr(self.state, "batch", 0))
        # Not `stop_training`: it may differ between ranks.
        last = batches_done == self.params.get("steps")
        # With steps_per_execution, Keras does not call this for every batch.
        done = batch + 1 - self._committed
        if done >= self.batches_per_commit and not last:
            self._committed = batch + 1
            self.state.commit()

    def on_epoch_end(self, epoch, logs=None):
        self._committed = 0
        self.state.commit()


class UpdateBatchStateCallback(keras.callbacks.Callback):
    """Counts the finished batches of this epoch in `state.batch`.

    The count is 0 when an epoch ends. If `fit` has `steps_per_epoch`, its first
    epoch leaves out the batches that are finished already. The callback records
    each batch in each `ElasticSampler` of the state.

    List it before callbacks that stop training when an epoch ends.

    Args:
        state: A `KerasState` with an attribute `batch`.
    """

    def __init__(self, state):
        super().__init__()
        self.state = state
        self._done_before = 0
        self._recorded = 0
        self._cut_short = False

    def on_train_begin(self, logs=None):
        self._done_before = self.state.batch

    def on_epoch_begin(self, epoch, logs=None):
        self._recorded = 0

    def on_train_batch_end(self, batch, logs=None):
        for _ in range(batch + 1 - self._recorded):
            for sampler in self.state.samplers:
                sampler.record_batch()
        self._recorded = batch + 1
        self.state.batch = self._done_before + batch + 1
        steps = self.params.get("steps")
        if self._done_before and steps and self.state.batch >= steps:
            # This ends the epoch. `on_epoch_end` lets training continue.
            self._cut_short = not self.model.stop_training
            self.model.stop_training = True

    def on_epoch_end(self, epoch, logs=None):
        self.state.batch = 0
        self._done_before = 0
        if self._cut_short:
            self._cut_short = False
            self.model.stop_training = False


class UpdateEpochStateCallback(keras.callbacks.Callback):
    """Counts the finished epochs in `state.epoch`.

    The count continues from its value when `fit` began, whatever the
    `initial_epoch` of `fit`. Each `ElasticSampler` of the state begins its next
    epoch.

    Args:
        state: A `KerasState` with an attribute `epoch`.
    """

    def __init__(self, state):
        super().__init__()
        self.state = state

    def on_epoch_end(self, epoch, logs=None):
        self.state.epoch += 1
        for sampler in self.state.samplers:
            sampler.end_epoch()
