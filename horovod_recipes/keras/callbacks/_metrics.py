"""Callbacks that put the metrics of all ranks into `logs`."""

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf

from horovod_recipes.keras._evaluation import check_metrics
from horovod_recipes.keras._evaluation import global_results


class MetricAverageCallback(keras.callbacks.Callback):
    """Replaces what `logs` has at the end of an epoch by the mean over ranks.

    Every rank's value counts the same, however many examples it is of, and
    the mean of ratios, as of a precision, is not the ratio over all examples:
    `ExactMetrics` is right there too. List it before the callbacks that read
    `logs`.

    Args:
        device: String, the TensorFlow device that reduces. Defaults to `""`,
            TensorFlow's choice.

    Raises:
        ValueError: When an epoch ends, on every rank, if the ranks' `logs` have
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
                    f"{sorted(other)}. List callbacks that only some ranks "
                    "have after it."
                )
        for name in names:
            values = [np.asarray(other[name]) for other in logs_of_ranks]
            mean = np.mean(values, axis=0, dtype="float64")
            logs[name] = float(mean) if mean.ndim == 0 else mean


class ExactMetrics(keras.callbacks.Callback):
    """Puts into `logs` what one process would have measured on all examples.

    Ranks may hold unequal numbers of examples. List it before the callbacks
    that read `logs`. `model.evaluate` outside of `fit` returns before a
    callback can act: use `horovod_recipes.keras.evaluate` there.

    Where a model has several outputs, Keras itself measures the loss of each as
    the mean over batches; so it is here, over the batches of all ranks. The
    total loss and the metrics count examples.

    The states of a metric are added up over the ranks, and its result is that
    of the sums. This is right for all of Keras's own metrics, for functions
    passed as metrics, and for subclasses of `keras.metrics.Mean` and
    `keras.metrics.Sum` without variables of their own. A class of your own
    whose variables are 0 after `reset_state`, and to which `update_state` adds
    something that does not depend on them, can say so with the attribute
    `states_add_up = True`; other classes are refused.

    Raises:
        ValueError: After the first step, if the state of a metric is not known
            to add up over ranks.
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
