"""Pictures for a person to look at, by Pillow alone: what a network is shown, and what its patches say.

A page is a grid of equal cells with a line of text over each column and beside each row. Small images are enlarged by
whole factors without smoothing, so that pixels and patches stay visible.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from embedders.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from embedders.vit import VisionTransformer
from trainer.batch import Batch, Masks, Photometric
from trainer.features import normalized
from trainer.photometric import augment

RGB = npt.NDArray[np.uint8]

CELL = 112
"""Pixels that the larger side of the largest image on a page has at least."""
GAP = 6
TEXT_HEIGHT = 14
PAPER = (215, 215, 215)
"""Behind the images: white would swallow white crops."""
MASKED = (255, 0, 140)
MASKED_SHARE = 0.7
"""How much of a masked patch is MASKED's colour, which no photograph has much of; the rest shows what is hidden."""
LEAST, MOST = 0.01, 0.99
"""Quantiles of a principal component that become 0 and 255."""
COMPONENTS = 3


def crops_page(batch: Batch, images: int = 8) -> Image.Image:
    """The crops of the first `images` of a batch as the student sees them: a row an image, global crops first.

    Masked patches are painted over; local crops are drawn at the same scale as global ones.
    """
    shown = _first(batch, images)
    count = len(shown.image_ids)
    columns, views = [], []
    for name, crops in (("global", _global_views(shown)), ("local", _colored(shown.local_crops, shown.local_colors))):
        columns += [f"{name} {view + 1}" for view in range(len(crops) // count)]
        views += [crops[start : start + count] for start in range(0, len(crops), count)]
    return page(list(zip(*views, strict=True)), columns, [name[:12] for name in shown.image_ids])


def pca_page(
    model: VisionTransformer, pixels: Tensor, preprocessing: Preprocessing, foreground: bool = False
) -> Image.Image:
    """Images uint8 [n, H, W, 3], prepared as `preprocessing` says, each beside the PCA map of its patches.

    Holds the patch features of all n at once. For `foreground`, see `pca_maps`.
    """
    before, _ = model.training, model.eval()
    with torch.inference_mode():
        patches = model(normalized(pixels.to(model.cls_token.device), preprocessing)).patches.float().cpu()
    model.train(before)
    size = model.config.patch_size
    height, width = (side // size for side in pixels.shape[1:3])
    maps = pca_maps(patches.reshape(len(pixels), height, width, -1), foreground).numpy()
    rows = [
        [image, colors.repeat(size, axis=0).repeat(size, axis=1)]
        for image, colors in zip(pixels.cpu().numpy(), maps, strict=True)
    ]
    return page(rows, ["image", "patches: 3 components"], [str(number) for number in range(len(rows))])


def pca_maps(patches: Tensor, foreground: bool = False) -> Tensor:
    """The first three principal components of all patches together as red, green and blue.

    Each component runs from its 1st percentile to its 99th; where it is positive and negative is chosen by its largest
    weight, so that the colours of the same features are always the same.

    Args:
        patches: float [n, h, w, D], of n images that are to be comparable.
        foreground: keep one side of the first component alone (the DINOv2 paper's figure 1) and make the components of
            that; the rest is black. Kept is the side that has fewer of the patches on the images' edges: it means
            something for images of things on backgrounds.

    Returns:
        uint8 [n, h, w, 3].
    """
    flat = patches.flatten(0, 2).float()
    kept = torch.ones(len(flat), dtype=torch.bool)
    if foreground:
        first = principal_components(flat, 1)[:, 0]
        kept = _foreground(first.view(patches.shape[:3])).flatten()
    colors = torch.zeros(len(flat), COMPONENTS)
    if kept.any():
        values = principal_components(flat[kept], COMPONENTS)
        low, high = torch.quantile(values[_spread(len(values))], torch.tensor([LEAST, MOST]), dim=0)
        scaled = ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
        colors[kept] = F.pad(scaled, (0, COMPONENTS - scaled.shape[1]))
    return (colors * 255).round().to(torch.uint8).view(*patches.shape[:3], COMPONENTS)


def principal_components(rows: Tensor, count: int) -> Tensor:
    """The first components of rows [n, D], centred here: [n, min(count, D)], by the covariance in float64."""
    centred = rows.double() - rows.double().mean(0)
    directions = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :count]
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    components: Tensor = centred @ (directions * largest.sign())
    return components.float()


def page(rows: Sequence[Sequence[RGB]], columns: Sequence[str], names: Sequence[str]) -> Image.Image:
    """Images uint8 [h, w, 3] in rows, all of a row in their columns, with the names of both in Pillow's own font."""
    sides = [max(image.shape[:2]) for row in rows for image in row]
    scale = max(1, math.ceil(CELL / max(sides)))
    cell, font = max(sides) * scale, ImageFont.load_default(TEXT_HEIGHT - 3)
    left = GAP + math.ceil(max(font.getlength(name) for name in names)) + GAP
    top = GAP + TEXT_HEIGHT
    size = (left + len(columns) * (cell + GAP), top + len(rows) * (cell + GAP))
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(columns):
        draw.text((left + column * (cell + GAP), GAP // 2), name, "black", font)
    for row, (images, name) in enumerate(zip(rows, names, strict=True)):
        draw.text((GAP, top + row * (cell + GAP)), name, "black", font)
        for column, image in enumerate(images):
            enlarged = Image.fromarray(image.repeat(scale, axis=0).repeat(scale, axis=1))
            sheet.paste(enlarged, (left + column * (cell + GAP), top + row * (cell + GAP)))
    return sheet


def _first(batch: Batch, images: int) -> Batch:
    """A batch of the first `images` of a batch, or of all."""
    total = len(batch.image_ids)
    count = min(images, total)

    def rows(values: Tensor) -> Tensor:
        return values[torch.arange(len(values), device=values.device) % total < count]

    return Batch(
        batch.image_ids[:count],
        rows(batch.global_crops),
        rows(batch.local_crops),
        Photometric(*map(rows, batch.global_colors)),
        Photometric(*map(rows, batch.local_colors)),
        batch.masks and batch.masks._replace(mask=rows(batch.masks.mask)),
    )


def _global_views(batch: Batch) -> RGB:
    """The global crops as augmented, masked patches painted over, uint8 [2B, G, G, 3]."""
    views = _colored(batch.global_crops, batch.global_colors)
    return views if batch.masks is None else _masked(views, batch.masks)


def _colored(crops: Tensor, colors: Photometric) -> RGB:
    """Crops uint8 [n, 3, H, W] after the photometric part, back as pixels uint8 [n, H, W, 3]."""
    inputs = augment(crops, colors).float().cpu().permute(0, 2, 3, 1)
    pixels = inputs * torch.tensor(IMAGENET_STD) + torch.tensor(IMAGENET_MEAN)
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def _masked(views: RGB, masks: Masks) -> RGB:
    """Masked patches [n, N] of square views uint8 [n, G, G, 3] painted over."""
    mask = masks.mask.cpu().numpy()
    grid = math.isqrt(mask.shape[1])
    patch = views.shape[1] // grid
    hidden = mask.reshape(-1, grid, grid).repeat(patch, axis=1).repeat(patch, axis=2)[..., None]
    painted = MASKED_SHARE * np.array(MASKED) + (1 - MASKED_SHARE) * views
    return np.where(hidden, painted.round().astype(np.uint8), views)


def _foreground(component: Tensor) -> Tensor:
    """The side of a component [n, h, w] that covers less of the images' edges, bool of the same shape."""
    edge = torch.ones(component.shape[1:], dtype=torch.bool)
    edge[1:-1, 1:-1] = False
    positive = component > 0
    return positive if positive[:, edge].float().mean() < 0.5 else ~positive


def _spread(count: int, most: int = 1 << 20) -> Tensor:
    """At most so many of `count` rows, evenly: torch.quantile takes no more than 16 million."""
    return torch.arange(0, count, math.ceil(count / most))
