"""Callbacks for `model.fit` on several ranks.

Those of `horovod.tensorflow.keras.callbacks`, with the same arguments, and more
that keep the ranks alike, make metrics exact, and see replicas that differ and
ranks that hang.
"""

from horovod_recipes.keras.callbacks.broadcast import AverageNonTrainableWeights
from horovod_recipes.keras.callbacks.broadcast import (
    BroadcastGlobalVariablesCallback,
)
from horovod_recipes.keras.callbacks.checkpoint import BestModelCheckpoint
from horovod_recipes.keras.callbacks.learning_rate import (
    LearningRateScheduleCallback,
)
from horovod_recipes.keras.callbacks.learning_rate import (
    LearningRateWarmupCallback,
)
from horovod_recipes.keras.callbacks.metrics import ExactMetrics
from horovod_recipes.keras.callbacks.metrics import MetricAverageCallback
from horovod_recipes.keras.callbacks.replica_check import ReplicaCheck
from horovod_recipes.keras.callbacks.replica_check import ReplicasDiffer
from horovod_recipes.keras.watchdog import Watchdog

__all__ = [
    "AverageNonTrainableWeights",
    "BestModelCheckpoint",
    "BroadcastGlobalVariablesCallback",
    "ExactMetrics",
    "LearningRateScheduleCallback",
    "LearningRateWarmupCallback",
    "MetricAverageCallback",
    "ReplicaCheck",
    "ReplicasDiffer",
    "Watchdog",
]
