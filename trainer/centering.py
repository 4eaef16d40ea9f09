"""Teacher logits to probabilities that use all prototypes: by a running centre, or by Sinkhorn-Knopp.

Both are float32 whatever comes in, work on one process without a group, and over the ranks of the default group
where there is one. Shapes: n rows (crops, or masked patches padded to a constant number), K prototypes. Of row
weights, only 0 means something: the row is padding and counts nowhere; any other row counts as one.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

SMALLEST_SUM = 1e-30
"""Prototypes that no row is near sum to 0; this in its place keeps what it is divided into inside float32."""


def sum_of_logits(logits: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sum over the rows of [n, K] that are not padding, float32 [K], and their number, float32 []."""
    if weights is None:
        return logits.sum(0, dtype=torch.float32), torch.full((), float(len(logits)), device=logits.device)
    valid = weights > 0
    # Not a product with 0 and 1: 0 times infinity would be NaN.
    return torch.where(valid[:, None], logits, 0).sum(0, dtype=torch.float32), valid.sum(dtype=torch.float32)


class SoftmaxCenter(nn.Module):
    """softmax((logits - centre) / temperature), the centre a moving average of the mean logits (arXiv 2104.14294).

    The mean is over all rows of all ranks, so ranks with more masked patches count more. A step's mean moves the
    centre at the start of the next step: the sum over ranks runs meanwhile. State holds that pending sum too, so that
    a run that resumes computes what one that was not interrupted does.

    Args:
        prototypes: K.
        momentum: of the moving average.
    """

    center: Tensor
    pending: Tensor

    def __init__(self, prototypes: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(prototypes))
        self.register_buffer("pending", torch.zeros(prototypes + 1))  # sum of logits, then their number
        self._reduction: dist.Work | None = None

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.wait()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.wait()
        super()._load_from_state_dict(*args, **kwargs)

    @torch.no_grad()
    def probabilities(self, logits: Tensor, temperature: float) -> Tensor:
        """[n, K] to float32 [n, K], rows summing to 1, after the update that the last step left."""
        self.apply_pending()
        return ((logits.float() - self.center) / temperature).softmax(dim=-1)

    @torch.no_grad()
    def update(self, total: Tensor, count: Tensor, ok: Tensor) -> None:
        """Start an update from this rank's `sum_of_logits`; nothing comes of it where `ok` is False.

        Args:
            total: [K], and count: [], as `sum_of_logits` gives them.
            ok: bool [], on the device, the same on all ranks: whether the step is finite.
        """
        self.apply_pending()
        self.pending.copy_(torch.where(ok, torch.cat([total, count[None]]), 0))
        if dist.is_initialized():
            self._reduction = dist.all_reduce(self.pending, async_op=True)

    @torch.no_grad()
    def apply_pending(self) -> None:
        """Move the centre by the pending mean, if there is one."""
        self.wait()
        total, count = self.pending[:-1], self.pending[-1]
        moved = self.momentum * self.center + (1 - self.momentum) * total / count
        self.center.copy_(torch.where(count > 0, moved, self.center))
        self.pending.zero_()

    def wait(self) -> None:
        """Until the pending sum is over all ranks; on a GPU it is the stream that waits, not the host."""
        if self._reduction is not None:
            self._reduction.wait()
            self._reduction = None


@torch.no_grad()
def sinkhorn(logits: Tensor, temperature: float, weights: Tensor | None = None, iterations: int = 3) -> Tensor:
    """Sinkhorn-Knopp assignment of rows to prototypes (arXiv 2006.09882, section 3.1), over the rows of all ranks.

    exp(logits / temperature) is scaled, in turn, so that all prototypes have equal sums and all rows sum to 1. Rows and
    prototypes each have one factor, u and c, and the matrix E itself, with its rows' greatest entries at 1, is only
    read: p = u E c. What the greatest entries were is in the first u, relative to the greatest of all, so nothing
    overflows and no row vanishes. The constants of the published form (numbers of rows and prototypes) cancel.

    Args:
        logits: [n, K] on this rank; ranks may differ in n.
        temperature: of the teacher.
        weights: [n], 0 for padding, whose logits may be anything; None is no padding.
        iterations: at least 1.

    Returns:
        Float32 [n, K]; rows sum to 1, rows of padding are 0.
    """
    valid = torch.ones(len(logits), dtype=torch.bool, device=logits.device) if weights is None else weights > 0
    matrix = logits.to(torch.float32, copy=True).div_(temperature).masked_fill_(~valid[:, None], 0)
    greatest = matrix.amax(dim=1)
    matrix.sub_(greatest[:, None]).exp_()
    of_all = torch.where(valid, greatest, -torch.inf).amax(dim=0, keepdim=True)
    _reduce(of_all, dist.ReduceOp.MAX)
    rows = torch.where(valid, (greatest - of_all).exp(), 0)
    with torch.autocast(logits.device.type, enabled=False):  # it would make the products bfloat16
        for _ in range(iterations):
            sums = rows @ matrix
            _reduce(sums, dist.ReduceOp.SUM)
            prototypes = 1 / sums.clamp(min=SMALLEST_SUM)
            rows = torch.where(valid, 1 / (matrix @ prototypes), 0)
    return matrix.mul_(rows[:, None]).mul_(prototypes)


def _reduce(tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> None:
    """Over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor, operation)
