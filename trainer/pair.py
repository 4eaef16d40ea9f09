"""The student and the teacher: two networks that start alike, of which one learns and the other follows.

Shapes: B images, V local views, N patches of a global crop, M places for masked patches, D width of a token, K and K'
prototypes of the two heads. Crops are crop-major, as in `trainer/batch.py`.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from embedders.vit import VisionTransformer

Module = TypeVar("Module", bound=nn.Module)
Grid = tuple[int, int]


class Outputs(NamedTuple):
    """What a network says of a batch.

    Attributes:
        cls: [2B, D], class tokens of the global crops, before the head.
        dino: [2B, K] or [(2 + V) B, K], logits of the class tokens, global crops first.
        ibot: [M, K'], logits of the patches that were asked for; None where none were.
    """

    cls: Tensor
    dino: Tensor
    ibot: Tensor | None


class Trainable(nn.Module):
    """A vision transformer, and other parts beside it that help to train it."""

    backbone: VisionTransformer


class Network(Trainable):
    """A vision transformer and its heads.

    Args:
        backbone: the vision transformer.
        dino_head: class tokens to logits; also patches, where there is no `ibot_head`.
        ibot_head: patches to logits.
    """

    def __init__(self, backbone: VisionTransformer, dino_head: nn.Module, ibot_head: nn.Module | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.dino_head = dino_head
        self.ibot_head = ibot_head

    def forward(
        self,
        global_crops: Tensor,
        local_crops: Tensor | None = None,
        mask: Tensor | None = None,
        at: Tensor | None = None,
        grid: Grid | None = None,
    ) -> Outputs:
        """All crops in one pass, and the heads on what they are needed for.

        Args:
            global_crops: float32 [2B, 3, G, G], normalised.
            local_crops: float32 [V B, 3, L, L].
            mask: bool [2B, N], patches of the global crops that the network does not see.
            at: int64 [M], the patches that go through the head, as places in [2B * N].
            grid: (rows, columns) of the patches that `at` counts, where it is not the network's own.
        """
        crops = [global_crops] if local_crops is None else [global_crops, local_crops]
        features = self.backbone.packed(crops, [mask, None][: len(crops)])
        cls = torch.cat([each.cls for each in features])
        if at is None:
            return Outputs(features[0].cls, self.dino_head(cls), None)
        patches = resampled(features[0].patches, patch_grid(self.backbone, global_crops), grid)
        return Outputs(features[0].cls, *self._logits(cls, patches.flatten(0, 1).index_select(0, at)))

    def _logits(self, cls: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        if self.ibot_head is not None:
            return self.dino_head(cls), self.ibot_head(patches)
        dino, ibot = self.dino_head(torch.cat([cls, patches])).split([len(cls), len(patches)])
        return dino, ibot


def patch_grid(backbone: VisionTransformer, images: Tensor) -> Grid:
    """(rows, columns) of the patches that a network makes of images [B, 3, H, W]."""
    size = backbone.config.patch_size
    return images.shape[2] // size, images.shape[3] // size


def resampled(patches: Tensor, of: Grid, to: Grid | None) -> Tensor:
    """Patch tokens [B, N, D] of one grid brought to another, bilinearly, between the centres of the patches."""
    if to is None or to == of:
        return patches
    plane = patches.transpose(1, 2).reshape(len(patches), -1, *of)
    return F.interpolate(plane.float(), size=to, mode="bilinear", antialias=True).flatten(2).transpose(1, 2)


@dataclass
class Pair:
    """A student, who learns; what it learns from; and what comes of the training.

    Attributes:
        student: with the gradients.
        teacher: gives the targets. In pretraining it is `ema` itself, in distillation another network, which is frozen.
        ema: moving average of the student: the result.
        run: the student as it is called, `student` itself or what wraps it over several ranks.
    """

    student: Trainable
    teacher: Trainable
    ema: Trainable
    run: Callable[..., NamedTuple]

    @classmethod
    def of(cls, student: Trainable, teacher: Trainable | None = None) -> "Pair":
        """A student and its moving average, which begins as its copy and is the teacher unless one is given."""
        ema = frozen(copy.deepcopy(student))
        return cls(student.train(), ema if teacher is None else frozen(teacher), ema, student)

    @property
    def networks(self) -> list[Trainable]:
        """All there are, each once."""
        return [self.student, self.ema] if self.teacher is self.ema else [self.student, self.ema, self.teacher]

    def submodules(self) -> dict[str, nn.Module]:
        """The student's parts, whose gradients are clipped each by itself."""
        return dict(self.student.named_children())

    @torch.no_grad()
    def update(self, momentum: float, ok: Tensor) -> None:
        """ema = momentum ema + (1 - momentum) student; where `ok` is False, all of it stays as it is, bit by bit.

        Args:
            momentum: of this step.
            ok: bool [], on the device: whether the step is finite.
        """
        ema, student = local_parameters(self.ema), local_parameters(self.student)
        # One weight tensor in place of a number, for the host does not know whether the step was finite.
        torch._foreach_lerp_(ema, student, [ok * (1 - momentum)] * len(ema))


def frozen(module: Module) -> Module:
    """The module without gradients, in evaluation mode, so without drop-path."""
    return module.requires_grad_(False).eval()


def local_parameters(module: nn.Module) -> list[Tensor]:
    """This rank's parts of the parameters, in order."""
    return [value.to_local() if isinstance(value, DTensor) else value for value in module.parameters()]


def set_up_blocks(backbone: VisionTransformer, compiled: bool, checkpointing: bool = False) -> None:
    """How the blocks are carried out; parameters and their names stay.

    Args:
        compiled: by torch.compile, each by itself: equal blocks share what is compiled.
        checkpointing: hold a block's input alone, and compute the rest again for the gradient.
    """
    for block in backbone.blocks:
        call: Callable[..., Tensor] = block.forward
        if compiled:
            call = torch.compile(call, dynamic=False)
        if checkpointing:
            call = partial(checkpoint, call, use_reentrant=False)
        block.forward = call
