"""Parameters for the optimizer: in groups of equal settings, which follow the schedules, and clipped by submodule."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainer.schedules import Values

BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")
FIRST = {"patch_embed", "pos_embed", "cls_token", "mask_token", "register_tokens"}
"""Parts of the names of what comes before the first block."""


def parameter_groups(
    module: nn.Module, layerwise_decay: float, patch_embed_factor: float = 0.2
) -> list[dict[str, Any]]:
    """All trained parameters, those of equal settings in one group, as `torch.optim` takes them.

    What precedes the blocks is layer 0, block i layer i + 1, the final norm and the heads the last, n + 1 for n blocks.
    Layer l learns with factor layerwise_decay^(n + 1 - l), the patch embedding with `patch_embed_factor` on top.
    Biases, norms and LayerScale are not decayed; tokens and positions are, as published.

    Args:
        module: backbone, head, or both inside some module.
        layerwise_decay: factor of a layer's learning rate to the next one's.
        patch_embed_factor: of the patch embedding's learning rate.

    Returns:
        Dicts with params, names (of the params, in their order), lr_factor, wd_factor and is_last_layer (of a head).
    """
    named = dict(module.named_parameters())
    blocks = 1 + max((int(found[1]) for name in named if (found := BLOCK.search(name))), default=-1)
    groups: dict[tuple[float, float, bool], dict[str, Any]] = {}
    for name, value in named.items():
        if not value.requires_grad:
            continue
        parts = name.split(".")
        lr_factor = layerwise_decay ** (blocks + 1 - _layer(name, blocks))
        if "patch_embed" in parts:
            lr_factor *= patch_embed_factor
        settings = (lr_factor, 1.0 if _decayed(name) else 0.0, "last_layer" in parts)
        keys = dict(zip(("lr_factor", "wd_factor", "is_last_layer"), settings, strict=True))
        group = groups.setdefault(settings, {"params": [], "names": [], **keys})
        group["params"].append(value)
        group["names"].append(name)
    return list(groups.values())


def set_values(optimizer: torch.optim.Optimizer, values: Values) -> None:
    """Give each group of `parameter_groups` its learning rate and weight decay of a step."""
    for group in optimizer.param_groups:
        lr = values.last_layer_lr if group["is_last_layer"] else values.lr
        group["lr"] = lr * group["lr_factor"]
        group["weight_decay"] = values.weight_decay * group["wd_factor"]


@torch.no_grad()
def clip_submodules(modules: Mapping[str, nn.Module], max_norm: float) -> dict[str, Tensor]:
    """Scale the gradients of each module by itself to a norm of at most `max_norm`; the host does not wait.

    Gradients that are not finite stay so, as the norm shows.

    Args:
        modules: such as backbone, dino_head and ibot_head, without parameters in common; sharded (FSDP2) or not.
        max_norm: of a module's gradients, taken as one vector.

    Returns:
        The norm before, [] on the device and the same on all ranks, under the name of each module.
    """
    norms = {}
    for name, module in modules.items():
        parameters = [value for value in module.parameters() if value.grad is not None]
        norm = torch.nn.utils.get_total_norm([value.grad for value in parameters if value.grad is not None])
        norms[name] = norm.full_tensor() if isinstance(norm, DTensor) else norm
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norms[name])
    return norms


def _layer(name: str, blocks: int) -> int:
    if found := BLOCK.search(name):
        return int(found[1]) + 1
    return 0 if FIRST & set(name.split(".")) else blocks + 1


def _decayed(name: str) -> bool:
    *path, last = name.split(".")
    return last not in ("bias", "gamma") and not any("norm" in part for part in path)
