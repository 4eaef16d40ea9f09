"""k-NN classification by weighted votes, as published for DINO and DINOv2: how good features are, without training.

Products in chunks on whatever device the features are; no process group. What is returned does not depend on the order
of sums or on how a device breaks ties: neighbors are ranked by (similarity, lower row), votes are whole numbers, and of
classes with equal votes the lower number wins.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

from curation.errors import ConfigError
from trainer.features import FeatureSet, Pixels
from trainer.labelled import class_numbers

KS = (10, 20, 100, 200)
TEMPERATURE = 0.07

QUERY_ROWS = 256
BANK_ROWS = 32_768
"""Rows multiplied at a time: 130 MB of products and of the numbers they are ranked by."""
LAST_ROW = (1 << 32) - 1
SIGN_KEPT = (1 << 31) - 1
ONE_VOTE = 1 << 52
TOP = 5


class Accuracy(NamedTuple):
    """Shares of the queries, 0 to 1, whose class got the most votes, or is among the five that did."""

    top1: float
    top5: float


def knn(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
) -> dict[int, Accuracy]:
    """Accuracy for each number of neighbors.

    The weights of a query's neighbors are softmax(cosine / temperature) over the nearest max(ks) (or the whole bank, if
    that is smaller); the first k of them add their weight to their class. A class without votes is never right.

    Args:
        bank, queries: float [n, D] and [m, D]; they are L2-normalised here. Queries are brought to the bank's device.
        bank_labels, query_labels: int64 [n] and [m], numbers from 0.

    Raises:
        ConfigError: no k, one that is not positive, or nothing to compare.
    """
    if not ks or min(ks) < 1:
        raise ConfigError(f"k of k-NN must be positive whole numbers; {list(ks)} is not")
    if not len(bank) or not len(queries):
        raise ConfigError(f"k-NN of {len(queries)} queries in a bank of {len(bank)}: there must be some of each")
    bank, labels = F.normalize(bank.float(), dim=1), bank_labels.to(bank.device)
    num_classes = 1 + int(max(bank_labels.max(), query_labels.max()))
    right = torch.zeros(len(ks), 2, dtype=torch.int64, device=bank.device)
    for start in range(0, len(queries), QUERY_ROWS):
        part = slice(start, start + QUERY_ROWS)
        similarity, rows = _nearest(bank, F.normalize(queries[part].to(bank.device).float(), dim=1), max(ks))
        votes = (torch.softmax(similarity.double() / temperature, dim=1) * ONE_VOTE).round().long()
        truth = query_labels[part].to(bank.device)
        for place, k in enumerate(ks):
            rank = _rank(votes[:, :k], labels[rows[:, :k]], truth, num_classes)
            right[place] += torch.stack([(rank < 1).sum(), (rank < TOP).sum()])
    shares = (right.double() / len(queries)).tolist()
    return {k: Accuracy(*share) for k, share in zip(ks, shares, strict=True)}


def evaluate_knn(
    train: FeatureSet,
    test: FeatureSet,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
    device: str | torch.device = "cpu",
) -> dict[int, Accuracy]:
    """`knn` of the last block's class tokens, on `device`. Raises ConfigError as it and `class_numbers` do."""
    _, bank_labels, query_labels = class_numbers(train.labels, test.labels)
    return knn(train.cls[:, -1].to(device), bank_labels, test.cls[:, -1], query_labels, ks, temperature)


def centred_pixels(train: Pixels, test: Pixels) -> tuple[FeatureSet, FeatureSet]:
    """Pixels as features, less their mean over `train`: the cosine of these is what a network has to beat."""
    bank, queries = (pixels.images.flatten(1).float() for pixels in (train, test))
    mean = bank.mean(0)
    return (
        FeatureSet((bank - mean)[:, None], None, train.labels, []),
        FeatureSet((queries - mean)[:, None], None, test.labels, []),
    )


def _nearest(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosines float32 and bank rows int64 of the k nearest, both [B, min(k, n)], best first; unit vectors."""
    best = torch.empty(len(queries), 0, dtype=torch.int64, device=bank.device)
    for start in range(0, len(bank), BANK_ROWS):
        ranks = _ranks(queries @ bank[start : start + BANK_ROWS].T, start)
        best = torch.cat([best, ranks.topk(min(k, ranks.shape[1]), dim=1).values], dim=1)
        best = best.topk(min(k, best.shape[1]), dim=1).values
    return _similarity(best), LAST_ROW - (best & LAST_ROW)


def _ranks(similarity: Tensor, first_row: int) -> Tensor:
    """Whole numbers, all different, that sort as (similarity, then the lower row): int64 of the same shape.

    The bits of a float32 sort as whole numbers do, once those of negative numbers are turned round; they make the upper
    half, and what is left from the row to the last possible one the lower.
    """
    bits = (similarity + 0.0).view(torch.int32)  # + 0.0 makes 0 of -0
    rows = torch.arange(first_row, first_row + similarity.shape[1], device=similarity.device)
    return (torch.where(bits < 0, bits ^ SIGN_KEPT, bits).long() << 32) | (LAST_ROW - rows)


def _similarity(ranks: Tensor) -> Tensor:
    """The similarities in what `_ranks` gave."""
    bits = (ranks >> 32).int()
    return torch.where(bits < 0, bits ^ SIGN_KEPT, bits).view(torch.float32)


def _rank(votes: Tensor, classes: Tensor, truth: Tensor, num_classes: int) -> Tensor:
    """Place of the true class by votes, from 0, int64 [B]; beyond all where it has none. votes, classes: [B, k]."""
    tally = votes.new_zeros(len(votes), num_classes).scatter_add_(1, classes, votes)
    own = tally.gather(1, truth[:, None])
    lower = torch.arange(num_classes, device=votes.device) < truth[:, None]
    rank = ((tally > own) | ((tally == own) & lower)).sum(1)
    return torch.where(own[:, 0] > 0, rank, num_classes + TOP)
