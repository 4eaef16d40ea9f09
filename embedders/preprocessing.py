"""From image bytes to the pixels a network takes: resize, centre crop, and the numbers to normalise with."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from embedders.images import Box, UndecodableImage, decode_picture

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

MAX_ELONGATION = 4
"""Longer side through shorter side, up to which an image is taken whole in its own shape."""


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a network's input; part of the model's fingerprint.

    Attributes:
        resize: (height, width) that the whole image is squeezed into, or one number for its shorter side.
        crop: (height, width) cut from the centre after that, or None. Half pixels are rounded to the left and the top,
            as transformers does; torchvision sometimes begins one pixel later.
        resample: one of Pillow's `Image.Resampling` values; all filters reduce without aliasing, except NEAREST.
        scale, mean, std: the network takes (pixel * scale - mean) / std, RGB.
    """

    resize: tuple[int, int] | int
    crop: tuple[int, int] | None
    resample: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 1 / 255

    def __post_init__(self) -> None:
        """Raises ValueError where the crop is larger than what it is cut from."""
        smallest = (self.resize, self.resize) if isinstance(self.resize, int) else self.resize
        if self.crop is not None and (self.crop[0] > smallest[0] or self.crop[1] > smallest[1]):
            raise ValueError(f"crops {list(self.crop)} from images of {list(smallest)}")

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """(height, width, 3) of every input; None where each image keeps its own (`resize` a number, no `crop`)."""
        size = self.crop or self.resize
        return None if isinstance(size, int) else (*size, 3)

    def pixels(self, data: bytes) -> npt.NDArray[np.uint8]:
        """Bytes of an image file to RGB pixels, uint8 [height, width, 3], writable and contiguous.

        Only the part that the crop keeps is resized, in one step, so that no image of extreme shape takes much memory.
        The pixels are those of resizing all and cropping, to one level; filters that overshoot (bicubic, Lanczos) can
        differ by more at hard edges, as Pillow cuts off between its two passes and picks their order by the size. A
        JPEG is decoded at a fraction of its size where that leaves at least twice the pixels asked for: half a level
        away in the mean.

        Raises:
            UndecodableImage: see `decode`; also "too elongated", where the image keeps its shape and its longer side
                would come out longer than MAX_ELONGATION times the shorter.
        """
        longer = self.resize if isinstance(self.resize, int) else max(self.resize)
        picture = decode_picture(data, min_side=2 * longer)
        size, box = self._cut(picture.box)
        return np.array(picture.in_srgb(picture.image.resize(size, Image.Resampling(self.resample), box)))

    def _cut(self, picture: Box) -> tuple[tuple[int, int], Box]:
        """(width, height) of the output, and the part of the picture that it shows."""
        left, top, right, bottom = picture
        whole = self._resized(right - left, bottom - top)
        if self.crop is None:
            return whole, picture
        height, width = self.crop
        x, y = (whole[0] - width) // 2, (whole[1] - height) // 2
        across, down = (right - left) / whole[0], (bottom - top) / whole[1]
        return (width, height), (
            left + x * across,
            top + y * down,
            left + (x + width) * across,
            top + (y + height) * down,
        )

    def _resized(self, width: float, height: float) -> tuple[int, int]:
        """(width, height) that a picture of this size would have if all of it were resized."""
        if not isinstance(self.resize, int):
            return self.resize[1], self.resize[0]
        short = min(width, height)
        resized = int(self.resize * width / short), int(self.resize * height / short)
        if self.crop is None and max(resized) > MAX_ELONGATION * self.resize:
            raise UndecodableImage("too elongated")
        return resized
