"""A callback that saves the best model so far, on rank 0 alone."""

import horovod.tensorflow as hvd

from horovod_recipes.keras._keras_hooks import Checkpoint


class BestModelCheckpoint(Checkpoint):
    """Saves the model when the monitored value is the best so far.

    Set the attribute `filepath` on rank 0 before training. It is a string that
    ends in `.keras`, or in `.weights.h5` with `save_weights_only`. Rank 0
    compares the values in its own `logs`, and writes. The attribute `best` is
    valid on rank 0. To monitor a metric of all ranks, list `ExactMetrics`
    before this callback.

    Args:
        monitor: String, a name in `logs`. Defaults to `"val_loss"`.
        verbose: 1 for a line per saved file, or 0. Defaults to `0`.
        save_weights_only: Whether to leave out the model's structure and the
            optimizer's state. Defaults to `False`.
        mode: `"min"`, `"max"`, or `"auto"`, which depends on the metric's
            name. Defaults to `"auto"`.
        save_freq: `"epoch"`, or an integer, the batches between two
            comparisons. Defaults to `"epoch"`.

    Raises:
        ValueError: On every rank, when training begins, if rank 0's `filepath`
            is not set or has another ending.
        RuntimeError: On every rank, if rank 0 cannot save.
    """

    def __init__(
        self,
        monitor="val_loss",
        verbose=0,
        save_weights_only=False,
        mode="auto",
        save_freq="epoch",
    ):
        self._ending = ".weights.h5" if save_weights_only else ".keras"
        super().__init__(
            f"best{self._ending}",
            monitor=monitor,
            verbose=verbose,
            save_best_only=True,
            save_weights_only=save_weights_only,
            mode=mode,
            save_freq=save_freq,
        )
        self.filepath = None

    def on_train_begin(self, logs=None):
        filepath = hvd.broadcast_object(self.filepath, root_rank=0)
        if not str(filepath).endswith(self._ending):
            raise ValueError(
                "BestModelCheckpoint needs its attribute `filepath` on rank 0, "
                f"a path that ends in {self._ending}. Received: "
                f"filepath={filepath!r}"
            )

    def save(self, epoch, batch, logs):
        # Keras calls this on every rank, in the same steps.
        failure = None
        if hvd.rank() == 0:
            try:
                super().save(epoch, batch, logs)
            except Exception as error:
                failure = f"{type(error).__name__}: {error}"
        failure = hvd.broadcast_object(failure, root_rank=0)
        if failure:
            raise RuntimeError(f"Rank 0 could not save the model: {failure}")
