"""Learning-rate schedules and scaling rules for large-batch training."""

import math

import keras
from keras import ops

from keras_lars._checks import check_choice
from keras_lars._checks import check_number

SCALING_RULES = ("linear", "sqrt")


@keras.saving.register_keras_serializable(package="keras_lars")
class WarmupPolynomialDecay(keras.optimizers.schedules.LearningRateSchedule):
    """Warm-up to a peak, then polynomial decay, as in published LARS runs.

    Over the first `warmup_steps` steps the rate rises from
    `warmup_start_learning_rate` to `peak_learning_rate`. Then it falls to
    `end_learning_rate` at `total_steps`, and stays there.

    Args:
        peak_learning_rate: Float >= 0, the rate when the warm-up ends.
        total_steps: Integer > 0, the number of updates of the whole training.
        warmup_steps: Integer in [0, total_steps), the number of updates of
            the warm-up. Defaults to `0`.
        warmup_start_learning_rate: Float >= 0, the rate at step 0 of a
            warm-up. Defaults to `0.0`.
        warmup_power: Float > 0, the power of the warm-up. 1 makes it linear.
            Defaults to `1.0`.
        end_learning_rate: Float >= 0, the rate from `total_steps` on.
            Defaults to `0.0`.
        power: Float > 0, the power of the decay. Defaults to `2.0`, as in the
            paper.
        rebase: Whether the decay starts when the warm-up ends, as in MLPerf's
            reference. Otherwise it starts at step 0, as without a warm-up, and
            the rate drops below the peak when the warm-up ends. Defaults to
            `True`.

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
        self.peak_learning_rate = check_number(
            "peak_learning_rate", peak_learning_rate
        )
        self.warmup_start_learning_rate = check_number(
            "warmup_start_learning_rate", warmup_start_learning_rate
        )
        self.end_learning_rate = check_number(
            "end_learning_rate", end_learning_rate
        )
        self.warmup_power = check_number(
            "warmup_power", warmup_power, positive=True
        )
        self.power = check_number("power", power, positive=True)
        self.total_steps = check_number(
            "total_steps", total_steps, positive=True
        )
        self.warmup_steps = check_number(
            "warmup_steps", warmup_steps, below=self.total_steps
        )
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


@keras.saving.register_keras_serializable(package="keras_lars")
class WarmupCosineDecay(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up to a peak, then half a cosine, as SimCLR trains.

    Over the first `warmup_steps` steps the rate rises from 0 to
    `peak_learning_rate`. Then it falls along half a cosine to
    `end_learning_rate` at `total_steps`, and stays there.

    Args:
        peak_learning_rate: Float >= 0, the rate when the warm-up ends.
        total_steps: Integer > 0, the number of updates of the whole training.
        warmup_steps: Integer in [0, total_steps), the number of updates of
            the warm-up. Defaults to `0`.
        end_learning_rate: Float >= 0, the rate from `total_steps` on.
            Defaults to `0.0`.

    Raises:
        ValueError: If an argument is out of its range.

    Example:

    >>> schedule = WarmupCosineDecay(4.0, total_steps=100, warmup_steps=20)
    >>> [round(float(schedule(step)), 3) for step in (0, 10, 20, 60, 100)]
    [0.0, 2.0, 4.0, 2.0, 0.0]

    References:
        - [Chen et al., 2020](https://arxiv.org/abs/2002.05709), Appendix B.6
    """

    def __init__(
        self,
        peak_learning_rate,
        total_steps,
        warmup_steps=0,
        end_learning_rate=0.0,
        name="WarmupCosineDecay",
    ):
        super().__init__()
        self.peak_learning_rate = check_number(
            "peak_learning_rate", peak_learning_rate
        )
        self.total_steps = check_number(
            "total_steps", total_steps, positive=True
        )
        self.warmup_steps = check_number(
            "warmup_steps", warmup_steps, below=self.total_steps
        )
        self.end_learning_rate = check_number(
            "end_learning_rate", end_learning_rate
        )
        self.name = name

    def __call__(self, step):
        step = ops.cast(step, "float32")
        progress = (step - self.warmup_steps) / (
            self.total_steps - self.warmup_steps
        )
        cosine = ops.cos(math.pi * ops.clip(progress, 0.0, 1.0))
        decayed = self.end_learning_rate + (
            self.peak_learning_rate - self.end_learning_rate
        ) * (0.5 * (1.0 + cosine))
        if self.warmup_steps == 0:
            return decayed
        warm = self.peak_learning_rate * (step / self.warmup_steps)
        return ops.where(step < self.warmup_steps, warm, decayed)

    def get_config(self):
        return {
            "peak_learning_rate": self.peak_learning_rate,
            "total_steps": self.total_steps,
            "warmup_steps": self.warmup_steps,
            "end_learning_rate": self.end_learning_rate,
            "name": self.name,
        }


def scale_learning_rate(base, batch_size, base_batch_size, rule="linear"):
    """Returns the learning rate for another batch size.

    Args:
        base: Float, the rate for `base_batch_size`.
        batch_size: Integer > 0, the global batch to scale to.
        base_batch_size: Integer > 0, the global batch to scale from.
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
    base = check_number("base", base)
    batch_size = check_number("batch_size", batch_size, positive=True)
    base_batch_size = check_number(
        "base_batch_size", base_batch_size, positive=True
    )
    check_choice("rule", rule, SCALING_RULES)
    if rule == "sqrt":
        return base * math.sqrt(batch_size / base_batch_size)
    return base * batch_size / base_batch_size
