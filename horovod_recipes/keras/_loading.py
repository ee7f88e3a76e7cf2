"""load_model: loads a saved model and distributes its optimizer again."""

import horovod.tensorflow as hvd
import keras

from horovod_recipes.keras._distributed_apply import is_distributed
from horovod_recipes.keras._keras_hooks import trained_variables
from horovod_recipes.keras._optimizer import DistributedOptimizer


def load_model(
    filepath,
    custom_optimizers=None,
    custom_objects=None,
    compression=hvd.Compression.none,
    legacy_opts=False,
):
    """Loads a model whose optimizer averages over the ranks.

    The file may have been saved with or without Horovod. The optimizer keeps
    its saved state, and `DistributedOptimizer` makes it average. To give it
    arguments other than `compression`, load the file with
    `keras.saving.load_model` and call `DistributedOptimizer(model.optimizer,
    ...)`.

    Args:
        filepath: String or path, the `.keras` file. Keras 3 cannot restore the
            optimizer of an `.h5` file.
        custom_optimizers: List of `keras.optimizers.Optimizer` subclasses that
            Keras does not know. Defaults to none.
        custom_objects: Dictionary of names and classes or functions, as for
            `keras.saving.load_model`. Defaults to none.
        compression: As for `DistributedOptimizer`.
        legacy_opts: `False`. Keras 3 does not have legacy optimizers.

    Returns:
        The model. It is compiled if the saved model was.

    Raises:
        ValueError: If `legacy_opts` is true, if the file's optimizer cannot be
            restored, or as `keras.saving.load_model`.
    """
    if legacy_opts:
        raise ValueError(
            "Argument `legacy_opts` must be False: Keras 3 does not have "
            "legacy optimizers. Load the file with Keras 2, compile the model "
            "with a new optimizer, and save it again."
        )
    objects = {cls.__name__: cls for cls in custom_optimizers or []}
    objects.update(custom_objects or {})
    model = keras.saving.load_model(filepath, custom_objects=objects)
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        return model
    if optimizer.built and not trained_variables(optimizer):
        # Keras has built it for no variables, so `fit` would fail.
        raise ValueError(
            f"Keras 3 cannot restore the optimizer of {filepath}, nor that of "
            "any other .h5 file. Load the model with "
            "keras.saving.load_model(filepath, compile=False), and compile it "
            "with a new DistributedOptimizer."
        )
    if not is_distributed(optimizer):
        model.optimizer = DistributedOptimizer(
            optimizer, compression=compression
        )
    return model
