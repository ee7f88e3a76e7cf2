"""The parts of SimCLR's network: encoder, projection head and linear probe."""

import keras
from keras import layers

from horovod_recipes.models.batch_norm import batch_norm_layer

# The random views of each image.
VIEWS = 2


def simclr_network(
    classifier, projection_layers, embedding_size, batch_norm="micro_batch"
):
    """Puts a projection head and a linear probe on a network's features.

    The projection head is that of SimCLR v1 with 2 layers, and of v2 with 3.
    The probe learns the classes from the features, and sends no gradient to
    the encoder.

    Args:
        classifier: A network of this package. Its last layer, which makes the
            logits, is left out. What remains is the encoder.
        projection_layers: Integer >= 1, the dense layers of the head.
        embedding_size: Integer, the outputs of the head.
        batch_norm: `"micro_batch"` or `"synchronized"`, for the head.

    Returns:
        A `keras.Model` with a dict of outputs: `features`, `embedding` and
        `logits`, float32 `[batch, n]` each.

    References:
        - [Chen et al., 2020](https://arxiv.org/abs/2002.05709), Appendix B
        - [v2](https://arxiv.org/abs/2006.10029), Section 2
    """
    last = classifier.layers[-1]
    features = last.input
    x = features
    for index in range(1, projection_layers + 1):
        is_last = index == projection_layers
        x = layers.Dense(
            embedding_size if is_last else features.shape[-1],
            use_bias=False,
            kernel_initializer=keras.initializers.RandomNormal(stddev=0.01),
            name=f"projection{index}",
        )(x)
        x = batch_norm_layer(
            batch_norm,
            center=not is_last,
            momentum=0.9,
            epsilon=1e-5,
            # The loss needs embeddings in float32, whatever the precision.
            dtype="float32" if is_last else None,
            name=f"projection{index}_bn",
        )(x)
        if not is_last:
            x = layers.ReLU(name=f"projection{index}_relu")(x)
    probe = layers.Dense(last.units, dtype="float32", name="probe")
    return keras.Model(
        classifier.input,
        {
            "features": features,
            "embedding": x,
            "logits": probe(keras.ops.stop_gradient(features)),
        },
        name=f"simclr_{classifier.name}",
    )


def encoder_of(network):
    """Returns the encoder of a network, from images to features.

    Args:
        network: A `simclr_network`, or a classifier of this package.
    """
    if isinstance(network.output, dict):
        features = network.output["features"]
    else:
        features = network.layers[-1].input
    return keras.Model(network.input, features, name="encoder")
