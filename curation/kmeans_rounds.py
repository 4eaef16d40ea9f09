"""Rounds of k-means, spherical and L2: a map over blocks of points, a sum, and the next centroids.

A round is `partial_sums` of each block against the centroids, `combine` of what they give, and `update`. Points are
added as multiples of a fixed power of two, so sums are exact: the order and the size of blocks, threads and machines
do not change a bit of them. `lloyd` runs rounds, over an array in memory or over anything else that gives the sums.
"""

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from curation.assignment import Nearest, mapped
from curation.distances import Points, Space, encode_points
from curation.hashing import keyed_hash
from curation.kmeans_init import as_centroids
from curation.scoring import compiled, readable, widen

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

RESOLUTION = 2.0**-26
"""Sums are of multiples of this, in units of the largest coordinate, so they are exact for 2**27 points a cluster."""
SPLIT = 0.25
"""How far from its cluster's mean, in root mean squared distances, the centroid of an empty cluster is put."""


@dataclass(frozen=True)
class Partial:
    """What some of the points contribute to a round.

    Attributes:
        sums: float64 [k, d], of the points nearest to each centroid; of unit length for cosine.
        counts: int64 [k], how many these are. Points without a direction do not count for cosine.
        squares: float64 [k], sum of their squared distances from the center; 1 each for cosine.
    """

    sums: Float64
    counts: Int64
    squares: Float64

    @staticmethod
    def nothing(num_clusters: int, dim: int) -> "Partial":
        return Partial(np.zeros((num_clusters, dim)), np.zeros(num_clusters, np.int64), np.zeros(num_clusters))

    def spread(self, centroids: Float32, space: Space) -> Float64:
        """Sum of squared distances from each centroid: |x - m|**2 - 2 <x - m, c - m> + |c - m|**2, float64 [k].

        Under cosine the center m is zero, and these are twice the cosine distances.
        """
        found = np.empty(len(centroids))
        center = np.zeros(centroids.shape[1], np.float32) if space.center is None else space.center
        _spread_loop(self.sums, self.counts, self.squares, centroids, center, found)
        return found


@compiled
def _add_loop(
    x: npt.NDArray[Any],
    factor: Float64,
    cluster: Int32,
    square: Float64,
    grid: tuple[float, float],
    sums: Float64,
    counts: Int64,
    squares: Float64,
) -> None:
    """Adding a `grid` and taking it away rounds to multiples of its last place."""
    bits, values = np.empty(x.shape[1], np.int32), np.empty(x.shape[1], np.float64)
    for row in range(x.shape[0]):
        if factor[row] == 0.0:
            continue
        widen(x[row], bits, values)
        scale, total = factor[row], sums[cluster[row]]
        for t in range(x.shape[1]):
            total[t] += (values[t] * scale + grid[0]) - grid[0]
        counts[cluster[row]] += 1
        squares[cluster[row]] += (square[row] + grid[1]) - grid[1]


@compiled
def _spread_loop(
    sums: Float64, counts: Int64, squares: Float64, centroids: Float32, center: Float32, spread: Float64
) -> None:
    for c in range(sums.shape[0]):
        product, square = 0.0, 0.0
        for t in range(sums.shape[1]):
            middle = np.float64(center[t])
            value = np.float64(centroids[c, t]) - middle
            product += (sums[c, t] - counts[c] * middle) * value
            square += value * value
        spread[c] = squares[c] - 2.0 * product + counts[c] * square


def add_sums(total: Partial, points: Points, cluster: Int32, space: Space) -> None:
    """Add points to `total`, given the cluster of each, int32 [n]."""
    factor, square, longest = np.ones(len(points)), points.length**2, space.reach**2 * total.sums.shape[1]
    if space.metric == "cosine":
        factor = np.divide(1.0, points.length, out=np.zeros(len(points)), where=points.length > 0)
        square, longest = np.ones(len(points)), 1.0
    grid = (1.5 * 2.0**52 * RESOLUTION * space.reach, 1.5 * 2.0**52 * RESOLUTION * longest)
    _add_loop(readable(points.x), factor, cluster, square, grid, total.sums, total.counts, total.squares)


def partial_sums(
    blocks: Iterable[Points], centroids: Float32, space: Space, *, threads: int = 1, device: str = "cpu"
) -> Partial:
    """Assign points to their nearest centroids and sum them up: the map of a round.

    Args:
        blocks: points as `encode_points` readies them in `space`, of any size; BLOCK_ROWS is a good one.
        centroids: float32 [k, d].
        space: the distance.
        threads: that assign blocks, each beside torch's own.
        device: that multiplies.

    Returns:
        The same however the points are cut into blocks. Holds 8 d k bytes, and two blocks for each thread.
    """
    target, total = encode_points(centroids, space), Partial.nothing(*centroids.shape)
    for points, cluster in mapped(Nearest.usual, blocks, target, space, threads, device):
        add_sums(total, points, cluster, space)
    return total


def combine(partials: Iterable[Partial]) -> Partial:
    """The sum of at least one: the reduce of a round. Holds one besides the one at hand."""
    rest = iter(partials)
    first = next(rest)
    total = Partial(first.sums.copy(), first.counts.copy(), first.squares.copy())
    del first  # or it is held along with the others
    for other in rest:
        for mine, its in ((total.sums, other.sums), (total.counts, other.counts), (total.squares, other.squares)):
            np.add(mine, its, out=mine)
    return total


def update(centroids: Float32, total: Partial, space: Space, *, seed: int, turn: int) -> Float32:
    """The centroids after a round: means, or mean directions, of what is nearest to each.

    An empty cluster moves near the mean of the one of largest spread, in a direction drawn for (turn, cluster), and
    each that has been so divided counts as many parts less. A cluster stays where it is if its mean has no direction,
    or if it is empty and there is none to divide.

    Args:
        centroids: of the round, float32 [k, d].
        total: of all points.
        space: the distance.
        seed, turn: of the draws.

    Returns:
        float32 [k, d], unit length for cosine.
    """
    sums = total.sums if space.metric == "cosine" else total.sums / np.maximum(total.counts, 1)[:, None]
    means = as_centroids(sums.astype(np.float32), space.metric)
    kept = total.counts == 0 if space.metric == "l2" else ~means.any(axis=1)
    means[kept] = centroids[kept]
    spread = total.spread(centroids, space)
    empty, donor = _divided(total, spread)
    if len(empty):
        squared = spread[donor] / total.counts[donor]
        step = SPLIT * np.sqrt(squared / means.shape[1])
        moved = means[donor] + step[:, None] * _signs(empty, means.shape[1], seed, turn)
        means[empty] = as_centroids(moved.astype(np.float32), space.metric)
    return means


def _signs(clusters: Int64, dim: int, seed: int, turn: int) -> Float64:
    """A direction for each cluster: 1 or -1 in each dimension, float64 [m, d]."""
    words = np.full((len(clusters), dim, 2), turn, dtype=np.uint64)
    words[:, :, 1] = clusters[:, None] * dim + np.arange(dim)
    draws = keyed_hash(seed, "k-means split", words.reshape(-1, 2)).reshape(len(clusters), dim)
    return np.where(draws >> np.uint64(63), 1.0, -1.0)


def _divided(total: Partial, spread: Float64) -> tuple[Int64, Int64]:
    """Which empty clusters get a part of which others, int64 [m] each."""
    divisible = np.flatnonzero((total.counts > 1) & (spread > 0))
    heap = [(-float(spread[c]), int(c), 1) for c in divisible]
    heapq.heapify(heap)
    empty = np.flatnonzero(total.counts == 0)
    donors: list[int] = []
    while heap and len(donors) < len(empty):
        _, c, parts = heapq.heappop(heap)
        donors.append(c)
        if parts + 1 < total.counts[c]:
            heapq.heappush(heap, (-float(spread[c]) / (parts + 1), c, parts + 1))
    return empty[: len(donors)], np.asarray(donors, dtype=np.int64)


def has_converged(before: float, after: float, tolerance: float) -> bool:
    """Whether a round's objective is less than the one before's by at most `tolerance` of it; never after the first."""
    return bool(np.isfinite(before)) and before - after <= tolerance * before


def lloyd(
    centroids: Float32,
    sums: Callable[[Float32], Partial],
    space: Space,
    *,
    iterations: int,
    tolerance: float,
    seed: int,
) -> Float32:
    """Rounds of k-means until they are done or have converged; `sums` gives what all points contribute to one."""
    before = np.inf
    for turn in range(iterations):
        total = sums(centroids)
        objective = float(total.spread(centroids, space).sum())
        centroids = update(centroids, total, space, seed=seed, turn=turn)
        if has_converged(before, objective, tolerance):
            break
        before = objective
    return centroids
