"""What the student learns: DINO, iBOT and KoLeo against the teacher's outputs (arXiv 2304.07193, section 4)."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from trainer.batch import Masks
from trainer.centering import SoftmaxCenter, sinkhorn, sum_of_logits
from trainer.losses import dino_loss, ibot_loss, koleo_loss
from trainer.masks import all_patches
from trainer.pair import Outputs, Pair, patch_grid


class Inputs(NamedTuple):
    """A batch as networks take it.

    Attributes:
        global_crops: float32 [2B, 3, G, G], normalised.
        local_crops: float32 [V B, 3, L, L].
        masks: of the global crops; None where nothing is masked.
    """

    global_crops: Tensor
    local_crops: Tensor
    masks: Masks | None


@dataclass(frozen=True)
class Weights:
    """Of the losses in their sum; an iBOT or KoLeo loss of weight 0 is not computed."""

    dino: float = 1.0
    ibot: float = 1.0
    koleo: float = 0.1


class Objective(nn.Module):
    """What is minimised, and whatever state it has."""

    def forward(self, pair: Pair, inputs: Inputs, teacher_temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, [] with gradient, and what it is made of, each [] before its weight."""
        raise NotImplementedError

    def update(self, ok: Tensor) -> None:
        """Take over what the last batch brings, unless `ok`, bool [] on the device, is False."""


class SelfDistillation(Objective):
    """The published objective; its state is the centres.

    Nothing masked is distillation, where the iBOT loss is over all patches of both global crops (appendix D).

    Args:
        weights: of the losses.
        centering: of the teacher's logits.
        prototypes: of the DINO head and of the iBOT head.
        temperature: of the student.
        center_momentum: of softmax centring.
    """

    def __init__(
        self,
        weights: Weights,
        centering: Literal["softmax", "sinkhorn"],
        prototypes: tuple[int, int],
        temperature: float = 0.1,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        self.weights = weights
        self.temperature = temperature
        self.centers = nn.ModuleList()
        if centering == "softmax":
            count = 2 if weights.ibot else 1
            self.centers.extend(SoftmaxCenter(each, center_momentum) for each in prototypes[:count])
        self._sums: list[tuple[Tensor, Tensor]] = []

    def forward(self, pair: Pair, inputs: Inputs, teacher_temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and parts `dino`, `ibot` and `koleo`; the batch's part in the centres waits for `update`."""
        masks = self._masks(pair, inputs)
        targets = self._targets(pair, inputs, masks, teacher_temperature)
        student = pair.run(
            inputs.global_crops,
            inputs.local_crops,
            None if inputs.masks is None else inputs.masks.mask,
            None if masks is None else masks.at,
        )
        assert isinstance(student, Outputs)
        losses = self._losses(student, targets, masks, len(inputs.global_crops))
        total = sum((getattr(self.weights, name) * loss for name, loss in losses.items()), losses["dino"].new_zeros(()))
        return total, {name: loss.detach() for name, loss in losses.items()}

    @torch.no_grad()
    def update(self, ok: Tensor) -> None:
        """Move the centres by the last batch; where `ok`, bool [], is False they stay."""
        for center, sums in zip(self.centers, self._sums, strict=True):
            assert isinstance(center, SoftmaxCenter)
            center.update(*sums, ok)
        self._sums = []

    def _masks(self, pair: Pair, inputs: Inputs) -> Masks | None:
        """The patches that the iBOT loss is about."""
        if not self.weights.ibot:
            return None
        if inputs.masks is not None:
            return inputs.masks
        with torch.device(inputs.global_crops.device):  # made there, for a copy would be waited for
            return all_patches(len(inputs.global_crops), patch_grid(pair.student.backbone, inputs.global_crops))

    @torch.no_grad()
    def _targets(self, pair: Pair, inputs: Inputs, masks: Masks | None, temperature: float) -> list[Tensor]:
        """Probabilities of the global crops [2B, K], and of the patches [M, K'] where there are masks."""
        grid = patch_grid(pair.student.backbone, inputs.global_crops)
        out = pair.teacher(inputs.global_crops, at=None if masks is None else masks.at, grid=grid)
        self._sums = []
        targets = [self._probabilities(0, out.dino, None, temperature)]
        if masks is not None:
            targets.append(self._probabilities(1, out.ibot, masks.weight, temperature))
        return targets

    def _probabilities(self, which: int, logits: Tensor, weights: Tensor | None, temperature: float) -> Tensor:
        if not self.centers:
            return sinkhorn(logits, temperature, weights)
        center = self.centers[which]
        assert isinstance(center, SoftmaxCenter)
        self._sums.append(sum_of_logits(logits, weights))
        return center.probabilities(logits, temperature)

    def _losses(self, student: Outputs, targets: list[Tensor], masks: Masks | None, crops: int) -> dict[str, Tensor]:
        by_view, of_views = (each.view(-1, crops // 2, each.shape[1]) for each in (student.dino, targets[0]))
        losses = {"dino": dino_loss(by_view, of_views, self.temperature)}
        if masks is not None and student.ibot is not None:
            losses["ibot"] = ibot_loss(student.ibot, targets[1], masks.weight, crops, self.temperature)
        if self.weights.koleo:
            first, second = student.cls.chunk(2)
            losses["koleo"] = koleo_loss(first) + koleo_loss(second)
        return losses
