"""Weights to start from, or to learn from: a checkpoint of a run with its heads, or any network without.

A place is recognised by what it is: a run's directory (its newest checkpoint is taken), one of its checkpoints, the
name of a published network (`dinov2_vitl14`), or what `embedders/checkpoints.py` reads (`vit:PATH` or the path alone).
"""

from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from curation.errors import ConfigError
from embedders.base import EmbedderError
from embedders.checkpoints import load_vit
from embedders.dinov2 import PINS, address
from embedders.vit import VisionTransformer, ViTConfig
from embedders.weights import obtain
from trainer.checkpoints import facts_of, is_checkpoint, newest, read_tensors
from trainer.heads import Head
from trainer.pair import Trainable

HEADS = ("dino_head", "ibot_head")


@dataclass(frozen=True)
class Weights:
    """A network on the CPU, float32.

    Attributes:
        backbone: the vision transformer.
        heads: by their names in a `Network`; empty for a network without.
    """

    backbone: VisionTransformer
    heads: dict[str, Head]


def open_weights(place: str) -> Weights:
    """The network at a place; of a run, the moving average. Raises ConfigError."""
    folder = Path(place.removeprefix("vit:"))
    checkpoint = folder if is_checkpoint(folder) else newest(folder)
    if checkpoint is not None:
        return _of_run(checkpoint)
    try:
        path = obtain(address(place), PINS[place], place)[0] if place in PINS else folder
        return Weights(load_vit(Path(path)), {})
    except EmbedderError as error:
        raise ConfigError(str(error)) from None


def _of_run(checkpoint: Path) -> Weights:
    tensors = read_tensors(checkpoint, "ema.")
    with torch.device("meta"):
        backbone = VisionTransformer(facts_of(checkpoint).network)
    backbone.load_state_dict(_below(tensors, "backbone."), assign=True)
    heads = {name: _head(_below(tensors, f"{name}.")) for name in HEADS if _below(tensors, f"{name}.")}
    return Weights(backbone, heads)


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _head(weights: dict[str, Tensor]) -> Head:
    """A head of the shapes of its weights."""
    linear = [value for name, value in weights.items() if name.startswith("mlp.") and name.endswith(".weight")]
    prototypes, bottleneck = weights["last_layer.weight_v"].shape
    with torch.device("meta"):
        head = Head(linear[0].shape[1], prototypes, linear[0].shape[0], bottleneck, len(linear))
    head.load_state_dict(weights, assign=True)
    return head


@torch.no_grad()
def fill(network: Trainable, weights: Weights) -> list[str]:
    """Put weights into a network, in place.

    Positions of another image size are interpolated as the network they come from does it.

    Returns:
        The network's heads that the weights have none for, of that shape; they stay as they are.

    Raises:
        ConfigError: the backbone is another network; names the first difference.
    """
    backbone = network.backbone
    _check_same(weights.backbone.config, backbone.config)
    state = weights.backbone.state_dict()
    grid = backbone.config.grid
    positions = weights.backbone.positions(grid, grid)
    backbone.load_state_dict({**state, "pos_embed": torch.cat([state["pos_embed"][:, :1], positions], dim=1)})
    left = []
    for name, head in network.named_children():
        if name != "backbone" and not _fill_head(head, weights.heads.get(name)):
            left.append(name)
    return left


def _fill_head(head: nn.Module, found: Head | None) -> bool:
    if found is None:
        return False
    state, expected = found.state_dict(), head.state_dict()
    if {name: value.shape for name, value in state.items()} != {name: value.shape for name, value in expected.items()}:
        return False
    head.load_state_dict(state)
    return True


def _check_same(found: ViTConfig, expected: ViTConfig) -> None:
    for field in fields(ViTConfig):
        here, there = getattr(expected, field.name), getattr(found, field.name)
        if field.name not in ("image_size", "interpolation") and here != there:
            raise ConfigError(f"the weights are of another network: {field.name} is {there} there, {here} here")
