"""AlexNet and AlexNet-BN, the LARS paper's first two networks."""

import functools

import keras
from keras import layers

from horovod_recipes.models.batch_norm import batch_norm_layer
from horovod_recipes.models.layers import IMAGENET_MEAN
from horovod_recipes.models.layers import GroupedConv2D
from horovod_recipes.models.layers import LocalResponseNormalization

# Smallest height and width of an image, in pixels.
# At this size the last pooling window covers its whole input.
SMALLEST_SIDE_PIXELS = 67


def alexnet(
    image_shape,
    num_classes,
    normalization="lrn",
    batch_norm="micro_batch",
    batch_norm_momentum=0.9,
    batch_norm_epsilon=1e-4,
    dropout=0.5,
):
    """Returns an AlexNet, from uint8 images to float32 logits.

    `normalization="lrn"` gives BVLC's network, which the LARS paper trains. Its
    layers, groups and initial values come from
    `models/bvlc_alexnet/train_val.prototxt` in https://github.com/BVLC/caffe.
    As there, the network subtracts the mean from the images but does not scale
    them. The small initial weights need pixels with a standard deviation of
    about 60: with 1, hardly any signal would reach the logits.

    `normalization="batch_norm"` gives AlexNet-BN. The LARS paper only says that
    batch norm replaces LRN. Its authors published the network as
    `models/alexnet_bn/train_val.prototxt` in NVIDIA's fork of Caffe. There, a
    batch norm follows each of the five convolutions, before ReLU, and dropout
    stays. A bias has no effect before a batch norm, so these convolutions have
    none; NVIDIA's file keeps the bias of conv5.

    Args:
        image_shape: Tuple `(height, width, 3)` of the uint8 images. Each side
            needs at least 67 pixels; the paper uses 227.
        num_classes: Integer, the number of logits.
        normalization: `"lrn"` or `"batch_norm"`. Defaults to `"lrn"`.
        batch_norm: `"micro_batch"` or `"synchronized"`; see
            `batch_norm.batch_norm_layer`. Defaults to `"micro_batch"`.
        batch_norm_momentum: Float, the weight of the old moving statistics in
            an update. Defaults to `0.9`, as in NVIDIA's file.
        batch_norm_epsilon: Float, added to the variance. Defaults to `1e-4`,
            as in NVIDIA's file.
        dropout: Float, the fraction of the outputs of fc6 and fc7 to drop.
            Defaults to `0.5`.

    Raises:
        ValueError: If the images are too small, or if `normalization` or
            `batch_norm` is not valid.
    """
    if min(image_shape[:2]) < SMALLEST_SIDE_PIXELS:
        raise ValueError(
            f"AlexNet needs images of at least {SMALLEST_SIDE_PIXELS} x "
            f"{SMALLEST_SIDE_PIXELS} pixels. Received: "
            f"image_shape={image_shape}"
        )
    if normalization not in ("lrn", "batch_norm"):
        raise ValueError(
            'Argument `normalization` must be "lrn" or "batch_norm". '
            f"Received: normalization={normalization!r}"
        )
    norm = None
    if normalization == "batch_norm":
        norm = functools.partial(
            batch_norm_layer,
            batch_norm,
            momentum=batch_norm_momentum,
            epsilon=batch_norm_epsilon,
        )

    inputs = keras.Input(image_shape, dtype="uint8", name="image")
    x = layers.Rescaling(
        1.0,
        offset=[-mean for mean in IMAGENET_MEAN],
        dtype="float32",
        name="subtract_mean",
    )(inputs)
    x = convolution(x, 1, 96, 11, norm, strides=4)
    if norm is None:
        x = LocalResponseNormalization(name="lrn1")(x)
    x = layers.MaxPooling2D(3, strides=2, name="pool1")(x)
    x = convolution(x, 2, 256, 5, norm, bias=0.1, groups=2, padding="same")
    if norm is None:
        x = LocalResponseNormalization(name="lrn2")(x)
    x = layers.MaxPooling2D(3, strides=2, name="pool2")(x)
    x = convolution(x, 3, 384, 3, norm, padding="same")
    x = convolution(x, 4, 384, 3, norm, bias=0.1, groups=2, padding="same")
    x = convolution(x, 5, 256, 3, norm, bias=0.1, groups=2, padding="same")
    x = layers.MaxPooling2D(3, strides=2, name="pool5")(x)
    x = layers.Flatten(name="flatten")(x)
    x = fully_connected(x, 6, dropout)
    x = fully_connected(x, 7, dropout)
    logits = layers.Dense(
        num_classes,
        kernel_initializer=gaussian(0.01),
        dtype="float32",
        name="fc8",
    )(x)
    return keras.Model(inputs, logits, name="alexnet")


def convolution(x, index, filters, size, norm, bias=0.0, **arguments):
    """Applies a convolution, a batch norm unless `norm` is None, and ReLU."""
    x = GroupedConv2D(
        filters,
        size,
        use_bias=norm is None,
        kernel_initializer=gaussian(0.01),
        bias_initializer=keras.initializers.Constant(bias),
        name=f"conv{index}",
        **arguments,
    )(x)
    if norm is not None:
        x = norm(name=f"bn{index}")(x)
    return layers.ReLU(name=f"relu{index}")(x)


def fully_connected(x, index, dropout):
    """Applies a dense layer with 4,096 outputs, ReLU and dropout."""
    x = layers.Dense(
        4096,
        activation="relu",
        kernel_initializer=gaussian(0.005),
        bias_initializer=keras.initializers.Constant(0.1),
        name=f"fc{index}",
    )(x)
    return layers.Dropout(dropout, name=f"drop{index}")(x)


def gaussian(stddev):
    return keras.initializers.RandomNormal(stddev=stddev)
