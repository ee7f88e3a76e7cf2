"""Callbacks that give all ranks the same weights."""

import horovod.tensorflow as hvd
import keras
import tensorflow as tf

from horovod_recipes.keras._distributed_apply import is_distributed
from horovod_recipes.keras._gradient_tape import tape_has_reduced
from horovod_recipes.keras._install_hooks import install_hooks
from horovod_recipes.keras._optimizers_of import has_own_train_step
from horovod_recipes.keras._optimizers_of import optimizers_of
from horovod_recipes.keras._variables import average_variables
from horovod_recipes.keras._variables import broadcast_variables


class BroadcastGlobalVariablesCallback(keras.callbacks.Callback):
    """Gives all ranks one rank's weights and optimizer states before step 1.

    It broadcasts the states of all optimizers that are attributes of the model.

    Each rank keeps the states of its random generators, so dropout masks differ
    between ranks. Keras traces the training step again: an earlier trace may be
    older than `DistributedOptimizer`.

    A model without an input shape creates its weights in step 1. All ranks then
    receive those of `root_rank` after step 1.

    Args:
        root_rank: Integer, the rank to copy from.
        device: String, the TensorFlow device that broadcasts. Defaults to
            `""`, TensorFlow's choice.
        local_variables: A variable or a list of variables, of the model or of
            the optimizer. Each rank keeps its own values of these. Defaults to
            none.

    Raises:
        ValueError: If `local_variables` holds anything other than variables.
            When training begins, if the model's optimizer does not come from
            `DistributedOptimizer`. After step 1 of a model with a `train_step`
            of its own, if it used an optimizer that does not come from
            `DistributedOptimizer`, and no `DistributedGradientTape`. When
            training begins, on every rank, if the ranks have different numbers
            of steps in an epoch, as far as Keras knows them.
    """

    def __init__(self, root_rank, device="", local_variables=None):
        super().__init__()
        self.root_rank = root_rank
        self.device = device
        self._local_variables = []
        if _is_variable(local_variables):
            local_variables = [local_variables]
        for variable in local_variables or []:
            self.register_local_var(variable)

    def register_local_var(self, var):
        """Makes each rank keep its own value of a variable."""
        if not _is_variable(var):
            raise ValueError(
                "Argument `local_variables` must hold keras.Variable or "
                f"tf.Variable. Received: {var!r}"
            )
        self._local_variables.append(var)

    def on_train_begin(self, logs=None):
        _check_steps((self.params or {}).get("steps"))
        model = self.model
        if not has_own_train_step(model):
            _check_distributed({"optimizer": model.optimizer})
            if model.built and not model.optimizer.built:
                model.optimizer.build(model.trainable_variables)
        # A train_step with a tape has no DistributedOptimizer to do it.
        install_hooks()
        model.make_train_function(force=True)
        # Step 1 creates what is not built, and shows which optimizers it uses.
        self._was_built = model.built
        self._is_first_step = True
        self._broadcast()

    def on_train_batch_end(self, batch, logs=None):
        if not self._is_first_step:
            return
        self._is_first_step = False
        if not tape_has_reduced():
            _check_distributed(_used_optimizers(self.model))
        if not self._was_built:
            self._broadcast()

    def _broadcast(self):
        states = [
            variable
            for optimizer in optimizers_of(self.model).values()
            for variable in optimizer.variables
        ]
        # Unlike `variables`, `weights` leaves out metrics and seeds.
        variables = [
            variable
            for variable in self.model.weights + states
            if not any(
                local is variable or local is variable.value
                for local in self._local_variables
            )
        ]
        with tf.device(self.device):
            broadcast_variables(variables, self.root_rank)


class AverageNonTrainableWeights(keras.callbacks.Callback):
    """Averages batch-norm statistics over the ranks for evaluation and saving.

    Each rank's moving means and variances come from its own micro-batches.
    Before an evaluation, and when an epoch ends, every rank gets their mean.
    Weights that are equal on all ranks do not change, such as those of frozen
    layers. List it before the callbacks that save the model.
    """

    def on_test_begin(self, logs=None):
        average_variables(self.model.non_trainable_weights)

    def on_epoch_end(self, epoch, logs=None):
        average_variables(self.model.non_trainable_weights)


def _check_steps(steps):
    """Raises on every rank if the ranks have different numbers of steps."""
    of_ranks = hvd.allgather_object(steps)
    known = {rank: n for rank, n in enumerate(of_ranks) if n is not None}
    if len(set(known.values())) > 1:
        numbers = ", ".join(f"rank {r} has {n}" for r, n in known.items())
        raise ValueError(
            f"The ranks have different numbers of steps in an epoch: {numbers} "
            "steps. Each step waits for all ranks. Pass the smallest number "
            "to fit as steps_per_epoch, and repeat() a dataset that is shorter."
        )


def _used_optimizers(model):
    return {
        place: optimizer
        for place, optimizer in optimizers_of(model).items()
        if int(optimizer.iterations) > 0
    }


def _check_distributed(optimizers):
    """Raises if one of the optimizers would not average gradients."""
    for place, optimizer in optimizers.items():
        if not is_distributed(optimizer):
            raise ValueError(
                f"The model's attribute {place} is a "
                f"{type(optimizer).__name__} that does not average gradients "
                "over the ranks. Wrap it: hvd.DistributedOptimizer(optimizer) "
                "of horovod_recipes.keras. An optimizer that comes from "
                "from_config or from a loaded file, and that of a cloned "
                "model, must be wrapped again."
            )


def _is_variable(value):
    return isinstance(value, (keras.Variable, tf.Variable))
