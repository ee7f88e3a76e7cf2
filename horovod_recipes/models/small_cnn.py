"""The demo's network: three convolutions with batch norm, for small images."""

import keras
from keras import layers

from horovod_recipes.models.batch_norm import FusedBatchNormalization


def small_cnn(image_shape, num_classes, filters=16):
    """Returns a network that two CPU cores train in half a minute.

    Args:
        image_shape: Tuple `(height, width, channels)`; the input is uint8.
        num_classes: Integer, the number of logits.
        filters: Integer, the filters of the first convolution. The second one
            has twice as many, the third one four times. Defaults to `16`.
    """
    inputs = keras.Input(image_shape, dtype="uint8")
    x = layers.Rescaling(1 / 127.5, offset=-1)(inputs)
    widths_and_strides = [(1, 2), (2, 2), (4, 1)]
    for index, (width, stride) in enumerate(widths_and_strides, start=1):
        x = layers.Conv2D(
            width * filters,
            kernel_size=3,
            strides=stride,
            padding="same",
            use_bias=False,
            kernel_initializer="he_normal",
            name=f"conv{index}",
        )(x)
        x = FusedBatchNormalization(momentum=0.9, name=f"bn{index}")(x)
        x = layers.ReLU(name=f"relu{index}")(x)
    x = layers.Flatten(name="flatten")(x)
    # The loss needs logits in float32, whatever the precision.
    logits = layers.Dense(num_classes, name="logits", dtype="float32")(x)
    return keras.Model(inputs, logits, name="small_cnn")
