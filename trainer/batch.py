"""What one training step is given: crops as bytes of pixels, how they are to be altered, what is masked.

Workers make batches; the device makes floats of them. Crops are crop-major: those of view 0 of all images come first,
then those of view 1. Shapes: B images, V local views, G and L pixels a side, N patches of a global crop.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Photometric(NamedTuple):
    """What happens to the colours of n crops, all [n] but `order`.

    Attributes:
        brightness, contrast, saturation: float32, factors; 1 leaves a crop as it is.
        hue: float32, turns of the colour circle, -0.5 to 0.5; 0 leaves a crop as it is.
        order: int64 [n, 4], in which brightness (0), contrast (1), saturation (2) and hue (3) are applied.
        gray: bool.
        sigma: float32, of the blur in pixels; 0 is none.
        solarize: bool.
    """

    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    order: Tensor
    gray: Tensor
    sigma: Tensor
    solarize: Tensor


class Masks(NamedTuple):
    """Masked patches of the 2B global crops, padded to a constant number so that shapes never change.

    Attributes:
        mask: bool [2B, N].
        at: int64 [M], places in the flattened [2B * N] grid, ascending; places of padding are 0.
        weight: float32 [M], 1 / (masked patches of the crop), 0 for padding.
    """

    mask: Tensor
    at: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Batch:
    """One rank's part of a step.

    Attributes:
        image_ids: of the B images.
        global_crops: uint8 [2B, 3, G, G].
        local_crops: uint8 [V B, 3, L, L].
        global_colors, local_colors: what happens to them.
        masks: None where nothing is masked.
    """

    image_ids: list[str]
    global_crops: Tensor
    local_crops: Tensor
    global_colors: Photometric
    local_colors: Photometric
    masks: Masks | None

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device; copies from pinned memory do not wait."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> "Batch":
        """The batch in pinned memory, from which copies to a GPU run beside its work."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(
            self.image_ids,
            change(self.global_crops),
            change(self.local_crops),
            Photometric(*map(change, self.global_colors)),
            Photometric(*map(change, self.local_colors)),
            self.masks and Masks(*map(change, self.masks)),
        )
