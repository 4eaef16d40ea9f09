"""The three losses of DINOv2 (arXiv 2304.07193, section 4), in float32 whatever comes in.

Shapes: B images, V local views, K prototypes, M places for masked patches (padding among them), D width of a token.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

STUDENT_TEMPERATURE = 0.1
DISTANCE_EPS = 1e-8
ROWS_AT_ONCE = 512
"""Rows of a long matrix of logits that are float32 at the same time."""


def dino_loss(student_logits: Tensor, teacher_probs: Tensor, temperature: float = STUDENT_TEMPERATURE) -> Tensor:
    """Mean cross-entropy over pairs of views: each global with the other, each local with both.

    Terms with the same student view share the student's part, so both teacher views are added first: 2 + V products
    for 2 + 2V terms.

    Args:
        student_logits: [2 + V, B, K], the global views first.
        teacher_probs: [2, B, K] of the global views, without gradient.
        temperature: of the student.

    Returns:
        [], summed over the 2 + 2V terms, divided by their number and by B.
    """
    views, images, _ = student_logits.shape
    first, second = teacher_probs.float()
    targets = [second, first, *[first + second] * (views - 2)]
    losses = _cross_entropy(student_logits.flatten(0, 1), targets, temperature)
    return losses.sum() / ((2 + 2 * (views - 2)) * images)


def ibot_loss(
    student_logits: Tensor,
    teacher_probs: Tensor,
    weight: Tensor,
    num_crops: int,
    temperature: float = STUDENT_TEMPERATURE,
) -> Tensor:
    """Cross-entropy at masked patches, averaged within each crop, then over all global crops, unmasked ones as 0.

    Args:
        student_logits, teacher_probs: [M, K]; rows of padding may hold anything, and get a gradient of exactly 0.
        weight: [M], 1 / (masked patches of the crop), 0 for padding.
        num_crops: global crops of the batch, 2B.
        temperature: of the student.

    Returns:
        [].
    """
    losses = _cross_entropy(student_logits, torch.split(teacher_probs.float(), ROWS_AT_ONCE), temperature)
    # Not a product alone: 0 times infinity would be NaN.
    return torch.where(weight > 0, losses * weight, 0).sum() / num_crops


def koleo_loss(x: Tensor, rank_size: int | None = None) -> Tensor:
    """Mean -log of the distance to the nearest other vector of the batch, all L2-normalised (arXiv 1806.03198).

    Finite for vectors that are the same: of two such neither has a direction to go, so neither has a gradient from it.

    Args:
        x: [B, D], class tokens of one view.
        rank_size: vectors that see each other, a divisor of B: the batch as that many vectors a rank would compute it.
            None is all.

    Returns:
        []; 0 for a vector alone.
    """
    size = len(x) if rank_size is None else rank_size
    if len(x) % size:
        raise ValueError(f"{len(x)} vectors do not divide into ranks of {size}")
    if size == 1:
        return x.float().sum() * 0
    parts = F.normalize(x.float(), dim=-1, eps=DISTANCE_EPS).reshape(-1, size, x.shape[1])
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):  # it would compare in bfloat16
        products = parts @ parts.transpose(1, 2)
        products.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
        nearest = products.argmax(dim=2)
    neighbors = parts.gather(1, nearest[..., None].expand_as(parts))
    distances = torch.linalg.vector_norm(parts - neighbors, dim=-1)
    loss: Tensor = -(distances + DISTANCE_EPS).log().mean()
    return loss


def _cross_entropy(logits: Tensor, targets: Sequence[Tensor], temperature: float) -> Tensor:
    """-sum over K of targets log softmax(logits / temperature) of each row, float32 [n].

    Args:
        logits: [n, K].
        targets: float32 [rows, K] each, the targets of consecutive rows, n together; each row of any sum.
        temperature: of the softmax.
    """
    losses: Tensor = _CrossEntropy.apply(logits, temperature, *targets)  # type: ignore[no-untyped-call]
    return losses


class _CrossEntropy(torch.autograd.Function):
    """`_cross_entropy`, holding no float32 matrix beyond one part's, and nothing for the backward pass but its inputs.

    With z = logits / temperature, m = sum of a row's targets: m logsumexp(z) - targets . z; its gradient by z is
    m softmax(z) - targets.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, temperature: float, *targets: Tensor) -> Tensor:
        norms, masses, losses = [], [], []
        for part, target in zip(torch.split(logits, _sizes(targets)), targets, strict=True):
            scaled = part.float() / temperature
            norms.append(scaled.logsumexp(dim=-1))
            masses.append(target.sum(dim=-1))
            losses.append(masses[-1] * norms[-1] - (target * scaled).sum(dim=-1))
        ctx.temperature = temperature
        ctx.save_for_backward(logits, torch.cat(norms), torch.cat(masses), *targets)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, norms, masses, *targets = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        matrices = (logits, gradient, norms[:, None], masses[:, None], grads[0][:, None])
        parts = (torch.split(matrix, _sizes(targets)) for matrix in matrices)
        for part, out, norm, mass, grad, target in zip(*parts, targets, strict=True):
            slope = (part.float() / ctx.temperature).sub_(norm).exp_().mul_(mass).sub_(target)
            # Rows that do not count may hold NaN, and must not pass it on.
            out.copy_(slope.mul_(grad / ctx.temperature).masked_fill_(grad == 0, 0))
        return gradient, None, *[None] * len(targets)


def _sizes(targets: Sequence[Tensor]) -> list[int]:
    return [len(target) for target in targets]
