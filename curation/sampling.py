"""Balanced sampling over clusters (Vo et al., arXiv 2405.15613, one level), and how balanced a set is."""

from typing import Any

import numpy as np
import numpy.typing as npt

from curation.errors import ConfigError, LvdError

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]


def equal_shares(sizes: npt.NDArray[Any], target: int, max_copies: int = 1, order: UInt64 | None = None) -> Int64:
    """How many images each cluster gives: as equal as their sizes allow, `target` in all.

    Shares are min(c, max_copies * size) with the largest cap c whose sum does not exceed `target`; what is missing goes
    one by one to clusters with images to spare, lowest `order` first.

    Args:
        sizes: images in each cluster, int [k].
        target: images wanted, exactly.
        max_copies: how often one image may be taken.
        order: draw of each cluster for the remainder, uint64 [k]; ties and None go by number.

    Returns:
        int64 [k], summing to `target`.

    Raises:
        ConfigError: `target` is negative or more than max_copies * sum(sizes).
    """
    limit = np.asarray(sizes, dtype=np.int64) * max_copies
    reachable = int(limit.sum())
    if not 0 <= target <= reachable:
        raise ConfigError(
            f"cannot take {target:,} images: the clusters hold {int(np.sum(sizes)):,}, "
            f"so with at most {max_copies} of each the largest possible target is {reachable:,}"
        )
    shares = np.minimum(_largest_cap(limit, target), limit)
    spare = np.flatnonzero(limit > shares)
    if order is not None:
        spare = spare[np.argsort(order[spare], kind="stable")]
    shares[spare[: target - int(shares.sum())]] += 1
    return shares


def _largest_cap(limit: Int64, target: int) -> int:
    """The largest c up to max(limit) with sum(min(c, limit)) <= target, by bisection."""
    low, high = 0, int(limit.max(initial=0))
    while low < high:
        middle = (low + high + 1) // 2
        if int(np.minimum(middle, limit).sum()) <= target:
            low = middle
        else:
            high = middle - 1
    return low


def draw_copies(cluster: npt.NDArray[Any], shares: Int64, draw: UInt64, words: UInt64) -> npt.NDArray[np.int32]:
    """How often each image is taken so that every cluster gives its share: whole rounds, then the lowest draws.

    Args:
        cluster: of each row, int [n], from 0 to k - 1.
        shares: images wanted of each cluster, int64 [k].
        draw: keyed hash of each row, uint64 [n].
        words: ids as `hashing.id_words` gives them, uint64 [n, 2]; they break ties.

    Returns:
        copies of each row, int32 [n]. Holds about 50 bytes a row.

    Raises:
        LvdError: rows name a cluster without a share, or a cluster without rows has a share.
    """
    if len(cluster) and (cluster.min() < 0 or cluster.max() >= len(shares)):
        raise LvdError(f"rows name clusters {cluster.min()} to {cluster.max()}, but there are {len(shares)} shares")
    size = np.bincount(cluster, minlength=len(shares))
    if (shares[size == 0] > 0).any():
        raise LvdError(f"cluster {np.flatnonzero((size == 0) & (shares > 0))[0]} has a share but no images")
    whole, rest = np.divmod(shares, np.maximum(size, 1))
    copies: Int64 = whole[cluster] + (draw_ranks(cluster, draw, words) < rest[cluster])
    return copies.astype(np.int32)


def draw_ranks(cluster: npt.NDArray[Any], draw: UInt64, words: UInt64) -> Int64:
    """Place of each row within its cluster by (draw, image id), int64 [n], from 0; arguments as in `draw_copies`."""
    order = np.lexsort((words[:, 1], words[:, 0], draw, cluster))
    ordered = cluster[order]
    place = np.arange(len(order))
    starts = np.searchsorted(ordered, ordered)
    ranks = np.empty(len(order), dtype=np.int64)
    ranks[order] = place - starts
    return ranks


def entropy(counts: npt.NDArray[Any]) -> float:
    """Shannon entropy of the shares counts / sum(counts), in nats; 0 for nothing."""
    present = np.asarray(counts)[np.asarray(counts) > 0]
    share = present / present.sum() if len(present) else np.ones(1)
    return float(abs((share * np.log(share)).sum()))


def normalized_entropy(counts: npt.NDArray[Any]) -> float:
    """`entropy` over its largest value log k, k counting empty clusters too: 1 is perfect balance (also for k = 1)."""
    if np.sum(counts) == 0:
        return 0.0
    return entropy(counts) / float(np.log(len(counts))) if len(counts) > 1 else 1.0


def gini(counts: npt.NDArray[Any]) -> float:
    """Gini coefficient: mean absolute difference of two counts over twice their mean; 0 is perfect balance."""
    ordered = np.sort(np.asarray(counts, dtype=np.float64))
    num_counts, total = len(ordered), float(ordered.sum())
    if total == 0.0:
        return 0.0
    weight = 2 * np.arange(1, num_counts + 1) - num_counts - 1
    return float((weight * ordered).sum() / (num_counts * total))
