"""What happens to the colours of crops, in batches on the device: uint8 crops in, a network's input out.

The order is that of the published augmentations: colour jitter (brightness, contrast, saturation and hue, in an order
of each crop's own), grayscale, Gaussian blur, solarization, normalisation. Each is defined as in torchvision, on floats
of 0 to 1, clamped after each part of the jitter; the published code works on bytes and rounds after each.

Nothing here depends on the values of the settings, neither shapes nor what runs, so a GPU is never waited for; crops to
which a step does not apply get it with neutral settings.
"""

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

from embedders.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from trainer.batch import Photometric

BLUR_REACH = 4
"""Pixels to either side that the blur's kernel of 9 covers."""
MIN_SIDE = BLUR_REACH + 1
"""Pixels that a crop's sides must have, for edges are reflected."""
SOLARIZE_FROM = 127.5 / 255
"""What would round to 128 as a byte, the published threshold."""
CPU_CHUNK, CHUNK = 1 << 17, 1 << 22
"""Pixels done at once: on a CPU what its caches hold, elsewhere what takes some 300 MB."""

_GRAY = (0.2989, 0.587, 0.114)
_CONTRAST, _SATURATION, _HUE = 1, 2, 3  # in Photometric.order; brightness is 0


@torch.no_grad()
def augment(crops: Tensor, colors: Photometric) -> Tensor:
    """Crops altered and normalised with ImageNet's mean and standard deviation.

    Args:
        crops: uint8 [n, 3, H, W], H and W at least MIN_SIDE.
        colors: of the n crops, on the same device.

    Returns:
        float32 [n, 3, H, W].

    Raises:
        ValueError: crops too small to blur.
    """
    if min(crops.shape[2:]) < MIN_SIDE:
        raise ValueError(f"crops of {crops.shape[2]} x {crops.shape[3]} pixels are too small to blur")
    step = max(1, (CPU_CHUNK if crops.device.type == "cpu" else CHUNK) // (crops.shape[2] * crops.shape[3]))
    out = torch.empty(crops.shape, dtype=torch.float32, device=crops.device)
    with torch.autocast(crops.device.type, enabled=False):
        for start in range(0, len(crops), step):
            part = slice(start, start + step)
            out[part] = _augmented(crops[part], Photometric(*(each[part] for each in colors)))
    return out


def _augmented(crops: Tensor, colors: Photometric) -> Tensor:
    # Choices are made by arithmetic with 0 and 1: torch.where is 40 times slower than a product on a CPU.
    x = crops.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    x = _jittered(x, colors)
    x.lerp_(_gray(x), _each(colors.gray.float()))
    x = _blurred(x, colors.sigma)
    x.lerp_(1 - x, (x >= SOLARIZE_FROM) * _each(colors.solarize.float()))
    for channel, mean, std in zip(x.unbind(dim=1), IMAGENET_MEAN, IMAGENET_STD, strict=True):
        channel.sub_(mean).div_(std)  # by numbers: to bring a tensor of them to a GPU would wait for it
    return x


def _each(values: Tensor) -> Tensor:
    """Values [n] of crops, to be broadcast over [n, channels, H, W]."""
    return values[:, None, None, None]


def _gray(x: Tensor) -> Tensor:
    """Luma (ITU-R BT.601) of [n, 3, H, W] as [n, 1, H, W]."""
    red, green, blue = x[:, 0:1], x[:, 1:2], x[:, 2:3]
    return (red * _GRAY[0]).add_(green, alpha=_GRAY[1]).add_(blue, alpha=_GRAY[2])


def _jittered(x: Tensor, colors: Photometric) -> Tensor:
    """Brightness, contrast, saturation and hue in each crop's order.

    Hue, which costs as much as the others together, is done once for all crops: the three others are gone through
    before it and again after it, each crop taking part in the one or the other. Changes x.
    """
    place_of_hue = (colors.order == _HUE).int().argmax(dim=1)
    for place in range(3):
        _blended(x, colors, place, place < place_of_hue)
    x = _hue_turned(x, colors.hue)
    for place in range(1, 4):
        _blended(x, colors, place, place > place_of_hue)
    return x


def _blended(x: Tensor, colors: Photometric, place: int, takes_part: Tensor) -> None:
    """Brightness, contrast or saturation in place, whatever stands at this place of a crop's order.

    All are f x + (1 - f) y, clamped, where y is black, the mean gray of the image, or the gray of the pixel.
    """
    kind = colors.order[:, place]
    factors = torch.stack([colors.brightness, colors.contrast, colors.saturation], dim=1)
    factor = factors.gather(1, kind.clamp(max=_SATURATION)[:, None])[:, 0]
    factor = torch.where(takes_part, factor, 1.0)
    gray = _gray(x)
    mean = gray.mean(dim=(1, 2, 3), keepdim=True) * _each((1 - factor) * (kind == _CONTRAST))
    gray.mul_(_each((1 - factor) * (kind == _SATURATION))).add_(mean)
    x.mul_(_each(factor)).add_(gray).clamp_(0, 1)


def _hue_turned(x: Tensor, turns: Tensor) -> Tensor:
    """Colours turned in HSV by `turns` [n] of the circle; value and saturation stay.

    With hue h of 0 to 6, a channel is min + (max - min) t(h), t a trapezium around the channel's own hue.
    """
    red, green, blue = x[:, 0:1], x[:, 1:2], x[:, 2:3]
    most, least = x.amax(dim=1, keepdim=True), x.amin(dim=1, keepdim=True)
    chroma = most - least
    divisor = chroma.clamp(min=1e-9)  # of grays, whose differences are 0
    hue = torch.lerp(4 + (red - green) / divisor, 2 + (blue - red) / divisor, (most == green).float())
    hue = torch.lerp(hue, (green - blue) / divisor, (most == red).float()).add_(6 * _each(turns))
    hue -= 6 * torch.floor(hue / 6)
    trapezia = ((hue - 3).abs_() - 1, 2 - (hue - 2).abs_(), 2 - (hue - 4).abs_())
    return torch.cat([torch.addcmul(least, chroma, trapezium.clamp_(0, 1)) for trapezium in trapezia], dim=1)


def _blurred(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur, down and then across, edges reflected (the edge pixel itself once).

    Taps are exp(-d^2 / 2 sigma^2) at distances d up to BLUR_REACH, divided by their sum; 1, 0, ... where sigma is 0.
    """
    distance = torch.arange(BLUR_REACH + 1, device=x.device)
    taps = torch.exp(-0.5 * (distance / sigma.clamp(min=1e-3)[:, None]) ** 2)
    taps = taps / (2 * taps.sum(dim=1, keepdim=True) - 1)  # the tap at distance 0 counts once
    weights = [_each(tap) for tap in taps.unbind(dim=1)]
    return _blurred_along(_blurred_along(x, 2, weights), 3, weights)


def _blurred_along(x: Tensor, dim: int, weights: list[Tensor]) -> Tensor:
    """Sums of shifted images: on a CPU several times faster than a grouped convolution."""
    around = (0, 0, BLUR_REACH, BLUR_REACH) if dim == 2 else (BLUR_REACH, BLUR_REACH, 0, 0)
    padded = F.pad(x, around, mode="reflect")
    out = x * weights[0]
    for distance, weight in enumerate(weights[1:], start=1):
        before, after = (padded.narrow(dim, BLUR_REACH + shift, x.shape[dim]) for shift in (-distance, distance))
        out.addcmul_(before + after, weight)
    return out
