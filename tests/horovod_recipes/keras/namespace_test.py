"""Our Keras binding has the names and signatures of Horovod's."""

import importlib
import inspect
import types

import horovod.keras
import horovod.tensorflow
import horovod.tensorflow.keras as upstream
import pytest

import horovod_recipes.keras as ours

# Signatures that differ from Horovod's on purpose, and why.
DIFFERENT_ARGUMENTS = {
    "SyncBatchNormalization": (
        "(fused=False, **arguments)",
        "Horovod calls the remaining arguments **kwargs.",
    ),
}
# The last argument of these is only ours: a model may have several optimizers.
WITH_OPTIMIZER = (
    "LearningRateScheduleCallback",
    "LearningRateWarmupCallback",
)
# Names that `horovod.tensorflow.keras` does not have, and their origin.
ADDED = {
    "DistributedGradientTape": horovod.tensorflow,
    "PartialDistributedGradientTape": horovod.tensorflow,
    "PartialDistributedOptimizer": horovod.keras,
    "SyncBatchNormalization": horovod.tensorflow,
    "allgather_object": horovod.tensorflow,
    "broadcast_object": horovod.tensorflow,
    "broadcast_variables": horovod.tensorflow,
    "grouped_allreduce": horovod.tensorflow,
    "join": horovod.tensorflow,
    "alltoall": horovod.tensorflow,
    "broadcast_": horovod.tensorflow,
    "gpu_available": horovod.tensorflow,
    "grouped_allgather": horovod.tensorflow,
    "grouped_reducescatter": horovod.tensorflow,
    "is_homogeneous": horovod.tensorflow,
    "local_rank_op": horovod.tensorflow,
    "local_size_op": horovod.tensorflow,
    "process_set_included_op": horovod.tensorflow,
    "rank_op": horovod.tensorflow,
    "size_op": horovod.tensorflow,
    "differentiable_allgather": None,  # With the gradient of a global batch.
    "average_variables": None,  # In place, over the ranks.
    "evaluate": None,  # Counts every example of every rank once.
    "sum_over_ranks": None,  # Of variables, in float64.
    "callbacks.AverageNonTrainableWeights": None,  # Batch-norm statistics.
    "callbacks.ExactMetrics": None,  # As if one process had seen all examples.
    "callbacks.ReplicaCheck": None,  # Finds ranks that have drifted apart.
    "callbacks.ReplicasDiffer": None,  # What it raises.
    "callbacks.SECONDS_TO_SAY_WHY": None,  # Of Watchdog.
    "callbacks.Watchdog": None,  # Ends a job in which a rank hangs.
    "callbacks.is_lost_rank": None,  # Tells errors of collectives from others.
    "callbacks.lost_rank": None,  # Names the rank that a collective lacks.
    "elastic.TensorFlowKerasState": None,  # Horovod has it in elastic as well.
    "elastic.ElasticSampler": None,  # Each example of an epoch once.
}
NAMESPACES = ["", "callbacks", "elastic"]


def public_names(module):
    """Returns a module's own names, without its imports."""
    if hasattr(module, "__all__"):
        return set(module.__all__)
    # Horovod's main module collects names from all of Horovod.
    package = "horovod" if module is upstream else module.__name__
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and name != "is_version_greater_equal_than"
        and (
            name in ("callbacks", "elastic")
            if isinstance(value, types.ModuleType)
            else getattr(value, "__module__", package).startswith(package)
        )
    }


def both(namespace):
    """Returns the two modules of a namespace."""
    suffix = f".{namespace}" if namespace else ""
    return (
        importlib.import_module(f"horovod.tensorflow.keras{suffix}"),
        importlib.import_module(f"horovod_recipes.keras{suffix}"),
    )


def arguments(function):
    """Returns each argument's name, kind and default; None for a constant.

    Annotations do not count.
    """
    if not callable(function) or function is ours.Compression:
        return None
    return [
        (parameter.name, parameter.kind, parameter.default)
        for parameter in inspect.signature(function).parameters.values()
    ]


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_every_name_is_there_with_the_same_arguments(namespace):
    their_module, our_module = both(namespace)
    names = public_names(their_module)
    assert len(names) >= 5
    assert names - public_names(our_module) == set()
    for name in sorted(names):
        theirs = arguments(getattr(their_module, name))
        our_arguments = arguments(getattr(our_module, name))
        if name in WITH_OPTIMIZER:
            assert our_arguments.pop()[0] == "optimizer"
        assert our_arguments == theirs, name


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_every_name_of_ours_is_accounted_for(namespace):
    their_module, our_module = both(namespace)
    added = public_names(our_module)
    added -= public_names(their_module)
    prefix = f"{namespace}." if namespace else ""
    expected = {
        name.removeprefix(prefix)
        for name in ADDED
        if name.rpartition(".")[0] == namespace
    }
    assert added == expected


@pytest.mark.parametrize(
    "name", [name for name, origin in ADDED.items() if origin]
)
def test_names_of_horovods_other_modules_have_the_same_arguments(name):
    function = getattr(ours, name)
    if name in DIFFERENT_ARGUMENTS:
        signature, _ = DIFFERENT_ARGUMENTS[name]
        assert str(inspect.signature(function)) == signature
    else:
        theirs = getattr(ADDED[name], name)
        assert arguments(function) == arguments(theirs)


def test_constants_and_classes_are_horovods_own():
    for name in ("Average", "Sum", "Compression", "ProcessSet"):
        assert getattr(ours, name) is getattr(upstream, name)
    assert ours.global_process_set is upstream.global_process_set
