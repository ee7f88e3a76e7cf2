"""Training that goes on while ranks come and go, as `hvd.elastic` of Horovod.

A `KerasState` holds what a rank must have to take part: weights, optimizer
state, and attributes of your own. `commit` keeps a copy of it; `run` brings
every rank back to the last commit, or up to it, when the ranks change.

What `horovodrun` does when a rank dies is in docs/elastic.md.
"""

import copy
import functools

import keras
import numpy as np
import tensorflow as tf
from horovod.common.elastic import ObjectState
from horovod.common.elastic import notification_manager
from horovod.common.exceptions import HorovodInternalError
from horovod.common.exceptions import HostsUpdatedInterrupt
from horovod.tensorflow import allgather
from horovod.tensorflow import allgather_object
from horovod.tensorflow import broadcast_object
from horovod.tensorflow import init
from horovod.tensorflow import rank
from horovod.tensorflow import shutdown
from horovod.tensorflow import size

from horovod_recipes.keras._optimizer import discard_accumulated
from horovod_recipes.keras._optimizer import is_within_update
from horovod_recipes.keras._variables import broadcast_variables
from horovod_recipes.keras._watchdog import is_lost_rank

__all__ = [
    "CommitStateCallback",
    "ElasticSampler",
    "KerasState",
    "UpdateBatchStateCallback",
    "UpdateEpochStateCallback",
    "run",
]


def run(func):
    """Makes a function go on, from the last commit, when the ranks change.

    Before each start of the function the state is made the same on all ranks.
    When a rank is lost, those that are left go back to the last commit; when
    hosts are added or removed, all stop at the next commit. Either way they
    start the function again, as a job of another size: the loop over what is
    left to do, and all that depends on `hvd.size()`, belongs into the function.

    Args:
        func: A function whose first argument is the state. A script calls no
            collective before it: a new rank would wait for the others there.

    Returns:
        The function, wrapped. It returns what `func` does.

    Raises:
        Exception: Whatever `func` raises and is not a failed collective; the
            rank then ends, and the job goes on without its host.
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
                # All ranks synchronize after this, also where Horovod would
                # not: a rank may have been added since the interrupt.
                shutdown()
                init()
                state.on_reset()
        finally:
            notification_manager.remove_listener(state)

    return wrapper


class KerasState(ObjectState):
    """What all ranks of an elastic job share: a model, and your own values.

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
        optimizer: The model's optimizer. Defaults to the one it was compiled
            with.
        **kwargs: Values to share; attributes of the state by these names. Any
            that can be pickled, and `ElasticSampler`s.

    Raises:
        ValueError: If the model is not built, or has no optimizer.
    """

    def __init__(self, model, optimizer=None, **kwargs):
        if not model.built:
            raise ValueError(
                "Argument `model` must be built first: call "
                "`model.build(input_shape)`."
            )
        self.model = model
        self.optimizer = optimizer or getattr(model, "optimizer", None)
        if self.optimizer is None:
            raise ValueError(
                "Argument `optimizer` is missing: pass it, or compile the "
                "model with it first."
            )
        if not self.optimizer.built:
            self.optimizer.build(model.trainable_variables)
        self.samplers = []
        for name, value in list(kwargs.items()):
            if isinstance(value, ElasticSampler):
                setattr(self, name, kwargs.pop(name))
                self.samplers.append(value)
        self._commits = 0
        super().__init__(bcast_object=broadcast_object, get_rank=rank, **kwargs)
        self._keep()

    def commit(self):
        """Keeps a copy of the state, and stops where the hosts have changed.

        All ranks call it together. Between the micro-batches of one update it
        does nothing: gradients that wait on a rank would be lost with it.

        Raises:
            HostsUpdatedInterrupt: For `run`.
        """
        if not is_within_update(self.optimizer):
            super().commit()

    def check_host_updates(self):
        """Stops where the hosts have changed, at the state as it is now."""
        if is_within_update(self.optimizer):
            return
        try:
            super().check_host_updates()
        except HostsUpdatedInterrupt:
            # All ranks are here: nothing since the last commit need be lost.
            self.save()
            raise

    def save(self):
        """Keeps a copy of the state; all ranks call it together."""
        for sampler in self.samplers:
            sampler.add_up()
        self._keep()
        self._commits += 1

    def restore(self):
        """Puts back the state of the last commit."""
        for variable, value in zip(
            self._variables(), self._saved_variables, strict=True
        ):
            variable.assign(value)
        discard_accumulated(self.optimizer)
        for sampler, saved in zip(
            self.samplers, self._saved_samplers, strict=True
        ):
            sampler.load_state_dict(saved)
        self._set_attrs()

    def sync(self):
        """Gives all ranks the state of the rank with the most commits.

        That is rank 0, but where it is new, or was not told before a rank died
        that the last commit had succeeded.
        """
        commits = allgather_object(self._commits)
        root = int(np.argmax(commits))
        broadcast_variables(self.model.weights + self.optimizer.variables, root)
        discard_accumulated(self.optimizer)
        samplers, self._saved_state, self._commits = broadcast_object(
            (self._saved_samplers, self._saved_state, self._commits), root
        )
        for sampler, saved in zip(self.samplers, samplers, strict=True):
            sampler.load_state_dict(saved)
        self._set_attrs()
        self._keep()

    def on_reset(self):
        """Called by `run` when the ranks have changed, before `sync`.

        Unlike Horovod's, it keeps what has been heard of hosts meanwhile:
        while ranks are starting others may become available.
        """
        self.reset()
        for callback in self._reset_callbacks:
            callback()

    def reset(self):
        """Has Keras trace its functions anew: they may contain the size."""
        self.model.train_function = None
        self.model.test_function = None
        self.model.predict_function = None

    def _keep(self):
        self._saved_variables = [
            np.array(variable) for variable in self._variables()
        ]
        self._saved_samplers = [s.state_dict() for s in self.samplers]
        self._saved_state = {
            name: copy.deepcopy(getattr(self, name))
            for name in self._saved_state
        }

    def _set_attrs(self):
        for name, value in self._saved_state.items():
            setattr(self, name, copy.deepcopy(value))

    def _variables(self):
        """Returns what a commit holds: the states of random generators too."""
        return (
            self.model.weights
            + [v for v in self.model.variables if _is_seed(v)]
            + self.optimizer.variables
        )


def _is_seed(variable):
    return variable.name == "seed_generator_state"


class ElasticSampler:
    """Deals out the examples of each epoch to the ranks, every one once.

    As an attribute of a `KerasState` it keeps count, over all ranks, of how
    often each example has been used in work that was committed, and deals out
    the others when the ranks change. The examples of a batch do not depend on
    the number of ranks, only how they are split: an epoch always has the same
    number of batches, and a schedule that counts updates stays right.

    Where the ranks do not divide a batch, their shares differ by one example;
    as each rank's mean counts alike, so do the weights of examples.

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
        num_examples: Integer, of an epoch.
        global_batch_size: Integer, the most examples in a batch of all ranks
            together. An epoch is cut into as few batches as that allows, equal
            but for one example.
        shuffle: Whether each epoch has an order of its own. Defaults to `True`.
        seed: Integer, the same on every rank. Defaults to `0`.

    Raises:
        ValueError: If there are more examples in a batch than in an epoch.
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
        # Of every epoch that has ended, as `report` returns it.
        self.reports = []
        self._uses = np.zeros(num_examples, np.int64)
        self._begin()

    @property
    def steps_per_epoch(self):
        """The number of batches of a whole epoch."""
        return -(-self._num_examples // self._global_batch_size)

    def batches(self):
        """Yields this rank's share of each batch that is left, without end.

        Yields:
            int64 array of the indices of examples: of what is left of this
            epoch, then of the next, and so on.
        """
        epoch, left = self.epoch, self._left()
        this_rank, ranks = rank(), size()
        while True:
            yield from self._shares(left, this_rank, ranks)
            epoch += 1
            left = self._order(epoch)

    def record_batch(self):
        """Notes that this rank has trained on its next share.

        Raises:
            ValueError: If this epoch has no batch left.
        """
        if self._shares_left is None:
            shares = self._shares(self._left(), rank(), size())
            self._shares_left = iter(shares)
        share = next(self._shares_left, None)
        if share is None:
            raise ValueError(
                f"Epoch {self.epoch} of an ElasticSampler went on after its "
                "last batch. The argument `steps_per_epoch` of fit must be the "
                f"sampler's, {self.steps_per_epoch}, and `steps_per_execution` "
                "of compile() must divide the batches that are left."
            )
        self._recorded.append(share)

    def add_up(self):
        """Adds what all ranks have recorded; all ranks call it together."""
        recorded = np.concatenate([*self._recorded, np.empty(0, np.int64)])
        used = allgather(tf.constant(recorded), name="elastic_sampler")
        np.add.at(self._uses, used.numpy(), 1)
        self._recorded = []

    def end_epoch(self):
        """Keeps the report of this epoch, begins the next; on all ranks."""
        self.add_up()
        self.reports.append(self.report())
        self.epoch += 1
        self._uses[:] = 0
        self._begin()

    def report(self):
        """Returns how often examples were used in this epoch, up to `add_up`.

        Returns:
            Dict with the `epoch` and the numbers of examples that were
            `used_once`, `never_used`, and `used_again`.
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
        """Forgets what was recorded since, and how examples were dealt out."""
        self._recorded = []
        self._shares_left = None

    def _left(self):
        """Returns the examples of this epoch that are still to be used."""
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
    """Commits the state every so many batches, and when an epoch ends.

    List it after the callbacks that update the state.

    Args:
        state: A `KerasState`.
        batches_per_commit: Integer, the batches of an epoch between commits.
            Defaults to `1`. A commit copies weights and optimizer state to
            memory of the host, and takes a message between the ranks.
    """

    def __init__(self, state, batches_per_commit=1):
        super().__init__()
        self.state = state
        self.batches_per_commit = batches_per_commit
        self._committed = 0

    def on_train_begin(self, logs=None):
        self._committed = 0

    def on_train_batch_end(self, batch, logs=None):
        # The last batch is committed when the epoch ends: a job that starts
        # again would else find an epoch without batches, which Keras has not.
        last = self.model.stop_training or batch + 1 == self.params.get("steps")
        # With steps_per_execution not every batch ends in Python.
        done = batch + 1 - self._committed
        if done >= self.batches_per_commit and not last:
            self._committed = batch + 1
            self.state.commit()

    def on_epoch_end(self, epoch, logs=None):
        self._committed = 0
        self.state.commit()


class UpdateBatchStateCallback(keras.callbacks.Callback):
    """Keeps `state.batch`, the number of batches of this epoch that are done.

    It is 0 when an epoch ends. The first epoch of a `fit` with
    `steps_per_epoch` is shorter by the batches that are done already. Each
    `ElasticSampler` of the state is told of each batch.

    List it before callbacks that stop the training when an epoch ends.

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
            # Ends the epoch, and is taken back before Keras ends training.
            self._cut_short = not self.model.stop_training
            self.model.stop_training = True

    def on_epoch_end(self, epoch, logs=None):
        self.state.batch = 0
        self._done_before = 0
        if self._cut_short:
            self._cut_short = False
            self.model.stop_training = False


class UpdateEpochStateCallback(keras.callbacks.Callback):
    """Keeps `state.epoch`, the number of epochs that are done.

    They are counted on from what it was when `fit` began, whatever the
    `initial_epoch` of that. Each `ElasticSampler` of the state begins its next
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
