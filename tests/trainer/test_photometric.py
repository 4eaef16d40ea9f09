import colorsys
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer import photometric
from trainer.batch import Photometric
from trainer.photometric import augment

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def neutral(n: int) -> Photometric:
    ones, no = torch.ones(n), torch.zeros(n, dtype=torch.bool)
    return Photometric(ones, ones, ones, torch.zeros(n), torch.arange(4).repeat(n, 1), no, torch.zeros(n), no)


def drawn(seed: int, n: int) -> Photometric:
    random = np.random.default_rng(seed)
    factors = random.uniform(0.2, 1.9, (3, n))
    numbers = [*factors, random.uniform(-0.5, 0.5, n), random.random((n, 4)).argsort(axis=1), random.random(n) < 0.3]
    numbers += [random.uniform(0.1, 2, n) * (random.random(n) < 0.6), random.random(n) < 0.4]
    return Photometric(*(torch.tensor(each, dtype=torch.float32 if each.dtype == float else None) for each in numbers))


def crops_of(seed: int, n: int, height: int, width: int) -> Tensor:
    """Noise with some pure gray, black, white and coloured pixels, whose hue is a matter of ties."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (n, height, width, 3), dtype=np.uint8)
    pixels[:, :2] = random.choice(np.array([0, 255], dtype=np.uint8), (n, 2, width, 3))
    pixels[:, 2] = pixels[:, 2, :, :1]
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def gray_of(image: np.ndarray) -> np.ndarray:
    return 0.2989 * image[..., 0] + 0.587 * image[..., 1] + 0.114 * image[..., 2]


def jittered(image: np.ndarray, factors: list[float], order: list[int]) -> np.ndarray:
    """An image [H, W, 3] of 0 to 1, one operation after the other."""
    for operation in order:
        factor = factors[operation]
        if operation == HUE:
            hsv = [colorsys.rgb_to_hsv(*pixel) for pixel in image.reshape(-1, 3)]
            turned = [colorsys.hsv_to_rgb((hue + factor) % 1, saturation, value) for hue, saturation, value in hsv]
            image = np.array(turned).reshape(image.shape)
        else:
            other = {BRIGHTNESS: 0.0, CONTRAST: gray_of(image).mean(), SATURATION: gray_of(image)[..., None]}[operation]
            image = np.clip(factor * image + (1 - factor) * other, 0, 1)
    return image


def blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    """All 81 taps of the kernel at every pixel, indices reflected by hand."""
    height, width, _ = image.shape
    weights = {(y, x): math.exp(-(y * y + x * x) / (2 * sigma**2)) for y in range(-4, 5) for x in range(-4, 5)}
    out = np.zeros_like(image)
    for row in range(height):
        for column in range(width):
            for (y, x), weight in weights.items():
                at = row + y, column + x
                at = -at[0] if at[0] < 0 else at[0], -at[1] if at[1] < 0 else at[1]
                at = 2 * height - 2 - at[0] if at[0] >= height else at[0], at[1]
                at = at[0], 2 * width - 2 - at[1] if at[1] >= width else at[1]
                out[row, column] += weight * image[at]
    return out / sum(weights.values())


def slowly(crop: Tensor, colors: list[Tensor]) -> np.ndarray:
    """One crop [3, H, W], step by step; returns [3, H, W]."""
    *factors, order, gray, sigma, solarize = (each.tolist() for each in colors)
    image = jittered(crop.permute(1, 2, 0).numpy() / 255, factors, order)
    if gray:
        image = gray_of(image)[..., None].repeat(3, axis=-1)
    if sigma > 0:
        image = blurred(image, sigma)
    if solarize:
        image = np.where(image >= 127.5 / 255, 1 - image, image)
    return ((image - MEAN) / STD).transpose(2, 0, 1)


@pytest.mark.parametrize("seed", range(4))
def test_crops_are_altered_as_by_the_formulas_in_their_own_order(seed: int) -> None:
    n, height, width = 6, 9 + seed, 11
    crops, colors = crops_of(seed, n, height, width), drawn(seed, n)
    found = augment(crops, colors)
    assert found.shape == (n, 3, height, width) and found.dtype == torch.float32 and found.is_contiguous()
    for index in range(n):
        expected = slowly(crops[index], [each[index] for each in colors])
        torch.testing.assert_close(found[index], torch.from_numpy(expected).float(), atol=3e-5, rtol=0)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2], [2, 0, 3, 1]])
@pytest.mark.parametrize("operation", range(4))
def test_each_operation_of_the_jitter_alone(operation: int, order: list[int]) -> None:
    crops, colors = crops_of(7, 2, 6, 7), neutral(2)
    factor = [1.7, 0.3, 1.9, -0.37][operation]
    values = {Photometric._fields[operation]: torch.full((2,), factor), "order": torch.tensor([order, order])}
    colors = colors._replace(**values)
    factors = [1.0, 1.0, 1.0, 0.0]
    factors[operation] = factor
    for crop, found in zip(crops, augment(crops, colors), strict=True):
        image = crop.permute(1, 2, 0).numpy() / 255
        expected = (jittered(image, factors, order) - MEAN) / STD
        np.testing.assert_allclose(found.permute(1, 2, 0), expected, atol=2e-5)
        assert np.abs(expected - (image - MEAN) / STD).mean() > 0.05


def test_neutral_settings_only_normalise() -> None:
    crops = crops_of(0, 3, 12, 10)
    expected = (crops.permute(0, 2, 3, 1).numpy() / 255 - MEAN) / STD
    np.testing.assert_allclose(augment(crops, neutral(3)).permute(0, 2, 3, 1), expected, atol=3e-6)


def test_bytes_from_128_on_are_solarized() -> None:
    crops = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    found = augment(crops, neutral(1)._replace(solarize=torch.tensor([True])))[0, 0] * STD[0] + MEAN[0]
    levels = np.arange(256)
    expected = np.where(levels >= 128, 255 - levels, levels).reshape(16, 16)
    np.testing.assert_allclose(found * 255, expected, atol=1e-3)


@pytest.mark.parametrize("chunk", [1, 200, 1000])
def test_crops_together_are_crops_one_by_one(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    crops, colors = crops_of(3, 7, 12, 10), drawn(3, 7)
    alone = torch.cat([augment(crops[i : i + 1], Photometric(*(each[i : i + 1] for each in colors))) for i in range(7)])
    monkeypatch.setattr(photometric, "CPU_CHUNK", chunk)
    torch.testing.assert_close(augment(crops, colors), alone, atol=1e-6, rtol=0)
    turned = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    shuffled = augment(crops[turned], Photometric(*(each[turned] for each in colors)))
    torch.testing.assert_close(shuffled, alone[turned], atol=1e-6, rtol=0)


def test_crops_are_read_in_either_memory_order_and_not_changed() -> None:
    crops, colors = crops_of(1, 4, 8, 8), drawn(1, 4)
    assert not crops.is_contiguous()
    before, settings = crops.clone(), [each.clone() for each in colors]
    assert torch.equal(augment(crops, colors), augment(crops.contiguous(), colors))
    assert torch.equal(crops, before) and all(map(torch.equal, colors, settings))


def test_autocast_does_not_reach_the_pixels_and_no_gradient_is_kept() -> None:
    crops, colors = crops_of(2, 3, 8, 8), drawn(2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        found = augment(crops, colors)
    assert torch.equal(found, augment(crops, colors)) and not found.requires_grad


def test_nothing_asks_for_the_value_of_a_tensor() -> None:
    """For which a GPU would have to be waited for; tensors of the device "meta" have none."""
    crops, colors = crops_of(2, 3, 8, 9).to("meta"), Photometric(*(each.to("meta") for each in drawn(2, 3)))
    assert photometric._augmented(crops, colors).shape == (3, 3, 8, 9)


def test_crops_too_small_to_blur_are_refused() -> None:
    assert augment(crops_of(0, 1, 5, 5), drawn(0, 1)).isfinite().all()
    with pytest.raises(ValueError, match=r"^crops of 4 x 6 pixels are too small to blur$"):
        augment(crops_of(0, 1, 4, 6), drawn(0, 1))
