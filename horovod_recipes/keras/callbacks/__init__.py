"""Callbacks for `model.fit` on several ranks.

They include all callbacks of `horovod.tensorflow.keras.callbacks`, with the
same arguments. The others keep the ranks alike, make metrics exact, and find
replicas that differ and ranks that hang.
"""

from horovod_recipes.keras._watchdog import SECONDS_TO_SAY_WHY
from horovod_recipes.keras._watchdog import Watchdog
from horovod_recipes.keras._watchdog import is_lost_rank
from horovod_recipes.keras._watchdog import lost_rank
from horovod_recipes.keras.callbacks._best_model import BestModelCheckpoint
from horovod_recipes.keras.callbacks._broadcast import (
    AverageNonTrainableWeights,
)
from horovod_recipes.keras.callbacks._broadcast import (
    BroadcastGlobalVariablesCallback,
)
from horovod_recipes.keras.callbacks._learning_rate import (
    LearningRateScheduleCallback,
)
from horovod_recipes.keras.callbacks._learning_rate import (
    LearningRateWarmupCallback,
)
from horovod_recipes.keras.callbacks._metrics import ExactMetrics
from horovod_recipes.keras.callbacks._metrics import MetricAverageCallback
from horovod_recipes.keras.callbacks._replica_check import ReplicaCheck
from horovod_recipes.keras.callbacks._replica_check import ReplicasDiffer

__all__ = [
    "SECONDS_TO_SAY_WHY",
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
    "is_lost_rank",
    "lost_rank",
]
