"""ResNet-18 for small images, such as those of CIFAR-10."""

import functools

import keras
from keras import layers

from horovod_recipes.models.batch_norm import batch_norm_layer


def resnet18(
    image_shape,
    num_classes,
    batch_norm="micro_batch",
    batch_norm_momentum=0.9,
    batch_norm_epsilon=1e-5,
    zero_gamma=False,
    stage_blocks=(2, 2, 2, 2),
    width=64,
    stem_stride=1,
):
    """Returns a ResNet-18, from uint8 images to float32 logits.

    He et al. describe it in table 1 (https://arxiv.org/abs/1512.03385). For
    images of about 32 x 32, the first convolution is 3x3 without a stride, and
    no pooling follows it (SimCLR, https://arxiv.org/abs/2002.05709, appendix
    B.9). A projection shortcut stands wherever the shape changes. Pixels are
    scaled to 0 to 1.

    Args:
        image_shape: Tuple `(height, width, channels)` of the uint8 images.
        num_classes: Integer, the number of logits.
        batch_norm: `"micro_batch"` or `"synchronized"`; see
            `batch_norm.batch_norm_layer`. Defaults to `"micro_batch"`.
        batch_norm_momentum: Float, the weight of the old moving statistics in
            an update. Defaults to `0.9`.
        batch_norm_epsilon: Float, added to the variance. Defaults to `1e-5`.
        zero_gamma: Whether the scale of each block's last batch norm starts
            at 0. The block then starts as its shortcut. Defaults to `False`.
        stage_blocks: Tuple of integers, the number of blocks of each stage.
            Each stage after the first halves height and width. Defaults to
            `(2, 2, 2, 2)`.
        width: Integer, the channels of the first convolution and stage. Each
            further stage has twice as many. Defaults to `64`.
        stem_stride: Integer, the stride of the first convolution. Defaults to
            `1`.

    Raises:
        ValueError: If `batch_norm` is not valid.
    """
    convolution = functools.partial(
        layers.Conv2D,
        use_bias=False,
        padding="same",
        kernel_initializer="he_normal",
    )
    norm = functools.partial(
        batch_norm_layer,
        batch_norm,
        momentum=batch_norm_momentum,
        epsilon=batch_norm_epsilon,
    )
    inputs = keras.Input(image_shape, dtype="uint8", name="image")
    x = layers.Rescaling(1 / 255, dtype="float32", name="scale")(inputs)
    x = convolution(width, 3, strides=stem_stride, name="stem_conv")(x)
    x = norm(name="stem_bn")(x)
    x = layers.ReLU(name="stem_relu")(x)
    for stage, blocks in enumerate(stage_blocks, start=1):
        for block in range(1, blocks + 1):
            x = basic_block(
                x,
                filters=width * 2 ** (stage - 1),
                stride=2 if stage > 1 and block == 1 else 1,
                last_gamma="zeros" if zero_gamma else "ones",
                convolution=convolution,
                norm=norm,
                name=f"stage{stage}_block{block}",
            )
    x = layers.GlobalAveragePooling2D(dtype="float32", name="pool")(x)
    logits = layers.Dense(num_classes, dtype="float32", name="logits")(x)
    return keras.Model(inputs, logits, name="resnet18")


def basic_block(x, filters, stride, last_gamma, convolution, norm, name):
    """Adds two convolutions of `x` to its shortcut, and applies ReLU."""
    shortcut = x
    if x.shape[-1] != filters:
        shortcut = convolution(
            filters, 1, strides=stride, name=f"{name}_projection_conv"
        )(x)
        shortcut = norm(name=f"{name}_projection_bn")(shortcut)
    x = convolution(filters, 3, strides=stride, name=f"{name}_conv1")(x)
    x = norm(name=f"{name}_bn1")(x)
    x = layers.ReLU(name=f"{name}_relu1")(x)
    x = convolution(filters, 3, name=f"{name}_conv2")(x)
    x = norm(gamma_initializer=last_gamma, name=f"{name}_bn2")(x)
    x = layers.Add(name=f"{name}_add")([shortcut, x])
    return layers.ReLU(name=f"{name}_relu")(x)
