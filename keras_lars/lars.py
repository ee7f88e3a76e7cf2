"""The LARS optimizer: one learning rate per layer, for large-batch training."""

import collections
import difflib
import math
import re

import keras
from keras import ops

MOMENTUM_STYLES = ("paper", "pytorch", "popular")
TRUST_RATIO_NORMS = ("separate", "joint")


@keras.saving.register_keras_serializable(package="keras_lars")
class LARS(keras.optimizers.Optimizer):
    """Optimizer that implements LARS, layer-wise adaptive rate scaling.

    With large batches the ratio of a layer's weight norm to its gradient norm
    differs by orders of magnitude between layers, so that one learning rate is
    too high for some and too low for others. LARS gives every variable a rate
    of its own: the global rate times a trust ratio.

    With `g` the gradient, `w` the weights, `v` the velocity, `m` the momentum
    and `b` the weight decay of a variable, one step is:

    ```
    d = g + b * w
    r = trust_coefficient * norm(w) / (norm(g) + b * norm(w) + epsilon)
    v = m * v + learning_rate * r * d
    w = w - v
    ```

    The norms and the ratio are computed in float32 whatever the dtype of the
    variable. A float16 or bfloat16 variable is rounded when it is stored, so
    steps below its resolution (0.4 % in bfloat16) are lost: train with Keras's
    mixed policies, which keep float32 variables.

    A variable with a zero norm, and one excluded from adaptation, uses
    `r = unadapted_scale`.

    Args:
        learning_rate: A float, a `keras.optimizers.schedules`
            `LearningRateSchedule`, or a callable that takes no arguments and
            returns the value to use. LARS wants rates far above those of SGD:
            2 to 40 in the paper. Defaults to `1.0`.
        momentum: Float in [0, 1). Defaults to `0.9`.
        nesterov: Whether to apply Nesterov momentum. Defaults to `False`.
        weight_decay: Float >= 0, the factor of the L2 term that is added to
            the gradient (it is not Keras's decoupled decay). Defaults to
            `0.0`.
        trust_coefficient: Float > 0, how far a layer is trusted to move in
            one step, relative to its norm. Defaults to `0.001`.
        epsilon: Float >= 0, added to the denominator of the trust ratio.
            Defaults to `0.0`.
        trust_ratio_norm: `"separate"` divides by `norm(g) + b * norm(w)` as
            in the paper, `"joint"` by `norm(g + b * w)`. `None` means
            `"separate"`, or `"joint"` where `momentum_style` is
            `"popular"`, which has no other. Defaults to `None`.
        momentum_style: Where the learning rate and the ratio enter. They
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
            batch norm; without it, rates of 2 to 40 make biases diverge and
            a value near 0.01 is needed. Defaults to `1.0`.
        exclude_from_layer_adaptation: List of regular expressions, searched
            in `variable.path`, of variables that are not adapted. `None`
            means every variable of rank 0 or 1: biases, and the scales and
            offsets of batch norm. `[]` means none. Defaults to `None`.
        exclude_from_weight_decay: The same for weight decay. The two lists
            are independent. Defaults to `None`.
        jit_compile: Whether to compile the update of all variables into one
            XLA program. Only for the TensorFlow backend; with the others the
            trainer compiles the step. A `tf.distribute` strategy with several
            replicas uses the ordinary update. Defaults to `True`.
        name: String, the name of the optimizer. Defaults to `"lars"`.
        **kwargs: The keyword arguments common to Keras's optimizers:
            `clipnorm`, `clipvalue`, `global_clipnorm`, `use_ema`,
            `ema_momentum`, `ema_overwrite_frequency`, `loss_scale_factor`,
            `gradient_accumulation_steps`.

    With `gradient_accumulation_steps` the schedule counts updates, as
    `iterations` does; Keras's own optimizers run it once a micro-batch.

    Raises:
        ValueError: If an argument is out of its range, if a pattern of an
            exclusion list matches no variable when the optimizer is built,
            or if Horovod's own Keras binding wraps it.

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
        # The mark of the subclass that Horovod's own Keras binding makes.
        if hasattr(self, "_HAS_AGGREGATE_GRAD"):
            raise ValueError(
                "horovod.tensorflow.keras.DistributedOptimizer does not "
                "average gradients on Keras 3. Use DistributedOptimizer of: "
                "import horovod_recipes.keras as hvd"
            )
        if isinstance(learning_rate, int) and not isinstance(
            learning_rate, bool
        ):
            learning_rate = float(learning_rate)
        if isinstance(learning_rate, float):
            _check_number("learning_rate", learning_rate)
        _check_number("momentum", momentum, below=1)
        _check_number("weight_decay", weight_decay)
        _check_number("trust_coefficient", trust_coefficient, positive=True)
        _check_number("epsilon", epsilon)
        _check_number("unadapted_scale", unadapted_scale)
        _check_bool("nesterov", nesterov)
        _check_bool("trust_clip", trust_clip)
        _check_bool("jit_compile", jit_compile)
        _check_choice("momentum_style", momentum_style, MOMENTUM_STYLES)
        if trust_ratio_norm is not None:
            _check_choice(
                "trust_ratio_norm", trust_ratio_norm, TRUST_RATIO_NORMS
            )
        if momentum_style == "popular" and trust_ratio_norm == "separate":
            raise ValueError(
                'Argument `trust_ratio_norm` must be "joint" or None when '
                '`momentum_style` is "popular", whose ratio divides by the '
                "norm of the velocity. "
                f"Received: trust_ratio_norm={trust_ratio_norm}"
            )
        if nesterov and momentum == 0:
            raise ValueError(
                "Argument `momentum` must be above 0 when `nesterov` is True. "
                f"Received: momentum={momentum}"
            )
        _check_patterns(
            "exclude_from_layer_adaptation", exclude_from_layer_adaptation
        )
        _check_patterns("exclude_from_weight_decay", exclude_from_weight_decay)
        for argument in (
            "clipnorm",
            "clipvalue",
            "global_clipnorm",
            "loss_scale_factor",
        ):
            if kwargs.get(argument) is not None:
                _check_number(argument, kwargs[argument], positive=True)
        accumulation_steps = kwargs.get("gradient_accumulation_steps")
        if accumulation_steps is not None and (
            not isinstance(accumulation_steps, int) or accumulation_steps < 2
        ):
            raise ValueError(
                "Argument `gradient_accumulation_steps` must be None or an "
                "integer 2 or more. Received: "
                f"gradient_accumulation_steps={accumulation_steps!r}"
            )
        super().__init__(
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            name=name,
            **kwargs,
        )
        self.momentum = momentum
        self.nesterov = nesterov
        self.trust_coefficient = trust_coefficient
        self.epsilon = epsilon
        self.trust_ratio_norm = trust_ratio_norm
        self.momentum_style = momentum_style
        self.trust_clip = trust_clip
        self.unadapted_scale = unadapted_scale
        self.exclude_from_layer_adaptation = exclude_from_layer_adaptation
        # `exclude_from_weight_decay` itself is a method of Keras's optimizers.
        self._decay_exclusions = exclude_from_weight_decay
        self.jit_compile = jit_compile
        self._compiled_update = None

    def build(self, variables):
        """Creates a velocity and a trust ratio for each model variable."""
        if self.built:
            return
        adaptation_exclusions = self.exclude_from_layer_adaptation
        _check_patterns_match(
            "exclude_from_layer_adaptation", adaptation_exclusions, variables
        )
        _check_patterns_match(
            "exclude_from_weight_decay", self._decay_exclusions, variables
        )
        super().build(variables)
        self._velocities = self.add_optimizer_variables(variables, "velocity")
        self._unique_paths = _unique([variable.path for variable in variables])
        # None for a variable that is not adapted.
        self._trust_ratios = [
            None
            if _is_excluded(variable, adaptation_exclusions)
            else self.add_variable(
                (),
                initializer="ones",
                dtype="float32",
                name=f"{variable.path.replace('/', '_')}_trust_ratio",
            )
            for variable in variables
        ]
        self._weight_decays = [
            0.0
            if _is_excluded(variable, self._decay_exclusions)
            or not self._use_weight_decay(variable)
            else self.weight_decay
            for variable in variables
        ]

    def apply(self, grads, trainable_variables=None):
        # The norms need every row of a sparse gradient, and Keras would clip
        # and unscale only the rows that it has, repeated ones one by one.
        grads = [_dense(gradient) for gradient in grads]
        super().apply(grads, trainable_variables)

    def update_step(self, gradient, variable, learning_rate):
        """Updates one variable from its gradient."""
        index = self._get_variable_index(variable)
        velocity = self._velocities[index]
        weight_decay = self._weight_decays[index]

        dtype = _compute_dtype(variable)
        g = ops.cast(gradient, dtype)
        w = ops.cast(variable, dtype)
        v = ops.cast(velocity, dtype)
        d = g + weight_decay * w if weight_decay else g

        if self.momentum_style == "popular":
            v = self.momentum * v + d
            step = self.momentum * v + d if self.nesterov else v
            ratio = self._trust_ratio(index, w, step, 0.0, learning_rate)
            step = ops.cast(learning_rate * ratio, dtype) * step
        else:
            if self.trust_ratio_norm == "joint":
                ratio = self._trust_ratio(index, w, d, 0.0, learning_rate)
            else:
                ratio = self._trust_ratio(
                    index, w, g, weight_decay, learning_rate
                )
            pytorch = self.momentum_style == "pytorch"
            s = ops.cast(ratio if pytorch else learning_rate * ratio, dtype) * d
            v = self.momentum * v + s
            step = self.momentum * v + s if self.nesterov else v
            if pytorch:
                step = ops.cast(learning_rate, dtype) * step

        self.assign(velocity, ops.cast(v, velocity.dtype))
        self.assign(variable, ops.cast(w - step, variable.dtype))

    def _trust_ratio(self, index, w, u, weight_decay, learning_rate):
        """Returns the float32 factor on the learning rate of a variable.

        `u` is what the variable moves along: the gradient, the gradient with
        decay or, in the popular style, the velocity.
        """
        unadapted = ops.convert_to_tensor(self.unadapted_scale, "float32")
        if self._trust_ratios[index] is None:
            return unadapted
        size = math.prod(w.shape)
        w_norm = _norm(w, size)
        u_norm = _norm(u, size)
        # Not "above 0": NaN must stay to be seen.
        adaptable = ops.logical_and(w_norm != 0, u_norm != 0)
        denominator = u_norm + weight_decay * w_norm + self.epsilon
        ratio = (
            self.trust_coefficient
            * w_norm
            / ops.where(adaptable, denominator, 1.0)
        )
        if self.trust_clip:
            # A rate of 0 gives inf, which the minimum makes 1.
            ratio = ops.minimum(ratio / learning_rate, 1.0)
        ratio = ops.where(adaptable, ratio, unadapted)
        self.assign(self._trust_ratios[index], ratio)
        return ratio

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        learning_rate = ops.cast(learning_rate, "float32")
        if keras.backend.backend() != "tensorflow":
            super()._backend_update_step(
                grads, trainable_variables, learning_rate
            )
            return
        import tensorflow as tf

        if (
            not self.jit_compile
            or self._distribution_strategy.num_replicas_in_sync > 1
        ):
            super()._backend_update_step(
                grads, trainable_variables, learning_rate
            )
            return
        if self._compiled_update is None:
            self._compiled_update = tf.function(
                self._update_variables, jit_compile=True, autograph=False
            )
        indices = [self._get_variable_index(v) for v in trainable_variables]
        self._compiled_update(indices, grads, learning_rate)

    def _update_variables(self, indices, grads, learning_rate):
        """Updates the variables at `indices`, which are Python integers."""
        for index, grad in zip(indices, grads, strict=True):
            variable = self._trainable_variables[index]
            self.update_step(grad, variable.value, learning_rate)

    def _get_current_learning_rate(self):
        schedule = self._learning_rate
        if isinstance(
            schedule, keras.optimizers.schedules.LearningRateSchedule
        ):
            return schedule(self.iterations)
        return super()._get_current_learning_rate()

    def _apply_weight_decay(self, variables):
        """Does nothing: the decay is part of the gradient, see above."""

    def trust_ratios(self):
        """Returns `{variable path: trust ratio of the last step}`.

        The ratio is the factor on the learning rate: for a variable that is
        not adapted, `unadapted_scale`; for an adapted one that has had no
        gradient yet, 1. A path that several variables share is followed by
        `_1`, `_2` and so on.
        """
        if not self.built:
            raise ValueError(
                "`trust_ratios()` needs an optimizer that has been built. Call "
                "`optimizer.build(model.trainable_variables)` or train first."
            )
        return {
            path: float(
                self.unadapted_scale if ratio is None else ratio.numpy()
            )
            for path, ratio in zip(
                self._unique_paths, self._trust_ratios, strict=True
            )
        }

    def get_config(self):
        config = super().get_config()
        config.update(
            {
                "momentum": self.momentum,
                "nesterov": self.nesterov,
                "trust_coefficient": self.trust_coefficient,
                "epsilon": self.epsilon,
                "trust_ratio_norm": self.trust_ratio_norm,
                "momentum_style": self.momentum_style,
                "trust_clip": self.trust_clip,
                "unadapted_scale": self.unadapted_scale,
                "exclude_from_layer_adaptation": (
                    self.exclude_from_layer_adaptation
                ),
                "exclude_from_weight_decay": self._decay_exclusions,
                "jit_compile": self.jit_compile,
            }
        )
        return config


def _dense(gradient):
    if keras.backend.backend() != "tensorflow":
        return gradient
    import tensorflow as tf

    # Keras's own `convert_to_tensor` leaves it sparse.
    sparse = isinstance(gradient, tf.IndexedSlices)
    return tf.convert_to_tensor(gradient) if sparse else gradient


def _norm(x, size):
    """Returns the Euclidean norm of the `size` numbers in `x`, in float32.

    XLA:CPU stores all squares before it sums them, and sums them without
    vector instructions. The sum of a few long rows it computes in one pass,
    vectorised and on all threads, and a sixteenth is left to sum. Without
    `maximum`, which changes nothing here, it would fold both sums back into
    one. `benchmarks.speed.norm` times this and other ways.
    """
    squares = ops.square(ops.cast(x, "float32"))
    rows = math.gcd(size, 16)
    row_sum = ops.sum(ops.reshape(squares, (rows, -1)), axis=0)
    return ops.sqrt(ops.sum(ops.maximum(row_sum, 0.0)))


def _compute_dtype(variable):
    """Returns the dtype to compute in: float32 for half-precision variables."""
    dtype = keras.backend.standardize_dtype(variable.dtype)
    return "float32" if dtype in ("float16", "bfloat16") else dtype


def _is_excluded(variable, patterns):
    if patterns is None:
        return len(variable.shape) <= 1
    return any(re.search(pattern, variable.path) for pattern in patterns)


def _unique(paths):
    """Returns the paths with `_1`, `_2` ... after those seen before."""
    seen = collections.Counter()
    unique = []
    for path in paths:
        unique.append(f"{path}_{seen[path]}" if seen[path] else path)
        seen[path] += 1
    return unique


def _check_number(name, value, below=math.inf, positive=False):
    rule = "above 0" if positive else "0 or more"
    if below < math.inf:
        rule += f" and below {below}"
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not (0 < value if positive else 0 <= value)
        or not value < below
    ):
        raise ValueError(
            f"Argument `{name}` must be a finite Python number {rule}. "
            f"Received: {name}={value!r}"
        )


def _check_bool(name, value):
    if not isinstance(value, bool):
        raise ValueError(
            f"Argument `{name}` must be True or False. "
            f"Received: {name}={value!r}"
        )


def _check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(
            f"Argument `{name}` must be one of {choices}. "
            f"Received: {name}={value!r}"
        )


def _check_patterns(name, patterns):
    if patterns is None:
        return
    if not isinstance(patterns, (list, tuple)) or not all(
        isinstance(pattern, str) for pattern in patterns
    ):
        raise ValueError(
            f"Argument `{name}` must be None or a list of regular "
            f"expressions. Received: {name}={patterns!r}"
        )
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"Argument `{name}` must hold valid regular expressions: "
                f"{error}. Received: {pattern!r}"
            ) from None


def _check_patterns_match(name, patterns, variables):
    """Raises where a pattern would silently do nothing."""
    paths = [variable.path for variable in variables]
    for pattern in patterns or []:
        if any(re.search(pattern, path) for path in paths):
            continue
        near = difflib.get_close_matches(pattern, paths, n=5, cutoff=0.0)
        raise ValueError(
            f"Argument `{name}` has a pattern that matches no variable's "
            f"path. Received: {pattern!r}. The nearest paths are: "
            f"{', '.join(near)}"
        )
