"""Batch norm: by TensorFlow's fused operation, or over all ranks."""

import keras


def batch_norm_layer(kind, **arguments):
    """Returns the batch norm layer that a config asks for.

    Args:
        kind: `"micro_batch"` or `"synchronized"`. The first, also called ghost
            batch norm, computes its statistics over the images of one rank in
            one forward pass. The second computes them over the images of all
            ranks in that pass; it needs Horovod.
        **arguments: The arguments of `keras.layers.BatchNormalization`.

    Raises:
        ValueError: If `kind` is neither of the two.
    """
    if kind == "micro_batch":
        return FusedBatchNormalization(**arguments)
    if kind == "synchronized":
        # Loading and planning other networks must not need Horovod.
        from horovod_recipes.keras import SyncBatchNormalization

        return SyncBatchNormalization(**arguments)
    raise ValueError(
        'Argument `batch_norm` must be "micro_batch" or "synchronized". '
        f"Received: batch_norm={kind!r}"
    )


def FusedBatchNormalization(**arguments):
    """Returns a batch norm that TensorFlow computes in one operation.

    Keras 3 computes batch norm in many operations, in float32. TensorFlow has
    an operation for all of it, and one for its gradient. The results are equal
    but for rounding: outputs, gradients and moving statistics.

    The layer is a `keras.layers.BatchNormalization`, so a model saved with it
    loads without this project. A layer made from its config is Keras's own, for
    example in a model that was loaded, or after `keras.models.clone_model`.
    There, and in a model of `keras.applications`, call `fuse_batch_norms`.

    The operation takes images with channels last, in float32, float16 or
    bfloat16. In all other cases the layer computes as Keras's: with a mask, on
    another backend, with `synchronized` or `renorm`, and where XLA compiles it.

    Args:
        **arguments: Arguments of `keras.layers.BatchNormalization`.
    """
    layer = keras.layers.BatchNormalization(**arguments)
    _fuse(layer)
    return layer


def fuse_batch_norms(model):
    """Makes each batch norm of a model a `FusedBatchNormalization`.

    It leaves those of `hvd.SyncBatchNormalization` and of subclasses. Call it
    before the model is compiled.

    Args:
        model: A `keras.Model`, or another layer that has layers.
    """
    for layer in getattr(model, "layers", []):
        fuse_batch_norms(layer)
        is_plain = type(layer) is keras.layers.BatchNormalization
        # XLA cannot compile a layer that Horovod synchronizes.
        if is_plain and layer.supports_jit:
            _fuse(layer)


def _fuse(layer):
    # An attribute, not a method of a subclass: a saved file names the class.
    is_fused = isinstance(layer.call, _FusedCall)
    if keras.backend.backend() == "tensorflow" and not is_fused:
        layer.call = _FusedCall(layer)


class _FusedCall:
    """Stands in for the `call` of one batch norm."""

    def __init__(self, layer):
        self._layer = layer
        self._plain_call = layer.call

    def __call__(self, inputs, training=None, mask=None):
        if mask is not None or not self._can_fuse(inputs):
            return self._plain_call(inputs, training=training, mask=mask)
        layer = self._layer
        if not (training and layer.trainable):
            outputs, _, _ = self._normalize(
                inputs,
                is_training=False,
                mean=layer.moving_mean,
                variance=layer.moving_variance,
            )
            return outputs
        outputs, mean, variance = self._normalize(
            inputs, is_training=True, mean=[], variance=[]
        )
        _move(layer.moving_mean, mean, layer.momentum)
        variance = _biased(variance, inputs)
        _move(layer.moving_variance, variance, layer.momentum)
        return outputs

    def _can_fuse(self, inputs):
        import tensorflow as tf

        from horovod_recipes._xla import xla_compiles

        layer = self._layer
        return (
            tf.is_tensor(inputs)
            and inputs.shape.rank == 4
            and layer.axis in (-1, 3)
            and inputs.dtype in (tf.float32, tf.float16, tf.bfloat16)
            and inputs.dtype == layer.compute_dtype
            and layer.variable_dtype == "float32"
            and not layer.synchronized
            # Keras 3.10 does not have it.
            and not getattr(layer, "renorm", False)
            and not xla_compiles()
        )

    def _normalize(self, inputs, is_training, mean, variance):
        """Returns the outputs, and the statistics that they come from."""
        import tensorflow as tf

        layer = self._layer
        channels = inputs.shape[-1:]
        scale = tf.ones(channels) if layer.gamma is None else layer.gamma
        offset = tf.zeros(channels) if layer.beta is None else layer.beta
        return tf.raw_ops.FusedBatchNormV3(
            x=inputs,
            scale=tf.convert_to_tensor(scale),
            offset=tf.convert_to_tensor(offset),
            mean=tf.convert_to_tensor(mean, tf.float32),
            variance=tf.convert_to_tensor(variance, tf.float32),
            epsilon=layer.epsilon,
            is_training=is_training,
        )[:3]


def _biased(variance, inputs):
    """Returns what the variance is if its sum is divided by n, not n - 1."""
    import tensorflow as tf

    size = tf.size(inputs) // inputs.shape[-1]
    return variance * tf.cast((size - 1) / size, variance.dtype)


def _move(moving, value, momentum):
    moving.assign(moving * momentum + value * (1 - momentum))
