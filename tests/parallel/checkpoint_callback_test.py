"""BestModelCheckpoint on two ranks."""

import keras
import numpy as np
import pytest

import horovod_recipes.keras as hvd
from tests.parallel.common import of_rank


class Prescribed(keras.callbacks.Callback):
    """Sets the weight to the epoch's number, and the loss to 3, 1, 2."""

    def on_epoch_end(self, epoch, logs=None):
        self.model.set_weights([np.full((1, 1), epoch)])
        # Rank 1 has another order, which must not matter.
        logs["val_loss"] = of_rank([3.0, 1.0, 2.0], [2.0, 3.0, 1.0])[epoch]


def fit(callback):
    model = keras.Sequential(
        [keras.Input((1,)), keras.layers.Dense(1, use_bias=False)]
    )
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.0)), "mse")
    model.fit(
        np.ones((2, 1)),
        np.ones((2, 1)),
        epochs=3,
        verbose=0,
        callbacks=[
            hvd.callbacks.BroadcastGlobalVariablesCallback(0),
            Prescribed(),
            callback,
        ],
    )
    return model


def test_rank_0_saves_the_best(shared_folder):
    callback = hvd.callbacks.BestModelCheckpoint()
    callback.filepath = str(shared_folder / f"of_rank_{hvd.rank()}.keras")
    fit(callback)
    names = hvd.broadcast_object(
        [path.name for path in shared_folder.iterdir()], root_rank=0
    )
    assert names == ["of_rank_0.keras"]
    saved = keras.saving.load_model(shared_folder / names[0])
    np.testing.assert_array_equal(saved.get_weights(), [[[1.0]]])


def test_weights_alone(shared_folder):
    callback = hvd.callbacks.BestModelCheckpoint(
        monitor="val_loss", mode="max", save_weights_only=True
    )
    if hvd.rank() == 0:
        callback.filepath = str(shared_folder / "best.weights.h5")
    model = fit(callback)
    hvd.broadcast_object(None, root_rank=0)  # Wait until rank 0 has saved.
    model.load_weights(shared_folder / "best.weights.h5")
    np.testing.assert_array_equal(model.get_weights(), [[[0.0]]])


def test_errors_reach_every_rank(shared_folder):
    callback = hvd.callbacks.BestModelCheckpoint()
    with pytest.raises(ValueError, match=r"ends in \.keras\. .*None"):
        fit(callback)
    # Keras cannot restore the optimizer of an .h5 file.
    callback.filepath = str(shared_folder / "best.h5")
    with pytest.raises(ValueError, match=r"ends in \.keras\. .*best\.h5"):
        fit(callback)
    in_the_way = shared_folder / "file"
    if hvd.rank() == 0:
        in_the_way.write_text("")
    callback.filepath = str(in_the_way / "best.keras")
    with pytest.raises(RuntimeError, match=r"Rank 0 could not save.*Error: "):
        fit(callback)
