import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image

from curation.errors import ConfigError
from embedders import images
from embedders.images import UndecodableImage, decode
from tests.embedders.images_for_tests import exif, photo, rgb_profile, saved
from trainer import crops
from trainer.crops import BLURS, CropMaker, CropSettings, collate, crop_boxes
from trainer.draws import Purpose, generator
from trainer.masks import MaskSettings, block_masks

SMALL = CropSettings(global_size=32, local_size=14, local_crops=3)
PLAIN = dataclasses.replace(SMALL, flip=0.0)
RATIO = (3 / 4, 4 / 3)


def slow_box(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], numbers: Iterator[float]
) -> list[int]:
    """torchvision's RandomResizedCrop.get_params, of uniform numbers: areas and shapes of ten tries, top, left."""
    tries = [(next(numbers), next(numbers)) for _ in range(10)]
    top, left = next(numbers), next(numbers)
    for area, shape in tries:
        target = width * height * (scale[0] + (scale[1] - scale[0]) * area)
        aspect = math.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * shape)
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return [math.floor(left * (width - w + 1)), math.floor(top * (height - h + 1)), w, h]
    if width / height < ratio[0]:
        w, h = width, round(width / ratio[0])
    elif width / height > ratio[1]:
        w, h = round(height * ratio[1]), height
    else:
        w, h = width, height
    return [(width - w) // 2, (height - h) // 2, w, h]


def boxes_of(settings: CropSettings, key: tuple[int, int], width: int, height: int) -> list[list[int]]:
    rows = generator(key, Purpose.VIEWS).random((2 + settings.local_crops, 36))
    scales = [settings.global_scale] * 2 + [settings.local_scale] * settings.local_crops
    return [slow_box(width, height, each, settings.ratio, iter(row)) for each, row in zip(scales, rows, strict=True)]


def cut(image: Image.Image, box: list[int], size: int) -> np.ndarray:
    left, top, width, height = box
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + width, top + height)))


# --- boxes


@pytest.mark.parametrize("size", [(500, 375), (32, 32), (3, 200), (300, 7), (1, 1), (40, 90)])
@pytest.mark.parametrize("ratio", [RATIO, (1.0, 1.0), (0.2, 0.5)])
def test_boxes_are_those_of_the_loop_of_tries(size: tuple[int, int], ratio: tuple[float, float]) -> None:
    draws = np.random.default_rng(0).random((200, 22))
    scales = np.array([(0.32, 1.0), (0.05, 0.32)] * 100)
    found = crop_boxes(draws, *size, scales, ratio)
    for box, row, scale in zip(found.tolist(), draws, scales, strict=True):
        assert box == slow_box(*size, scale, ratio, iter(row))
        assert box[0] >= 0 and box[1] >= 0 and box[0] + box[2] <= size[0] and box[1] + box[3] <= size[1]


def test_areas_shapes_and_places_are_uniform_in_their_ranges() -> None:
    draws = np.random.default_rng(1).random((4000, 22))
    left, top, width, height = crop_boxes(draws, 4000, 4000, np.array([(0.05, 0.32)] * 4000), RATIO).T
    values = {
        "area": (width * height / 4000**2 - 0.05) / 0.27,
        "shape": np.log(width / height) / (2 * math.log(4 / 3)) + 0.5,
        "left": left / (4000 - width),
        "top": top / (4000 - height),
    }
    for name, value in values.items():
        shares = np.histogram(value, 10, (-0.001, 1.001))[0] / 4000
        assert np.abs(shares - 0.1).max() < 0.025, name
    assert np.abs(np.corrcoef(list(values.values())) - np.eye(4)).max() < 0.06


# --- pixels


@pytest.mark.parametrize("size", [(90, 70), (32, 32), (20, 200)])
def test_crops_are_boxes_of_the_decoded_image_resized(size: tuple[int, int]) -> None:
    data = saved(photo(1, *size), "PNG")
    for place in range(4):
        found = CropMaker(PLAIN)(data, (5, place)).crops
        boxes = boxes_of(PLAIN, (5, place), *size)
        assert [crop.shape for crop in found] == [(32, 32, 3)] * 2 + [(14, 14, 3)] * 3
        for crop, box in zip(found, boxes, strict=True):
            np.testing.assert_array_equal(crop, cut(photo(1, *size), box, len(crop)))


def test_half_of_the_crops_are_flipped_and_otherwise_the_same() -> None:
    data, flipped = saved(photo(2), "PNG"), []
    for place in range(60):
        pairs = zip(CropMaker(SMALL)(data, (0, place)).crops, CropMaker(PLAIN)(data, (0, place)).crops, strict=True)
        for crop, plain in pairs:
            flipped.append(not np.array_equal(crop, plain))
            np.testing.assert_array_equal(crop, plain[:, ::-1] if flipped[-1] else plain)
    assert 0.4 < np.mean(flipped) < 0.6 and np.mean(np.array(flipped).reshape(60, 5).all(axis=1)) < 0.2


@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_crops_lie_in_the_upright_image(orientation: int) -> None:
    data = saved(photo(3, 90, 50), "PNG", exif=exif(orientation))
    image = decode(data)
    for crop, box in zip(CropMaker(PLAIN)(data, (0, 0)).crops, boxes_of(PLAIN, (0, 0), *image.size), strict=True):
        np.testing.assert_array_equal(crop, cut(image, box, len(crop)))


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "CMYK"])
def test_crops_are_rgb_whatever_the_image_is(mode: str) -> None:
    data = saved(photo(1).convert(mode), "TIFF" if mode == "CMYK" else "PNG")
    found = CropMaker(PLAIN)(data, (0, 0)).crops
    for crop, box in zip(found, boxes_of(PLAIN, (0, 0), 96, 72), strict=True):
        assert crop.shape[2] == 3 and crop.dtype == np.uint8
        assert np.abs(crop - cut(decode(data), box, len(crop)).astype(int)).max() <= (8 if mode == "CMYK" else 1)


def test_colours_are_brought_to_srgb() -> None:
    plain, profiled = (saved(photo(1), "PNG", **o) for o in ({}, {"icc_profile": rgb_profile(1.0)}))
    before, after = (CropMaker(PLAIN)(data, (0, 0)).crops[0].astype(float) for data in (plain, profiled))
    assert (after - before).mean() > 20  # linear light looks brighter than its numbers say
    box = boxes_of(PLAIN, (0, 0), 96, 72)[0]
    np.testing.assert_allclose(after, cut(decode(profiled), box, 32), atol=12)


# --- reduced JPEGs


@pytest.fixture
def reductions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The reductions at which CropMaker decodes from now on."""
    found = []

    def watched(*arguments: object) -> images.Picture:
        picture = images.decode_picture(*arguments)
        found.append(picture.reduction)
        return picture

    monkeypatch.setattr(crops, "decode_picture", watched)
    return found


@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_jpegs_are_reduced_as_far_as_every_crop_keeps_its_pixels(orientation: int, reductions: list[int]) -> None:
    data = saved(photo(4, 481, 355), quality=92, exif=exif(orientation))
    image = decode(data)
    for place in range(12):
        found = CropMaker(PLAIN)(data, (1, place)).crops
        boxes = boxes_of(PLAIN, (1, place), *image.size)
        room = min(min(box[2:]) / len(crop) for crop, box in zip(found, boxes, strict=True))
        assert reductions[-1] <= room < 2 * reductions[-1] or reductions[-1] == 8 <= room
        for crop, box in zip(found, boxes, strict=True):
            whole = cut(image, box, len(crop)).astype(int)
            assert np.abs(crop - whole).mean() < 1.5
    assert len(set(reductions)) > 1


def test_only_jpegs_with_pixels_to_spare_are_reduced(reductions: list[int]) -> None:
    CropMaker(PLAIN)(saved(photo(4, 40, 40)), (0, 0))
    CropMaker(PLAIN)(saved(photo(4, 481, 355), "PNG"), (0, 0))
    assert reductions == [1, 1]


def test_images_are_opened_once(monkeypatch: pytest.MonkeyPatch) -> None:
    opened, plainly = [], Image.open
    monkeypatch.setattr(Image, "open", lambda *a, **k: opened.append(1) or plainly(*a, **k))
    CropMaker(SMALL)(saved(photo(4, 300, 200)), (0, 0))
    assert len(opened) == 1


@pytest.mark.parametrize("data", [b"", b"no image", saved(photo(1))[:900], saved(photo(1), "PNG")[:900]])
def test_bytes_that_are_no_image_raise_the_error_of_the_decoder(data: bytes) -> None:
    with pytest.raises(UndecodableImage, match=r"^(unknown image format|truncated|corrupt)$"):
        CropMaker(SMALL)(data, (0, 0))


def test_a_mistake_in_choosing_the_size_is_not_blamed_on_the_image() -> None:
    with pytest.raises(ZeroDivisionError):
        images.decode_picture(saved(photo(1)), lambda width, height: width // 0)


# --- colours


def colors_of(settings: CropSettings, places: int = 300) -> np.ndarray:
    """[crops, places, 11]"""
    maker, data = CropMaker(settings), saved(photo(0, 8, 8), "PNG")
    return np.stack([maker(data, (3, place)).colors for place in range(places)], axis=1)


@pytest.mark.parametrize("preset", ["dino", "dinov2"])
def test_colours_have_their_probabilities_and_ranges(preset: str) -> None:
    colors = colors_of(dataclasses.replace(SMALL, blur=BLURS[preset]))
    first, second, others = BLURS[preset]
    jittered = (colors[..., :4] != (1, 1, 1, 0)).any(axis=2)
    assert np.abs(jittered.mean(axis=1) - 0.8).max() < 0.1
    assert np.abs(colors[..., 4].mean(axis=1) - 0.2).max() < 0.1
    assert np.abs((colors[..., 5] > 0).mean(axis=1) - [first, second, others, others, others]).max() < 0.1
    assert np.abs(colors[..., 6].mean(axis=1) - [0, 0.2, 0, 0, 0]).max() < 0.1
    assert (colors[..., 6].mean(axis=1) > 0).tolist() == [False, True, False, False, False]
    for column, (least, most) in enumerate([(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]):
        values = (colors[..., column][jittered] - least) / (most - least)
        assert np.abs(np.histogram(values, 5, (-1e-6, 1 + 1e-6))[0] / len(values) - 0.2).max() < 0.05
    sigma = (colors[..., 5][colors[..., 5] > 0] - 0.1) / 1.9
    assert np.abs(np.histogram(sigma, 5, (-1e-6, 1 + 1e-6))[0] / len(sigma) - 0.2).max() < 0.05


def test_orders_are_all_permutations_alike() -> None:
    orders = colors_of(SMALL, 480)[..., 7:].reshape(-1, 4)
    found, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(found) == 24 and (np.sort(found, axis=1) == [0, 1, 2, 3]).all()
    assert counts.min() > 50 and counts.max() < 160  # 100 expected


def test_sharp_crops_are_not_blurred() -> None:
    assert (colors_of(dataclasses.replace(SMALL, blur=BLURS["sharp"]), 20)[..., 5] == 0).all()


def test_what_is_never_applied_leaves_colours_alone() -> None:
    settings = dataclasses.replace(SMALL, jitter=0.0, gray=0.0, blur=(0.0, 0.0, 0.0), solarize=0.0)
    assert (colors_of(settings, 20)[..., :7] == (1, 1, 1, 0, 0, 0, 0)).all()


# --- keys and batches


def test_views_are_a_function_of_the_key() -> None:
    data = saved(photo(5, 300, 200))

    def views(seed: int, place: int, settings: CropSettings = SMALL) -> bytes:
        found = CropMaker(settings)(data, (seed, place))
        return b"".join(crop.tobytes() for crop in found.crops[:5]) + found.colors[:5].tobytes()

    assert views(1, 2) == views(1, 2)
    assert len({views(1, 2), views(1, 3), views(2, 2), views(2, 1), views(-1, 2), views(1, 2**40 + 2)}) == 6


def test_a_batch_is_crop_major() -> None:
    maker, files = CropMaker(SMALL), [saved(photo(n, 60, 50), "PNG") for n in range(3)]
    views = [maker(data, (0, place)) for place, data in enumerate(files)]
    masks = block_masks(6, (4, 4), MaskSettings(), (0, 0))
    batch = collate(views, ["a", "b", "c"], masks)
    assert batch.image_ids == ["a", "b", "c"] and batch.masks is masks
    assert batch.global_crops.shape == (6, 3, 32, 32) and batch.local_crops.shape == (9, 3, 14, 14)
    assert batch.global_crops.dtype == batch.local_crops.dtype == torch.uint8
    for crop, of_image in [(crop, image) for crop in range(5) for image in range(3)]:
        part, colors = (
            (batch.global_crops, batch.global_colors) if crop < 2 else (batch.local_crops, batch.local_colors)
        )
        row = 3 * (crop if crop < 2 else crop - 2) + of_image
        np.testing.assert_array_equal(part[row].permute(1, 2, 0), views[of_image].crops[crop])
        values = torch.cat([field[row].float().reshape(-1) for field in colors])
        expected = views[of_image].colors[crop]
        order, others = values[4:8], torch.cat([values[:4], values[8:]])
        assert order.tolist() == expected[7:].tolist() and others.tolist() == expected[:7].tolist()


def test_a_batch_has_the_types_of_the_step() -> None:
    maker = CropMaker(SMALL)
    batch = collate([maker(saved(photo(1)), (0, 0))] * 2, ["a", "b"], None)
    for colors, count in ((batch.global_colors, 4), (batch.local_colors, 6)):
        assert {field.dtype for field in colors[:4]} | {colors.sigma.dtype} == {torch.float32}
        assert (colors.order.dtype, colors.gray.dtype, colors.solarize.dtype) == (torch.int64, torch.bool, torch.bool)
        assert colors.order.shape == (count, 4) and all(field.shape == (count,) for field in (*colors[:4], *colors[5:]))
    assert batch.masks is None


@pytest.mark.parametrize(
    "values",
    [
        {"global_size": 4},
        {"local_crops": 0},
        {"global_scale": (0.5, 0.3)},
        {"local_scale": (0.1, 1.1)},
        {"ratio": (0.0, 1.0)},
        {"sigma": (0.0, 2.0)},
        {"flip": 1.5},
        {"blur": (0.5, 0.5)},
        {"blur": (0.5, 0.5, 2.0)},
        {"hue": 0.6},
        {"contrast": -0.1},
    ],
)
def test_settings_outside_their_range_are_refused(values: dict) -> None:
    with pytest.raises(ConfigError, match=r"^crops: ") as error:
        CropSettings(**values)
    assert next(iter(values)) in str(error.value) or "strengths" in str(error.value)
