"""Small labelled sets, networks and features for the tests of evaluation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from embedders.vit import VisionTransformer, ViTConfig
from trainer.features import FeatureSet

TINY = ViTConfig(dim=24, depth=5, heads=2, patch_size=4, image_size=16)


def network(config: ViTConfig = TINY, seed: int = 0) -> VisionTransformer:
    """A network far from its initial values, so that all of its parts count."""
    torch.manual_seed(seed)
    model = VisionTransformer(config, layer_scale=0.3)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=draw))
    return model


def write_labelled(path: Path, images: Sequence[Any], labels: Sequence[Any], group: int = 3, **names: str) -> str:
    """A Parquet file with row groups of `group` rows; `names` are those of the columns `image` and `label`."""
    columns = {names.get("image", "image"): pa.array(images), names.get("label", "label"): pa.array(labels)}
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return str(path)


def blobs(
    rows: int, classes: int, dim: int, seed: int, spread: float = 1.0, blocks: int = 1, centres: int = 0
) -> tuple[Tensor, Tensor]:
    """Features [rows, blocks, dim] around a centre for each class and block, and the classes int64 [rows].

    Centres depend on the seed `centres` alone.
    """
    draw = torch.Generator().manual_seed(seed)
    middle = torch.randn(classes, blocks, dim, generator=torch.Generator().manual_seed(centres))
    labels = torch.arange(rows) % classes
    return middle[labels] + spread * torch.randn(rows, blocks, dim, generator=draw), labels


def feature_set(cls: Tensor, labels: Tensor, patches: Tensor | None = None) -> FeatureSet:
    return FeatureSet(cls, patches, labels.tolist(), [])
