"""ResNet-50 in two versions: v1 of the 2015 paper, and v1.5 of MLPerf."""

import functools

import keras
from keras import layers

from horovod_recipes.models.batch_norm import batch_norm_layer
from horovod_recipes.models.layers import IMAGENET_MEAN
from horovod_recipes.models.layers import IMAGENET_STDDEV


def resnet50(
    image_shape,
    num_classes,
    version="v1.5",
    batch_norm="micro_batch",
    batch_norm_momentum=0.9,
    batch_norm_epsilon=1e-5,
    zero_gamma=False,
    stage_blocks=(3, 4, 6, 3),
    width=64,
    kernel_initializer="he_normal",
    logits_stddev=0.01,
):
    """Returns a ResNet-50, from uint8 images to float32 logits.

    He et al. describe it in table 1 (https://arxiv.org/abs/1512.03385). A
    projection shortcut stands wherever the shape changes (their option B).
    Convolutions before a batch norm have no bias. The first layer normalizes
    images by the mean and standard deviation of ImageNet's channels.

    Args:
        image_shape: Tuple `(height, width, 3)` of the uint8 images.
        num_classes: Integer, the number of logits.
        version: `"v1"` or `"v1.5"`. It places the stride of 2 in the first
            block of stages 2 to 4. In `"v1"` the first convolution, 1x1, has
            it, as in the paper. In `"v1.5"` the second, 3x3, has it, as in
            MLPerf. Defaults to `"v1.5"`.
        batch_norm: `"micro_batch"` or `"synchronized"`; see
            `batch_norm.batch_norm_layer`. Defaults to `"micro_batch"`.
        batch_norm_momentum: Float, the weight of the old moving statistics in
            an update. Defaults to `0.9`, as in MLPerf.
        batch_norm_epsilon: Float, added to the variance. Defaults to `1e-5`,
            as in MLPerf.
        zero_gamma: Whether the scale of each block's last batch norm starts
            at 0. The block then starts as its shortcut (Goyal et al.,
            https://arxiv.org/abs/1706.02677, section 5.1). Defaults to
            `False`.
        stage_blocks: Tuple of integers, the number of blocks of each stage.
            Defaults to `(3, 4, 6, 3)`.
        width: Integer, the channels of the first convolution. The stages have
            4, 8, 16 and 32 times as many. Defaults to `64`.
        kernel_initializer: The initializer of the convolutions. Defaults to
            `"he_normal"`, as in MLPerf.
        logits_stddev: Float, the standard deviation of the last layer's
            normal initial weights. Defaults to `0.01`, as in MLPerf.

    Raises:
        ValueError: If `version` or `batch_norm` is not valid.
    """
    if version not in ("v1", "v1.5"):
        raise ValueError(
            'Argument `version` must be "v1" or "v1.5". '
            f"Received: version={version!r}"
        )
    convolution = functools.partial(
        layers.Conv2D, use_bias=False, kernel_initializer=kernel_initializer
    )
    norm = functools.partial(
        batch_norm_layer,
        batch_norm,
        momentum=batch_norm_momentum,
        epsilon=batch_norm_epsilon,
    )
    last_gamma = "zeros" if zero_gamma else "ones"

    inputs = keras.Input(image_shape, dtype="uint8", name="image")
    x = stem(inputs, width, convolution, norm)
    for stage, blocks in enumerate(stage_blocks, start=1):
        for block in range(1, blocks + 1):
            x = bottleneck_block(
                x,
                filters=width * 2 ** (stage - 1),
                stride=2 if stage > 1 and block == 1 else 1,
                project=block == 1,
                version=version,
                last_gamma=last_gamma,
                convolution=convolution,
                norm=norm,
                name=f"stage{stage}_block{block}",
            )
    x = layers.GlobalAveragePooling2D(dtype="float32", name="pool")(x)
    logits = layers.Dense(
        num_classes,
        kernel_initializer=keras.initializers.RandomNormal(
            stddev=logits_stddev
        ),
        dtype="float32",
        name="logits",
    )(x)
    return keras.Model(inputs, logits, name="resnet50")


def stem(inputs, width, convolution, norm):
    """Normalizes the images, and reduces their size to a quarter."""
    x = layers.Rescaling(
        [1 / stddev for stddev in IMAGENET_STDDEV],
        offset=[
            -mean / stddev
            for mean, stddev in zip(IMAGENET_MEAN, IMAGENET_STDDEV, strict=True)
        ],
        dtype="float32",
        name="normalize_image",
    )(inputs)
    x = layers.ZeroPadding2D(3, name="stem_pad")(x)
    x = convolution(width, 7, strides=2, name="stem_conv")(x)
    x = norm(name="stem_bn")(x)
    x = layers.ReLU(name="stem_relu")(x)
    # Padding with zeros is safe: after ReLU no value is below zero.
    x = layers.ZeroPadding2D(1, name="stem_pool_pad")(x)
    return layers.MaxPooling2D(3, strides=2, name="stem_pool")(x)


def bottleneck_block(
    x, filters, stride, project, version, last_gamma, convolution, norm, name
):
    """Adds three convolutions of `x` to its shortcut, and applies ReLU."""
    shortcut = x
    if project:
        shortcut = convolution(
            4 * filters, 1, strides=stride, name=f"{name}_projection_conv"
        )(x)
        shortcut = norm(name=f"{name}_projection_bn")(shortcut)

    stride1, stride2 = (stride, 1) if version == "v1" else (1, stride)
    x = convolution(filters, 1, strides=stride1, name=f"{name}_conv1")(x)
    x = norm(name=f"{name}_bn1")(x)
    x = layers.ReLU(name=f"{name}_relu1")(x)
    padding = "same"
    if stride2 > 1:
        # With a stride of 2, "same" would pad an even side at one end only.
        x = layers.ZeroPadding2D(1, name=f"{name}_pad")(x)
        padding = "valid"
    x = convolution(
        filters, 3, strides=stride2, padding=padding, name=f"{name}_conv2"
    )(x)
    x = norm(name=f"{name}_bn2")(x)
    x = layers.ReLU(name=f"{name}_relu2")(x)
    x = convolution(4 * filters, 1, name=f"{name}_conv3")(x)
    x = norm(gamma_initializer=last_gamma, name=f"{name}_bn3")(x)
    x = layers.Add(name=f"{name}_add")([shortcut, x])
    return layers.ReLU(name=f"{name}_relu")(x)
