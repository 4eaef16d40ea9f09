"""The two distances of clustering, what is compared under them, and their exact values.

Cosine is 1 - cos(x, c). L2 is |x - c|**2, computed from codes as |x|**2 + |c|**2 - 2 |x| |c| cos(x, c), of x and c
less a common center, which shortens what is compared. `scoring.cosine_pairs` and `squared_pairs` decide.

int8 codes (`curation.codes`) of few coordinates are coarse. Up to FEW_DIMENSIONS one compiled loop scores all
centroids instead, in the order of summation of the pairwise functions and to the same bits.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from curation.codes import Codes, encode
from curation.scoring import Vectors, compiled, norms, readable, rows_of_pairs, widen

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Metric = Literal["cosine", "l2"]

FEW_DIMENSIONS = 16
"""Vectors of at most so many numbers are scored directly."""
BLOCK_ROWS = 16_384
"""Points that are readied, or assigned, at a time; more only take more memory."""
SIDE = 256
"""Centroids that are scored side by side in the direct loop: their sums stay in the nearest cache."""


@dataclass(frozen=True)
class Space:
    """The distance, and for L2 about where the points lie.

    Attributes:
        metric: `cosine` or `l2`.
        center: float32 [d], taken from points and centroids before they are coded; None for cosine.
        reach: a power of two about as large as the largest coordinate; 1 for cosine.
    """

    metric: Metric = "cosine"
    center: Float32 | None = None
    reach: float = 1.0

    @staticmethod
    def around(metric: Metric, x: Vectors) -> "Space":
        """The space whose center is the mean of the rows of `x` [n, d], n > 0. Holds 8 d n bytes for L2."""
        if metric == "cosine":
            return Space()
        largest = float(np.abs(x).max())
        reach = 2.0 ** int(np.ceil(np.log2(largest))) if largest > 0 else 1.0
        return Space(metric, x.astype(np.float64).mean(axis=0).astype(np.float32), reach)


@dataclass(frozen=True)
class Points:
    """Vectors made ready to be compared in a `Space`.

    Attributes:
        x: as they are stored, [n, d].
        length: float64 [n], distance from the center.
        codes: of x less the center; None for vectors of few dimensions.
    """

    x: Vectors
    length: Float64
    codes: Codes | None

    def __len__(self) -> int:
        return len(self.x)

    def part(self, rows: slice) -> "Points":
        """Some of the points, as views."""
        return Points(self.x[rows], self.length[rows], self.codes and self.codes.take(rows))

    def blocks(self) -> Iterator["Points"]:
        """The points in order, BLOCK_ROWS at a time."""
        return (self.part(slice(start, start + BLOCK_ROWS)) for start in range(0, len(self), BLOCK_ROWS))


def encode_points(x: Vectors, space: Space) -> Points:
    """Ready the rows of `x` [n, d]. Holds 8 bytes a row and, above FEW_DIMENSIONS, d + 4 more.

    Raises LvdError where a row is not finite.
    """
    few = x.shape[1] <= FEW_DIMENSIONS
    if space.center is None:
        length = norms(x)
        return Points(x, length, None if few else encode(x, length))
    norms(x)  # refuses what is not finite by its row in x
    codes, length = [encode(np.zeros((0, x.shape[1]), np.float32))], np.empty(len(x))
    for start in range(0, len(x), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        moved = (x[rows].astype(np.float64) - space.center).astype(np.float32)
        length[rows] = norms(moved)
        if not few:
            codes.append(encode(moved, length[rows]))
    values, error = (np.concatenate([getattr(code, name) for code in codes]) for name in ("values", "error"))
    return Points(x, length, None if few else Codes(values, error, codes[0].scale))


@compiled
def _direct_loop(
    x: npt.NDArray[Any], length: Float64, y: Float64, y_length: Float64, cosine: bool, best: Float32, column: Int32
) -> None:
    """The best score of each row of x against the columns of y [d, k], ties to the first: as the pairwise loops do."""
    dim, count = y.shape
    bits, values, total = np.empty(dim, np.int32), np.empty(dim, np.float64), np.empty(SIDE, np.float64)
    for row in range(x.shape[0]):
        widen(x[row], bits, values)
        for first in range(0, count, SIDE):
            width = min(SIDE, count - first)
            total[:] = 0.0
            for t in range(dim):
                value, line = values[t], y[t, first : first + width]
                if cosine:
                    for j in range(line.shape[0]):
                        total[j] += value * line[j]
                else:
                    for j in range(line.shape[0]):
                        total[j] += (value - line[j]) * (value - line[j])
            for j in range(width):
                scale = length[row] * y_length[first + j] if cosine else -1.0
                score = np.float32(total[j] / scale) if scale != 0.0 else np.float32(0.0)
                if score > best[row]:
                    best[row], column[row] = score, first + j


@compiled
def _squared_loop(x: npt.NDArray[Any], i: Int64, y: npt.NDArray[Any], j: Int64, out: Float32) -> None:
    bits, values = np.empty(x.shape[1], np.int32), np.empty((2, x.shape[1]), np.float64)
    for pair in range(i.shape[0]):
        widen(x[i[pair]], bits, values[0])
        widen(y[j[pair]], bits, values[1])
        total = 0.0
        for t in range(values.shape[1]):
            total += (values[0, t] - values[1, t]) * (values[0, t] - values[1, t])
        out[pair] = total


def squared_pairs(x: Vectors, i: npt.NDArray[Any], y: Vectors, j: npt.NDArray[Any]) -> Float32:
    """Squared Euclidean distance of chosen pairs: the counterpart of `scoring.cosine_pairs` that decides under L2.

    Summed in float64 in index order and rounded to float32.

    Args:
        x, y: stored vectors [n, d] and [k, d], finite.
        i, j: rows of `x` and of `y`, int [m] each.

    Returns:
        float32 [m].

    Raises:
        LvdError: vectors of different length; IndexError: a row that does not exist.
    """
    i, j = rows_of_pairs(x, i, y, j)
    out = np.empty(len(i), dtype=np.float32)
    _squared_loop(readable(x), i, readable(y), j, out)
    return out


def direct_best(points: Points, centroids: Points, metric: Metric) -> tuple[Int32, Float32]:
    """The nearest of k centroids by scoring all of them: slow where dimensions are many.

    Returns:
        cluster int32 [n], ties to the lowest, and its score float32 [n]: the cosine, or the squared distance negated.
        Holds 8 d k bytes besides.
    """
    best, cluster = np.full(len(points), -np.inf, np.float32), np.zeros(len(points), np.int32)
    across = np.ascontiguousarray(centroids.x.astype(np.float64).T)
    _direct_loop(readable(points.x), points.length, across, centroids.length, metric == "cosine", best, cluster)
    return cluster, best
