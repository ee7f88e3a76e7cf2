"""Learning-rate schedules and scaling rules for large-batch training."""

import math

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="keras_lars")
class WarmupPolynomialDecay(keras.optimizers.schedules.LearningRateSchedule):
    """Warm-up to a peak, then polynomial decay: the schedule of LARS's runs.

    Over the first `warmup_steps` steps the rate goes from
    `warmup_start_learning_rate` to `peak_learning_rate`, then down to
    `end_learning_rate` at `total_steps`, where it stays.

    Args:
        peak_learning_rate: Float >= 0, the rate when the warm-up ends.
        total_steps: Integer > 0, the number of updates of the whole training.
        warmup_steps: Integer in [0, total_steps), the number of updates of
            the warm-up. Defaults to `0`.
        warmup_start_learning_rate: Float >= 0, the rate at step 0 of a
            warm-up. Defaults to `0.0`.
        warmup_power: Float > 0; 1 is a linear warm-up. Defaults to `1.0`.
        end_learning_rate: Float >= 0. Defaults to `0.0`.
        power: Float > 0, of the decay. Defaults to `2.0`, the paper's.
        rebase: Whether the decay starts at the peak when the warm-up ends,
            as MLPerf's reference does. Otherwise it is the decay of a run
            without warm-up, from step 0, so that the rate falls to below the
            peak when the warm-up ends. Defaults to `True`.

    Raises:
        ValueError: If an argument is out of its range.

    Example:

    >>> schedule = WarmupPolynomialDecay(8.0, total_steps=100, warmup_steps=20)
    >>> [float(schedule(step)) for step in (0, 10, 20, 60, 100)]
    [0.0, 4.0, 8.0, 2.0, 0.0]

    References:
        - [You et al., 2017](https://arxiv.org/abs/1708.03888), Section 5
    """

    def __init__(
        self,
        peak_learning_rate,
        total_steps,
        warmup_steps=0,
        warmup_start_learning_rate=0.0,
        warmup_power=1.0,
        end_learning_rate=0.0,
        power=2.0,
        rebase=True,
        name="WarmupPolynomialDecay",
    ):
        super().__init__()
        for argument, value in (
            ("peak_learning_rate", peak_learning_rate),
            ("warmup_start_learning_rate", warmup_start_learning_rate),
            ("end_learning_rate", end_learning_rate),
        ):
            if not 0 <= value < math.inf:
                raise ValueError(
                    f"Argument `{argument}` must be a finite number 0 or "
                    f"more. Received: {argument}={value}"
                )
        for argument, value in (
            ("warmup_power", warmup_power),
            ("power", power),
        ):
            if not 0 < value < math.inf:
                raise ValueError(
                    f"Argument `{argument}` must be a finite number above 0. "
                    f"Received: {argument}={value}"
                )
        if not total_steps > 0:
            raise ValueError(
                "Argument `total_steps` must be above 0. "
                f"Received: total_steps={total_steps}"
            )
        if not 0 <= warmup_steps < total_steps:
            raise ValueError(
                "Argument `warmup_steps` must be 0 or more and below "
                f"total_steps={total_steps}. "
                f"Received: warmup_steps={warmup_steps}"
            )
        self.peak_learning_rate = peak_learning_rate
        self.total_steps = total_steps
        self.warmup_steps = warmup_steps
        self.warmup_start_learning_rate = warmup_start_learning_rate
        self.warmup_power = warmup_power
        self.end_learning_rate = end_learning_rate
        self.power = power
        self.rebase = rebase
        self.name = name

    def __call__(self, step):
        step = ops.cast(step, "float32")
        start = self.warmup_steps if self.rebase else 0
        progress = (step - start) / (self.total_steps - start)
        decayed = (
            self.end_learning_rate
            + (self.peak_learning_rate - self.end_learning_rate)
            * (1.0 - ops.clip(progress, 0.0, 1.0)) ** self.power
        )
        if self.warmup_steps == 0:
            return decayed
        warm = (
            self.warmup_start_learning_rate
            + (self.peak_learning_rate - self.warmup_start_learning_rate)
            * (step / self.warmup_steps) ** self.warmup_power
        )
        return ops.where(step < self.warmup_steps, warm, decayed)

    def get_config(self):
        return {
            "peak_learning_rate": self.peak_learning_rate,
            "total_steps": self.total_steps,
            "warmup_steps": self.warmup_steps,
            "warmup_start_learning_rate": self.warmup_start_learning_rate,
            "warmup_power": self.warmup_power,
            "end_learning_rate": self.end_learning_rate,
            "power": self.power,
            "rebase": self.rebase,
            "name": self.name,
        }


def scale_learning_rate(base, batch_size, base_batch_size, rule="linear"):
    """Returns the learning rate for another batch size.

    Args:
        base: Float, the rate that suits `base_batch_size`.
        batch_size: Integer > 0, the global batch to scale to.
        base_batch_size: Integer > 0.
        rule: `"linear"` multiplies by the ratio of the batch sizes (Goyal et
            al., 2017), `"sqrt"` by its square root (Krizhevsky, 2014).
            Defaults to `"linear"`.

    Raises:
        ValueError: If an argument is out of its range.

    Example:

    >>> scale_learning_rate(0.1, batch_size=8192, base_batch_size=256)
    3.2
    >>> scale_learning_rate(0.1, 1024, 256, rule="sqrt")
    0.2

    References:
        - [Goyal et al., 2017](https://arxiv.org/abs/1706.02677), Section 2.1
        - [Krizhevsky, 2014](https://arxiv.org/abs/1404.5997), Section 5
    """
    for argument, value in (
        ("batch_size", batch_size),
        ("base_batch_size", base_batch_size),
    ):
        if not value > 0:
            raise ValueError(
                f"Argument `{argument}` must be above 0. "
                f"Received: {argument}={value}"
            )
    if rule == "linear":
        return base * batch_size / base_batch_size
    if rule == "sqrt":
        return base * math.sqrt(batch_size / base_batch_size)
    raise ValueError(
        f'Argument `rule` must be "linear" or "sqrt". Received: rule={rule!r}'
    )
