"""Which part of an image a crop shows, read from the colours of its pixels."""

import io

import numpy as np
import PIL.Image
import pytest
import tensorflow as tf

from horovod_recipes.data import augmentations
from horovod_recipes.data import colours

HEIGHT, WIDTH = 160, 240
SHAPE = (32, 48, 3)
CROPS = (
    augmentations.minimal,
    augmentations.inception,
    augmentations.large_crop,
    augmentations.centre_of_scaled,
    augmentations.centre_square,
)
ALL = (augmentations.whole, augmentations.random_affine, *CROPS)
VIEWS = (
    augmentations.simclr,
    augmentations.simclr_small,
    augmentations.simclr_grey,
    augmentations.simclr_digits,
)


def coordinates(height=HEIGHT, width=WIDTH):
    """Returns an image: red is the row, green the column, blue forms waves."""
    rows, columns = np.indices((height, width))
    waves = 127 + 60 * np.sin(rows / 20) + 60 * np.cos(columns / 30)
    return np.stack([rows, columns, waves], axis=-1).astype(np.uint8)


def jpeg(image, **options):
    """Returns a JPEG of the best quality, without chroma subsampling."""
    file = io.BytesIO()
    PIL.Image.fromarray(image).save(
        file, "JPEG", quality=100, subsampling=0, **options
    )
    return file.getvalue()


def png(image):
    """Returns a PNG, which keeps every colour exactly."""
    return tf.io.encode_png(image).numpy()


def crops(function, encoded, count, shape=SHAPE):
    """Returns the crops for `count` seeds, as floats."""
    images = tf.data.Dataset.range(count).map(
        lambda index: function(encoded, tf.stack([5, index]), shape)
    )
    return np.stack(list(images.as_numpy_iterator())).astype(float)


def windows(images):
    """Returns top, left, height, width and "is flipped" for each crop.

    The crops must show the image from `coordinates`.
    """
    (tops, heights), (lefts, widths) = (
        np.transpose([_start_and_extent(line) for line in lines])
        for lines in (images[..., 0].mean(axis=2), images[..., 1].mean(axis=1))
    )
    flipped = widths < 0
    lefts = np.where(flipped, lefts + widths, lefts)
    return tops, lefts, heights, np.abs(widths), flipped


def _start_and_extent(line):
    """Fits a line to the coordinates of the centres of a crop's pixels."""
    centres = np.arange(len(line)) + 0.5
    slope, start = np.polyfit(centres, line + 0.5, 1)
    return start, slope * len(line)


def test_minimal_is_224_of_256_pixels_at_a_uniform_place_half_flipped():
    images = crops(augmentations.minimal, png(coordinates()), 400)
    tops, lefts, heights, widths, flipped = windows(images)
    np.testing.assert_allclose(heights, HEIGHT * 224 / 256, atol=0.1)
    np.testing.assert_allclose(widths, WIDTH * 224 / 256, atol=0.1)
    # Each fifth of the possible starts is equally likely.
    # The tolerance, 0.06, is three standard deviations.
    for starts, room in ((tops, HEIGHT // 8), (lefts, WIDTH // 8)):
        np.testing.assert_allclose(starts, np.round(starts), atol=0.1)
        counts, _ = np.histogram(np.round(starts), 5, (0, room))
        assert counts.sum() == 400
        np.testing.assert_allclose(counts / 400, 0.2, atol=0.06)
    assert 0.43 < flipped.mean() < 0.57
    correlations = np.corrcoef([tops, lefts, flipped])
    np.testing.assert_allclose(correlations, np.eye(3), atol=0.15)


def test_minimal_is_a_crop_of_the_scaled_image():
    image = coordinates()
    scaled = tf.image.resize(image, [256, 256]).numpy()
    images = crops(augmentations.minimal, jpeg(image), 20, (224, 224, 3))
    tops, lefts, _, _, flipped = windows(images)
    assert 0 < flipped.sum() < 20
    for index, crop in enumerate(images):
        top = round(tops[index] * 256 / HEIGHT)
        left = round(lefts[index] * 256 / WIDTH)
        # The fitted line may start one pixel outside the image.
        top, left = max(top, 0), max(left, 0)
        expected = scaled[top : top + 224, left : left + 224]
        if flipped[index]:
            expected = expected[:, ::-1]
        assert np.abs(crop - expected).mean() < 2


def test_inception_crops_within_the_limits_and_flips_on_its_own():
    images = crops(augmentations.inception, png(coordinates()), 400)
    tops, lefts, heights, widths, flipped = windows(images)
    areas = heights * widths / (HEIGHT * WIDTH)
    ratios = widths / heights
    # The lowest limit allows half a pixel of error on sides of 48 pixels.
    assert 0.079 < areas.min() < 0.1
    # A 4:3 crop as high as the image covers 0.89 of it.
    assert 0.8 < areas.max() < 0.9
    assert 0.74 < ratios.min() < 0.78
    assert 1.29 < ratios.max() < 1.35
    assert min(tops.min(), lefts.min()) > -0.1
    assert (tops + heights).max() < HEIGHT + 0.1
    assert (lefts + widths).max() < WIDTH + 0.1
    assert 0.43 < flipped.mean() < 0.57
    for of_the_crop in (ratios, areas, tops, lefts):
        correlation = np.corrcoef(of_the_crop, flipped)[0, 1]
        assert abs(correlation) < 0.15


@pytest.mark.parametrize(
    ("view", "smallest", "is_mirrored"),
    [
        (augmentations.simclr_small, 0.08, True),
        (augmentations.simclr_grey, 0.3, True),
        (augmentations.simclr_digits, 0.4, False),
    ],
)
def test_views_show_enough_of_the_image(
    view, smallest, is_mirrored, monkeypatch
):
    # The colours tell the place, so they must stay.
    monkeypatch.setattr(colours, "PROBABILITY_OF_JITTER", 0.0)
    monkeypatch.setattr(colours, "PROBABILITY_OF_GREY", 0.0)
    encoded = png(coordinates())
    _, _, heights, widths, flipped = windows(crops(view, encoded, 200))
    areas = heights * widths / (HEIGHT * WIDTH)
    assert smallest - 0.01 < areas.min() < smallest + 0.05
    assert (0.4 < flipped.mean() < 0.6) if is_mirrored else not flipped.any()


def test_inception_takes_the_whole_image_where_no_crop_fits():
    # A 4:3 crop that is 12 rows high covers less than 8 % of the image.
    encoded = png(coordinates(12, 240))
    images = crops(augmentations.inception, encoded, 8, (12, 48, 3))
    tops, lefts, heights, widths, _ = windows(images)
    np.testing.assert_allclose(tops, 0, atol=0.1)
    np.testing.assert_allclose(heights, 12, atol=0.1)
    np.testing.assert_allclose(lefts, 0, atol=0.1)
    np.testing.assert_allclose(widths, 240, atol=0.1)


def test_centre_of_scaled_is_the_middle_of_the_scaled_image():
    image = coordinates()
    scaled = tf.image.resize(image, [256, 256]).numpy()
    crop = augmentations.centre_of_scaled(jpeg(image), None, (224, 224, 3))
    error = np.abs(crop.numpy() - scaled[16:240, 16:240])
    assert error.mean() < 2


def test_centre_square_is_seven_eighths_of_the_shorter_side():
    image = coordinates()
    # 7/8 of the 160 rows are 140 rows.
    middle = image[10:150, 50:190]
    crop = augmentations.centre_square(png(image), None, (140, 140, 3))
    np.testing.assert_array_equal(crop, middle)
    crop = augmentations.centre_square(jpeg(image), None, (70, 70, 3))
    expected = tf.image.resize(middle, [70, 70]).numpy()
    assert np.abs(crop.numpy() - expected).mean() < 2


@pytest.mark.parametrize("function", ALL + VIEWS)
def test_pixels_are_uint8_of_the_shape_and_depend_on_the_seed_alone(function):
    encoded = jpeg(coordinates())
    image = function(encoded, [1, 2], SHAPE)
    assert image.dtype == tf.uint8
    assert image.shape == SHAPE
    np.testing.assert_array_equal(image, function(encoded, [1, 2], SHAPE))
    is_random = function in (
        augmentations.random_affine,
        augmentations.minimal,
        augmentations.inception,
        augmentations.large_crop,
        *VIEWS,
    )
    other = function(encoded, [1, 3], SHAPE)
    assert (image.numpy() != other.numpy()).any() == is_random


@pytest.mark.parametrize("function", ALL)
def test_a_png_or_a_progressive_jpeg_gives_the_pixels_of_a_jpeg(function):
    image = coordinates()
    pixels = crops(function, jpeg(image), 4)
    progressive = jpeg(image, progressive=True)
    assert progressive != jpeg(image)
    assert np.abs(crops(function, png(image), 4) - pixels).max() <= 8
    np.testing.assert_array_equal(crops(function, progressive, 4), pixels)


@pytest.mark.parametrize("function", ALL)
def test_grey_and_colour_are_converted_to_the_model_channels(function):
    grey = np.full((50, 70), 90, np.uint8)
    middle = function(jpeg(grey), [1, 2], SHAPE)[10:20, 10:30]
    assert np.unique(middle) == [90]
    red = np.full((50, 70, 3), [255, 0, 0], np.uint8)
    middle = function(jpeg(red), [1, 2], (32, 48, 1))[10:20, 10:30]
    assert middle.shape == (10, 20, 1)
    # Red has 0.299 of white's luminance (ITU-R BT.601).
    np.testing.assert_allclose(middle, 76, atol=1)


def cmyk_jpeg():
    """Returns a CMYK JPEG of one colour."""
    inks = np.full((50, 70, 4), [55, 195, 225, 0], np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(inks, "CMYK").save(file, "JPEG", quality=100)
    return file.getvalue()


def ycck_jpeg():
    """Returns the colour of `cmyk_jpeg` as a YCCK JPEG.

    YCCK stores the first three inks as luminance and chroma. Pillow cannot
    write it. So this function writes a CMYK file, for which Pillow inverts all
    values, and then marks it as YCCK. The mark is the last byte of Adobe's
    marker, 11 bytes after the start of the marker's name.
    """
    inks = PIL.Image.new("RGB", (70, 50), (55, 195, 225)).convert("YCbCr")
    values = 255 - np.asarray(inks)
    values = np.dstack([values, np.zeros((50, 70), np.uint8)])
    file = io.BytesIO()
    PIL.Image.fromarray(values, "CMYK").save(file, "JPEG", quality=100)
    content = bytearray(file.getvalue())
    content[content.index(b"Adobe") + 11] = 2
    return bytes(content)


@pytest.mark.parametrize("function", ALL)
@pytest.mark.parametrize("encode", [cmyk_jpeg, ycck_jpeg])
def test_four_ink_jpeg_has_the_right_colours(function, encode):
    image = function(encode(), [1, 2], SHAPE)[10:20, 10:30]
    np.testing.assert_allclose(
        image, np.broadcast_to([200, 60, 30], image.shape), atol=3
    )


@pytest.mark.parametrize("function", CROPS)
@pytest.mark.parametrize("size", [(1, 60), (60, 1), (1, 1)])
def test_image_one_pixel_wide(function, size):
    image = np.full((*size, 3), [200, 60, 30], np.uint8)
    pixels = crops(function, jpeg(image), 10)
    np.testing.assert_allclose(
        pixels, np.broadcast_to([200, 60, 30], pixels.shape), atol=3
    )


@pytest.mark.parametrize("function", ALL)
def test_undecodable_content_is_an_error(function):
    whole = jpeg(coordinates())
    for content in (whole[: len(whole) // 4], whole[:100], b"no image", b""):
        with pytest.raises(tf.errors.InvalidArgumentError):
            function(content, [1, 2], SHAPE)


@pytest.mark.parametrize("function", CROPS)
@pytest.mark.parametrize("share", [0.5, 0.7, 0.95, 0.999])
def test_jpeg_that_was_cut_is_an_error_whatever_the_crop(function, share):
    """A crop above the cut needs none of the lost part."""
    whole = jpeg(coordinates())
    cut = whole[: int(share * len(whole))]
    for seed in range(20):
        with pytest.raises(tf.errors.InvalidArgumentError):
            function(cut, [seed, 2], SHAPE)


@pytest.mark.parametrize("function", ALL)
def test_bytes_after_the_end_of_a_jpeg_change_nothing(function):
    encoded = jpeg(coordinates())
    np.testing.assert_array_equal(
        function(encoded + b"\0\0", [1, 2], SHAPE),
        function(encoded, [1, 2], SHAPE),
    )


@pytest.mark.parametrize("function", ALL)
def test_bitmap_with_a_palette_is_an_error(function):
    """TensorFlow would decode it to the numbers of the palette."""
    image = PIL.Image.fromarray(coordinates())
    for converted, is_right in (
        (image, True),
        (image.convert("P"), False),
        (image.convert("L"), False),
    ):
        file = io.BytesIO()
        converted.save(file, "BMP")
        if is_right:
            function(file.getvalue(), [1, 2], SHAPE)
            continue
        with pytest.raises(tf.errors.InvalidArgumentError, match="palette"):
            function(file.getvalue(), [1, 2], SHAPE)
