"""Callbacks that replace `logs` by the metrics of all ranks."""

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf

from horovod_recipes.keras._evaluation import check_metrics
from horovod_recipes.keras._evaluation import global_results


class MetricAverageCallback(keras.callbacks.Callback):
    """Averages the values in `logs` over the ranks when an epoch ends.

    Every rank's value counts the same, whatever its number of examples. The
    mean of the ranks' ratios is not the ratio over all examples, for example
    for a precision. `ExactMetrics` is right in both cases. List this callback
    before the callbacks that read `logs`.

    Args:
        device: String, the TensorFlow device that reduces. Defaults to `""`,
            TensorFlow's choice.

    Raises:
        ValueError: On every rank, when an epoch ends, if the ranks' `logs` have
            different names.
    """

    def __init__(self, device=""):
        super().__init__()
        self.device = device

    def on_epoch_end(self, epoch, logs=None):
        with tf.device(self.device):
            logs_of_ranks = hvd.allgather_object(dict(logs or {}))
        names = sorted(logs_of_ranks[0])
        for rank, other in enumerate(logs_of_ranks):
            if sorted(other) != names:
                raise ValueError(
                    "MetricAverageCallback needs the same metrics on every "
                    f"rank, but rank 0 has {names} and rank {rank} has "
                    f"{sorted(other)}. If only some ranks have a callback, "
                    "list it after MetricAverageCallback."
                )
        for name in names:
            values = [np.asarray(other[name]) for other in logs_of_ranks]
            mean = np.mean(values, axis=0, dtype="float64")
            logs[name] = float(mean) if mean.ndim == 0 else mean


class ExactMetrics(keras.callbacks.Callback):
    """Puts the metrics over all examples of all ranks into `logs`.

    They equal those of one process with all examples. The ranks may have
    different numbers of examples. List this callback before the callbacks that
    read `logs`. Outside of `fit`, use `horovod_recipes.keras.evaluate`:
    `model.evaluate` returns before a callback can act.

    For a model with several outputs, Keras measures the loss of each output as
    the mean over batches. This callback takes the mean over the batches of all
    ranks. The total loss and the metrics count examples.

    It adds up the states of a metric over the ranks, and takes the result of
    the sums. This is right for Keras's own metrics, for functions passed as
    metrics, and for subclasses of `keras.metrics.Mean` and `keras.metrics.Sum`
    that add no variables. Another class is refused unless it has the attribute
    `states_add_up = True`. Set it if the variables are 0 after `reset_state`,
    and if `update_state` adds amounts that do not depend on them.

    Raises:
        ValueError: After the first step, if the states of a metric may not add
            up over ranks.
    """

    def __init__(self):
        super().__init__()
        self._results = {}
        self._checked = False

    def on_epoch_begin(self, epoch, logs=None):
        self._results = {}

    def on_train_batch_end(self, batch, logs=None):
        # Keras creates the metrics in the first step. Refuse them early.
        if not self._checked:
            check_metrics(self.model)
            self._checked = True

    def on_test_begin(self, logs=None):
        # Evaluation will reset the metrics, which hold the training results.
        self._results = global_results(self.model)

    def on_test_end(self, logs=None):
        for name, value in global_results(self.model).items():
            self._results[f"val_{name}"] = value

    def on_epoch_end(self, epoch, logs=None):
        logs.update(self._results or global_results(self.model))
