"""Distorts the colours of an image, and blurs it, as SimCLR does.

Images are float32 `[height, width, channels]` from 0 to 1, with 3 channels or,
for grey images, 1. Seeds are stateless seeds, pairs of integers.

Source: Chen et al., https://arxiv.org/abs/2002.05709, appendix A, and the code
at https://github.com/google-research/simclr (version 2 of its distortions).
"""

import tensorflow as tf

PROBABILITY_OF_JITTER = 0.8
PROBABILITY_OF_GREY = 0.2
PROBABILITY_OF_BLUR = 0.5
# Largest change of the hue at strength 1, in turns of the colour wheel.
HUE_AT_STRENGTH_1 = 0.2
# Largest change of the other factors at strength 1.
FACTOR_AT_STRENGTH_1 = 0.8
# Smallest and largest standard deviation of the blur, in pixels.
BLUR_PIXELS = (0.1, 2.0)


def distort(image, seed, strength):
    """Changes brightness, contrast, saturation and hue, or removes the colours.

    With a probability of 0.8 it changes all four in a random order, and limits
    the result to 0 to 1 after each. Then, with a probability of 0.2, it makes
    the image grey. Of a grey image, it changes brightness and contrast.

    Args:
        image: The image.
        seed: The seed.
        strength: Float from 0 to 1.
    """
    jitter_seed, choice_seed = tf.unstack(tf.random.split(seed))
    jitter, grey = tf.unstack(tf.random.stateless_uniform([2], choice_seed))
    image = tf.cond(
        jitter < PROBABILITY_OF_JITTER,
        lambda: _jitter(image, jitter_seed, strength),
        lambda: image,
    )
    if image.shape[-1] == 1:
        return image
    return tf.cond(
        grey < PROBABILITY_OF_GREY,
        lambda: tf.repeat(tf.image.rgb_to_grayscale(image), 3, axis=-1),
        lambda: image,
    )


def _jitter(image, seed, strength):
    factor_seed, order_seed = tf.unstack(tf.random.split(seed))
    numbers = tf.random.stateless_uniform([4], factor_seed, -1.0, 1.0)
    factors = 1 + FACTOR_AT_STRENGTH_1 * strength * numbers
    changes = [
        lambda image: image * factors[0],
        lambda image: tf.image.adjust_contrast(image, factors[1]),
    ]
    if image.shape[-1] == 3:
        hue = HUE_AT_STRENGTH_1 * strength * numbers[3]
        changes += [
            lambda image: tf.image.adjust_saturation(image, factors[2]),
            lambda image: tf.image.adjust_hue(image, hue),
        ]
    order = tf.argsort(tf.random.stateless_uniform([len(changes)], order_seed))
    for place in tf.unstack(order):
        changed = tf.switch_case(
            place, [lambda c=change, i=image: c(i) for change in changes]
        )
        image = tf.clip_by_value(changed, 0.0, 1.0)
    return image


def blur(image, seed):
    """Blurs the image in half of the cases, by a Gaussian of random width.

    Its kernel covers 10 % of the height.
    """
    chance, number = tf.unstack(tf.random.stateless_uniform([2], seed))
    low, high = BLUR_PIXELS
    deviation = low + (high - low) * number
    return tf.cond(
        chance < PROBABILITY_OF_BLUR,
        lambda: _gaussian(image, deviation),
        lambda: image,
    )


def _gaussian(image, deviation):
    height, _, channels = image.shape
    radius = max(1, height // 10 // 2)
    x = tf.range(-radius, radius + 1, dtype=tf.float32)
    weights = tf.nn.softmax(-(x**2) / (2 * deviation**2))
    image = image[tf.newaxis]
    for shape in ([-1, 1, 1, 1], [1, -1, 1, 1]):
        kernel = tf.tile(tf.reshape(weights, shape), [1, 1, channels, 1])
        image = tf.nn.depthwise_conv2d(image, kernel, [1, 1, 1, 1], "SAME")
    return image[0]
