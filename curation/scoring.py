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

    try:
        decorated: Callable[..., Any] = njit(cache=True)(loop)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        decorated = njit(loop)
    return decorated


def compiled(loop: Callable[P, R]) -> Callable[P, R]:
    """Let numba compile `loop` at its first call, so that numba is imported only where a loop runs.

    Without fast-math: sums stay in index order. Array bounds are not checked in the loop; callers check.
    """

    @functools.wraps(loop)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        result: R = _compile(loop)(*args, **kwargs)
        return result

    return call


@functools.cache
def _float16_values() -> npt.NDArray[np.float64]:
    """The value of every float16 code, float64 [65536]: the compiled loops cannot read float16 themselves."""
    with np.errstate(invalid="ignore"):
        return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64)


def _readable(x: Vectors) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64] | None]:
    """`x` as a compiled loop reads it: float16 codes and the table of their values, or float32 and no table."""
    rows = np.ascontiguousarray(x).view(np.uint16 if x.dtype == np.float16 else np.float32)
    rows.flags.writeable = False  # arrays over files are read-only: one compiled version serves all
    return rows, _float16_values() if x.dtype == np.float16 else None


@compiled
def _norm_loop(x: npt.NDArray[Any], table: npt.NDArray[np.float64] | None, out: npt.NDArray[np.float64]) -> None:
    for row in range(x.shape[0]):
        total = 0.0
        for t in range(x.shape[1]):
            value = np.float64(x[row, t]) if table is None else table[x[row, t]]
            total += value * value
        out[row] = np.sqrt(total)


@compiled
def _unit_loop(
    x: npt.NDArray[Any],
    table: npt.NDArray[np.float64] | None,
    norm: npt.NDArray[np.float64],
    out: npt.NDArray[np.float32],
) -> None:
    for row in range(x.shape[0]):
        scale = 1.0 / norm[row] if norm[row] > 0.0 else 0.0
        for t in range(x.shape[1]):
            value = np.float64(x[row, t]) if table is None else table[x[row, t]]
            out[row, t] = value * scale


@compiled
def _cosine_loop(
    x: npt.NDArray[Any],
    x_table: npt.NDArray[np.float64] | None,
    i: npt.NDArray[np.int64],
    y: npt.NDArray[Any],
    y_table: npt.NDArray[np.float64] | None,
    j: npt.NDArray[np.int64],
    out: npt.NDArray[np.float32],
) -> None:
    for pair in range(i.shape[0]):
        a, b = i[pair], j[pair]
        dot, xx, yy = 0.0, 0.0, 0.0
        for t in range(x.shape[1]):
            u = np.float64(x[a, t]) if x_table is None else x_table[x[a, t]]
            v = np.float64(y[b, t]) if y_table is None else y_table[y[b, t]]
            dot += u * v
            xx += u * u
            yy += v * v
        scale = np.sqrt(xx) * np.sqrt(yy)
        out[pair] = dot / scale if scale > 0.0 else 0.0


def check_comparable(x: Vectors, y: Vectors) -> None:
    """Raise LvdError unless the rows of `x` and of `y` have the same length."""
    if x.shape[1] != y.shape[1]:
        raise LvdError(
            f"vectors of {x.shape[1]} and {y.shape[1]} numbers cannot be compared: use one embedder for both"
        )


def norms(x: Vectors) -> npt.NDArray[np.float64]:
    """Euclidean length of each row of `x` [n, d], float64 [n]. Raises LvdError where a row is not finite."""
    out = np.empty(len(x), dtype=np.float64)
    _norm_loop(*_readable(x), out)
    if not np.isfinite(out).all():
        row = int(np.flatnonzero(~np.isfinite(out))[0])
        raise LvdError(f"vector in row {row} has NaN or infinite values; compute its embedding again")
    return out


def to_unit(x: Vectors) -> npt.NDArray[np.float32]:
    """Rows of `x` [n, d] scaled to length 1, float32 [n, d], for the search of candidates only; zero stays zero."""
    out = np.empty(x.shape, dtype=np.float32)
    _unit_loop(*_readable(x), norms(x), out)
    return out


def cosine_pairs(x: Vectors, i: npt.NDArray[Any], y: Vectors, j: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Cosine similarity of chosen pairs, m(s, r) = f(s).f(r) / (|f(s)| |f(r)|) (DINOv2, section 3).

    Args:
        x, y: stored vectors [n, d] and [k, d], finite.
        i, j: rows of `x` and of `y`, int [m] each.

    Returns:
        float32 [m], the same for (x, i, y, j) and (y, j, x, i); 0 where a vector is zero. Holds nothing else.

    Raises:
        LvdError: vectors of different length; IndexError: a row that does not exist.
    """
    check_comparable(x, y)
    i, j = (np.ascontiguousarray(rows, dtype=np.int64) for rows in (i, j))
    for rows, num_rows in ((i, len(x)), (j, len(y))):
        if len(rows) and (rows.min() < 0 or rows.max() >= num_rows):
            raise IndexError(f"pairs name rows {rows.min()} to {rows.max()} of {num_rows}")
    out = np.empty(len(i), dtype=np.float32)
    _cosine_loop(*_readable(x), i, *_readable(y), j, out)
    return out


def search_margin(dim: int) -> float:
    """How far a float32 product of `to_unit` vectors may lie from `cosine_pairs`, whatever the order of its sum.

    The bound is d u / (1 - d u) for the sum plus a few u for the roundings around it, u = 2**-24 (Higham, Accuracy and
    Stability of Numerical Algorithms, section 3.1); this is twice that, so comparisons may round as they like.
    """
    return (dim + 8) * 2.0**-23
