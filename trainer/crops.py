"""Views of an image: crops cut from its bytes by the worker, and what the device is to do with their colours.

Multi-crop as published (DINOv2's augmentations, arXiv 2304.07193): two global crops and several local ones, each a
RandomResizedCrop (Inception crop), perhaps flipped. The image is decoded once, as small as its crops allow, and each
crop is resized from the decoded image in one step. Pixels stay uint8; `trainer/photometric.py` does the rest.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from curation.errors import ConfigError
from embedders.images import Picture, decode_picture
from trainer.batch import Batch, Masks, Photometric
from trainer.draws import Key, Purpose, generator
from trainer.photometric import MIN_SIDE

GLOBAL_CROPS = 2
TRIES = 10
"""Boxes drawn for a crop before the largest central one is taken."""
BLURS = {"dinov2": (0.0, 0.9, 0.5), "dino": (1.0, 0.1, 0.5), "sharp": (0.0, 0.0, 0.0)}
"""Blur of the first global, second global and local crops: of DINOv2's code as it runs, as DINO's paper has it, none.

DINOv2's code says 1.0, 0.1 and 0.5, but applies blur with what is missing to 1; its models were trained so.
"""

Boxes = npt.NDArray[np.int64]
"""Left, top, width and height of each crop, int64 [crops, 4], in pixels of the image."""

_BOX = slice(0, 2 * TRIES)  # columns of the numbers drawn for a crop
_TOP, _LEFT, FLIP = 2 * TRIES, 2 * TRIES + 1, 2 * TRIES + 2
_VALUES = slice(FLIP + 1, FLIP + 6)  # brightness, contrast, saturation, hue, sigma
_CHANCES = slice(FLIP + 6, FLIP + 10)  # jitter, gray, blur, solarize
_ORDER = slice(FLIP + 10, FLIP + 14)
COLUMNS = _ORDER.stop


@dataclass(frozen=True)
class CropSettings:
    """The views of an image. Pairs are (least, most); `flip`, `jitter`, `gray`, `blur`, `solarize` are probabilities.

    Attributes:
        global_size, local_size: sides of the crops made, in pixels.
        local_crops: number of local crops; global ones are 2.
        global_scale, local_scale: area of a crop as a share of the image's.
        ratio: width through height of a crop, log-uniform.
        flip: of a crop, left to right.
        jitter: of brightness, contrast, saturation and hue together.
        brightness, contrast, saturation: factors lie within 1 - this and 1 + this, not below 0.
        hue: turns of the colour circle, to either side, up to 0.5.
        gray: of colours taken away.
        blur: of the first global, the second global and the local crops; `BLURS` has those with a name.
        sigma: of the blur, in pixels of the crop.
        solarize: of the second global crop.

    Raises:
        ConfigError: a value outside its range.
    """

    global_size: int = 224
    local_size: int = 98
    local_crops: int = 8
    global_scale: tuple[float, float] = (0.32, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.32)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    gray: float = 0.2
    blur: tuple[float, float, float] = BLURS["dinov2"]
    sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.2

    def __post_init__(self) -> None:
        for name, least in (("global_size", MIN_SIDE), ("local_size", MIN_SIDE), ("local_crops", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"crops: {name} {getattr(self, name)} is below {least}")
        for name in ("global_scale", "local_scale", "ratio", "sigma"):
            least, most = getattr(self, name)
            if not 0 < least <= most or (name.endswith("scale") and most > 1):
                raise ConfigError(f"crops: {name} ({least}, {most}) is no range of such values")
        for name in ("flip", "jitter", "gray", "solarize"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"crops: {name} {getattr(self, name)} is no probability")
        if len(self.blur) != 3 or not all(0 <= chance <= 1 for chance in self.blur):
            raise ConfigError(f"crops: blur {self.blur} is not three probabilities (global, global, local)")
        if min(self.brightness, self.contrast, self.saturation, self.hue) < 0 or self.hue > 0.5:
            raise ConfigError("crops: strengths of jitter are negative, or that of hue is above 0.5")


class Views(NamedTuple):
    """The crops of one image, global ones first.

    Attributes:
        crops: uint8 [size, size, 3] each.
        colors: float32 [crops, 11], the fields of `Photometric` side by side, `order` last.
    """

    crops: list[npt.NDArray[np.uint8]]
    colors: npt.NDArray[np.float32]


class CropMaker:
    """Makes the views of images; what it draws is a function of the key alone."""

    def __init__(self, settings: CropSettings) -> None:
        self.settings = settings
        local = settings.local_crops
        self.sizes = [settings.global_size] * GLOBAL_CROPS + [settings.local_size] * local
        self._scales = np.array([settings.global_scale] * GLOBAL_CROPS + [settings.local_scale] * local)
        strengths = np.array([settings.brightness, settings.contrast, settings.saturation])
        self._least = np.array([*np.maximum(1 - strengths, 0), -settings.hue, settings.sigma[0]])
        self._most = np.array([*(1 + strengths), settings.hue, settings.sigma[1]])
        first, second, others = settings.blur
        self._chances = np.empty((len(self.sizes), 4))  # jitter, gray, blur, solarize
        self._chances[:] = settings.jitter, settings.gray, others, 0
        self._chances[:GLOBAL_CROPS, 2:] = (first, 0), (second, settings.solarize)

    def __call__(self, image_bytes: bytes, key: Key) -> Views:
        """The views of an image.

        Args:
            image_bytes: of a file that `embedders.images.decode` reads.
            key: (seed, place of the sample in the endless order).

        Raises:
            UndecodableImage: see `embedders.images.decode`.
        """
        draws = generator(key, Purpose.VIEWS).random((len(self.sizes), COLUMNS))

        @functools.cache  # asked before decoding and after, nearly always for the same size
        def boxes(width: int, height: int) -> Boxes:
            return crop_boxes(draws, width, height, self._scales, self.settings.ratio)

        picture = decode_picture(image_bytes, lambda *size: self._min_side(boxes(*size), *size))
        left, top, right, bottom = (round(edge * picture.reduction) for edge in picture.box)
        flips = draws[:, FLIP] < self.settings.flip
        each = zip(boxes(right - left, bottom - top).tolist(), self.sizes, flips.tolist(), strict=True)
        return Views([_crop(picture, *crop) for crop in each], self._colors(draws))

    def _min_side(self, boxes: Boxes, width: int, height: int) -> int:
        """Shorter side to which the image may be reduced so that no crop has fewer pixels than are made of it.

        A crop cut so close is a little sharper than one resized from all pixels: by 1 to 3 levels of 255 in the mean.
        """
        wanted = float((self.sizes / boxes[:, 2:].min(axis=1)).max())
        return math.ceil(min(width, height) * min(wanted, 1.0))

    def _colors(self, draws: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
        """Settings of the photometric part, as `Views.colors` has them; what is not applied is left neutral."""
        jitter, gray, blur, solarize = (draws[:, _CHANCES] < self._chances).T
        values = self._least + (self._most - self._least) * draws[:, _VALUES]
        colors = np.empty((len(draws), 11), dtype=np.float32)
        colors[:, :4] = np.where(jitter[:, None], values[:, :4], (1, 1, 1, 0))
        colors[:, 4] = gray
        colors[:, 5] = values[:, 4] * blur
        colors[:, 6] = solarize
        colors[:, 7:] = draws[:, _ORDER].argsort(axis=1)
        return colors


def crop_boxes(
    draws: npt.NDArray[np.float64],
    width: int,
    height: int,
    scales: npt.NDArray[np.float64],
    ratio: tuple[float, float],
) -> Boxes:
    """Boxes of RandomResizedCrop in an image of width x height, with torchvision's distribution.

    Args:
        draws: uniform over [0, 1), [crops, at least 22]: area and shape of each of the ten tries, then top and left.
        scales: least and most area of each crop as a share of the image's, [crops, 2].
        ratio: least and most width through height.
    """
    area, shape = draws[:, _BOX].reshape(-1, TRIES, 2).transpose(2, 0, 1)
    area = width * height * (scales[:, :1] + (scales[:, 1:] - scales[:, :1]) * area)
    shape = np.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * shape)
    wide, high = np.rint(np.sqrt(area * shape)), np.rint(np.sqrt(area / shape))
    fits = (wide > 0) & (wide <= width) & (high > 0) & (high <= height)
    first, rows = fits.argmax(axis=1), np.arange(len(draws))
    boxes = np.empty((len(draws), 4), dtype=np.int64)
    boxes[:, 2], boxes[:, 3] = wide[rows, first], high[rows, first]
    boxes[:, 0] = draws[:, _LEFT] * (width - boxes[:, 2] + 1)
    boxes[:, 1] = draws[:, _TOP] * (height - boxes[:, 3] + 1)
    boxes[~fits[rows, first]] = _central(width, height, ratio)
    return boxes


def _central(width: int, height: int, ratio: tuple[float, float]) -> tuple[int, int, int, int]:
    """The largest central box whose shape is allowed."""
    wide = min(width, round(height * ratio[1]))
    high = min(height, round(width / ratio[0]))
    return (width - wide) // 2, (height - high) // 2, wide, high


def _crop(picture: Picture, box: list[int], size: int, flip: bool) -> npt.NDArray[np.uint8]:
    """Pixels [size, size, 3] of a box of the unreduced image."""
    left, top, width, height = (edge / picture.reduction for edge in box)
    left, top = left + picture.box[0], top + picture.box[1]
    image = picture.image.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + width, top + height))
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(picture.in_srgb(image))


def collate(views: Sequence[Views], image_ids: Sequence[str], masks: Masks | None) -> Batch:
    """The batch of B images, crop-major.

    Its crops are [n, 3, size, size] over memory in the order of decoded pixels ("channels last"), as moving three
    channels apart is faster where they become floats.

    Args:
        views: of the B images, by one CropMaker.
        image_ids: of the B images.
        masks: of the 2B global crops, or None.
    """
    colors = torch.from_numpy(np.stack([each.colors for each in views], axis=1))  # [crops, B, 11]
    return Batch(
        list(image_ids),
        _stacked([each.crops[:GLOBAL_CROPS] for each in views]),
        _stacked([each.crops[GLOBAL_CROPS:] for each in views]),
        _photometric(colors[:GLOBAL_CROPS].flatten(0, 1)),
        _photometric(colors[GLOBAL_CROPS:].flatten(0, 1)),
        masks,
    )


def _stacked(crops: list[list[npt.NDArray[np.uint8]]]) -> Tensor:
    """Crops of equal size, by image, as one tensor, uint8 [crops an image x B, 3, size, size]."""
    crop_major = [crop for crops_of_all in zip(*crops, strict=True) for crop in crops_of_all]
    return torch.from_numpy(np.stack(crop_major)).permute(0, 3, 1, 2)


def _photometric(colors: Tensor) -> Photometric:
    """Colours [n, 11] as `Views` has them, field by field."""
    brightness, contrast, saturation, hue, gray, sigma, solarize = (column.contiguous() for column in colors.T[:7])
    order = colors[:, 7:].long()
    return Photometric(brightness, contrast, saturation, hue, order, gray.bool(), sigma, solarize.bool())
