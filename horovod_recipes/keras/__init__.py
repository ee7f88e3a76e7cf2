"""Horovod for Keras 3: the names of `horovod.tensorflow.keras`, working.

On Keras 3, the Keras binding of Horovod 0.28.1 trains without averaging, and
without an error. Import this module instead:

    import horovod_recipes.keras as hvd

Importing it changes nothing in Keras. The first call that needs it, such as
`DistributedOptimizer`, patches eight methods of Keras; see `_keras_hooks.py`.
"""

import keras

from horovod_recipes.install_horovod import check_installed

check_installed()

if keras.backend.backend() != "tensorflow":
    raise ImportError(
        f"keras.json chooses the backend {keras.backend.backend()}, but "
        "Horovod needs Keras on TensorFlow; set KERAS_BACKEND=tensorflow"
    )

# The check comes first: without a fitting Horovod these imports fail unclearly.
# isort: split
from horovod.tensorflow import Average
from horovod.tensorflow import Compression
from horovod.tensorflow import ProcessSet
from horovod.tensorflow import Sum
from horovod.tensorflow import add_process_set
from horovod.tensorflow import allgather_object
from horovod.tensorflow import broadcast_object
from horovod.tensorflow import ccl_built
from horovod.tensorflow import cross_rank
from horovod.tensorflow import cross_size
from horovod.tensorflow import cuda_built
from horovod.tensorflow import ddl_built
from horovod.tensorflow import global_process_set
from horovod.tensorflow import gloo_built
from horovod.tensorflow import gloo_enabled
from horovod.tensorflow import gpu_available
from horovod.tensorflow import is_homogeneous
from horovod.tensorflow import is_initialized
from horovod.tensorflow import join
from horovod.tensorflow import local_rank
from horovod.tensorflow import local_rank_op
from horovod.tensorflow import local_size
from horovod.tensorflow import local_size_op
from horovod.tensorflow import mpi_built
from horovod.tensorflow import mpi_enabled
from horovod.tensorflow import mpi_threads_supported
from horovod.tensorflow import nccl_built
from horovod.tensorflow import process_set_included_op
from horovod.tensorflow import rank
from horovod.tensorflow import rank_op
from horovod.tensorflow import remove_process_set
from horovod.tensorflow import rocm_built
from horovod.tensorflow import shutdown
from horovod.tensorflow import size
from horovod.tensorflow import size_op
from horovod.tensorflow import start_timeline
from horovod.tensorflow import stop_timeline

from horovod_recipes.keras import callbacks
from horovod_recipes.keras import elastic
from horovod_recipes.keras._collectives import allgather
from horovod_recipes.keras._collectives import allreduce
from horovod_recipes.keras._collectives import alltoall
from horovod_recipes.keras._collectives import broadcast
from horovod_recipes.keras._collectives import broadcast_
from horovod_recipes.keras._collectives import differentiable_allgather
from horovod_recipes.keras._collectives import grouped_allgather
from horovod_recipes.keras._collectives import grouped_allreduce
from horovod_recipes.keras._collectives import grouped_reducescatter
from horovod_recipes.keras._collectives import reducescatter
from horovod_recipes.keras._evaluation import evaluate
from horovod_recipes.keras._gradient_tape import DistributedGradientTape
from horovod_recipes.keras._gradient_tape import PartialDistributedGradientTape
from horovod_recipes.keras._init import init
from horovod_recipes.keras._loading import load_model
from horovod_recipes.keras._optimizer import DistributedOptimizer
from horovod_recipes.keras._optimizer import PartialDistributedOptimizer
from horovod_recipes.keras._variables import average_variables
from horovod_recipes.keras._variables import broadcast_global_variables
from horovod_recipes.keras._variables import broadcast_variables
from horovod_recipes.keras._variables import sum_over_ranks
from horovod_recipes.keras.layers import SyncBatchNormalization

__all__ = [
    "Average",
    "Compression",
    "DistributedGradientTape",
    "DistributedOptimizer",
    "PartialDistributedGradientTape",
    "PartialDistributedOptimizer",
    "ProcessSet",
    "Sum",
    "SyncBatchNormalization",
    "add_process_set",
    "allgather",
    "allgather_object",
    "allreduce",
    "alltoall",
    "average_variables",
    "broadcast",
    "broadcast_",
    "broadcast_global_variables",
    "broadcast_object",
    "broadcast_variables",
    "callbacks",
    "ccl_built",
    "cross_rank",
    "cross_size",
    "cuda_built",
    "ddl_built",
    "differentiable_allgather",
    "elastic",
    "evaluate",
    "global_process_set",
    "gloo_built",
    "gloo_enabled",
    "gpu_available",
    "grouped_allgather",
    "grouped_allreduce",
    "grouped_reducescatter",
    "init",
    "is_homogeneous",
    "is_initialized",
    "join",
    "load_model",
    "local_rank",
    "local_rank_op",
    "local_size",
    "local_size_op",
    "mpi_built",
    "mpi_enabled",
    "mpi_threads_supported",
    "nccl_built",
    "process_set_included_op",
    "rank",
    "rank_op",
    "reducescatter",
    "remove_process_set",
    "rocm_built",
    "shutdown",
    "size",
    "size_op",
    "start_timeline",
    "stop_timeline",
    "sum_over_ranks",
]
