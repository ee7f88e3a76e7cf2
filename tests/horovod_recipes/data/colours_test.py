"""Distortions of colours, read from images whose result is known."""

import colorsys

import numpy as np
import pytest
import tensorflow as tf

from horovod_recipes.data import colours

COUNT = 400
# Three standard deviations of a share of 0.2 or 0.8 in COUNT draws.
TOLERANCE = 0.06


def distorted(image, strength, count=COUNT):
    """Returns the image distorted by `count` seeds."""
    image = tf.constant(image, tf.float32)
    images = tf.data.Dataset.range(count).map(
        lambda index: colours.distort(image, tf.stack([3, index]), strength)
    )
    return np.stack(list(images.as_numpy_iterator()))


def constant(colour, side=4):
    return np.full([side, side, len(colour)], colour, "float32")


def test_one_in_five_keeps_its_colours_and_one_in_five_becomes_grey():
    # Without the jitter, a noisy image stays as it is, or becomes grey.
    image = np.random.default_rng(0).uniform(0.2, 0.8, (6, 6, 3))
    results = distorted(image.astype("float32"), strength=1.0)
    grey = np.ptp(results, axis=-1).max(axis=(1, 2)) < 1e-6
    kept = np.abs(results - image).max(axis=(1, 2, 3)) < 1e-6
    assert grey.mean() == pytest.approx(0.2, abs=TOLERANCE)
    assert kept[~grey].mean() == pytest.approx(0.2, abs=TOLERANCE)
    assert results.min() >= 0
    assert results.max() <= 1


def test_strength_0_changes_nothing_but_to_grey():
    image = np.random.default_rng(0).uniform(0, 1, (6, 6, 3)).astype("float32")
    luminance = tf.image.rgb_to_grayscale(image).numpy().repeat(3, axis=-1)
    for result in distorted(image, strength=0.0, count=40):
        expected = image if np.ptp(result, axis=-1).max() > 1e-6 else luminance
        np.testing.assert_allclose(result, expected, atol=1e-5)


@pytest.mark.parametrize("strength", [0.25, 0.5])
def test_brightness_of_a_constant_grey_image(strength):
    """Contrast does not change it, so its factor is that of the brightness."""
    results = distorted(constant([0.5]), strength)
    assert np.ptp(results, axis=(1, 2, 3)).max() < 1e-5
    factors = results[:, 0, 0, 0] / 0.5
    limit = 0.8 * strength
    assert factors.min() == pytest.approx(1 - limit, abs=0.02)
    assert factors.max() == pytest.approx(1 + limit, abs=0.02)
    changed = factors[np.abs(factors - 1) > 1e-6]
    assert len(changed) / COUNT == pytest.approx(0.8, abs=TOLERANCE)
    assert np.mean(changed) == pytest.approx(1.0, abs=0.05)


def test_contrast_of_a_grey_image():
    """The range of the pixels relative to their mean has its factor."""
    image = constant([0.5])
    image[0] = 0.55
    results = distorted(image, strength=0.5)
    means = results.mean(axis=(1, 2, 3))
    factors = (np.ptp(results, axis=(1, 2, 3)) / means) / (0.05 / image.mean())
    assert factors.min() == pytest.approx(0.6, abs=0.03)
    assert factors.max() == pytest.approx(1.4, abs=0.03)


def test_hue_and_saturation_of_a_constant_colour():
    start = (0.6, 0.4, 0.4)
    hue, saturation, _ = colorsys.rgb_to_hsv(*start)
    results = distorted(constant(start), strength=0.5)
    found = np.array([colorsys.rgb_to_hsv(*r[0, 0]) for r in results])
    found = found[found[:, 1] > 1e-5]
    turns = (found[:, 0] - hue + 0.5) % 1 - 0.5
    assert np.abs(turns).max() == pytest.approx(0.1, abs=0.01)
    factors = found[:, 1] / saturation
    assert factors.min() == pytest.approx(0.6, abs=0.03)
    # Brightness and contrast that reach the limit change it too.
    assert np.quantile(factors, 0.95) == pytest.approx(1.4, abs=0.06)


def test_the_order_is_random():
    """A bright image that is darkened first is not cut at white."""
    image = constant([0.7])
    image[0] = 1.0
    results = distorted(image, strength=1.0)
    assert len(np.unique(results[:, 0, 0, 0])) > 100
    assert len(np.unique(results[:, 1, 0, 0])) > 100


def test_seed_decides():
    image = np.random.default_rng(0).uniform(0, 1, (6, 6, 3)).astype("float32")
    np.testing.assert_array_equal(
        distorted(image, 1.0, count=8), distorted(image, 1.0, count=8)
    )


def test_blur_is_a_gaussian_in_half_of_the_cases():
    side = 60
    impulse = np.zeros((side, side, 3), "float32")
    impulse[30, 30] = [1.0, 0.5, 0.25]
    seeds = tf.data.Dataset.range(COUNT)
    results = np.stack(
        list(
            seeds.map(
                lambda index: colours.blur(impulse, tf.stack([7, index]))
            ).as_numpy_iterator()
        )
    )
    unchanged = np.all(results == impulse, axis=(1, 2, 3))
    assert unchanged.mean() == pytest.approx(0.5, abs=0.08)
    x = np.arange(-3, 4)
    deviations = []
    for result in results[~unchanged]:
        np.testing.assert_allclose(
            result.sum(axis=(0, 1)), impulse[30, 30], rtol=1e-5
        )
        line = result[30, 27:34, 0]
        # A Gaussian's neighbours: w(1) / w(0) = exp(-1 / (2 deviation ** 2)).
        ratio = line[4] / line[3]
        if ratio < 1e-6:
            continue
        deviation = np.sqrt(-1 / (2 * np.log(ratio)))
        weights = np.exp(-(x**2) / (2 * deviation**2))
        weights /= weights.sum()
        np.testing.assert_allclose(
            result[27:34, 27:34, 0],
            np.outer(weights, weights),
            rtol=1e-3,
            atol=1e-6,
        )
        # Its kernel covers 10 % of the height.
        assert result[26].max() == 0
        deviations.append(deviation)
    assert max(deviations) == pytest.approx(2.0, abs=0.05)
    assert min(deviations) < 0.35
