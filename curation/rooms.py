"""Rooms of candidates for the k nearest of each query, with the least and the most that each can score.

A candidate comes with the product of its codes, whose bounds are wide (`codes.at_most`). When a room is full, the k-th
highest least raises its query's floor, and what cannot reach it goes. Where bounds are too wide for that they are
sharpened: a cosine summed in any order, in float64, is off by far less, and is several times faster than the score,
which alone decides in the end. Compiled loops; callers check.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from curation.codes import SLACK, margin
from curation.rows import Rows
from curation.scoring import compiled, inlined, readable, widen

Int64 = npt.NDArray[np.int64]
Names = npt.NDArray[np.integer]
Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Words = npt.NDArray[np.uint64]

SHARP = 2.0**-20
"""More than a cosine summed in any order, in float64, differs from the score, which is rounded to float32."""
LANES = 64
"""Products that are added up side by side."""


class Rooms(NamedTuple):
    """Candidates of n queries, w at most of each, as the loops take them.

    Attributes:
        row: of the pool, int32 [n, w]; least, most: that it can score, float32 [n, w].
        held: candidates in each room, int32 [n]; is_full: whether a room is too small for what ties, bool [n].
        floor: what each query's k-th best scores at least, float32 [n].
        cutoff: what a product must reach for that, as `codes.cutoffs` has it, int32 [n].
        bounds: of no query alone: the square of the codes' scale, and k, float64 [2].
    """

    row: Int32
    least: Float32
    most: Float32
    held: Int32
    is_full: Bools
    floor: Float32
    cutoff: Int32
    bounds: Float64


class Side(NamedTuple):
    """Vectors of one side: `readable` bits [m, d], where each row lies in them, lengths [m], errors of codes."""

    bits: npt.NDArray[Any]
    at: Int64
    norms: Float64
    error: Float32


class Found(NamedTuple):
    """The k best so far of each query, best first: similarity [n, k], ids [n, k, 2], numbers [n, k], -1 for none."""

    similarity: Float32
    words: Words
    numbers: Int64


def make_rooms(count: int, width: int, scale: float, k: int, cutoff: Int32) -> Rooms:
    """Empty rooms of `count` queries; `cutoff` int32 [count] is filled."""
    cutoff[:] = -(2**30)
    row = np.empty((count, width), np.int32)
    least, most = (np.empty((count, width), np.float32) for _ in range(2))
    held, is_full = np.zeros(count, np.int32), np.zeros(count, np.bool_)
    floor = np.full(count, -np.inf, np.float32)
    return Rooms(row, least, most, held, is_full, floor, cutoff, np.array([scale**2, k]))


def side_of(rows: Rows) -> Side:
    """Rows as the loops take them."""
    return Side(readable(rows.vectors), rows.at, rows.norms, rows.codes.error)


@inlined
def _raise_floor(q: int, score: float, rooms: Rooms, error: Float32) -> None:
    """Raise a query's floor to a score, and its cutoff (`codes.cutoffs`) with it."""
    if score > rooms.floor[q]:
        rooms.floor[q] = score
        least = np.floor((score - error[q] - SLACK) / rooms.bounds[0])
        rooms.cutoff[q] = np.int32(min(max(least, -(2.0**30)), 2.0**30))


@inlined
def _cut(q: int, rooms: Rooms, error: Float32) -> None:
    """Raise a floor to the k-th highest least of the room, and drop what cannot reach it."""
    held, k = rooms.held[q], int(rooms.bounds[1])
    if held >= k:
        ordered = np.sort(rooms.least[q, :held])
        _raise_floor(q, ordered[held - k], rooms, error)
    kept = 0
    for t in range(held):
        if rooms.most[q, t] >= rooms.floor[q]:
            rooms.row[q, kept] = rooms.row[q, t]
            rooms.least[q, kept], rooms.most[q, kept] = rooms.least[q, t], rooms.most[q, t]
            kept += 1
    rooms.held[q] = kept


@inlined
def _sharpen(q: int, rooms: Rooms, mine: Side, its: Side, room: tuple[Int32, Float64, Float64, Float64]) -> None:
    """Narrow the bounds of a room to SHARP around each cosine; then cut."""
    bits, line, other, lanes = room
    dim = line.shape[0]
    widen(mine.bits[mine.at[q]], bits, line)
    for t in range(rooms.held[q]):
        if rooms.most[q, t] - rooms.least[q, t] <= 4.0 * SHARP:
            continue
        at = its.at[rooms.row[q, t]]
        widen(its.bits[at], bits, other)
        lanes[:] = 0.0
        for first in range(0, dim, LANES):
            left, right = line[first : first + LANES], other[first : first + LANES]
            for lane in range(left.shape[0]):
                lanes[lane] += left[lane] * right[lane]
        scale, total = mine.norms[mine.at[q]] * its.norms[at], 0.0
        for lane in range(LANES):
            total += lanes[lane]
        near = total / scale if scale > 0.0 else 0.0
        rooms.least[q, t], rooms.most[q, t] = near - SHARP, near + SHARP
    _cut(q, rooms, mine.error)


@compiled
def hold(i: Int32, j: Int32, product: Int32, rooms: Rooms, mine: Side, its: Side, over: Int64) -> int:
    """Put candidates (query, row of the pool) into the rooms; how many, named in `over`, found theirs too small."""
    dim, width, left = mine.bits.shape[1], rooms.row.shape[1], 0
    room = np.empty(dim, np.int32), np.empty(dim, np.float64), np.empty(dim, np.float64), np.empty(LANES, np.float64)
    for t in range(i.shape[0]):
        q, e, f = i[t], mine.error[i[t]], its.error[j[t]]
        middle = product[t] * rooms.bounds[0]
        off = margin(e, f)
        if middle + off < rooms.floor[q]:
            continue
        if rooms.held[q] == width and not rooms.is_full[q]:
            _cut(q, rooms, mine.error)
            if rooms.held[q] > width // 2:
                _sharpen(q, rooms, mine, its, room)
            rooms.is_full[q] = rooms.held[q] >= width - width // 4
            if middle + off < rooms.floor[q]:
                continue
        if rooms.is_full[q]:
            over[left] = t
            left += 1
            continue
        at = rooms.held[q]
        rooms.row[q, at], rooms.least[q, at], rooms.most[q, at] = j[t], middle - off, middle + off
        rooms.held[q] = at + 1
    return left


@compiled
def empty(which: Bools, rooms: Rooms, mine: Side, its: Side, i: Int32, j: Int32) -> int:
    """Empty the rooms of some queries into (query, row), but for what cannot be among the k best; how many that are."""
    dim, count = mine.bits.shape[1], 0
    room = np.empty(dim, np.int32), np.empty(dim, np.float64), np.empty(dim, np.float64), np.empty(LANES, np.float64)
    for q in range(which.shape[0]):
        if not which[q]:
            continue
        _cut(q, rooms, mine.error)
        if rooms.held[q] > rooms.bounds[1]:
            _sharpen(q, rooms, mine, its, room)
        for t in range(rooms.held[q]):
            i[count], j[count] = q, rooms.row[q, t]
            count += 1
        rooms.held[q], rooms.is_full[q] = 0, False
    return count


@inlined
def _is_before(
    score: float, high: int, low: int, number: int, other: float, its_high: int, its_low: int, its_number: int
) -> bool:
    """Whether one neighbor comes before another."""
    if score != other:
        return score > other
    if high != its_high:
        return high < its_high
    return low < its_low if low != its_low else number < its_number


@compiled
def insert(
    i: Int32, j: Int32, score: Float32, words: Words, numbers: Names, found: Found, rooms: Rooms, error: Float32
) -> None:
    """Put scored pairs, each new, into their places; what is left over at the end of a row falls out.

    `words` uint64 [m, 2] and `numbers` int64 [m] are of the pool's rows, `error` of the queries.
    """
    best, best_words, best_numbers = found
    k = best.shape[1]
    for t in range(i.shape[0]):
        q, this, number = i[t], score[t], numbers[j[t]]
        high, low = words[j[t], 0], words[j[t], 1]
        at = k
        while at > 0:
            b, w, other = best[q, at - 1], best_words[q, at - 1], best_numbers[q, at - 1]
            if other >= 0 and not _is_before(this, high, low, number, b, w[0], w[1], other):
                break
            if at < k:
                best[q, at], best_words[q, at], best_numbers[q, at] = b, w, other
            at -= 1
        if at == k:
            continue
        best[q, at], best_words[q, at, 0], best_words[q, at, 1], best_numbers[q, at] = this, high, low, number
        if best_numbers[q, k - 1] >= 0:
            _raise_floor(q, best[q, k - 1], rooms, error)
