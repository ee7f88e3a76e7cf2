"""The LARS optimizer: one learning rate per layer, for large-batch training."""

import typing

import keras
from keras import ops

from keras_lars import _checks
from keras_lars import _tensorflow
from keras_lars._ratio import LayerAdaptation
from keras_lars._ratio import compute_dtype
from keras_lars._ratio import trust_ratio


@keras.saving.register_keras_serializable(package="keras_lars")
class LARS(LayerAdaptation, keras.optimizers.Optimizer):
    """Optimizer that implements LARS, layer-wise adaptive rate scaling.

    With large batches the ratio of a variable's weight norm to its gradient
    norm differs widely: from 5.8 to 1,345 in Table 2 of the paper. One learning
    rate is then too high for some layers and too low for others. LARS gives
    every variable its own rate: the global rate times a trust ratio.

    Let `g` be the gradient of a variable, `w` its weights, `v` its velocity,
    `m` the momentum and `b` the weight decay. One step is:

    ```
    d = g + b * w
    r = trust_coefficient * norm(w) / (norm(g) + b * norm(w) + epsilon)
    v = m * v + learning_rate * r * d
    w = w - v
    ```

    A variable that is excluded from adaptation uses `r = unadapted_scale`, and
    so does one whose weights or gradient have a zero norm.

    The norms and the ratio are computed in float32 for variables of any dtype.
    A float16 or bfloat16 variable is rounded when it is stored, so that it
    loses steps below its resolution (0.4 % in bfloat16). Keras's mixed
    policies avoid this, because they keep float32 variables.

    Args:
        learning_rate: A float, a `keras.optimizers.schedules`
            `LearningRateSchedule`, or a callable that takes no arguments and
            returns the value to use. LARS needs far higher rates than SGD:
            2 to 40 in the paper. Defaults to `1.0`.
        momentum: Float in [0, 1). Defaults to `0.9`.
        nesterov: Whether to apply Nesterov momentum. Defaults to `False`.
        weight_decay: Float >= 0, the factor of the L2 term that is added to
            the gradient. It is not Keras's decoupled decay. Defaults to `0.0`.
        trust_coefficient: Float > 0, how far a layer may move in one step,
            relative to its norm. Defaults to `0.001`.
        epsilon: Float >= 0, added to the denominator of the trust ratio.
            Defaults to `0.0`.
        trust_ratio_norm: `"separate"` divides by `norm(g) + b * norm(w)` as
            in the paper, `"joint"` by `norm(g + b * w)`. `None` means
            `"separate"`, except for the momentum style `"popular"`, which
            supports only `"joint"`. Defaults to `None`.
        momentum_style: Where the learning rate and the ratio enter. The styles
            agree only while the rate and the ratio are constant.
            - `"paper"`: `v = m*v + lr*r*d; w = w - v`.
            - `"pytorch"`: `v = m*v + r*d; w = w - lr*v`.
            - `"popular"`: `v = m*v + d; w = w - lr*r*v`, with the ratio
                `trust_coefficient * norm(w) / norm(u)`, where `u` is `v`,
                or `m*v + d` with Nesterov momentum.
            Defaults to `"paper"`.
        trust_clip: Whether to clip the ratio of an adapted variable to
            `min(r / learning_rate, 1)` as LARC does, so that its rate never
            exceeds the global one. Defaults to `False`.
        unadapted_scale: Float >= 0, the factor on the learning rate of every
            variable that is not adapted. The usual `1.0` suits networks with
            batch norm. Networks without batch norm need a value near 0.01,
            because rates of 2 to 40 make their biases diverge. Defaults to
            `1.0`.
        exclude_from_layer_adaptation: List of regular expressions. A variable
            is not adapted if one of them is found in `variable.path`. `None`
            excludes every variable of rank 0 or 1: biases, and the scales and
            offsets of batch norm. `[]` excludes none. Defaults to `None`.
        exclude_from_weight_decay: The same for weight decay. The two lists
            are independent. Defaults to `None`.
        jit_compile: Whether to compile the update of all variables into one
            XLA program. It has an effect only on the TensorFlow backend; on
            the others the trainer compiles the step. A `tf.distribute`
            strategy with several replicas uses the ordinary update, and so
            does a subclass with an `update_step` of its own. Optimizers that
            differ only in the learning rate, for variables of equal shapes,
            share a program: TensorFlow keeps each one until the process ends.
            Defaults to `True`.
        name: String, the name of the optimizer. Defaults to `"lars"`.
        **kwargs: The keyword arguments common to Keras's optimizers:
            `clipnorm`, `clipvalue`, `global_clipnorm`, `use_ema`,
            `ema_momentum`, `ema_overwrite_frequency`, `loss_scale_factor`,
            `gradient_accumulation_steps`.

    With `gradient_accumulation_steps` the schedule counts updates, as
    `iterations` does. Keras's own optimizers count micro-batches.

    Raises:
        ValueError: If an argument is out of its range, if a pattern of an
            exclusion list matches no variable when the optimizer is built,
            or if Horovod's own Keras binding wraps the optimizer.

    Example:

    >>> import keras
    >>> from keras_lars import LARS
    >>> optimizer = LARS(learning_rate=2.0, momentum=0.0, weight_decay=0.1)
    >>> kernel = keras.Variable([[3.0, 4.0]])
    >>> optimizer.apply([keras.ops.array([[0.0, 1.0]])], [kernel])
    >>> # r = 0.001 * 5 / (1 + 0.1 * 5); w = w - 2 * r * (g + 0.1 * w)
    >>> print(kernel.numpy().round(4))
    [[2.998  3.9907]]

    References:
        - [You et al., 2017](https://arxiv.org/abs/1708.03888), Algorithm 1
    """

    def __init__(
        self,
        learning_rate=1.0,
        momentum=0.9,
        nesterov=False,
        weight_decay=0.0,
        trust_coefficient=0.001,
        epsilon=0.0,
        trust_ratio_norm=None,
        momentum_style="paper",
        trust_clip=False,
        unadapted_scale=1.0,
        exclude_from_layer_adaptation=None,
        exclude_from_weight_decay=None,
        jit_compile=True,
        name="lars",
        **kwargs,
    ):
        _checks.check_not_wrapped_by_horovod(self)
        super().__init__(
            learning_rate=_checks.checked_learning_rate(learning_rate),
            weight_decay=weight_decay,
            name=name,
            **_checks.checked_keras_arguments(kwargs),
        )
        self.momentum = momentum
        self.nesterov = nesterov
        self.trust_coefficient = trust_coefficient
        self.epsilon = epsilon
        self.trust_ratio_norm = trust_ratio_norm
        self.momentum_style = momentum_style
        self.trust_clip = trust_clip
        self.unadapted_scale = unadapted_scale
        self.jit_compile = jit_compile
        self.exclude_from_layer_adaptation = exclude_from_layer_adaptation
        self.exclude_from_weight_decay = exclude_from_weight_decay
        _checks.check_together(self)
        self._is_from_config = False
        self._xla_is_possible = _tensorflow.xla_is_possible()

    def build(self, variables):
        """Creates a velocity and a trust ratio for each model variable."""
        if self.built:
            return
        # A process may load a file without the frozen layers of its network.
        if not self._is_from_config:
            _checks.check_patterns_match(self._exclusions(), variables)
        super().build(variables)
        self._velocities = self.add_optimizer_variables(variables, "velocity")
        self._build_adaptation(variables, self.add_variable)

    def update_step(self, gradient, variable, learning_rate):
        """Updates one variable by `new_values`."""
        index = self._get_variable_index(variable)
        velocity, ratio = self._velocities[index], self._trust_ratios[index]
        w, v, r = new_values(
            self._rule(index), gradient, variable, velocity, learning_rate
        )
        self.assign(velocity, v)
        self.assign(variable, w)
        if ratio is not None:
            self.assign(ratio, r)

    def apply(self, grads, trainable_variables=None):
        """Makes sparse gradients dense, then updates all variables."""
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
        # Before Keras clips them, repeated rows one by one.
        grads = self._dense_gradients(grads, trainable_variables)
        super().apply(grads, trainable_variables)

    # `_keras_names.py` says why each of the following overrides is needed.
    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        _checks.check_together(self)
        learning_rate = ops.cast(learning_rate, "float32")
        # The programs know no update but this one.
        is_own_update = type(self).update_step is LARS.update_step
        if not (self.jit_compile and self._xla_is_possible and is_own_update):
            super()._backend_update_step(
                grads, trainable_variables, learning_rate
            )
            return
        indices = [self._get_variable_index(v) for v in trainable_variables]
        _tensorflow.update(
            _tensorflow.Formulas(new_values, scaled_gradient),
            [self._rule(index) for index in indices],
            [self._trainable_variables[index] for index in indices],
            [self._velocities[index] for index in indices],
            [self._trust_ratios[index] for index in indices],
            grads,
            learning_rate,
        )

    def _rule(self, index):
        decay = self.weight_decay if self._is_decayed[index] else 0.0
        is_adapted = self._trust_ratios[index] is not None
        hyper_parameters = self._hyper_parameters() | {"weight_decay": decay}
        return Rule(**hyper_parameters, is_adapted=is_adapted)

    def _hyper_parameters(self):
        return {
            "weight_decay": self.weight_decay,
            "momentum": self.momentum,
            "nesterov": self.nesterov,
            "trust_coefficient": self.trust_coefficient,
            "epsilon": self.epsilon,
            "trust_ratio_norm": self.trust_ratio_norm,
            "momentum_style": self.momentum_style,
            "trust_clip": self.trust_clip,
            "unadapted_scale": self.unadapted_scale,
        }

    def _get_current_learning_rate(self):
        schedule = self._learning_rate
        if isinstance(
            schedule, keras.optimizers.schedules.LearningRateSchedule
        ):
            return schedule(self.iterations)
        return super()._get_current_learning_rate()

    def _apply_weight_decay(self, variables):
        """Does nothing, because `update_step` adds the decay."""

    def get_config(self):
        return {
            **super().get_config(),
            **self._hyper_parameters(),
            **self._exclusions(),
            "jit_compile": self.jit_compile,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        optimizer = super().from_config(config, custom_objects)
        optimizer._is_from_config = True
        return optimizer


class Rule(typing.NamedTuple):
    """How one variable is updated: the arguments of `LARS`, for it alone."""

    weight_decay: float
    momentum: float
    nesterov: bool
    trust_coefficient: float
    epsilon: float
    trust_ratio_norm: str
    momentum_style: str
    trust_clip: bool
    unadapted_scale: float
    is_adapted: bool


def new_values(rule, gradient, variable, velocity, learning_rate, apart=False):
    """Computes one step. The docstring of `LARS` explains the letters.

    Args:
        rule: `Rule`.
        gradient: Tensor.
        variable: Tensor.
        velocity: Tensor.
        learning_rate: Float32 tensor.
        apart: Whether to compute the new variable without the new velocity,
            where that is possible. The result differs by rounding.

    Returns:
        The variable, its velocity and its trust ratio after the step.
    """
    dtype = compute_dtype(variable)
    g = ops.cast(gradient, dtype)
    w = ops.cast(variable, dtype)
    v = ops.cast(velocity, dtype)
    m = rule.momentum
    b = rule.weight_decay

    if rule.momentum_style == "popular":
        d = g + b * w if b else g
        new_v = m * v + d
        u = m * new_v + d if rule.nesterov else new_v
        r = trust_ratio(rule, w, u, clip=_clip(rule, learning_rate))
        step = ops.cast(learning_rate * r, dtype) * u
    else:
        rate, d, r = _rate_and_direction(rule, g, w, learning_rate)
        new_v = m * v + rate * d
        if rule.nesterov:
            step = m * new_v + rate * d
        elif apart and m:
            # XLA must not find a part of `new_v` in it.
            step = m * (v + (rate / m * g + rate * b / m * w))
        else:
            step = new_v
        if rule.momentum_style == "pytorch":
            step = ops.cast(learning_rate, dtype) * step

    new_variable = ops.cast(w - step, variable.dtype)
    return new_variable, ops.cast(new_v, velocity.dtype), r


def scaled_gradient(rule, gradient, variable, learning_rate, norm):
    """Computes a step up to its momentum, for variables that are stacked.

    Args:
        rule: `Rule`, whose style is not `"popular"`.
        gradient: Float tensor.
        variable: Float tensor.
        learning_rate: Float32 tensor.
        norm: Function of a tensor and its number of elements that returns its
            norm in float32.

    Returns:
        What the velocity takes up, the factor on the velocity when it is taken
        off the variable, and the trust ratio.
    """
    rate, d, r = _rate_and_direction(
        rule, gradient, variable, learning_rate, norm
    )
    outer_rate = learning_rate if rule.momentum_style == "pytorch" else 1.0
    return rate * d, ops.cast(outer_rate, variable.dtype), r


def _rate_and_direction(rule, g, w, learning_rate, norm=None):
    """Returns the factor and the direction that a velocity takes up."""
    b = rule.weight_decay
    d = g + b * w if b else g
    clip = _clip(rule, learning_rate)
    if rule.trust_ratio_norm == "joint":
        r = trust_ratio(rule, w, d, clip=clip, norm=norm)
    else:
        r = trust_ratio(rule, w, g, b, clip=clip, norm=norm)
    rate = r if rule.momentum_style == "pytorch" else learning_rate * r
    return ops.cast(rate, w.dtype), d, r


def _clip(rule, learning_rate):
    """Returns the function that clips a ratio as LARC does, or None."""
    if not rule.trust_clip:
        return None
    # A learning rate of 0 gives inf, which the minimum turns into 1.
    return lambda r: ops.minimum(r / learning_rate, 1.0)
