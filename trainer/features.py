"""Features of labelled images by a frozen vision transformer: what every evaluation starts from.

Images are read and decoded in threads while the network works; features alone are kept. They are prepared as
published: shorter side to 256 pixels (bicubic; small images grow), the centre of 224 x 224, mean and standard deviation
of ImageNet. A linear probe may also train on random views (`RandomView`).
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from curation.errors import ConfigError, LvdError
from embedders.dinov2 import standard_preprocessing
from embedders.images import UndecodableImage, decode_picture
from embedders.preprocessing import Preprocessing
from embedders.vit import VisionTransformer
from trainer.crops import TRIES, crop_boxes
from trainer.draws import Purpose, generator
from trainer.labelled import Label, Labelled, Row, Skipped, read

View = Callable[[Row], npt.NDArray[np.uint8]]
"""Encoded image to pixels uint8 [H, W, 3], of one size for all; raises UndecodableImage. Called from threads."""

VIEW_SCALE = np.array([[0.08, 1.0]])
VIEW_RATIO = (3 / 4, 4 / 3)
VIEW_DRAWS = 2 * TRIES + 3
"""Numbers a random view takes: area and shape of each try, top, left, flip."""


@dataclass(frozen=True)
class Pixels:
    """Prepared images: uint8 [n, H, W, 3], and their labels."""

    images: Tensor
    labels: list[Label]


@dataclass(frozen=True)
class FeatureSet:
    """What a network says of n images, float32 on the CPU.

    Attributes:
        cls: [n, L, D], class tokens after the last L blocks, the very last at the end, after the final norm.
        patches: [n, D], mean of the last block's patch tokens; None where it was not asked for.
        labels: n of them.
        skipped: rows that are not here, and why.
    """

    cls: Tensor
    patches: Tensor | None
    labels: list[Label]
    skipped: list[Skipped]


def evaluation_preprocessing(resize: int = 256, crop: int = 224) -> Preprocessing:
    """The published preparation, or the same at other sizes in pixels. Raises ConfigError for resize < crop."""
    if resize < crop:
        raise ConfigError(f"crops of {crop} pixels from images of {resize}: set resize to {crop} or more")
    return replace(standard_preprocessing(crop), resize=resize)


def check_fit(model: VisionTransformer, preprocessing: Preprocessing) -> None:
    """Raises ConfigError where images prepared so do not divide into the network's patches."""
    size = model.config.patch_size
    if preprocessing.shape is None:
        raise ConfigError("images keep sizes of their own in this preparation; take one that ends in a crop")
    height, width, _ = preprocessing.shape
    if height % size or width % size:
        fits = max(1, round(min(height, width) / size)) * size
        raise ConfigError(
            f"crops of {height} x {width} pixels do not divide into patches of {size}; set crop to {fits}"
        )


def features_of(
    model: VisionTransformer,
    source: Labelled,
    preprocessing: Preprocessing,
    *,
    blocks: int = 1,
    patches: bool = False,
    view: View | None = None,
    precision: str = "float32",
    batch_size: int = 256,
    workers: int | None = None,
) -> FeatureSet:
    """Features of all rows of `source`; holds 4 n D (blocks + patches) bytes, twice that while they are joined.

    Args:
        model: a plain network (not sharded over devices), on the device that is to work.
        blocks, patches: what of `FeatureSet` is wanted; with depth < blocks, all blocks.
        view: another view of each image than the centre, for training.
        precision: of the products, "float32" or "bfloat16".
        workers: threads that decode; None for one a core.

    Raises:
        ConfigError: see `labelled.read`; no image could be decoded; sizes do not fit the network.
        LvdError: the network gives values that are not finite.
    """
    skipped: list[Skipped] = []
    batches = pixel_batches(source, view or centre(preprocessing), skipped, batch_size, workers)
    found = extract(model, batches, preprocessing, blocks=blocks, patches=patches, precision=precision)
    if not found.labels:
        raise _nothing_left(source, skipped)
    return replace(found, skipped=skipped)


def pixels_of(source: Labelled, preprocessing: Preprocessing) -> tuple[Pixels, list[Skipped]]:
    """All images of `source`, prepared, and the rows that are not among them; raises as `features_of`.

    Holds 3 n H W bytes, twice that while they are joined.
    """
    skipped: list[Skipped] = []
    batches = list(pixel_batches(source, centre(preprocessing), skipped))
    if not batches:
        raise _nothing_left(source, skipped)
    labels = [label for batch in batches for label in batch.labels]
    return Pixels(torch.cat([batch.images for batch in batches]), labels), skipped


def extract(
    model: VisionTransformer,
    batches: Iterable[Pixels],
    preprocessing: Preprocessing,
    *,
    blocks: int = 1,
    patches: bool = False,
    precision: str = "float32",
) -> FeatureSet:
    """Features of prepared images, in evaluation mode; the mode of `model` is as before afterwards.

    Args and errors are those of `features_of`; without images all tensors are empty.
    """
    check_fit(model, preprocessing)
    blocks, dim = min(blocks, model.config.depth), model.config.dim
    labels: list[Label] = []
    cls, means = [torch.empty(0, blocks, dim)], [torch.empty(0, dim)]
    device = model.cls_token.device
    before, _ = model.training, model.eval()
    try:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, precision == "bfloat16"):
            for batch in batches:
                tokens, mean = _tokens(model, normalized(batch.images.to(device), preprocessing), blocks, patches)
                cls.append(tokens.float().cpu())
                means.append(mean.float().cpu())
                labels += batch.labels
    finally:
        model.train(before)
    found = FeatureSet(torch.cat(cls), torch.cat(means) if patches else None, labels, [])
    _require_finite(found)
    return found


def normalized(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """uint8 [B, H, W, 3] to the network's input, float32 [B, 3, H, W]: (pixel * scale - mean) / std."""
    mean = torch.tensor(preprocessing.mean, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(preprocessing.std, device=pixels.device).view(3, 1, 1)
    return (pixels.permute(0, 3, 1, 2) * preprocessing.scale - mean) / std


def pixel_batches(
    source: Labelled, view: View, skipped: list[Skipped], batch_size: int = 256, workers: int | None = None
) -> Iterator[Pixels]:
    """Prepared images in order; the next batch is decoded while the caller uses this one.

    Images that cannot be decoded are added to `skipped`. Holds two batches, encoded and decoded.
    """
    rows = read(source, skipped)
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:

        def begin() -> list[tuple[Row, Future[npt.NDArray[np.uint8]]]]:
            return [(row, pool.submit(view, row)) for row in islice(rows, batch_size)]

        ahead = begin()
        while ahead:
            now, ahead = ahead, begin()
            batch = _finished(now, skipped)
            if batch is not None:
                yield batch


def centre(preprocessing: Preprocessing) -> View:
    """The view for evaluation."""
    return lambda row: preprocessing.pixels(row.data)


@dataclass(frozen=True)
class RandomView:
    """RandomResizedCrop of 8 to 100 % of the area (bicubic), flipped by half chance: the published training view.

    What is drawn is a function of (seed, epoch, row).
    """

    size: int
    seed: int
    epoch: int

    def __call__(self, row: Row) -> npt.NDArray[np.uint8]:
        """uint8 [size, size, 3]."""
        draws = generator((self.seed, (self.epoch << 40) + row.number), Purpose.VIEWS).random((1, VIEW_DRAWS))
        picture = decode_picture(row.data)
        left, top, right, bottom = picture.box
        boxes = crop_boxes(draws, round(right - left), round(bottom - top), VIEW_SCALE, VIEW_RATIO)
        x, y, width, height = boxes[0].tolist()
        box = (left + x, top + y, left + x + width, top + y + height)
        image = picture.image.resize((self.size, self.size), Image.Resampling.BICUBIC, box)
        if draws[0, -1] < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.array(picture.in_srgb(image))


def _finished(rows: list[tuple[Row, Future[npt.NDArray[np.uint8]]]], skipped: list[Skipped]) -> Pixels | None:
    """The images that could be decoded; None where there is none."""
    images, labels = [], []
    for row, future in rows:
        try:
            images.append(future.result())
        except UndecodableImage as error:
            skipped.append(Skipped(row.place, str(error)))
        else:
            labels.append(row.label)
    return Pixels(torch.from_numpy(np.stack(images)), labels) if images else None


def _tokens(model: VisionTransformer, images: Tensor, blocks: int, patches: bool) -> tuple[Tensor, Tensor]:
    """Class tokens [B, blocks, D] and mean patch tokens, [B, D] if asked for, else [B, 0]."""
    if blocks == 1 and not patches:
        tokens = model.class_tokens(images)
        return tokens[:, None], tokens[:, :0]
    found = model.intermediate(images, range(-blocks, 0))
    return torch.stack([features.cls for features in found], 1), found[-1].patches.mean(1)


def _require_finite(found: FeatureSet) -> None:
    good = found.cls.isfinite().flatten(1).all(1)
    if found.patches is not None:
        good &= found.patches.isfinite().all(1)
    if not good.all():
        raise LvdError(
            f"the network gives values that are not finite for {int((~good).sum())} of {len(good)} images; "
            "its weights are broken: take an earlier checkpoint"
        )


def _nothing_left(source: Labelled, skipped: list[Skipped]) -> ConfigError:
    place, reason = skipped[0]
    return ConfigError(f"{source.uri}: none of {len(skipped)} rows can be used; the first, {place}: {reason}")
