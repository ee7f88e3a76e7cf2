"""load_model: a saved model, with its optimizer distributed again."""

import horovod.tensorflow as hvd
import keras

from horovod_recipes.keras._optimizer import DistributedOptimizer
from horovod_recipes.keras._optimizer import is_distributed


def load_model(
    filepath,
    custom_optimizers=None,
    custom_objects=None,
    compression=hvd.Compression.none,
    legacy_opts=False,
):
    """Loads a model; its optimizer goes on averaging over the ranks.

    The optimizer and its state are those that were saved, with or without
    Horovod, and get what `DistributedOptimizer` adds. For other arguments of
    it than `compression`: load with `keras.saving.load_model`, and call
    `DistributedOptimizer(model.optimizer, ...)`.

    Args:
        filepath: String or path, the `.keras` file. From an `.h5` file Keras 3
            restores no optimizer.
        custom_optimizers: List of `keras.optimizers.Optimizer` subclasses that
            Keras does not know. Defaults to none.
        custom_objects: Dictionary of names and classes or functions, as for
            `keras.saving.load_model`. Defaults to none.
        compression: As for `DistributedOptimizer`.
        legacy_opts: `False`. Keras 3 has no legacy optimizers.

    Returns:
        The model, compiled if it was when it was saved.

    Raises:
        ValueError: If `legacy_opts` is true, or the file's optimizer cannot
            be restored; or as `keras.saving.load_model`.
    """
    if legacy_opts:
        raise ValueError(
            "Argument `legacy_opts` must be False: Keras 3 has no legacy "
            "optimizers. Load the file with Keras 2, compile the model with "
            "a new optimizer, and save it again."
        )
    objects = {cls.__name__: cls for cls in custom_optimizers or []}
    objects.update(custom_objects or {})
    model = keras.saving.load_model(filepath, custom_objects=objects)
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        return model
    if optimizer.built and not optimizer._trainable_variables:
        # Keras builds it for no variables; `fit` would say they are unknown.
        raise ValueError(
            f"Keras 3 cannot restore the optimizer of {filepath}, as it cannot "
            "of any .h5 file. Load it with keras.saving.load_model(filepath, "
            "compile=False), and compile it with a new DistributedOptimizer."
        )
    if not is_distributed(optimizer):
        model.optimizer = DistributedOptimizer(
            optimizer, compression=compression
        )
    return model
