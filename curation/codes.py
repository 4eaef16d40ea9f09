"""int8 codes of vectors: what proposes pairs, with a bound on how far a proposal may be off.

A vector is scaled to length 1, rotated at random (coordinates permuted, signs flipped, Hadamard transforms of blocks),
and rounded to multiples of one constant. The rotation spreads every vector's length evenly over its coordinates,
whatever the spectrum of the data, so that one constant suits all and integer products compare directly. Integers are
exact: a product of codes is the same on every machine, in any order of summation.

The bound is proven, not estimated. Let u, v be unit vectors after rotation (which keeps inner products), a, b their
codes times the constant, and e = |u - a|, f = |v - b| measured while rounding. Then by Cauchy-Schwarz
|<u, v> - <a, b>| = |<a, v - b> + <u - a, v>| <= |a| f + e |v| <= (1 + e) f + e.
"""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from curation.hashing import keyed_hash
from curation.scoring import Vectors, compiled, inlined, norms, readable, widen

Int8 = npt.NDArray[np.int8]
Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]

RANGE = 4.0
"""Coordinates of a rotated unit vector are about normal with deviation d ** -0.5; codes reach this many deviations."""
USUAL_DEVIATIONS = 2.5
"""Standard deviations that rounding is taken to be off by where chance, not proof, will do."""
SLACK = 1e-5
"""Room for rounding around the bound: the score's to float32, the cutoff's, and those of the rotation in float64."""


@dataclass(frozen=True)
class Codes:
    """Codes of n vectors.

    Attributes:
        values: int8 [n, k], k = d rounded up to a multiple of 8 (GPUs multiply no other lengths); the rest is zero.
        error: float32 [n], at least the distance between the rotated unit vector and `scale` * `values`.
        scale: the constant, the same for all vectors of one dimension.
    """

    values: Int8
    error: Float32
    scale: float

    def __len__(self) -> int:
        return len(self.values)

    def take(self, rows: npt.NDArray[np.integer] | slice) -> "Codes":
        """The codes of some rows: copies for an array of rows, views for a slice."""
        values = self.values[rows] if isinstance(rows, slice) else self.values.take(rows, axis=0)
        return Codes(values, self.error[rows], self.scale)


@functools.cache
def _rotation(dim: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], int]:
    """The permutation, the signs, and the length of the blocks: the largest power of two that divides `dim`."""
    words = np.zeros((dim, 2), dtype=np.uint64)
    words[:, 1] = np.arange(dim)
    order = np.argsort(keyed_hash(0, "rotation order", words), kind="stable")
    block = dim & -dim
    signs = np.where(keyed_hash(0, "rotation signs", words) >> np.uint64(63), 1.0, -1.0) / np.sqrt(block)
    return order, signs, block


def usual_share(dim: int) -> float:
    """The share of an error of rounding that a product with a unit vector is off by, as a rule; at most 1.

    Rounded coordinates are off independently, so <u - a, v> is a sum with deviation |u - a| d ** -0.5. Where blocks are
    short a vector may lie in few coordinates, which are cut off together: b, the length of a block, stands for d. Two
    products of one vector are compared by four such errors, each at USUAL_DEVIATIONS: five deviations of their sum.
    """
    return float(min(1.0, USUAL_DEVIATIONS / np.sqrt(dim & -dim)))


LANES = 8
"""Rows that are rotated side by side: one instruction serves all of them."""


@compiled
def _encode_loop(
    x: npt.NDArray[Any],
    norm: npt.NDArray[np.float64],
    order: npt.NDArray[np.int64],
    signs: npt.NDArray[np.float64],
    block: int,
    scale: float,
    values: Int8,
    error: Float32,
) -> None:
    count, dim = x.shape
    bits, raw = np.empty(dim, np.int32), np.empty(dim, np.float64)
    rows, whole = np.zeros((dim, LANES), np.float64), np.empty((dim, LANES), np.int32)
    flat, flat_whole, steps = rows.reshape(-1), whole.reshape(-1), 1.0 / scale
    squares = np.empty(LANES * LANES, np.float64)
    for first in range(0, count, LANES):
        lanes = min(LANES, count - first)
        for lane in range(lanes):
            n = first + lane
            widen(x[n], bits, raw)
            inverse = 1.0 / norm[n] if norm[n] > 0.0 else 0.0
            for t in range(dim):
                rows[t, lane] = raw[order[t]] * signs[t] * inverse
        # Long runs over one dimension: over rows and lanes the compiler would not see that halves do not overlap.
        width = LANES
        while width < block * LANES:
            for start in range(0, dim * LANES, 2 * width):
                above, below = flat[start : start + width], flat[start + width : start + 2 * width]
                for u in range(width):
                    a, b = above[u], below[u]
                    above[u], below[u] = a + b, a - b
            width *= 2
        for u in range(flat.shape[0]):
            bounded = min(max(flat[u] * steps, -127.0), 127.0)
            flat_whole[u] = np.int32(bounded + 128.5) - np.int32(128)
        squares[:] = 0.0
        for start in range(0, dim * LANES, squares.shape[0]):
            part, codes = flat[start : start + squares.shape[0]], flat_whole[start : start + squares.shape[0]]
            for u in range(part.shape[0]):
                off = part[u] - codes[u] * scale
                squares[u] += off * off
        for lane in range(lanes):
            code = values[first + lane]
            for t in range(dim):
                code[t] = whole[t, lane]
            error[first + lane] = np.sqrt(squares[lane::LANES].sum()) * (1.0 + 1e-6)


def encode(x: Vectors, length: npt.NDArray[np.float64] | None = None) -> Codes:
    """Codes of the rows of `x` [n, d]; zero vectors get zero codes and no error.

    Holds 8 bytes a row besides the result. Raises LvdError where a row is not finite.

    Args:
        x: stored vectors [n, d].
        length: `scoring.norms` of the rows, where they are known.
    """
    dim = x.shape[1]
    order, signs, block = _rotation(dim)
    scale = RANGE / (127.0 * np.sqrt(dim))
    values = np.zeros((len(x), -(-dim // 8) * 8), dtype=np.int8)
    error = np.zeros(len(x), dtype=np.float32)
    _encode_loop(readable(x), norms(x) if length is None else length, order, signs, block, scale, values, error)
    return Codes(values, error, scale)


def cutoffs(score: float | Float32, codes: Codes) -> Int32:
    """What a pair's product, with the `allowances` of the other vector added, must reach if its score is `score`.

    Args:
        score: one for all rows, or float32 [n].
        codes: of the rows.

    Returns:
        int32 [n].
    """
    least = np.asarray(score, dtype=np.float64) - codes.error - SLACK
    return np.clip(np.floor(least / codes.scale**2), -(2**30), 2**30).astype(np.int32)


def allowances(codes: Codes, other: float) -> Int32:
    """The part of the bound that belongs to these vectors, in units of products, int32 [n].

    `other` is the largest error of the vectors they are compared with.
    """
    return np.ceil((1.0 + other) * codes.error.astype(np.float64) / codes.scale**2).astype(np.int32)


@inlined
def margin(error: Any, other: Any) -> Any:
    """How far the score of two vectors with these errors can lie above what their codes say."""
    return error + other + error * other + 2 * SLACK


def at_most(product: Int32, error: Float32, other: Float32, scale: float) -> Float32:
    """The highest score that pairs with these products of codes and these errors can have, float32 [m]."""
    bound: Float32 = product.astype(np.float32) * np.float32(scale**2) + margin(error, other)
    return bound
