"""One step of training: views, loss, gradients, and one update of student, moving average and centres, or none.

On a GPU the host never waits here. Whether all is finite is found out on the device, which then leaves out the updates
itself; the host reads the numbers a step later.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.batch import Batch
from trainer.objective import Inputs, Objective
from trainer.pair import Pair
from trainer.parameters import clip_submodules, parameter_groups, set_values
from trainer.photometric import augment
from trainer.schedules import Values

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Trained:
    """What a step works on, and in what way.

    Attributes:
        pair, objective, optimizer: what changes.
        clip: largest norm of the gradients of each part of the student.
        precision: of products in the networks; losses, weights and optimizer are float32.
        seed: of the run.
        rank: of this process, which draws for its own images which of them a block leaves out.
    """

    pair: Pair
    objective: Objective
    optimizer: torch.optim.AdamW
    clip: float
    precision: Precision = "float32"
    seed: int = 0
    rank: int = 0


class Metrics(NamedTuple):
    """The numbers of a step, means over all ranks.

    Attributes:
        names: `loss`, the parts of the loss, and `norm_PART` for the gradients of each part of the student.
        values: float32 [len(names)], on the device. One that is not finite means that nothing was updated.
    """

    names: tuple[str, ...]
    values: Tensor


def train_step(trained: Trained, batch: Batch, step: int, values: Values, backbone_learns: bool = True) -> Metrics:
    """One update by a batch on the device.

    A step whose loss or gradients are not finite, on whatever rank, changes neither parameters nor moments, step
    counts, moving average or centres on any rank.

    Args:
        batch: this rank's, of the same size on all.
        step: counted from 0; with the seed it decides what is drawn.
        values: of the schedules.
        backbone_learns: False trains the heads alone.
    """
    torch.manual_seed(draw_seed(trained.seed, step, trained.rank))
    pair, optimizer = trained.pair, trained.optimizer
    inputs = augmented(batch)
    with torch.autocast(batch.global_crops.device.type, torch.bfloat16, trained.precision == "bfloat16"):
        loss, parts = trained.objective(pair, inputs, values.teacher_temperature)
    loss.backward()
    norms = clip_submodules(pair.submodules(), trained.clip)
    metrics = _metrics({"loss": loss.detach(), **parts}, norms)
    ok = metrics.values.isfinite().all()
    set_values(optimizer, values)
    if not backbone_learns:
        _hold_backbone(optimizer)
    optimizer.found_inf = (~ok).float()  # type: ignore[attr-defined] # what a GradScaler tells fused optimizers
    optimizer.step()
    optimizer.zero_grad()
    pair.update(values.momentum, ok)
    trained.objective.update(ok)
    return metrics


def augmented(batch: Batch) -> Inputs:
    """A batch as networks take it, made on its device."""
    return Inputs(
        augment(batch.global_crops, batch.global_colors), augment(batch.local_crops, batch.local_colors), batch.masks
    )


def make_optimizer(
    student: nn.Module, betas: tuple[float, float], layerwise_decay: float, patch_embed_factor: float
) -> torch.optim.AdamW:
    """Fused AdamW for a student, sharded or not, with all its state there from the beginning.

    Learning rates and weight decay come with each step; groups say in `backbone` which part they belong to.
    """
    groups: list[dict[str, Any]] = []
    for name, part in student.named_children():
        found = parameter_groups(part, layerwise_decay, patch_embed_factor)
        groups += [{**group, "backbone": name == "backbone"} for group in found]
    optimizer = torch.optim.AdamW(groups, betas=betas, fused=True)
    for group in groups:
        for value in group["params"]:
            optimizer.state[value] = {
                "step": torch.zeros((), dtype=torch.float32, device=value.device),
                "exp_avg": torch.zeros_like(value),
                "exp_avg_sq": torch.zeros_like(value),
            }
    return optimizer


def draw_seed(seed: int, step: int, rank: int) -> int:
    """What torch draws with during a step, 64 bits: a function of these three alone."""
    digest = hashlib.blake2b(f"step {step} rank {rank}".encode(), digest_size=8, salt=_salt(seed))
    return int.from_bytes(digest.digest(), "big")


def _salt(seed: int) -> bytes:
    return (seed % (1 << 64)).to_bytes(8, "big")


def _hold_backbone(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        if group["backbone"]:
            group["lr"] = 0.0


def _metrics(losses: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> Metrics:
    """All numbers in one tensor, over all ranks: a value that is not finite on one rank is so in the mean."""
    named = {**losses, **{f"norm_{name}": norm for name, norm in norms.items()}}
    values = torch.stack([value.float() for value in named.values()])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return Metrics(tuple(named), values)
