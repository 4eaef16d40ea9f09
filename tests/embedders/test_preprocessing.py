"""Preprocessing against resizing everything and cropping, and against the filters' definitions in float64."""

import numpy as np
import pytest
from PIL import Image

from embedders.images import UndecodableImage, decode
from embedders.preprocessing import MAX_ELONGATION, Preprocessing
from tests.embedders.images_for_tests import exif, photo, png_file, rgb_profile, saved, stored_as, turned_upright

NEAREST, LANCZOS, BILINEAR, BICUBIC, BOX, HAMMING = range(6)
MEAN = (0.0, 0.0, 0.0)


def prepared(
    data: bytes, resize: tuple[int, int] | int, crop: tuple[int, int] | None = None, resample: int = BICUBIC
) -> np.ndarray:
    return Preprocessing(resize, crop, resample, MEAN, MEAN).pixels(data)


def noise(draw: np.random.Generator, width: int, height: int, low: int = 0, high: int = 255) -> Image.Image:
    """The hardest image to resize: every sample is one of two extremes."""
    return Image.fromarray(np.where(draw.random((height, width, 3)) < 0.5, low, high).astype(np.uint8))


def resize_then_crop(
    image: Image.Image, resize: tuple[int, int] | int, crop: tuple[int, int], resample: int
) -> np.ndarray:
    """As torchvision and transformers: the whole image by the shorter side or to a shape, then the centre of that."""
    short, long = min(image.size), max(image.size)
    if isinstance(resize, int):
        other = int(resize * long / short)
        size = (resize, other) if image.width <= image.height else (other, resize)
    else:
        size = resize[::-1]
    whole = np.asarray(image.resize(size, Image.Resampling(resample)))
    top, left = (size[1] - crop[0]) // 2, (size[0] - crop[1]) // 2
    return whole[top : top + crop[0], left : left + crop[1]]


def random_cases(seed: int, count: int) -> list[tuple[int, int, tuple[int, int] | int, tuple[int, int]]]:
    """(width, height, resize, crop) over sizes from 1 to 600 and aspect ratios that can still be resized whole."""
    draw, cases = np.random.default_rng(seed), []
    while len(cases) < count:
        width, height = (int(side) for side in np.exp(draw.uniform(0, np.log(600), 2)))
        resize: tuple[int, int] | int = int(draw.integers(16, 200))
        if max(width, height) * resize * resize > 4_000_000 * min(width, height):
            continue
        if draw.random() < 0.3:
            resize = (int(draw.integers(16, 200)), int(draw.integers(16, 200)))
        most = (resize, resize) if isinstance(resize, int) else resize
        cases.append((width, height, resize, (int(draw.integers(1, most[0] + 1)), int(draw.integers(1, most[1] + 1)))))
    return cases


@pytest.mark.parametrize("resample", [BILINEAR, HAMMING, BICUBIC, LANCZOS])
@pytest.mark.parametrize("seed", range(3))
def test_one_resize_of_the_centre_is_resizing_all_and_cropping(resample: int, seed: int) -> None:
    """To one level. Filters that overshoot are cut off at black and white between Pillow's two passes, the order of
    which depends on the size; so they get an image that does not reach there, and a level for rounding twice."""
    draw = np.random.default_rng(seed)
    overshoots = resample in (BICUBIC, LANCZOS)
    total = 0.0
    for width, height, resize, crop in random_cases(seed, 40):
        image = noise(draw, width, height, *((70, 185) if overshoots else (0, 255)))
        found = prepared(saved(image, "PNG", compress_level=0), resize, crop, resample).astype(int)
        difference = np.abs(found - resize_then_crop(image, resize, crop, resample))
        assert difference.max() <= (2 if overshoots else 1), (width, height, resize, crop)
        total += difference.mean()
    assert total / 40 < 0.15


@pytest.mark.parametrize("resample", [BILINEAR, BICUBIC, LANCZOS])
def test_photographs_differ_by_little_from_resizing_all_and_cropping(resample: int) -> None:
    for seed, size in enumerate([(500, 375), (375, 500), (333, 500), (640, 213), (100, 80)]):
        image = photo(seed, *size)
        found = prepared(saved(image, "PNG"), 256, (224, 224), resample).astype(int)
        difference = np.abs(found - resize_then_crop(image, 256, (224, 224), resample))
        assert difference.mean() < 0.1 and difference.max() <= 3


KERNELS = {
    BILINEAR: (1, lambda x: 1 - x),
    BICUBIC: (2, lambda x: np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2)),
}


def by_definition(line: np.ndarray, whole: int, crop: int, resample: int) -> np.ndarray:
    """Pixels [S, ...] resized along the first axis to `whole`, of which only the central `crop` are computed."""
    support, kernel = KERNELS[resample]
    step = len(line) / whole
    stretch = max(step, 1.0)
    rows = []
    for place in range((whole - crop) // 2, (whole - crop) // 2 + crop):
        centre = (place + 0.5) * step
        first, last = max(0, int(centre - support * stretch) - 1), min(len(line), int(centre + support * stretch) + 2)
        away = np.abs(np.arange(first, last) + 0.5 - centre) / stretch
        weights = np.where(away < support, kernel(away), 0)
        rows.append(np.tensordot(weights / weights.sum(), line[first:last], axes=1))
    return np.stack(rows)


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (65_535, 1), (9_000, 3), (5, 7_001), (1, 1), (3, 2)])
@pytest.mark.parametrize("resample", [BILINEAR, BICUBIC])
def test_very_long_and_very_small_images_have_one_result(size: tuple[int, int], resample: int) -> None:
    """Resized whole, 20,000 x 1 would take 5,120,000 x 256 pixels; the centre is thinner than a pixel."""
    draw = np.random.default_rng(size[0])
    image = noise(draw, *size, 60, 195)
    found = prepared(saved(image, "PNG"), 256, (224, 196), resample)
    values = np.asarray(image, dtype=float)
    whole_width, whole_height = (int(256 * side / min(size)) for side in size)
    across = by_definition(values.transpose(1, 0, 2), whole_width, 196, resample).transpose(1, 0, 2)
    expected = by_definition(across, whole_height, 224, resample)
    assert np.abs(found - np.clip(expected, 0, 255)).max() <= 2.5
    assert np.abs(found - np.clip(expected, 0, 255)).mean() < 0.6


def test_squeezing_takes_the_whole_image() -> None:
    for seed, size in enumerate([(500, 375), (40, 300), (64, 64), (3, 1)]):
        image = photo(seed, *size)
        for resample in (BILINEAR, BICUBIC):
            found = prepared(saved(image, "PNG"), (64, 96), None, resample)
            np.testing.assert_array_equal(found, np.asarray(image.resize((96, 64), Image.Resampling(resample))))


def test_nothing_is_resampled_where_the_size_fits() -> None:
    image = photo(1, 96, 72)
    np.testing.assert_array_equal(prepared(saved(image, "PNG"), (72, 96)), np.asarray(image))
    np.testing.assert_array_equal(prepared(saved(image, "PNG"), 72, (50, 60)), np.asarray(image)[11:61, 18:78])


def test_pixels_are_a_new_contiguous_array() -> None:
    for data in (saved(photo(1)), saved(photo(1).convert("L")), saved(photo(1, 64, 64), "PNG")):
        for resize, crop in ((40, (32, 24)), ((64, 64), None), (48, None)):
            found = prepared(data, resize, crop)
            assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3
            assert found.flags.c_contiguous and found.flags.writeable
            found[:] = 0
            assert prepared(data, resize, crop).any()


def test_shapes() -> None:
    def shape(resize: tuple[int, int] | int, crop: tuple[int, int] | None) -> tuple[int, int, int] | None:
        return Preprocessing(resize, crop, BICUBIC, MEAN, MEAN).shape

    assert shape(256, (224, 196)) == (224, 196, 3)
    assert shape((320, 300), None) == (320, 300, 3)
    assert shape((320, 300), (224, 196)) == (224, 196, 3)
    assert shape(288, None) is None


@pytest.mark.parametrize(
    ("resize", "crop"), [(20, (24, 20)), (20, (20, 24)), ((20, 40), (24, 20)), ((40, 20), (20, 24))]
)
def test_crops_larger_than_the_image_are_refused(resize: tuple[int, int] | int, crop: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="crops"):
        Preprocessing(resize, crop, BICUBIC, MEAN, MEAN)


def test_images_may_keep_their_own_shape() -> None:
    draw = np.random.default_rng(0)
    for _ in range(30):
        short, ratio = int(draw.integers(5, 120)), draw.uniform(1, 3.9)
        size = (short, int(short * ratio))[:: draw.choice([-1, 1])]
        image = noise(draw, *size)
        found = prepared(saved(image, "PNG"), 48, None, BILINEAR)
        long = int(48 * max(size) / min(size))
        assert found.shape == ((48, long, 3) if size[0] > size[1] else (long, 48, 3))
        np.testing.assert_array_equal(found, np.asarray(image.resize(found.shape[1::-1], Image.Resampling.BILINEAR)))


def test_images_that_keep_their_shape_must_not_be_too_elongated() -> None:
    assert MAX_ELONGATION == 4
    assert prepared(saved(photo(1, 400, 100), "PNG"), 48).shape == (48, 192, 3)
    assert prepared(saved(photo(1, 100, 400), "PNG"), 48).shape == (192, 48, 3)
    for size in ((410, 100), (100, 410), (20_000, 1), (1, 20_000)):
        with pytest.raises(UndecodableImage, match=r"^too elongated$"):
            prepared(saved(Image.new("RGB", size), "PNG"), 48)
        assert prepared(saved(Image.new("RGB", size), "PNG"), 48, (48, 48)).shape == (48, 48, 3)


def test_the_shape_is_that_of_the_image_before_reducing() -> None:
    """3001 x 2001 at half size has 1501 x 1001 pixels, of which the last are half empty: another ratio."""
    for size in ((1001, 667), (667, 1001), (803, 401)):
        whole = prepared(saved(photo(1, *size), "PNG"), 40)
        reduced = prepared(saved(photo(1, *size)), 40)
        assert decode(saved(photo(1, *size)), min_side=80).width < size[0]
        assert reduced.shape == whole.shape


# --- JPEG


def detailed(seed: int, width: int, height: int) -> Image.Image:
    """Texture down to a few pixels, as photographs have; `photo` is smooth at this size."""
    grain = np.random.default_rng(seed).normal(0, 25, (height // 3, width // 3, 1)).repeat(3, axis=2)
    fine = Image.fromarray(np.clip(128 + grain, 0, 255).astype(np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    return Image.blend(photo(seed, width, height), fine, 0.4)


@pytest.mark.parametrize("size", [(1030, 777), (777, 1030), (1031, 1017), (523, 517)])
@pytest.mark.parametrize("crop", [(56, 56), None])
def test_reduced_jpegs_give_almost_the_same_pixels(size: tuple[int, int], crop: tuple[int, int] | None) -> None:
    """All of these are decoded at a fraction. Were the last, half empty column resized too, all would be shifted."""
    data = saved(detailed(1, *size), quality=90)
    assert decode(data, min_side=128).size != size
    found = prepared(data, 64, crop)
    expected = prepared(saved(decode(data), "PNG"), 64, crop)
    difference = np.abs(found.astype(int) - expected)
    assert difference.mean() < 0.6 and np.percentile(difference, 99) <= 4


def test_jpegs_are_not_reduced_below_twice_the_size_wanted() -> None:
    data = saved(detailed(2, 511, 600), quality=90)
    whole = saved(decode(data), "PNG")
    np.testing.assert_array_equal(prepared(data, 128, (112, 112)), prepared(whole, 128, (112, 112)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_gives_the_pixels_of_the_turned_image(orientation: int) -> None:
    upright = np.asarray(detailed(3, 211, 153))
    stored = Image.fromarray(stored_as(upright, orientation))
    expected = prepared(saved(Image.fromarray(upright), "PNG"), 64, (56, 48))
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        found = prepared(saved(stored, kind, exif=exif(orientation), **options), 64, (56, 48))
        np.testing.assert_array_equal(found, expected)
    jpeg = saved(stored, exif=exif(orientation))
    np.testing.assert_array_equal(prepared(jpeg, 100, (90, 80)), prepared(saved(decode(jpeg), "PNG"), 100, (90, 80)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_reduced_jpegs_are_the_same_however_they_are_turned(orientation: int) -> None:
    """The padding of the last column and row is left out on whichever side the turn brings it."""
    upright = np.asarray(detailed(4, 1031, 777))
    stored = Image.fromarray(stored_as(upright, orientation))
    plain, turned = saved(stored, quality=90), saved(stored, exif=exif(orientation), quality=90)
    expected = turned_upright(prepared(plain, (64, 64), None, BILINEAR), orientation)
    difference = np.abs(prepared(turned, (64, 64), None, BILINEAR).astype(int) - expected)
    assert difference.max() <= 1
    crop = (56, 48) if orientation < 5 else (48, 56)
    expected = turned_upright(prepared(plain, 64, crop, BILINEAR), orientation)
    difference = np.abs(prepared(turned, 64, (56, 48), BILINEAR).astype(int) - expected)
    assert difference.max() <= 1


def test_the_longer_side_of_a_shape_decides_how_far_jpegs_are_reduced() -> None:
    data = saved(detailed(5, 511, 511), quality=90)
    for shape in ((32, 128), (128, 32)):
        np.testing.assert_array_equal(prepared(data, shape), prepared(saved(decode(data), "PNG"), shape))


# --- what else decode does, seen through the resize


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_colours_may_be_brought_to_srgb_after_resizing(mode: str) -> None:
    image, profile = photo(5, 200, 160).convert(mode), rgb_profile(1.8)
    data = saved(image, "PNG", icc_profile=profile)
    found = prepared(data, 64, (56, 56)).astype(int)
    expected = prepared(saved(decode(data), "PNG"), 64, (56, 56))
    assert np.abs(found - expected).mean() < 0.6
    assert np.abs(found - prepared(saved(image, "PNG"), 64, (56, 56))).mean() > 5


@pytest.mark.parametrize("data", [b"", b"<html>", png_file(20_000, 20_000, 8, 2)])
def test_what_cannot_be_decoded_is_refused(data: bytes) -> None:
    with pytest.raises(UndecodableImage):
        prepared(data, 64)
