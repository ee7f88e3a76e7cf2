"""Callbacks that set the learning rate, with momentum correction."""

import math

import horovod.tensorflow as hvd
import keras
import tensorflow as tf

from horovod_recipes.keras._distributed_apply import is_distributed
from horovod_recipes.keras._keras_hooks import rmsprop_momentums
from horovod_recipes.keras._optimizers_of import optimizers_of
from keras_lars import LARS
from keras_lars._unwrap import innermost


class LearningRateScheduleCallback(keras.callbacks.Callback):
    """Sets the learning rate to `initial_lr * multiplier(epoch)`.

    With `staircase`, this happens when an epoch begins, and `epoch` is an
    integer. Otherwise it happens before each batch, and `epoch` is a float:
    2.5 is the middle of the third epoch. When an epoch ends, the callback puts
    the rate into `logs` as `lr`.

    The velocity of SGD contains the learning rate: `v = m * v + lr * g`. If the
    rate changes, the past gradients in `v` still have the old rate. Momentum
    correction multiplies `m` by `lr / old_lr` for one batch (Goyal et al.,
    section 2.1, remark 2). This callback multiplies `v` instead, once per
    change, which gives the same step. It also works where `m` is part of a
    compiled program, with `steps_per_execution`, with
    `backward_passes_per_step` and with Nesterov momentum. After a learning rate
    of 0 the velocity does not change.

    Args:
        initial_lr: Float, the rate that `multiplier` multiplies.
        multiplier: Function of the epoch, or a float. The code of Horovod
            compounds a float each epoch; its documentation, and the scripts
            that follow it, mean a constant, as it is here.
        start_epoch: Integer, the first epoch in which the callback sets the
            rate. Defaults to `0`.
        end_epoch: Integer, the first epoch in which it no longer sets the
            rate, or None. Defaults to `None`.
        staircase: Whether to set the rate once per epoch, not before each
            batch. Defaults to `True`.
        momentum_correction: Whether to correct the momentum of Keras's `SGD`
            and `RMSprop`, and of `LARS` in the style "paper". The other styles
            of `LARS` and Keras's other optimizers do not need a correction:
            their velocities do not contain the rate. Defaults to `True`.
        steps_per_epoch: Integer, the batches in an epoch. Defaults to the
            number that Keras finds in the dataset.
        optimizer: The optimizer whose rate to set. Defaults to the only
            distributed one that is an attribute of the model, or to the one
            it was compiled with.

    Raises:
        ValueError: If `initial_lr` is None. When training begins, if the
            optimizer's learning rate is not a float, if its momentum cannot be
            corrected, or if the number of steps is not known.

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
        optimizer=None,
    ):
        super().__init__()
        if initial_lr is None:
            raise ValueError("Argument `initial_lr` must be a float.")
        self.initial_lr = initial_lr
        self.multiplier = multiplier
        if not callable(multiplier):
            self.multiplier = lambda epoch: multiplier
        self.start_epoch = start_epoch
        self.end_epoch = end_epoch
        self.staircase = staircase
        self.momentum_correction = momentum_correction
        self.steps_per_epoch = steps_per_epoch
        self.optimizer = optimizer

    def on_train_begin(self, logs=None):
        optimizer = self._find_optimizer()
        if not isinstance(optimizer.learning_rate, keras.Variable):
            rate = optimizer.get_config().get("learning_rate", "a schedule")
            raise ValueError(
                f"{type(self).__name__} sets the optimizer's learning rate, "
                "which must be a float, not a schedule. Received: "
                f"{type(optimizer).__name__}(learning_rate={rate!r})"
            )
        if self.momentum_correction:
            _velocities(optimizer)  # Raises if it does not know them.
        self._scale_velocities = None
        if not self.staircase and not self.steps_per_epoch:
            self.steps_per_epoch = self.params.get("steps")
            if not self.steps_per_epoch:
                raise ValueError(
                    f"{type(self).__name__} cannot tell how many steps an "
                    "epoch of this dataset has: pass steps_per_epoch."
                )

    def _find_optimizer(self):
        if self.optimizer is not None:
            return innermost(self.optimizer)
        optimizers = {
            place: optimizer
            for place, optimizer in optimizers_of(self.model).items()
            if is_distributed(optimizer)
        }
        if len(optimizers) > 1:
            raise ValueError(
                f"{type(self).__name__} sets the rate of one optimizer, but "
                f"the model has {', '.join(optimizers)}. Pass one of them as "
                "the argument `optimizer`."
            )
        (optimizer,) = optimizers.values() or [self.model.optimizer]
        return innermost(optimizer)

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
            logs["lr"] = float(self._find_optimizer().learning_rate)

    def _set_learning_rate(self, epoch):
        optimizer = self._find_optimizer()
        old = float(optimizer.learning_rate)
        optimizer.learning_rate = self.initial_lr * self.multiplier(epoch)
        new = float(optimizer.learning_rate)
        # Before the optimizer is built, its velocities are 0.
        corrects = self.momentum_correction and optimizer.built
        if corrects and old not in (0.0, new):
            if self._scale_velocities is None:
                self._scale_velocities = _scaling_function(
                    _velocities(optimizer)
                )
            self._scale_velocities(tf.constant(new / old))


class LearningRateWarmupCallback(LearningRateScheduleCallback):
    """Raises the learning rate from `initial_lr / hvd.size()` to `initial_lr`.

    After the share `t` of the warm-up's batches, the rate is
    `initial_lr / size * (1 + t * (size - 1))`. Each batch trains at the rate of
    its end. So the last batch of the warm-up trains at `initial_lr`, as do the
    last `steps_per_execution` batches.

    Args:
        initial_lr: Float, the rate after the warm-up, for the global batch.
        warmup_epochs: Integer, the length of the warm-up. Defaults to `5`.
        momentum_correction: As for `LearningRateScheduleCallback`. Defaults
            to `True`.
        steps_per_epoch: As for `LearningRateScheduleCallback`.
        verbose: 1 for a line on rank 0 when the warm-up ends, or 0. Defaults
            to `0`.
        optimizer: As for `LearningRateScheduleCallback`.

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
        optimizer=None,
    ):
        super().__init__(
            initial_lr,
            self._warmup,
            end_epoch=warmup_epochs,
            staircase=False,
            momentum_correction=momentum_correction,
            steps_per_epoch=steps_per_epoch,
            optimizer=optimizer,
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
            rate = float(self._find_optimizer().learning_rate)
            print(
                f"\nEpoch {epoch + 1}: finished gradual learning rate warmup "
                f"to {rate:g}."
            )


def _velocities(optimizer):
    """Returns the variables that hold past gradients times learning rates.

    The list is empty before the optimizer is built.
    """
    if not getattr(optimizer, "momentum", 0.0):
        return []
    # A subclass may define its own update.
    update = type(optimizer).update_step
    if update is keras.optimizers.SGD.update_step:
        return getattr(optimizer, "momentums", [])
    if update is keras.optimizers.RMSprop.update_step:
        return rmsprop_momentums(optimizer)
    if update is LARS.update_step:
        in_velocity = optimizer.momentum_style == "paper"
        return getattr(optimizer, "_velocities", []) if in_velocity else []
    if update is keras.optimizers.Muon.update_step:
        return []
    raise ValueError(
        "Momentum correction is for keras.optimizers.SGD, RMSprop and "
        "keras_lars.LARS. It is not known how the momentum of "
        f"{type(optimizer).__name__} depends on the learning rate. Pass "
        "momentum_correction=False."
    )


def _scaling_function(variables):
    @tf.function(autograph=False)
    def scale(factor):
        for variable in variables:
            variable.assign(variable * tf.cast(factor, variable.dtype))

    return scale
