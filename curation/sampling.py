"""Balanced sampling over a tree of clusters (Vo et al., arXiv 2405.15613): equal shares top-down, a draw at each leaf.

A flat clustering is the tree of one level. Trees come from `hierarchy`; how balanced a set is, from `balance_measures`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from curation.errors import ConfigError, LvdError
from curation.groups import group_sizes, group_sums, take_lowest
from curation.scoring import Vectors, compiled
from curation.spread import take_spread

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Tree:
    """Clusters of L levels; level 1 is the finest and comes first. Clusters may be empty at any level.

    Attributes:
        num_clusters: of each level, K_1 .. K_L.
        parents: for levels 1 .. L - 1, the cluster of the next level that each cluster belongs to, int32 [K_l].

    Raises:
        LvdError: a parent is missing, or names a cluster that does not exist.
    """

    num_clusters: tuple[int, ...]
    parents: tuple[Int32, ...] = ()

    def __post_init__(self) -> None:
        if len(self.parents) != len(self.num_clusters) - 1:
            raise LvdError(f"{len(self.num_clusters)} levels of clusters, but {len(self.parents)} lists of parents")
        for level, parent in enumerate(self.parents, 1):
            below, above = self.num_clusters[level - 1 : level + 1]
            if len(parent) != below or (below and (parent.min() < 0 or parent.max() >= above)):
                raise LvdError(
                    f"the {len(parent)} parents of level {level} do not lead from {below} to {above} clusters"
                )

    def totals(self, leaves: npt.NDArray[Any]) -> list[Int64]:
        """Sums of a number of each finest cluster, int [K_1], at every level: int64 [K_l], finest first."""
        found = [np.asarray(leaves, dtype=np.int64)]
        for parent, above in zip(self.parents, self.num_clusters[1:], strict=True):
            found.append(group_sums(parent, found[-1], above))
        return found

    def path(self, cluster: Int32) -> list[Int32]:
        """Cluster of each row at every level, int32 [n] each, finest first, from its finest cluster, int32 [n]."""
        found = [cluster]
        for parent in self.parents:
            found.append(parent[found[-1]])
        return found


def tree_shares(
    tree: Tree, sizes: npt.NDArray[Any], target: int, max_copies: int = 1, orders: tuple[UInt64, ...] | None = None
) -> Int64:
    """How many images each finest cluster gives: at every node as equal as what lies below allows, `target` in all.

    From the top down, what a node gives is divided among its children: min(c, max_copies * images below), with the
    largest cap c whose sum does not exceed it; what is missing goes one by one to children with images to spare, lowest
    `orders` first. Holds about 60 bytes a cluster; time grows with log(target) times the clusters.

    Args:
        tree: the clusters.
        sizes: images in each finest cluster, int [K_1].
        target: images wanted, exactly.
        max_copies: how often one image may be taken.
        orders: for each level, finest first, the draw of each cluster for the remainder, uint64 [K_l]; ties and None go
            by number.

    Returns:
        int64 [K_1], summing to `target`.

    Raises:
        ConfigError: `target` is negative or more than max_copies * sum(sizes).
    """
    limits = tree.totals(np.asarray(sizes, dtype=np.int64) * max_copies)
    reachable = int(limits[0].sum())
    if not 0 <= target <= reachable:
        raise ConfigError(
            f"cannot take {target:,} images: the clusters hold {int(np.sum(sizes)):,}, "
            f"so with at most {max_copies} of each the largest possible target is {reachable:,}"
        )
    shares = np.array([target], dtype=np.int64)
    root = np.zeros(tree.num_clusters[-1], dtype=np.int32)
    for level, parent in reversed(list(enumerate((*tree.parents, root)))):
        shares = _divided(limits[level], parent, shares, orders[level] if orders else None)
    return shares


def equal_shares(sizes: npt.NDArray[Any], target: int, max_copies: int = 1, order: UInt64 | None = None) -> Int64:
    """`tree_shares` of a flat clustering: sizes int [k], `order` uint64 [k] or None; int64 [k] comes back."""
    return tree_shares(Tree((len(sizes),)), sizes, target, max_copies, None if order is None else (order,))


def proportional_shares(sizes: npt.NDArray[Any], target: int) -> Int64:
    """How many clusters each of k cells is divided into: in proportion to its size, by largest remainder.

    Args:
        sizes: rows of each cell, int [k].
        target: clusters in all, from k to the sum of max(1, size).

    Returns:
        int64 [k], summing to `target`: from 1 to max(1, size) each.
    """
    most = np.maximum(sizes, 1)
    low, high = 0.0, 1.0  # clusters a row: at `high` every cell has all that it can
    for _ in range(64):
        middle = (low + high) / 2
        if np.clip(sizes * middle, 1, most).sum() <= target:
            low = middle
        else:
            high = middle
    quota = np.clip(sizes * high, 1, most)
    shares: Int64 = np.floor(quota).astype(np.int64)
    missing = target - int(shares.sum())
    shares[np.argsort(shares - quota, kind="stable")[:missing]] += 1
    return shares


def _divided(limit: Int64, parent: Int32, target: Int64, order: UInt64 | None) -> Int64:
    """Shares of children, int64 [k], that add up to the target of each parent, int64 [p], within their limits."""
    shares = np.minimum(_largest_caps(limit, parent, target)[parent], limit)
    missing = target - group_sums(parent, shares, len(target))
    spare = np.flatnonzero(limit > shares)
    keys = np.zeros(len(spare), dtype=np.uint32) if order is None else order[spare]
    shares[spare] += take_lowest(parent[spare], missing, keys)
    return shares


def _largest_caps(limit: Int64, parent: Int32, target: Int64) -> Int64:
    """For each parent the largest c up to its target with sum(min(c, limit)) <= target, all by bisection at once."""
    low, high = np.zeros_like(target), target.copy()
    while (low < high).any():
        middle = low + (high - low + 1) // 2
        spent = np.zeros_like(target)
        _spend_loop(parent, limit, middle, spent)
        fits = spent <= target
        low, high = np.where(fits, middle, low), np.where(fits, high, middle - 1)
    return low


@compiled
def _spend_loop(parent: npt.NDArray[Any], limit: Int64, cap: Int64, spent: Int64) -> None:
    for child in range(parent.shape[0]):
        spent[parent[child]] += min(cap[parent[child]], limit[child])


def draw_copies(
    cluster: npt.NDArray[Any],
    shares: Int64,
    draw: npt.NDArray[Any],
    words: UInt64 | None = None,
    vectors: Vectors | None = None,
) -> Int32:
    """How often each image is taken so that every cluster gives its share: whole rounds, then the lowest draws.

    With keyed hashes as draws that is a random choice; with `groups.distance_keys` the images closest to the centroid;
    with `vectors` images spread over the cluster (`spread.take_spread`), beginning with the lowest draw.

    Args:
        cluster: of each row, int [n], from 0 to k - 1.
        shares: images wanted of each cluster, int64 [k].
        draw: of each row, uint32 or uint64 [n].
        words: ids as `hashing.id_words` gives them, uint64 [n, 2]; they break ties. Without them the first row does.
        vectors: stored vectors of the rows [n, d], for a spread.

    Returns:
        copies of each row, int32 [n]. Holds 12 bytes a row beside the arguments (cluster int32 and draw uint64 are 12
        more), 40 bytes a cluster and 8 bytes a row of the largest cluster; with vectors, what `take_spread` holds.

    Raises:
        LvdError: rows name a cluster without a share, or a cluster without rows has a share.
    """
    if len(cluster) and (cluster.min() < 0 or cluster.max() >= len(shares)):
        raise LvdError(f"rows name clusters {cluster.min()} to {cluster.max()}, but there are {len(shares)} shares")
    size = group_sizes(cluster, len(shares))
    if (shares[size == 0] > 0).any():
        raise LvdError(f"cluster {np.flatnonzero((size == 0) & (shares > 0))[0]} has a share but no images")
    whole, rest = np.divmod(shares, np.maximum(size, 1))
    copies: Int32 = whole.astype(np.int32)[cluster]
    if vectors is None:
        copies += take_lowest(cluster, rest, draw, words)
    else:
        copies += take_spread(vectors, cluster, rest, draw, words)
    return copies


def draw_ranks(cluster: npt.NDArray[Any], draw: UInt64, words: UInt64) -> Int64:
    """Place of each row within its cluster by (draw, image id), int64 [n], from 0; arguments as in `draw_copies`."""
    order = np.lexsort((words[:, 1], words[:, 0], draw, cluster))
    ordered = cluster[order]
    place = np.arange(len(order))
    starts = np.searchsorted(ordered, ordered)
    ranks = np.empty(len(order), dtype=np.int64)
    ranks[order] = place - starts
    return ranks
