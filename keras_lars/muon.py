"""ConvMuon: Keras's Muon, for convolution kernels too."""

import math
import re

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="keras_lars")
class ConvMuon(keras.optimizers.Muon):
    """Muon that treats a convolution kernel as a matrix.

    Keras's Muon updates only kernels of dense layers, and everything else by
    AdamW. This class also takes kernels of convolutions. A row of their matrix
    has all weights of one output channel.

    Inside `TrustRatio` it is OrScale:

    >>> from keras_lars import TrustRatio
    >>> muon = ConvMuon(0.05, rms_rate=None, weight_decay=None)
    >>> orscale = TrustRatio(
    ...     muon, weight_decay=5e-4, epsilon=1e-6, clip=(0.5, 1.5)
    ... )

    Args:
        *args, **kwargs: Those of `keras.optimizers.Muon`.

    References:
        - [OrScale](https://arxiv.org/abs/2605.07815), convolutional form
        - [Jordan, 2024](https://kellerjordan.github.io/posts/muon/)
    """

    def _should_use_adamw(self, variable):
        if len(variable.shape) <= 2:
            return super()._should_use_adamw(variable)
        return any(
            re.search(pattern, variable.path) for pattern in self.exclude_layers
        )

    def zeropower_via_newtonschulz5(self, x, steps):
        # The last axis of a kernel has its output channels.
        matrix = ops.reshape(x, (math.prod(x.shape[:-1]), x.shape[-1]))
        result = super().zeropower_via_newtonschulz5(matrix, steps)
        return ops.reshape(result, x.shape)
