"""Callbacks that set the learning rate, with momentum correction."""

import math

import horovod.tensorflow as hvd
import keras
import tensorflow as tf

from keras_lars import LARS


class LearningRateScheduleCallback(keras.callbacks.Callback):
    """Sets the learning rate to `initial_lr * multiplier(epoch)`.

    With `staircase` it is set when an epoch begins, and `epoch` is an integer;
    otherwise before each batch, and `epoch` is a float, as 2.5 in the middle
    of the third. The rate is put into `logs` as `lr` when an epoch ends.

    Where the learning rate is part of the velocity, as in SGD's
    `v = m * v + lr * g; w = w - v`, a change of the rate leaves the past
    gradients in `v` at the old one. Momentum correction multiplies `m` by
    `lr / old_lr` for the batch (Goyal et al., section 2.1, remark 2). Here `v`
    itself is multiplied, once for each change, which is the same step and
    takes effect where `m` is part of a compiled program; it is right too with
    `steps_per_execution`, `backward_passes_per_step` and Nesterov momentum.
    After a learning rate of 0 the velocity is left as it is.

    Args:
        initial_lr: Float, the rate that `multiplier` multiplies.
        multiplier: Function of the epoch; or a float, for
            `multiplier ** (epoch - start_epoch)`.
        start_epoch: Integer, the first epoch in which the rate is set.
            Defaults to `0`.
        end_epoch: Integer, the epoch from which it no longer is, or None.
            Defaults to `None`.
        staircase: Whether to set it once an epoch, not before each batch.
            Defaults to `True`.
        momentum_correction: Whether to correct the momentum of Keras's `SGD`
            and `RMSprop` and of `LARS` in the style "paper". The other
            styles of `LARS`, and Keras's other optimizers, keep the rate out
            of their velocities and need no correction. Defaults to `True`.
        steps_per_epoch: Integer, the batches in an epoch. Defaults to what
            Keras knows of the dataset.

    Raises:
        ValueError: If `initial_lr` is None; when training begins, if the
            optimizer's learning rate is not a float, if it has a momentum that
            cannot be corrected, or if the number of steps is not known.

    References:
        - [Goyal et al., 2017](https://arxiv.org/abs/1706.02677)
    """

    def __init__(
        self,
        initial_lr,
        multiplier,
        start_epoch=0,
        end_epoch=None,
        staircase=True,
        momentum_correction=True,
        steps_per_epoch=None,
    ):
        super().__init__()
        if initial_lr is None:
            raise ValueError("Argument `initial_lr` must be a float.")
        self.initial_lr = initial_lr
        self.multiplier = multiplier
        if not callable(multiplier):
            self.multiplier = lambda epoch: multiplier ** (epoch - start_epoch)
        self.start_epoch = start_epoch
        self.end_epoch = end_epoch
        self.staircase = staircase
        self.momentum_correction = momentum_correction
        self.steps_per_epoch = steps_per_epoch

    def on_train_begin(self, logs=None):
        optimizer = _inner(self.model.optimizer)
        if not isinstance(optimizer.learning_rate, keras.Variable):
            raise ValueError(
                f"{type(self).__name__} sets the optimizer's learning rate, "
                "which must be a float, not a schedule. Received: "
                f"{type(optimizer).__name__}(learning_rate="
                f"{optimizer._learning_rate!r})"
            )
        if self.momentum_correction:
            _velocities(optimizer)  # Raises where it does not know them.
        self._scale_velocities = None
        if not self.staircase and not self.steps_per_epoch:
            self.steps_per_epoch = self.params.get("steps")
            if not self.steps_per_epoch:
                raise ValueError(
                    f"{type(self).__name__} cannot tell how many steps an "
                    "epoch of this dataset has: pass steps_per_epoch."
                )

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch

    def on_train_batch_begin(self, batch, logs=None):
        end = math.inf if self.end_epoch is None else self.end_epoch
        if not self.start_epoch <= self._epoch < end:
            return
        if not self.staircase:
            self._set_learning_rate(self._epoch + batch / self.steps_per_epoch)
        elif batch == 0:
            self._set_learning_rate(self._epoch)

    def on_epoch_end(self, epoch, logs=None):
        if logs is not None:
            logs["lr"] = float(self.model.optimizer.learning_rate)

    def _set_learning_rate(self, epoch):
        optimizer = _inner(self.model.optimizer)
        old = float(optimizer.learning_rate)
        optimizer.learning_rate = self.initial_lr * self.multiplier(epoch)
        new = float(optimizer.learning_rate)
        # Before it is built, its velocities are 0 anyway.
        corrects = self.momentum_correction and optimizer.built
        if corrects and old not in (0.0, new):
            if self._scale_velocities is None:
                self._scale_velocities = _scaling_function(
                    _velocities(optimizer)
                )
            self._scale_velocities(tf.constant(new / old))


class LearningRateWarmupCallback(LearningRateScheduleCallback):
    """Raises the learning rate from `initial_lr / hvd.size()` to `initial_lr`.

    After the share `t` of the `warmup_epochs`, in batches, it is
    `initial_lr / size * (1 + t * (size - 1))`. A batch is trained at the rate
    that belongs to its end, so that the last one of the warm-up, or all
    `steps_per_execution` last ones, are trained at `initial_lr`.

    Args:
        initial_lr: Float, the rate to arrive at: that of all ranks together.
        warmup_epochs: Integer, the epochs that it takes. Defaults to `5`.
        momentum_correction: As for `LearningRateScheduleCallback`. Defaults
            to `True`.
        steps_per_epoch: As for `LearningRateScheduleCallback`.
        verbose: 1 for a line on rank 0 when the warm-up ends, or 0. Defaults
            to `0`.

    Raises:
        ValueError: As `LearningRateScheduleCallback`.

    References:
        - [Goyal et al., 2017](https://arxiv.org/abs/1706.02677), section 2.2
    """

    def __init__(
        self,
        initial_lr,
        warmup_epochs=5,
        momentum_correction=True,
        steps_per_epoch=None,
        verbose=0,
    ):
        super().__init__(
            initial_lr,
            self._warmup,
            end_epoch=warmup_epochs,
            staircase=False,
            momentum_correction=momentum_correction,
            steps_per_epoch=steps_per_epoch,
        )
        self.verbose = verbose

    def _warmup(self, epoch):
        batches = self.model.steps_per_execution
        batch_end = min(
            epoch + batches / self.steps_per_epoch, math.floor(epoch) + 1
        )
        size = hvd.size()
        return (1 + batch_end / self.end_epoch * (size - 1)) / size

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        if epoch == self.end_epoch - 1 and self.verbose and hvd.rank() == 0:
            rate = float(self.model.optimizer.learning_rate)
            print(
                f"\nEpoch {epoch + 1}: finished gradual learning rate warmup "
                f"to {rate:g}."
            )


def _inner(optimizer):
    """Returns the optimizer inside a `LossScaleOptimizer`, or itself."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def _velocities(optimizer):
    """Returns the variables that hold past gradients times learning rates."""
    if not getattr(optimizer, "momentum", 0.0):
        return []
    # A subclass may have an update of its own.
    update = type(optimizer).update_step
    if update is keras.optimizers.SGD.update_step:
        attribute = "momentums"
    elif update is keras.optimizers.RMSprop.update_step:
        attribute = "_momentums"
    elif update is LARS.update_step:
        if optimizer.momentum_style != "paper":
            return []
        attribute = "_velocities"
    elif update is keras.optimizers.Muon.update_step:
        return []
    else:
        raise ValueError(
            "Momentum correction is for keras.optimizers.SGD, RMSprop and "
            "keras_lars.LARS: how the momentum of "
            f"{type(optimizer).__name__} depends on the learning rate is not "
            "known. Pass momentum_correction=False."
        )
    return getattr(optimizer, attribute, [])


def _scaling_function(variables):
    @tf.function(autograph=False)
    def scale(factor):
        for variable in variables:
            variable.assign(variable * tf.cast(factor, variable.dtype))

    return scale
