"""The trust ratio of a variable, and which variables have one."""

import math

import keras
from keras import ops

from keras_lars import _checks
from keras_lars import _tensorflow
from keras_lars._paths import is_excluded
from keras_lars._paths import path_of
from keras_lars._paths import unique_paths


def trust_ratio(rule, w, u, b=0.0, clip=None, norm=None):
    """Returns the float32 trust ratio of a variable.

    It is `trust_coefficient * norm(w) / (norm(u) + b * norm(w) + epsilon)`, or
    `unadapted_scale` where a norm is zero or the variable is not adapted.

    Args:
        rule: An object with the attributes `is_adapted`, `trust_coefficient`,
            `epsilon` and `unadapted_scale`.
        w: Tensor, the weights.
        u: Tensor, the gradient or update.
        b: Float, the weight decay that the denominator has beside `u`.
        clip: Function of the ratio that returns it clipped.
        norm: Function of a tensor and its number of elements that returns its
            norm in float32. Defaults to that of all elements.
    """
    unadapted = ops.convert_to_tensor(rule.unadapted_scale, "float32")
    if not rule.is_adapted:
        return unadapted
    norm = norm or _norm
    size = math.prod(w.shape)
    w_norm = norm(w, size)
    u_norm = norm(u, size)
    # "!= 0" lets NaN through to the weights; "> 0" would hide it.
    adaptable = ops.logical_and(w_norm != 0, u_norm != 0)
    denominator = u_norm + b * w_norm + rule.epsilon
    denominator = ops.where(adaptable, denominator, 1.0)
    r = rule.trust_coefficient * w_norm / denominator
    if clip is not None:
        r = clip(r)
    return ops.where(adaptable, r, unadapted)


def _norm(x, size):
    """Returns the Euclidean norm of the `size` numbers in `x`, in float32.

    XLA:CPU stores all squares of a plain sum before it adds them up, without
    vector instructions. It adds up 16 long rows in one pass, vectorised and on
    all threads. One sixteenth of the numbers is left. `maximum` changes no
    value: it keeps XLA from folding both sums back into one.
    `benchmarks.speed.norm` times this and other ways.
    """
    if "complex" in keras.backend.standardize_dtype(x.dtype):
        x = ops.abs(x)
    squares = ops.square(ops.cast(x, "float32"))
    rows = math.gcd(size, 16)
    row_sum = ops.sum(ops.reshape(squares, (rows, -1)), axis=0)
    return ops.sqrt(ops.sum(ops.maximum(row_sum, 0.0)))


def compute_dtype(variable):
    """Returns the dtype to compute in: float32 for half-precision variables."""
    dtype = keras.backend.standardize_dtype(variable.dtype)
    return "float32" if dtype in ("float16", "bfloat16") else dtype


class LayerAdaptation:
    """Which variables of an optimizer are adapted and decayed, and the ratios.

    A part of `LARS` and `TrustRatio`.
    """

    def __setattr__(self, name, value):
        """Checks an argument, also one that is set after the first step.

        In an eager loop, a new value takes effect in the next step. In a
        compiled step, it does when the step is compiled again.
        """
        value = _checks.checked(name, value)
        if name in _checks.EXCLUSIONS and getattr(self, "built", False):
            raise ValueError(
                f"Argument `{name}` cannot change after the first step. Pass "
                "it to a new optimizer."
            )
        if name == "exclude_from_weight_decay":
            # Keras's optimizers have a method of this name.
            name = "_decay_exclusions"
        super().__setattr__(name, value)

    def _dense_gradients(self, gradients, variables):
        """Returns checked gradients with all rows, because norms need them."""
        if variables is None:
            if not self.built:
                raise ValueError(
                    "The first step needs the variables: pass them to `apply`, "
                    "or call `optimizer.build(variables)` before."
                )
            variables = self._trainable_variables
        _checks.check_gradients(gradients, variables)
        return [
            _tensorflow.dense(gradient, variable.shape)
            for gradient, variable in zip(gradients, variables, strict=True)
        ]

    def _build_adaptation(self, variables, add_variable):
        """Creates the ratios by `add_variable` of a Keras optimizer."""
        self._unique_paths = unique_paths(variables)
        # None for a variable that is not adapted.
        self._trust_ratios = [
            None
            if is_excluded(variable, self.exclude_from_layer_adaptation)
            else add_variable(
                (),
                initializer="ones",
                dtype="float32",
                name=f"{path_of(variable).replace('/', '_')}_trust_ratio",
            )
            for variable in variables
        ]
        self._is_decayed = [
            not is_excluded(variable, self._decay_exclusions)
            and self._use_weight_decay(variable)
            for variable in variables
        ]

    def _exclusions(self):
        return {
            "exclude_from_layer_adaptation": self.exclude_from_layer_adaptation,
            "exclude_from_weight_decay": self._decay_exclusions,
        }

    def trust_ratios(self):
        """Returns `{variable path: trust ratio of the last step}`.

        The ratio is the factor on the learning rate. It is `unadapted_scale`
        for a variable that is not adapted, and 1 for an adapted variable that
        has had no gradient yet. If several variables share a path, `_1`, `_2`
        and so on are appended from the second variable on.
        """
        adapted = self.trust_ratio_variables()
        ratios = dict.fromkeys(self._unique_paths, float(self.unadapted_scale))
        return ratios | {p: float(v.numpy()) for p, v in adapted.items()}

    def trust_ratio_variables(self):
        """Returns `{variable path: keras.Variable}` of the adapted variables.

        Each variable holds a ratio of the last step. Stacking them before
        reading waits for the device once; `trust_ratios()` waits for each.
        """
        if not self.built:
            raise ValueError(
                "Trust ratios need an optimizer that has been built. Call "
                "`optimizer.build(model.trainable_variables)` or train first."
            )
        ratios = zip(self._unique_paths, self._trust_ratios, strict=True)
        return {path: ratio for path, ratio in ratios if ratio is not None}
