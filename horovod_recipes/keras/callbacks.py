"""Callbacks that keep the ranks of a Keras 3 training alike."""

import keras

from horovod_recipes.keras.evaluation import check_metrics
from horovod_recipes.keras.evaluation import global_results
from horovod_recipes.keras.optimizer import is_distributed
from horovod_recipes.keras.train_step import make_train_function
from horovod_recipes.keras.variables import average_variables
from horovod_recipes.keras.variables import broadcast_variables


class BroadcastGlobalVariablesCallback(keras.callbacks.Callback):
    """Gives all ranks one rank's weights and optimizer state before step 1.

    The states of random generators stay each rank's own, so that dropout
    masks differ between ranks. The training step is traced anew, so that one
    from before the optimizer was distributed is not used again; where the model
    was compiled with `jit_compile`, XLA compiles it up to the allreduce.

    Args:
        root_rank: Integer, the rank to copy from.

    Raises:
        ValueError: When training begins, if the model's optimizer does not
            come from `DistributedOptimizer`: the ranks would drift apart.
    """

    def __init__(self, root_rank):
        super().__init__()
        self.root_rank = root_rank

    def on_train_begin(self, logs=None):
        optimizer = self.model.optimizer
        if not is_distributed(optimizer):
            raise ValueError(
                f"The model was compiled with {type(optimizer).__name__}, "
                "which would not average gradients over the ranks. Use "
                "hvd.DistributedOptimizer(optimizer) of horovod_recipes.keras; "
                "a LossScaleOptimizer goes inside it."
            )
        make_train_function(self.model)
        if not optimizer.built:
            optimizer.build(self.model.trainable_variables)
        # `weights` leaves out what `variables` has: metrics and seeds.
        broadcast_variables(
            self.model.weights + optimizer.variables, self.root_rank
        )


class AverageNonTrainableWeights(keras.callbacks.Callback):
    """Averages batch-norm statistics over the ranks for evaluation and saving.

    Each rank's moving means and variances come from its own micro-batches.
    Before an evaluation, and when an epoch ends, every rank gets their mean.
    Weights that are equal on all ranks, such as those of frozen layers, do
    not change. List it before the callbacks that save the model.
    """

    def on_test_begin(self, logs=None):
        average_variables(self.model.non_trainable_weights)

    def on_epoch_end(self, epoch, logs=None):
        average_variables(self.model.non_trainable_weights)


class ExactMetrics(keras.callbacks.Callback):
    """Puts into `logs` what one process would have measured on all examples.

    Ranks may hold unequal numbers of examples. List it before the callbacks
    that read `logs`. `model.evaluate` outside of `fit` returns before a
    callback can act: use `horovod_recipes.keras.evaluate` there.

    Raises:
        ValueError: After the first step, if the state of a metric does not
            add up over ranks.
    """

    def __init__(self):
        super().__init__()
        self._results = {}
        self._checked = False

    def on_epoch_begin(self, epoch, logs=None):
        self._results = {}

    def on_train_batch_end(self, batch, logs=None):
        # Keras makes the metrics in the first step; refuse them then, not
        # when the epoch ends.
        if not self._checked:
            check_metrics(self.model)
            self._checked = True

    def on_test_begin(self, logs=None):
        # The metrics hold the training results until evaluation resets them.
        self._results = global_results(self.model)

    def on_test_end(self, logs=None):
        for name, value in global_results(self.model).items():
            self._results[f"val_{name}"] = value

    def on_epoch_end(self, epoch, logs=None):
        logs.update(self._results or global_results(self.model))
