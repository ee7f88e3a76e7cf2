"""The layers that the ImageNet networks share or that Keras has not."""

import keras
from keras import layers

# Of the red, green and blue of ImageNet's training images, from 0 to 255: the
# values that torchvision and fb.resnet.torch give for 0 to 1, times 255.
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STDDEV = (58.395, 57.12, 57.375)


def batch_norm_layer(kind, **arguments):
    """Returns a batch norm, with the statistics that a config asks for.

    Args:
        kind: `"micro_batch"`, whose statistics are those of the images that
            one rank has in one forward pass, also called ghost batch norm; or
            `"synchronized"`, of those of all ranks in that pass, which needs
            Horovod.
        **arguments: Of `keras.layers.BatchNormalization`.

    Raises:
        ValueError: If `kind` is neither of the two.
    """
    if kind == "micro_batch":
        return layers.BatchNormalization(**arguments)
    if kind == "synchronized":
        # Networks are also loaded and planned for where there is no Horovod.
        from horovod_recipes.keras import SyncBatchNormalization

        return SyncBatchNormalization(**arguments)
    raise ValueError(
        'Argument `batch_norm` must be "micro_batch" or "synchronized". '
        f"Received: batch_norm={kind!r}"
    )


@keras.saving.register_keras_serializable("horovod_recipes")
class GroupedConv2D(layers.Conv2D):
    """A convolution in groups, as one ordinary convolution a group.

    Keras compiles grouped convolutions with XLA, since TensorFlow has none on
    the CPU. There that takes eight times as long: 825 ms in place of 104 ms for
    AlexNet's conv2, forward and backward, with 16 images on two cores.
    """

    def convolution_op(self, inputs, kernel):
        convolution_op = super().convolution_op
        return keras.ops.concatenate(
            [
                convolution_op(*group)
                for group in zip(
                    keras.ops.split(inputs, self.groups, axis=-1),
                    keras.ops.split(kernel, self.groups, axis=-1),
                    strict=True,
                )
            ],
            axis=-1,
        )


@keras.saving.register_keras_serializable("horovod_recipes")
class LocalResponseNormalization(layers.Layer):
    """AlexNet's local response normalization, across channels, as in Caffe.

    Divides by `(1 + alpha / 5 * s) ** 0.75`, where `s` sums the squares of five
    channels, two on each side, and `alpha` is 1e-4. That is Caffe's LRN with
    the values of BVLC's AlexNet; TensorFlow's operation takes `alpha / 5`.
    """

    def call(self, inputs):
        # The other networks are for machines without TensorFlow too.
        import tensorflow as tf

        # Squares of half-precision numbers overflow.
        outputs = tf.nn.local_response_normalization(
            tf.cast(inputs, tf.float32),
            depth_radius=2,
            bias=1.0,
            alpha=1e-4 / 5,
            beta=0.75,
        )
        return tf.cast(outputs, self.compute_dtype)
