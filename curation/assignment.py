"""Nearest centroids: product, argmax and candidates in one pass over tiles that stay in cache; `scoring` decides.

Products of int8 codes (`curation.codes`) are integers, the same on every machine. For L2 a tile becomes integers that
rank as |x - c|**2 does. A centroid is a candidate if it may, by the proven bound on what codes are off, be the nearest;
in rounds of k-means, which need no proof, by what codes are off as a rule, which leaves few. Candidates are scored.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from curation.candidates import Candidates, distance_of
from curation.codes import SLACK, usual_share
from curation.distances import Points, Space, direct_best
from curation.products import TILE_COLUMNS, TILE_ROWS, Found, Multiplier
from curation.scoring import check_comparable, compiled

if TYPE_CHECKING:
    import torch

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

R = TypeVar("R")

LEAST = -(2**31)
SCALE = 2.0**29
"""Estimates of L2 are integers: multiples of (|x| + max |c|)**2 / SCALE."""
L2_SLACK = 2e-6
"""Room for rounding in (|x| + max |c|)**2: float32 operations, the center's removal, and the score's to float32."""


@compiled
def _collect_loop(
    tile: Int32,
    columns: tuple[int, int],
    margin: Int32,
    allowance: Int32,
    highest: Int32,
    floor: Int32,
    best: Int32,
    cluster: Int32,
    found: tuple[Int32, Int32, Int32],
) -> int:
    """Enter each line's best value and what it is at least, and collect its candidates; returns how many."""
    rows, others, most = found
    count, first, width = 0, columns[0], columns[1] - columns[0]
    for row in range(best.shape[0]):
        line, top = tile[row, :width], np.int32(-(2**31))
        for j in range(width):
            top = max(top, line[j])
        at = -1
        if top > best[row]:
            at = 0
            while line[at] != top:
                at += 1
            best[row], cluster[row] = top, first + at
            floor[row] = max(floor[row], top - allowance[at])
        least = floor[row] - 2 * margin[row]
        if top + highest[0] < least:
            continue
        left = 0
        for j in range(width):  # a count has no branches: many at once
            left += np.int32(line[j] + allowance[j]) >= least
        j = at if left == 1 and at >= 0 and top + allowance[at] >= least else 0
        while left:
            if np.int32(line[j] + allowance[j]) >= least:
                rows[count], others[count], most[count] = row, first + j, line[j] + allowance[j]
                count, left = count + 1, left - 1
            j += 1
    return count


@compiled
def _distance_loop(tile: Int32, slope: Float32, offset: Float32, reach: Float32, square: Float32) -> None:
    """Products become estimates of 2 <x, c> - |c|**2 in units of their row, in place."""
    for row in range(slope.shape[0]):
        a, b, line = slope[row], offset[row], tile[row, : reach.shape[0]]
        for j in range(line.shape[0]):
            line[j] = np.int32(np.float32(line[j]) * (a * reach[j]) - b * square[j])


@dataclass(frozen=True)
class _Units:
    """What turns products into estimates, row by row and column by column, and how far these may be off.

    Estimates are of the cosine, in units of products; for L2 of |x|**2 less the distance, in units of
    (|x| + max |c|)**2 / SCALE. One is off by at most its row's margin and its column's allowance: the bound of `codes`,
    (1 + e) f + e, times 2 |x| |c| for L2, where |x| / (|x| + max |c|)**2 is at most 1 / (4 max |c|).
    """

    margin: Int32
    allowance: Int32
    slope: Float32
    offset: Float32
    reach: Float32
    square: Float32

    @staticmethod
    def of(points: Points, centroids: Points, space: Space, share: float) -> "_Units":
        """`share` of what codes may be off is counted on."""
        assert points.codes is not None and centroids.codes is not None
        scale, e = points.codes.scale**2, points.codes.error.astype(np.float64)
        allowed = share * (1.0 + e.max(initial=0.0)) * centroids.codes.error.astype(np.float64)
        e *= share
        none, lengths, u = np.zeros(0, np.float32), centroids.length, points.length
        if space.metric == "cosine":
            # A point without a direction has no candidates: it scores 0 with all, and the lowest cluster takes it.
            margin = np.where(u > 0, (e + SLACK) / scale, -1e9)
            return _Units(_up(margin), _up(allowed / scale), none, none, none, none)
        longest = float(lengths.max())
        unit = (u + longest) ** 2 / SCALE
        inverse = np.divide(1.0, unit, out=np.zeros_like(unit), where=unit > 0)
        margin = 2.0 * u * longest * e * inverse + L2_SLACK * SCALE
        relative = lengths / longest if longest > 0 else lengths
        slope, offset = (2.0 * scale * u * inverse).astype(np.float32), inverse.astype(np.float32)
        reach, square = lengths.astype(np.float32), (lengths**2).astype(np.float32)
        return _Units(_up(margin), _up(0.5 * SCALE * relative * allowed), slope, offset, reach, square)


def _up(values: Float64) -> Int32:
    return np.ceil(values).astype(np.int32)


class Nearest(Multiplier):
    """Finds nearest centroids on one device; holds its tiles between calls, so one serves one thread."""

    def usual(self, points: Points, centroids: Points, space: Space) -> Int32:
        """The nearest centroid of each point, or in rare cases one about as near: of the candidates that codes leave
        as a rule (`codes.usual_share`), the one that `cosine_pairs` or `squared_pairs` decides for.

        Takes and holds what `exact` does. Returns int32 [n].
        """
        return self._search(points, centroids, space, False)[0]

    def exact(self, points: Points, centroids: Points, space: Space) -> tuple[Int32, Float32]:
        """The nearest centroid of each point as `cosine_pairs` or `squared_pairs` decides, ties to the lowest.

        Args:
            points, centroids: what `encode_points` gives in this space, [n, d] and [k, d], k > 0.

        Returns:
            cluster int32 [n], and the distance of each as it is scored, float32 [n]: 1 - cosine, or squared. Holds
            about 60 bytes a point, and 12 for each of MAX_HELD candidates and those of one tile.
        """
        return self._search(points, centroids, space, True)

    def _search(self, points: Points, centroids: Points, space: Space, scored: bool) -> tuple[Int32, Float32]:
        check_comparable(points.x, centroids.x)
        if points.codes is None or centroids.codes is None:
            cluster, score = direct_best(points, centroids, space.metric)
            return cluster, distance_of(score, space.metric)
        units = _Units.of(points, centroids, space, 1.0 if scored else usual_share(points.x.shape[1]))
        best, floor = (np.full(len(points), LEAST, np.int32) for _ in range(2))
        cluster = np.zeros(len(points), np.int32)
        held = Candidates(points, centroids, space.metric)
        for rows, columns, tile in self._tiles(points.codes.values, centroids.codes.values):
            known = floor[rows], best[rows], cluster[rows]
            i, j, most = self._collect(self._estimates(tile, rows, columns, units), rows, columns, units, *known)
            held.add(i + np.int32(rows.start), j, most, floor - 2 * units.margin)
        held.drop(floor - 2 * units.margin)
        if not scored:
            held.take_lone()
            held.sift()
            held.take_lone()
        return held.decide()

    def _estimates(self, tile: "torch.Tensor", rows: slice, columns: slice, units: _Units) -> "torch.Tensor":
        """The tile's estimates; what it was padded with stays, on the CPU, behind them."""
        if self.device.type == "cuda":
            tile = tile[: rows.stop - rows.start, : columns.stop - columns.start]
        if not len(units.slope):
            return tile
        parts = units.slope[rows], units.offset[rows], units.reach[columns], units.square[columns]
        if self.device.type == "cpu":
            _distance_loop(tile.numpy(), *parts)
            return tile
        a, b, reach, square = (self._torch.from_numpy(part).to(self.device) for part in parts)
        estimates: torch.Tensor = tile.float() * (a[:, None] * reach) - b[:, None] * square
        return estimates.to(self._torch.int32)

    def _collect(
        self,
        tile: "torch.Tensor",
        rows: slice,
        columns: slice,
        units: _Units,
        floor: Int32,
        best: Int32,
        cluster: Int32,
    ) -> Found:
        """Enter a tile's best estimates; its candidates: row in the tile, cluster, and what it may be at most."""
        margin, allowance = units.margin[rows], units.allowance[columns]
        if self.device.type == "cpu":
            if not hasattr(self, "_collected"):
                room = np.empty((3, TILE_ROWS * TILE_COLUMNS), dtype=np.int32)
                self._collected = room[0], room[1], room[2]
            ends, highest = (columns.start, columns.stop), allowance.max(keepdims=True)
            count = _collect_loop(tile.numpy(), ends, margin, allowance, highest, floor, best, cluster, self._collected)
            i, j, most = (part[:count].copy() for part in self._collected)
            return i, j, most
        column = tile.argmax(dim=1)  # of equal values the first
        top, at = tile.gather(1, column[:, None])[:, 0].cpu().numpy(), column.cpu().numpy()
        better = top > best
        best[better], cluster[better] = top[better], columns.start + at[better]
        floor[better] = np.maximum(floor[better], top[better] - allowance[at[better]])
        i, j, value = self._scan_gpu(tile, floor - 2 * margin, allowance)
        return i, j + np.int32(columns.start), value + allowance[j]


def mapped(
    search: Callable[[Nearest, Points, Points, Space], R],
    blocks: Iterable[Points],
    target: Points,
    space: Space,
    threads: int,
    device: str,
) -> Iterator[tuple[Points, R]]:
    """Each block with what is found for it, in order; at most two blocks a thread are under way."""
    idle = SimpleQueue[Nearest]()
    for _ in range(threads):
        idle.put(Nearest(device))

    def work(points: Points) -> R:
        nearest = idle.get()
        try:
            return search(nearest, points, target, space)
        finally:
            idle.put(nearest)

    if threads == 1:
        yield from ((points, work(points)) for points in blocks)
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[tuple[Points, Future[R]]] = deque()
        for points in blocks:
            waiting.append((points, pool.submit(work, points)))
            if len(waiting) == 2 * threads:
                first, future = waiting.popleft()
                yield first, future.result()
        yield from ((points, future.result()) for points, future in waiting)
