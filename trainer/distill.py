"""Distillation from a teacher that has no heads, such as the published weights: features are compared directly.

Every crop is compared with itself as the teacher sees it: 1 - cosine of the student's class token, through a linear
projection to the teacher's width, and the same for each patch, through another projection. Cosines leave out how long
tokens are, which differs by far more between crops than is worth learning, and need no temperature and no centre.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor, nn

from embedders.vit import VisionTransformer
from trainer.objective import Inputs, Objective
from trainer.pair import Grid, Pair, Trainable, patch_grid, resampled


class Tokens(NamedTuple):
    """Tokens after the last norm, or their projections.

    Attributes:
        cls: [(2 + V) B, D], global crops first.
        global_patches: [2B, N, D].
        local_patches: [V B, n, D].
    """

    cls: Tensor
    global_patches: Tensor
    local_patches: Tensor


class Featured(Trainable):
    """A vision transformer that gives class and patch tokens, projected to another width if one is given.

    Args:
        backbone: the vision transformer.
        width: D of the teacher, for the student.
    """

    def __init__(self, backbone: VisionTransformer, width: int | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        dim = backbone.config.dim
        self.cls_projection = nn.Linear(dim, width) if width else nn.Identity()
        self.patch_projection = nn.Linear(dim, width) if width else nn.Identity()

    def forward(self, global_crops: Tensor, local_crops: Tensor, grids: tuple[Grid, Grid] | None = None) -> Tokens:
        """Tokens of all crops; patches on `grids` of global and local crops, where these are not its own."""
        crops = [global_crops, local_crops]
        found = self.backbone.packed(crops)
        own = [patch_grid(self.backbone, each) for each in crops]
        first, second = (
            self.patch_projection(resampled(each.patches, of, to))
            for each, of, to in zip(found, own, grids or own, strict=True)
        )
        return Tokens(self.cls_projection(torch.cat([each.cls for each in found])), first, second)


class FeatureMatching(Objective):
    """The objective: mean of 1 - cosine over class tokens, plus that over patches; it has no state."""

    def forward(self, pair: Pair, inputs: Inputs, teacher_temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, [] with gradient, and its parts `cls` and `patches`; the temperature plays no part."""
        grids = tuple(patch_grid(pair.student.backbone, each) for each in (inputs.global_crops, inputs.local_crops))
        with torch.no_grad():
            teacher = pair.teacher(inputs.global_crops, inputs.local_crops, grids)
        student = pair.run(inputs.global_crops, inputs.local_crops)
        assert isinstance(student, Tokens)
        losses = {
            "cls": _distances(student.cls, teacher.cls).mean(),
            "patches": torch.cat(
                [
                    _distances(student.global_patches, teacher.global_patches).flatten(),
                    _distances(student.local_patches, teacher.local_patches).flatten(),
                ]
            ).mean(),
        }
        return losses["cls"] + losses["patches"], {name: loss.detach() for name, loss in losses.items()}


def _distances(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine over the last dimension, float32."""
    return 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1, eps=1e-6)
