"""ConvMuon: Keras's Muon, for convolution kernels too."""

import inspect
import math
import re

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="keras_lars")
class ConvMuon(keras.optimizers.Muon):
    """Muon that treats a convolution kernel as a matrix.

    Keras's Muon updates matrices, such as kernels of dense layers. It updates
    all other variables by AdamW. This class also takes every variable of three
    or more dimensions. A column of its matrix has all weights of one output
    channel, or of one input channel if the convolution is transposed. List in
    `exclude_layers` what is no such kernel: those of attention and of depthwise
    convolutions.

    Inside `TrustRatio` it is OrScale:

    ```
    muon = ConvMuon(
        0.05, rms_rate=None, weight_decay=None, adam_weight_decay=None
    )
    orscale = TrustRatio(
        muon, weight_decay=5e-4, epsilon=1e-6, clip=(0.5, 1.5)
    )
    ```

    Args:
        *args, **kwargs: Those of `keras.optimizers.Muon`.

    Raises:
        ImportError: If Keras is older than 3.13. Its Muon scales updates in
            another way, and has no `rms_rate`.

    References:
        - [OrScale](https://arxiv.org/abs/2605.07815), convolutional form
        - [Jordan, 2024](https://kellerjordan.github.io/posts/muon/)
    """

    def __init__(self, *args, **kwargs):
        parameters = inspect.signature(keras.optimizers.Muon).parameters
        if "rms_rate" not in parameters:
            raise ImportError(
                f"ConvMuon needs Keras 3.13 or later, not {keras.__version__}."
            )
        super().__init__(*args, **kwargs)

    def _should_use_adamw(self, variable):
        if len(variable.shape) <= 2:
            return super()._should_use_adamw(variable)
        return any(
            re.search(pattern, variable.path) for pattern in self.exclude_layers
        )

    def zeropower_via_newtonschulz5(self, x, steps):
        orthogonal = super().zeropower_via_newtonschulz5(_matrix(x), steps)
        return ops.reshape(orthogonal, x.shape)

    def lr_adjust(self, x):
        return ops.reshape(super().lr_adjust(_matrix(x)), x.shape)


def _matrix(x):
    # The last axis of a kernel has its output channels.
    return ops.reshape(x, (math.prod(x.shape[:-1]), x.shape[-1]))
