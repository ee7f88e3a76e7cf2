"""TrustRatio: one learning rate per layer, around any Keras optimizer."""

import contextlib
import functools
import numbers
import typing

import keras
from keras import ops

from keras_lars import _checks
from keras_lars import _tensorflow
from keras_lars._ratio import LayerAdaptation
from keras_lars._ratio import compute_dtype
from keras_lars._ratio import trust_ratio


@keras.saving.register_keras_serializable(package="keras_lars")
class TrustRatio(LayerAdaptation, keras.optimizers.Optimizer):
    """Optimizer that scales the updates of another one, layer by layer.

    LARS multiplies the rate of SGD by a trust ratio. `TrustRatio` does the same
    to any Keras optimizer. Around Adam it is LAMB.

    Let `u` be what the inner optimizer would take off a variable `w` at a rate
    of 1, `c` the learning rate and `b` the weight decay. One step is:

    ```
    d = u + b * w
    r = trust_coefficient * norm(w) / (norm(d) + epsilon)
    w = w - c * r * d
    ```

    `clip` bounds `r`. A variable that is excluded from adaptation uses
    `r = unadapted_scale`, and so does one whose weights or update have a zero
    norm.

    The learning rate, `iterations` and all state are those of the inner
    optimizer. So are its clipping, its own weight decay, its moving average of
    the weights and its accumulation of gradients; set these on it. Do not
    use the inner optimizer elsewhere.

    Keras's SGD and RMSprop multiply the rate into their velocity. `TrustRatio`
    does not, so a new rate acts on the whole step at once.

    Args:
        optimizer: A `keras.optimizers.Optimizer`. Its update must be
            proportional to its learning rate.
        trust_coefficient: Float > 0. Defaults to `1.0`.
        weight_decay: Float >= 0, the factor of the L2 term that is added to
            the update, before its norm is computed. It is not the decoupled
            decay of the inner optimizer. Defaults to `0.0`.
        epsilon: Float >= 0, added to the denominator of the trust ratio.
            Defaults to `0.0`.
        clip: `(low, high)`, the bounds of the ratio, or `None`. Defaults to
            `None`.
        exclude_from_layer_adaptation: List of regular expressions. A variable
            is not adapted if one of them is found in `variable.path`. `None`
            excludes every variable of rank 0 or 1: biases, and the scales and
            offsets of batch norm. `[]` excludes none. Defaults to `None`.
        exclude_from_weight_decay: The same for weight decay. The two lists
            are independent. Defaults to `None`.
        unadapted_scale: Float >= 0, the factor on the learning rate of every
            variable that is not adapted. Defaults to `1.0`.
        jit_compile: Whether to compile the update of all variables into one
            XLA program, on the TensorFlow backend. Each optimizer has its own
            program, which TensorFlow keeps until the process ends. Defaults to
            `True`.
        name: String. Defaults to `"trust_ratio"`.

    Raises:
        ValueError: If an argument is out of its range, if the inner optimizer
            has a trust ratio already or an update that is not proportional to
            its rate, or if a pattern of an exclusion list matches no variable
            when the optimizer is built.

    Example:

    >>> import keras
    >>> from keras_lars import TrustRatio
    >>> sgd = keras.optimizers.SGD(0.5)
    >>> optimizer = TrustRatio(sgd, weight_decay=0.1)
    >>> kernel = keras.Variable([[3.0, 4.0]])
    >>> optimizer.apply([keras.ops.array([[0.0, 0.6]])], [kernel])
    >>> # d = g + 0.1 * w = [0.3, 1]; r = 5 / norm(d); w = w - 0.5 * r * d
    >>> print(kernel.numpy().round(4))
    [[2.2816 1.6054]]

    References:
        - [You et al., 2020](https://arxiv.org/abs/1904.00962), LAMB
        - [Fong et al., 2020](https://arxiv.org/abs/2011.13584), LAMBC: `clip`
        - [You et al., 2017](https://arxiv.org/abs/1708.03888), LARS
    """

    def __init__(
        self,
        optimizer,
        trust_coefficient=1.0,
        weight_decay=0.0,
        epsilon=0.0,
        clip=None,
        exclude_from_layer_adaptation=None,
        exclude_from_weight_decay=None,
        unadapted_scale=1.0,
        jit_compile=True,
        name="trust_ratio",
    ):
        _checks.check_inner_optimizer(optimizer)
        _checks.check_not_wrapped_by_horovod(self)
        # The learning rate of this optimizer itself is not used.
        super().__init__(learning_rate=0.0, name=name)
        self.optimizer = optimizer
        self.trust_coefficient = trust_coefficient
        self.weight_decay = weight_decay
        self.epsilon = epsilon
        self.clip = clip
        self.unadapted_scale = unadapted_scale
        self.jit_compile = jit_compile
        self.exclude_from_layer_adaptation = exclude_from_layer_adaptation
        self.exclude_from_weight_decay = exclude_from_weight_decay
        self._is_from_config = False
        self._xla_is_possible = _tensorflow.xla_is_possible()
        # Keras and TensorFlow would track a plain attribute as state.
        object.__setattr__(self, "_programs", {})

    def build(self, variables):
        """Builds the inner optimizer, and a trust ratio for each variable."""
        if self.built:
            return
        # A process may load a file without the frozen layers of its network.
        if not self._is_from_config:
            _checks.check_patterns_match(self._exclusions(), variables)
        self.optimizer.build(variables)
        super().build(variables)
        # All state is the inner optimizer's. It resets what belongs to it if a
        # step only accumulates gradients.
        self._build_adaptation(variables, self.optimizer.add_variable)

    def __setattr__(self, name, value):
        if name in _checks.SET_INSIDE and "optimizer" in vars(self):
            raise ValueError(
                f"Argument `{name}` has no effect on TrustRatio. Set it on "
                "the optimizer inside."
            )
        super().__setattr__(name, value)

    @property
    def variables(self):
        return self.optimizer.variables

    def save_own_variables(self, store):
        """Saves nothing: Keras saves the inner optimizer by itself."""

    def load_own_variables(self, store):
        """Loads nothing: Keras loads the inner optimizer by itself."""

    def set_weights(self, weights):
        self.optimizer.set_weights(weights)

    @property
    def iterations(self):
        return self.optimizer.iterations

    @property
    def learning_rate(self):
        return self.optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate):
        self.optimizer.learning_rate = learning_rate

    @property
    def loss_scale_factor(self):
        return self.optimizer.loss_scale_factor

    @loss_scale_factor.setter
    def loss_scale_factor(self, factor):
        # Keras's constructor sets it before there is an inner optimizer.
        if "optimizer" in vars(self):
            self.optimizer.loss_scale_factor = factor

    def scale_loss(self, loss):
        return self.optimizer.scale_loss(loss)

    def apply_gradients(self, grads_and_vars):
        super().apply_gradients(grads_and_vars)
        return self.iterations

    def apply(self, grads, trainable_variables=None):
        """Updates all variables as the inner optimizer does, with the ratio."""
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
            with keras.name_scope(self.name):
                self.build(trainable_variables)
        # Before Keras clips them, repeated rows one by one.
        grads = self._dense_gradients(grads, trainable_variables)
        with _replaced(self.optimizer, _backend_update_step=self._update_all):
            self.optimizer.apply(grads, trainable_variables)

    def update_step(self, gradient, variable, learning_rate):
        """Updates one variable, as the inner optimizer does, with the ratio."""
        index = self._get_variable_index(variable)
        change, sign = self._inner_change(gradient, variable)
        w, r = new_values(
            self._rule(index), change, sign, variable, learning_rate
        )
        self.optimizer.assign(variable, w)
        if self._trust_ratios[index] is not None:
            self.optimizer.assign(self._trust_ratios[index], r)

    def _update_all(self, grads, trainable_variables, learning_rate):
        learning_rate = ops.cast(learning_rate, "float32")
        if not (self.jit_compile and self._xla_is_possible):
            self._update_each(trainable_variables, grads, learning_rate)
            return
        indices = tuple(map(self._get_variable_index, trainable_variables))
        key = (
            indices,
            tuple(map(self._rule, indices)),
            _hyperparameters(self.optimizer),
        )
        if key not in self._programs:
            self._programs[key] = _tensorflow.compiled(
                functools.partial(self._update_each, trainable_variables)
            )
        self._programs[key](grads, learning_rate)

    def _update_each(self, trainable_variables, grads, learning_rate):
        # What some optimizers do once per step comes before `update_step`.
        with _replaced(self.optimizer, update_step=self.update_step):
            _backend_update_step(
                self.optimizer, grads, trainable_variables, learning_rate
            )

    def _inner_change(self, gradient, variable):
        """Returns how the inner optimizer changes a variable at a rate of 1.

        The optimizer updates its own state, but not the variable.

        Returns:
            A tensor, and 1 if it is added to the variable or -1 if it is taken
            off. XLA would store a tensor whose sign is changed.
        """
        inner, changes = self.optimizer, []

        def assign(target, value):
            if target is variable:
                changes.append((value - ops.convert_to_tensor(variable), 1))
            else:
                type(inner).assign(inner, target, value)

        def assign_add(target, value):
            if target is variable:
                changes.append((ops.convert_to_tensor(value), 1))
            else:
                type(inner).assign_add(inner, target, value)

        def assign_sub(target, value):
            if target is variable:
                changes.append((ops.convert_to_tensor(value), -1))
            else:
                type(inner).assign_sub(inner, target, value)

        with _replaced(
            inner, assign=assign, assign_add=assign_add, assign_sub=assign_sub
        ):
            type(inner).update_step(inner, gradient, variable, 1.0)
        if not changes:
            raise ValueError(
                f"{type(inner).__name__} cannot be inside TrustRatio, because "
                "its `update_step` does not change the variable by "
                "`self.assign`, `self.assign_add` or `self.assign_sub`."
            )
        if len(changes) == 1:
            return changes[0]
        return sum(change * sign for change, sign in changes), 1

    def _rule(self, index):
        return Rule(
            weight_decay=self.weight_decay if self._is_decayed[index] else 0.0,
            trust_coefficient=self.trust_coefficient,
            epsilon=self.epsilon,
            clip=self.clip,
            unadapted_scale=self.unadapted_scale,
            is_adapted=self._trust_ratios[index] is not None,
        )

    def finalize_variable_values(self, var_list):
        self.optimizer.finalize_variable_values(var_list)

    def get_config(self):
        return {
            "name": self.name,
            "optimizer": keras.saving.serialize_keras_object(self.optimizer),
            "trust_coefficient": self.trust_coefficient,
            "weight_decay": self.weight_decay,
            "epsilon": self.epsilon,
            "clip": self.clip,
            "unadapted_scale": self.unadapted_scale,
            **self._exclusions(),
            "jit_compile": self.jit_compile,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        config["optimizer"] = keras.saving.deserialize_keras_object(
            config["optimizer"], custom_objects=custom_objects
        )
        optimizer = cls(**config)
        optimizer._is_from_config = True
        return optimizer


class Rule(typing.NamedTuple):
    """How one variable is updated: the arguments of `TrustRatio`, for it."""

    weight_decay: float
    trust_coefficient: float
    epsilon: float
    clip: tuple
    unadapted_scale: float
    is_adapted: bool


def new_values(rule, change, sign, variable, learning_rate):
    """Computes one step. The docstring of `TrustRatio` explains the letters.

    Args:
        rule: `Rule`.
        change: Tensor, `-u` or `u`.
        sign: 1 if `change` is added to the variable, -1 if it is taken off.
        variable: Tensor.
        learning_rate: Float32 tensor.

    Returns:
        The variable and its trust ratio after the step.
    """
    dtype = compute_dtype(variable)
    change = ops.cast(change, dtype)
    w = ops.cast(variable, dtype)
    b = rule.weight_decay
    # It has the norm of `d`.
    d = change - sign * b * w if b else change
    clip = None if rule.clip is None else lambda r: ops.clip(r, *rule.clip)
    r = trust_ratio(rule, w, d, clip=clip)
    rate = ops.cast(learning_rate * r, dtype)
    step = sign * rate * change
    if b:
        # `rate * d` would make XLA store `d`, which takes two passes more.
        step = step - rate * b * w
    return ops.cast(w + step, variable.dtype), r


def _hyperparameters(optimizer):
    """Returns what a compiled update of an optimizer has as constants."""
    return tuple(
        (name, value)
        for name, value in vars(optimizer).items()
        if isinstance(value, (str, numbers.Number))
    )


@contextlib.contextmanager
def _replaced(optimizer, **methods):
    """Replaces methods of one optimizer in a block."""
    # Keras's own __setattr__ would track them as state.
    for name, method in methods.items():
        object.__setattr__(optimizer, name, method)
    try:
        yield
    finally:
        # Replicas of a `tf.distribute.Strategy` leave in turn.
        for name in methods:
            vars(optimizer).pop(name, None)


def _backend_update_step(optimizer, grads, variables, learning_rate):
    """Calls `update_step` for each variable, as Keras's optimizers do."""
    owner = type(optimizer)
    if keras.backend.backend() == "torch":
        # On PyTorch some classes update all variables without `update_step`.
        # The first class in Keras's own module is the portable one.
        owner = next(
            c for c in owner.__mro__ if ".backend.torch." not in c.__module__
        )
    owner._backend_update_step(optimizer, grads, variables, learning_rate)
