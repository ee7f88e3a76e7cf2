"""A callback that saves the model at its best, on rank 0 alone."""

import horovod.tensorflow as hvd
import keras


class BestModelCheckpoint(keras.callbacks.ModelCheckpoint):
    """Saves the model where the monitored value is the best so far.

    Set the attribute `filepath` on rank 0 before training: a string that ends
    in `.keras`, or in `.weights.h5` with `save_weights_only`. Rank 0 judges by
    its own `logs` and writes; `best` is rank 0's. List `ExactMetrics` before
    it, so that what it monitors is of all ranks.

    Args:
        monitor: String, a name in `logs`. Defaults to `"val_loss"`.
        verbose: 1 for a line each time, or 0. Defaults to `0`.
        save_weights_only: Whether to leave out the model's structure and the
            optimizer's state. Defaults to `False`.
        mode: `"min"`, `"max"`, or `"auto"`, which goes by the metric's name.
            Defaults to `"auto"`.
        save_freq: `"epoch"`, or an integer, the batches between two looks.
            Defaults to `"epoch"`.

    Raises:
        ValueError: On every rank, when training begins, if rank 0's `filepath`
            is not set or ends otherwise.
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

    def _save_model(self, epoch, batch, logs):
        # Keras calls this on every rank, in the same steps.
        failure = None
        if hvd.rank() == 0:
            try:
                super()._save_model(epoch, batch, logs)
            except Exception as error:
                failure = f"{type(error).__name__}: {error}"
        failure = hvd.broadcast_object(failure, root_rank=0)
        if failure:
            raise RuntimeError(f"Rank 0 could not save the model: {failure}")
