"""A tiny network, its batches, settings and images, for the tests of the pair, the step and the loop."""

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from curation.config import override, validate
from tests.builders import photo
from trainer.batch import Batch, Masks, Photometric
from trainer.build import make_objective, make_pair
from trainer.config import TrainSettings
from trainer.masks import MaskSettings, block_masks
from trainer.step import Trained, make_optimizer

VALUES: dict[str, Any] = {
    "crops": {"global_size": 56, "local_size": 28, "local_crops": 3},
    "model": {"variant": "test"},
    "heads": {"prototypes": 24, "hidden": 16, "bottleneck": 8},
    "optimizer": {"base_lr": 0.05, "betas": [0.9, 0.99], "clip": 0.5},
    "loss": {"teacher_temperature_warmup": 4},
    "schedule": {"steps": 6, "warmup": 2, "freeze_last_layer": 1, "momentum": [0.9, 1.0]},
    "batch_size": 4,
    "precision": "float32",
    "data": {"workers": 0},
    "checkpoint_every": 100,
    "log_every": 1,
}


def settings(*assignments: str) -> TrainSettings:
    """Those of a tiny run, with overrides."""
    return validate(TrainSettings, override(VALUES, list(assignments)), "tiny")


def random_weights(module: nn.Module, seed: int) -> None:
    """Weights far from their initial values, so that every one of them counts."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in module.parameters():
            noise = torch.randn(value.shape, generator=draw)
            value.copy_(0.6 + 0.3 * noise if value.ndim == 1 else noise / math.sqrt(value[0].numel()))


def trained(given: TrainSettings, seed: int = 0) -> Trained:
    """All of a run on one process, with weights that are random and the same in student and moving average."""
    pair, _ = make_pair(given)
    random_weights(pair.student, seed)
    pair.ema.load_state_dict(pair.student.state_dict())
    optimizer = given.optimizer
    return Trained(
        pair,
        make_objective(given, pair),
        make_optimizer(pair.student, optimizer.betas, optimizer.layerwise_decay, optimizer.patch_embed_factor),
        optimizer.clip,
        seed=given.seed,
    )


def random_batch(given: TrainSettings, seed: int, masked: bool = True) -> Batch:
    """Noise, and colours that are changed at random."""
    draw = torch.Generator().manual_seed(seed)
    images, crops = given.batch_size, given.crops

    def pixels(count: int, side: int) -> torch.Tensor:
        return torch.randint(0, 256, (count, 3, side, side), generator=draw, dtype=torch.uint8)

    def colors(count: int) -> Photometric:
        factors = 0.6 + 0.8 * torch.rand(3, count, generator=draw)
        turn, sigma = 0.2 * torch.rand(2, count, generator=draw)
        gray, solarize = torch.rand(2, count, generator=draw) < 0.3
        order = torch.rand(count, 4, generator=draw).argsort(dim=1)
        return Photometric(*factors, turn - 0.1, order, gray, sigma, solarize)

    side = crops.global_size // given.model.patch_size
    masks = block_masks(2 * images, (side, side), MaskSettings(), (given.seed, seed)) if masked else None
    return Batch(
        [f"{seed:02d}{image:02d}" for image in range(images)],
        pixels(2 * images, crops.global_size),
        pixels(crops.local_crops * images, crops.local_size),
        colors(2 * images),
        colors(crops.local_crops * images),
        masks,
    )


def joined(first: Batch, second: Batch) -> Batch:
    """Two ranks' batches as one: crop-major, first the images of `first`."""
    images = len(first.image_ids)

    def both(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.cat([a.unflatten(0, (-1, images)), b.unflatten(0, (-1, images))], dim=1).flatten(0, 1)

    masks = None
    if first.masks is not None and second.masks is not None:
        mask = both(first.masks.mask, second.masks.mask)
        at = mask.flatten().nonzero()[:, 0]
        masks = Masks(mask, at, (1 / mask.sum(dim=1))[at // mask.shape[1]])
    return Batch(
        first.image_ids + second.image_ids,
        both(first.global_crops, second.global_crops),
        both(first.local_crops, second.local_crops),
        Photometric(*map(both, first.global_colors, second.global_colors)),
        Photometric(*map(both, first.local_colors, second.local_colors)),
        masks,
    )


def write_images(path: Path, count: int = 20) -> Path:
    """A Parquet file with a column `image`."""
    pq.write_table(pa.table({"image": [photo(seed) for seed in range(count)]}), path, row_group_size=7)
    return path


def copied(module: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and buffers as they are now."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
