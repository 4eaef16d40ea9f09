"""The one scoring function: what decides every threshold, rank and assignment.

A score is the cosine of two stored vectors, accumulated in float64 in index order and rounded to float32. Products of
stored values are exact in float64, so a score does not change with threads, block sizes, BLAS kernels or fused
multiply-add. Searches in float32 (`to_unit`) only propose; `search_margin` says how far they may be off.

Stored vectors are float16 (embeddings) or float32 (centroids) and must be finite. A threshold is rounded to float32
before it is compared, as numpy does by itself for `similarity > 0.6`.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

from curation.errors import LvdError

Vectors = npt.NDArray[np.float16] | npt.NDArray[np.float32]
"""Stored vectors, one per row: float16 or float32 [n, d]."""

P = ParamSpec("P")
R = TypeVar("R")


@functools.cache
def _compile(loop: Callable[..., Any]) -> Callable[..., Any]:
    from numba import njit
    from numba.extending import register_jitable

    _overload_popcount()
    while _inlined:
        register_jitable(_inlined.pop())
    try:
        decorated: Callable[..., Any] = njit(cache=True)(loop)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        decorated = njit(loop)
    return decorated


_inlined: list[Callable[..., Any]] = []


def popcount(x: Any) -> Any:
    """The number of bits of a uint64 that are set; in compiled loops one instruction, for many at once."""
    return np.uint64(int(x).bit_count())


@functools.cache
def _overload_popcount() -> None:
    from numba.extending import intrinsic, overload

    @intrinsic
    def count(_: Any, x: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.ctpop(arguments[0])

        return x(x), generate

    @overload(popcount, strict=False)
    def implementation(x: Any) -> Any:
        return lambda x: count(x)  # type: ignore[call-arg]  # numba gives the first


def inlined(part: Callable[P, R]) -> Callable[P, R]:
    """Let compiled loops call `part`; it is compiled with them, and outside of them it is plain Python."""
    _inlined.append(part)
    return part


@inlined
def lowest_bit(x: Any) -> Any:
    """The place of the lowest bit that is set in a uint64 other than 0, int64."""
    return np.int64(popcount((x & (~x + np.uint64(1))) - np.uint64(1)))


@inlined
def single_bits() -> npt.NDArray[np.uint64]:
    """The words that have one bit set, by its place, uint64 [64]."""
    bit = np.empty(64, np.uint64)
    for t in range(64):
        bit[t] = np.uint64(1) << np.uint64(t)
    return bit


def compiled(loop: Callable[P, R]) -> Callable[P, R]:
    """Let numba compile `loop` at its first call, so that numba is imported only where a loop runs.

    Without fast-math: sums stay in index order. Array bounds are not checked in the loop; callers check.
    """

    @functools.wraps(loop)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        result: R = _compile(loop)(*args, **kwargs)
        return result

    return call


def readable(x: Vectors) -> npt.NDArray[Any]:
    """The bits of `x` as a compiled loop reads them, uint16 or uint32 [n, d]: the compiler knows no float16."""
    rows = np.ascontiguousarray(x).view(np.uint16 if x.dtype == np.float16 else np.uint32)
    rows.flags.writeable = False  # arrays over files are read-only: one compiled version serves all
    return rows


@inlined
def widen(row: npt.NDArray[Any], bits: npt.NDArray[np.int32], values: npt.NDArray[np.float64]) -> None:
    """Write the values of one `readable` row to `values`; `bits` is room for as many. For compiled loops.

    A float16's bits, moved to a float32's places, are its value times 2**-112: exact, subnormal numbers included, but
    not for infinity and NaN.
    """
    single = bits.view(np.float32)
    if row.itemsize == 2:
        for t in range(row.shape[0]):
            bits[t] = ((row[t] & 0x8000) << 16) | ((row[t] & 0x7FFF) << 13)
        for t in range(row.shape[0]):
            values[t] = np.float64(single[t]) * 2.0**112
    else:
        for t in range(row.shape[0]):
            bits[t] = row[t]
        for t in range(row.shape[0]):
            values[t] = single[t]


@inlined
def _length(values: npt.NDArray[np.float64]) -> float:
    """Euclidean length, summed in index order."""
    total = 0.0
    for t in range(values.shape[0]):
        total += values[t] * values[t]
    return np.sqrt(total)  # type: ignore[no-any-return]


@compiled
def _finite_loop(x: npt.NDArray[Any], exponent: int, finite: npt.NDArray[np.bool_]) -> None:
    for row in range(x.shape[0]):
        bad = False
        for t in range(x.shape[1]):
            bad |= (x[row, t] & exponent) == exponent
        finite[row] = not bad


@compiled
def _norm_loop(x: npt.NDArray[Any], out: npt.NDArray[np.float64]) -> None:
    bits = np.empty(x.shape[1], np.int32)
    values = np.empty(x.shape[1], np.float64)
    for row in range(x.shape[0]):
        widen(x[row], bits, values)
        out[row] = _length(values)


@compiled
def _unit_loop(x: npt.NDArray[Any], norm: npt.NDArray[np.float64], out: npt.NDArray[np.float32]) -> None:
    bits = np.empty(x.shape[1], np.int32)
    values = np.empty(x.shape[1], np.float64)
    for row in range(x.shape[0]):
        scale = 1.0 / norm[row] if norm[row] > 0.0 else 0.0
        widen(x[row], bits, values)
        for t in range(x.shape[1]):
            out[row, t] = values[t] * scale


LANES = 4
"""Pairs scored side by side: each sum waits for its own last addition, not for the others'."""
FETCHED = 16
"""Pairs whose rows are fetched from memory side by side; a multiple of LANES."""
LINE = 64
"""Bytes of a line of the cache."""


@inlined
def touched(row: npt.NDArray[Any]) -> int:
    """Read a number of each line of the cache that a row lies on: loads that do not wait for each other."""
    seen = 0
    for t in range(0, row.shape[0], LINE // row.itemsize):
        seen += row[t]
    return seen


@compiled
def _cosine_loop(
    x: npt.NDArray[Any],
    i: npt.NDArray[np.int64],
    x_norms: npt.NDArray[np.float64],
    y: npt.NDArray[Any],
    j: npt.NDArray[np.int64],
    y_norms: npt.NDArray[np.float64],
    out: npt.NDArray[np.float32],
) -> int:
    """Fill `out`; what is returned means nothing, it keeps the compiler from leaving out what is read ahead."""
    dim, count, seen = x.shape[1], i.shape[0], 0
    bits = np.empty(dim, np.int32)
    values = np.empty((2 * LANES, dim), np.float64)
    held = np.full(LANES, -1, np.int64)
    for start in range(0, count, LANES):
        if start % FETCHED == 0:
            for pair in range(start, min(start + FETCHED, count)):
                seen += touched(x[i[pair]]) + touched(y[j[pair]])
        for lane in range(LANES):
            pair = min(start + lane, count - 1)
            a, b = i[pair], j[pair]
            if held[lane] != a:
                widen(x[a], bits, values[lane])
                held[lane] = a
                if x_norms[a] < 0.0:
                    x_norms[a] = _length(values[lane])
            widen(y[b], bits, values[LANES + lane])
            if y_norms[b] < 0.0:
                y_norms[b] = _length(values[LANES + lane])
        dot0, dot1, dot2, dot3 = 0.0, 0.0, 0.0, 0.0
        for t in range(dim):
            dot0 += values[0, t] * values[4, t]
            dot1 += values[1, t] * values[5, t]
            dot2 += values[2, t] * values[6, t]
            dot3 += values[3, t] * values[7, t]
        dots = (dot0, dot1, dot2, dot3)
        for lane in range(min(LANES, count - start)):
            scale = x_norms[i[start + lane]] * y_norms[j[start + lane]]
            out[start + lane] = dots[lane] / scale if scale > 0.0 else 0.0
    return seen


def check_comparable(x: Vectors, y: Vectors) -> None:
    """Raise LvdError unless the rows of `x` and of `y` have the same length."""
    if x.shape[1] != y.shape[1]:
        raise LvdError(
            f"vectors of {x.shape[1]} and {y.shape[1]} numbers cannot be compared: use one embedder for both"
        )


def rows_of_pairs(
    x: Vectors, i: npt.NDArray[Any], y: Vectors, j: npt.NDArray[Any]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """`i` and `j`, rows of `x` and of `y`, int [m] each, as int64.

    Raises LvdError where vectors have different length; IndexError where a row does not exist.
    """
    check_comparable(x, y)
    i, j = (np.ascontiguousarray(rows, dtype=np.int64) for rows in (i, j))
    for rows, num_rows in ((i, len(x)), (j, len(y))):
        if len(rows) and (rows.min() < 0 or rows.max() >= num_rows):
            raise IndexError(f"pairs name rows {rows.min()} to {rows.max()} of {num_rows}")
    return i, j


def not_finite(x: Vectors) -> int | None:
    """The first row of `x` [n, d] with NaN or infinite values, None where there is none."""
    finite = np.ones(len(x), dtype=np.bool_)
    _finite_loop(readable(x), 0x7C00 if x.dtype == np.float16 else 0x7F800000, finite)
    return None if finite.all() else int(np.flatnonzero(~finite)[0])


def norms(x: Vectors) -> npt.NDArray[np.float64]:
    """Euclidean length of each row of `x` [n, d], float64 [n]. Raises LvdError where a row is not finite."""
    row = not_finite(x)
    if row is not None:
        raise LvdError(f"vector in row {row} has NaN or infinite values; compute its embedding again")
    out = np.empty(len(x), dtype=np.float64)
    _norm_loop(readable(x), out)
    return out


def to_unit(x: Vectors) -> npt.NDArray[np.float32]:
    """Rows of `x` [n, d] scaled to length 1, float32 [n, d], for the search of candidates only; zero stays zero."""
    out = np.empty(x.shape, dtype=np.float32)
    _unit_loop(readable(x), norms(x), out)
    return out


def cosine_pairs(
    x: Vectors,
    i: npt.NDArray[Any],
    y: Vectors,
    j: npt.NDArray[Any],
    x_norms: npt.NDArray[np.float64] | None = None,
    y_norms: npt.NDArray[np.float64] | None = None,
) -> npt.NDArray[np.float32]:
    """Cosine similarity of chosen pairs, m(s, r) = f(s).f(r) / (|f(s)| |f(r)|) (DINOv2, section 3).

    Fastest where neighboring pairs share i.

    Args:
        x, y: stored vectors [n, d] and [k, d], finite.
        i, j: rows of `x` and of `y`, int [m] each.
        x_norms, y_norms: what `norms` gives for `x` and `y`, if at hand; else 8 bytes a row are held for it. Negative
            ones are filled in, so that several calls can share them.

    Returns:
        float32 [m], the same for (x, i, y, j) and (y, j, x, i); 0 where a vector is zero. Holds nothing else.

    Raises:
        LvdError: vectors of different length; IndexError: a row that does not exist.
    """
    i, j = rows_of_pairs(x, i, y, j)
    out = np.empty(len(i), dtype=np.float32)
    _cosine_loop(readable(x), i, _fillable(x_norms, len(x)), readable(y), j, _fillable(y_norms, len(y)), out)
    return out


def _fillable(lengths: npt.NDArray[np.float64] | None, num_rows: int) -> npt.NDArray[np.float64]:
    if lengths is None:
        return np.full(num_rows, -1.0)
    return lengths if lengths.flags.writeable else lengths.copy()


def search_margin(dim: int) -> float:
    """How far a float32 product of `to_unit` vectors may lie from `cosine_pairs`, whatever the order of its sum.

    The bound is d u / (1 - d u) for the sum plus a few u for the roundings around it, u = 2**-24 (Higham, Accuracy and
    Stability of Numerical Algorithms, section 3.1); this is twice that, so comparisons may round as they like.
    """
    return (dim + 8) * 2.0**-23
