"""Candidates for the nearest centroid of each point: held while bounds rise, then decided by their scores."""

from typing import Any

import numpy as np
import numpy.typing as npt

from curation.distances import Metric, Points, squared_pairs
from curation.scoring import compiled, cosine_pairs, readable, search_margin, widen

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

LANES = 64
"""Products that are added up side by side."""
MAX_HELD = 1 << 20
"""Candidates (12 bytes each) that are held before they are scored."""


def distance_of(score: Float32, metric: Metric) -> Float32:
    """The distance that a score stands for: 1 - cosine, or the squared one, whose score is negative."""
    return np.float32(1) - score if metric == "cosine" else -score


@compiled
def _keep_loop(i: Int32, j: Int32, score: Float32, best: Float32, cluster: Int32) -> None:
    """Of equal scores the first stays, which is the lowest centroid: tiles come by rising columns."""
    for pair in range(i.shape[0]):
        row = i[pair]
        if score[pair] > best[row]:
            best[row], cluster[row] = score[pair], j[pair]


@compiled
def _sift_loop(
    x: npt.NDArray[Any],
    y: Float32,
    i: Int32,
    j: Int32,
    cosine: bool,
    x_norm: Float64,
    y_norm: Float64,
    margin: float,
    near: Float32,
    kept: npt.NDArray[np.bool_],
) -> None:
    """Keep of pairs sorted by i those that are, by float32 sums of LANES side by side, near the best of their i."""
    dim = x.shape[1]
    bits, values = np.empty(dim, np.int32), np.empty(dim, np.float64)
    row, lanes = np.empty(dim, np.float32), np.empty(LANES, np.float32)
    start = 0
    while start < i.shape[0]:
        a, stop = i[start], start
        widen(x[a], bits, values)
        for t in range(dim):
            row[t] = values[t]
        best = np.float32(np.inf)
        while stop < i.shape[0] and i[stop] == a:
            other = y[j[stop]]
            lanes[:] = 0.0
            for first in range(0, dim, LANES):
                mine, its = row[first : first + LANES], other[first : first + LANES]
                if cosine:
                    for t in range(mine.shape[0]):
                        lanes[t] -= mine[t] * its[t]
                else:
                    for t in range(mine.shape[0]):
                        lanes[t] += (mine[t] - its[t]) * (mine[t] - its[t])
            total = np.float32(0.0)
            for t in range(LANES):
                total += lanes[t]
            scale = x_norm[a] * y_norm[j[stop]] if cosine else 1.0
            near[stop] = total / scale if scale > 0.0 else 0.0
            best = min(best, near[stop])
            stop += 1
        least = best + 2.0 * margin * (1.0 if cosine else best)
        for pair in range(start, stop):
            kept[pair] = near[pair] <= least
        start = stop


class Candidates:
    """Candidates of one block of points, and the best scored centroid of each so far.

    A point without a direction, under cosine, scores 0 with all centroids and belongs to the first.
    """

    def __init__(self, points: Points, centroids: Points, metric: Metric) -> None:
        self._points, self._centroids, self._metric = points, centroids, metric
        self._cluster = np.zeros(len(points), np.int32)
        known = (points.length == 0.0) & (metric == "cosine")
        self._best = np.where(known, 0.0, -np.inf).astype(np.float32)
        self._lengths = np.full(len(points), -1.0), np.full(len(centroids), -1.0)
        self._count, self._parts = 0, [(np.zeros(0, np.int32),) * 3]

    def add(self, i: Int32, j: Int32, most: Int32, least: Int32) -> None:
        """Hold the pairs (i, j), int32 [m]; where these are too many, score them first.

        Args:
            i, j: rows of points and of centroids.
            most: upper bounds of their estimates, int32 [m].
            least: what a candidate's must reach by now, int32 [n].
        """
        self._count += len(i)
        self._parts.append((i, j, most))
        if self._count > MAX_HELD:
            self.drop(least)
            self._score()

    def drop(self, least: Int32) -> None:
        """Hold on to those alone that reach their point's bound, int32 [n]."""
        i, j, most = (np.concatenate(column) for column in zip(*self._parts, strict=True))
        kept = most >= least[i]
        self._hold(i[kept], j[kept], most[kept])

    def take_lone(self) -> None:
        """Decide for the candidates that are their point's only ones without scoring them: they have no distance."""
        i, j, most = self._parts[0]
        lone = (np.bincount(i, minlength=len(self._best))[i] == 1) & (self._best[i] == -np.inf)
        self._cluster[i[lone]], self._best[i[lone]] = j[lone], np.inf
        self._hold(i[~lone], j[~lone], most[~lone])

    def sift(self) -> None:
        """Drop candidates of what is held that products in float32, some ten times faster than scores, rule out.

        For them `search_margin` bounds what is off: of a cosine by itself, of a squared distance as a share of it.
        """
        order = np.argsort(self._parts[0][0], kind="stable")
        i, j, most = (part[order] for part in self._parts[0])
        near, kept = np.empty(len(i), np.float32), np.empty(len(i), np.bool_)
        lengths, margin = (self._points.length, self._centroids.length), 2 * search_margin(self._points.x.shape[1])
        y = np.ascontiguousarray(self._centroids.x, dtype=np.float32)
        _sift_loop(readable(self._points.x), y, i, j, self._metric == "cosine", *lengths, margin, near, kept)
        self._hold(i[kept], j[kept], most[kept])

    def decide(self) -> tuple[Int32, Float32]:
        """Score what is held; cluster int32 [n], of equal scores the lowest, and distance float32 [n]."""
        self._score()
        return self._cluster, distance_of(self._best, self._metric)

    def _score(self) -> None:
        i, j, _ = self._parts[0]
        order = np.argsort(i, kind="stable")  # pairs of one point are scored fastest together
        i, j, x, y = i[order], j[order], self._points.x, self._centroids.x
        cosine = self._metric == "cosine"
        score = cosine_pairs(x, i, y, j, *self._lengths) if cosine else -squared_pairs(x, i, y, j)
        _keep_loop(i, j, score, self._best, self._cluster)
        self._hold(*(np.zeros(0, np.int32),) * 3)

    def _hold(self, i: Int32, j: Int32, most: Int32) -> None:
        self._count, self._parts = len(i), [(i, j, most)]
