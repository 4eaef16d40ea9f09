"""From image bytes to the pixels a network takes: resize, centre crop, and the numbers to normalise with."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from embedders.images import decode

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a network's input; part of the model's fingerprint.

    Attributes:
        resize: (height, width) that the whole image is squeezed into, or one number for its shorter side.
        crop: (height, width) cut from the centre after that; None only where `resize` gives one shape.
        resample: one of Pillow's `Image.Resampling` values; all filters reduce without aliasing, except NEAREST.
        scale, mean, std: the network takes (pixel * scale - mean) / std, RGB.
    """

    resize: tuple[int, int] | int
    crop: tuple[int, int] | None
    resample: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 1 / 255

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, 3) of every input."""
        if self.crop is not None:
            return (*self.crop, 3)
        assert not isinstance(self.resize, int)
        return (*self.resize, 3)

    def pixels(self, data: bytes) -> npt.NDArray[np.uint8]:
        """Bytes of an image file to RGB pixels, uint8 [height, width, 3]. Raises UndecodableImage.

        A JPEG is decoded at a fraction of its size where that leaves at least twice the pixels asked for.
        """
        longer = self.resize if isinstance(self.resize, int) else max(self.resize)
        image = decode(data, min_side=2 * longer)
        image = image.resize(self._target(*image.size), Image.Resampling(self.resample))
        if self.crop is not None:
            height, width = self.crop
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        return np.asarray(image)

    def _target(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) to resize an image of this size to."""
        if not isinstance(self.resize, int):
            return self.resize[1], self.resize[0]
        short = min(width, height)
        return max(self.resize, self.resize * width // short), max(self.resize, self.resize * height // short)
