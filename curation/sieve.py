"""The sieve of a partitioned join: of the pairs that meet in a list it drops most by their signs (`signs`).

Counting the bits that differ takes a cycle or two, where a product of codes takes hundreds of operations. Pairs that
are left go on to their codes, whose bound is proven, and those that can be no edge of a forest are dropped, too.

Among thousands of near-copies of one image, a crowd, most pairs pass, and codes are too coarse to tell which of them
the forest wants. There pairs are multiplied in float32, whole tiles at once, and compared with how strongly both rows
are tied to the middle of the crowd: rows that are less alike than that need no edge.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from curation.codes import margin
from curation.forest import Forest, is_decided
from curation.products import Found
from curation.rows import Rows
from curation.scoring import (
    FETCHED,
    LINE,
    compiled,
    cosine_pairs,
    inlined,
    lowest_bit,
    popcount,
    search_margin,
    single_bits,
    to_unit,
    touched,
)
from curation.signs import FIRST_WORDS, WORDS, MostBits, passes

Int8 = npt.NDArray[np.int8]
Int32 = npt.NDArray[np.int32]
UInt64 = npt.NDArray[np.uint64]
Float32 = npt.NDArray[np.float32]

SPAN = 64
"""Rows of a list whose sketches stand side by side, one bit of a word for each pair with them that passes."""
TILE = 512
"""Rows of a list that some guests are compared with before the next: their sketches stay in a core's first cache."""
GUESTS = 64
"""Guests whose sketches are fetched from afar side by side, and compared with one tile after another."""
OWN_ROWS = 1_024
"""Rows of a list that guests are compared with at a time: their codes stay in a processor's cache."""
NO_PARENT, NO_LEVELS = np.zeros((0, 0), np.int32), np.zeros(0, np.float32)
ROOM = 1 << 17
"""Pairs that are found before they are handed on, GUESTS * OWN_ROWS or more."""
CROWDED, LEAST_CROWD = 8, 1_024
"""Where one pair in so many passes, of so many rows or more on both sides, they are a crowd; to set one up takes MIDDLE
scores of each row."""
MIDDLE, CANDIDATES, JUDGES = 32, 4_096, 64
"""Rows that are the middle of a crowd, those that they are chosen from, and those that they are most alike to."""


def _turned_room() -> UInt64:
    """Room for what `_turn_loop` writes of OWN_ROWS rows, from the start of a line: reads across two take longer."""
    words = -(-OWN_ROWS // SPAN) * SPAN * FIRST_WORDS
    room = np.empty(words + LINE // 8, np.uint64)
    return room[-room.ctypes.data % LINE // 8 :][:words]


@compiled
def _turn_loop(sketch: UInt64, rows: Int32, turned: UInt64) -> None:
    """Write the first words of sketches, of SPAN rows at a time: of all of them the first, then the second, ..."""
    for j in range(rows.shape[0]):
        start = (j // SPAN) * SPAN * FIRST_WORDS + j % SPAN
        for word in range(FIRST_WORDS):
            turned[start + word * SPAN] = sketch[rows[j], word]


@compiled
def _sieve_loop(
    sketch: UInt64,
    own: Int32,
    turned: UInt64,
    guests: Int32,
    first: int,
    upper: bool,
    most_first: int,
    most: int,
    i: Int32,
    j: Int32,
) -> tuple[int, int]:
    """Sieve guests[first:] against `own`; returns how many pairs were found, and the first guest not looked at.

    `i` counts from `first`; `j` are places in `own`, whose sketches are `turned`.
    """
    found, none, one = 0, np.uint64(0), np.uint64(1)
    near, bit = np.empty((GUESTS, WORDS), np.uint64), single_bits()
    for top in range(first, guests.shape[0], GUESTS):
        some = min(GUESTS, guests.shape[0] - top)
        if found + some * own.shape[0] > i.shape[0]:
            return found, top
        for g in range(some):  # loads that do not wait for each other
            for word in range(WORDS):
                near[g, word] = sketch[guests[top + g], word]
        for tile in range(0, own.shape[0], TILE):
            for g in range(some):
                a, b, c, d = near[g, 0], near[g, 1], near[g, 2], near[g, 3]
                for start in range(tile, min(tile + TILE, own.shape[0]), SPAN):
                    w, few = turned[start * FIRST_WORDS : (start + SPAN) * FIRST_WORDS], none
                    for t in range(SPAN):
                        count = popcount(a ^ w[t]) + popcount(b ^ w[SPAN + t])
                        count += popcount(c ^ w[2 * SPAN + t]) + popcount(d ^ w[3 * SPAN + t])
                        few |= bit[t] if count <= np.uint64(most_first) else none
                    if own.shape[0] - start < SPAN:
                        few &= (one << np.uint64(own.shape[0] - start)) - one
                    while few:
                        place = start + lowest_bit(few)
                        few &= few - one
                        count = none
                        for word in range(WORDS):
                            count += popcount(near[g, word] ^ sketch[own[place], word])
                        if count <= np.uint64(most) and (not upper or guests[top + g] < own[place]):
                            i[found], j[found] = top - first + g, place
                            found += 1
    return found, guests.shape[0]


@inlined
def _product(codes: Int8, i: int, j: int) -> np.int32:
    x, y, total = codes[i], codes[j], np.int32(0)
    for n in range(x.shape[0]):  # cut back to 32 bits at each step: numba widens to 64, which takes three times as long
        total = np.int32(total + np.int32(np.int32(x[n]) * np.int32(y[n])))
    return total


@compiled
def _untied_loop(
    tile: Float32, least: np.float32, tied: Float32, own_tied: Float32, i: Int32, j: Int32, count: int
) -> int:
    """Move those of the first `count` pairs to the front whose product in `tile` reaches `least` and one row's tie."""
    kept = 0
    for t in range(count):
        if tile[i[t], j[t]] >= max(least, min(tied[i[t]], own_tied[j[t]])):
            i[kept], j[kept] = i[t], j[t]
            kept += 1
    return kept


@compiled
def _product_loop(
    codes: Int8,
    cutoff: Int32,
    allowance: Int32,
    nodes: npt.NDArray[Any],
    error: Float32,
    scale: np.float32,
    levels: Float32,
    parent: Int32,
    guests: Int32,
    own: Int32,
    i: Int32,
    j: Int32,
    product: Int32,
    count: int,
) -> tuple[int, int]:
    """Of the first `count` pairs, places in `guests` and `own`, move the rows of those that are left to the front.

    Returns how many (and a sum of no meaning).
    """
    kept, seen, last = 0, 0, -1
    for t in range(count):
        if t % FETCHED == 0:
            for ahead in range(t, min(t + FETCHED, count)):
                if i[ahead] != last:
                    last = i[ahead]
                    seen += touched(codes[guests[last]])
        guest, other = guests[i[t]], own[j[t]]
        total = _product(codes, guest, other)
        if total + allowance[other] < cutoff[guest]:
            continue
        bound = total * scale + margin(error[guest], error[other])
        if levels.shape[0] and is_decided(parent, levels, nodes[guest], nodes[other], bound):
            continue
        i[kept], j[kept], product[kept] = guest, other, total
        kept += 1
    return kept, seen


@dataclass(frozen=True)
class Sieve:
    """Compares some rows with others.

    Attributes:
        x: the rows, with sketches.
        threshold: of the join.
        most: bits that may differ in a pair that passes.
        cutoff, allowance: of all rows, int32 [n]; see `codes.cutoffs`.
        forest: pairs that can be none of its edges are left out. Most pairs of a large group are such, and are told
            fastest where they are found.
    """

    x: Rows
    threshold: float
    most: MostBits
    cutoff: Int32
    allowance: Int32
    forest: Forest | None = None

    def met(self, guests: Int32, own: Int32, among: bool = True) -> Iterator[Found]:
        """Pairs of rows that pass, and whose codes reach their cutoff.

        Args:
            guests, own: rows, int32 [g] and int32 [s]; `own` ascends.
            among: also pairs of `own`; a forest needs them, for what is left out relies on them.

        Yields:
            i int32 [t], j int32 [t] of `own` and products of their codes, int32 [t].
        """
        if among:
            yield from self._pairs(own, own, upper=True)
        yield from self._pairs(guests, own)

    def _pairs(self, guests: Int32, own: Int32, upper: bool = False) -> Iterator[Found]:
        sketch, codes = self._sketches, self.x.codes
        i, j, product = np.empty((3, ROOM), np.int32)
        turned = _turned_room()
        levels, parent = (NO_LEVELS, NO_PARENT) if self.forest is None else (self.forest.levels, self.forest.parent)
        known = codes.values, self.cutoff, self.allowance, self.x.nodes, codes.error, np.float32(codes.scale**2)
        may_crowd = self.forest is not None and min(len(guests), len(own)) >= LEAST_CROWD
        crowd: _Crowd | None = None
        for start in range(0, len(own), OWN_ROWS):
            block = own[start : start + OWN_ROWS]
            _turn_loop(sketch, block, turned)
            first, last = 0, np.searchsorted(guests, block[-1]) if upper else len(guests)
            while first < last:
                found, stop = _sieve_loop(sketch, block, turned, guests[:last], first, upper, *self.most, i, j)
                if may_crowd and found * CROWDED > (stop - first) * len(block):
                    crowd = crowd or _Crowd(self.x, self.threshold, self.most, guests, own)
                    found = crowd.untied(slice(first, stop), slice(start, start + OWN_ROWS), i, j, found)
                kept, _ = _product_loop(*known, levels, parent, guests[first:stop], block, i, j, product, found)
                if kept:
                    yield i[:kept].copy(), j[:kept].copy(), product[:kept].copy()
                first = stop

    @property
    def _sketches(self) -> UInt64:
        assert self.x.sketches is not None
        return self.x.sketches


class _Crowd:
    """Rows of a list of near-copies and its guests, and how strongly each is tied to the middle of the list.

    Any two of them are connected at least as strongly as the weaker is tied, by pairs that pass and are offered to the
    forest. So a pair that scores less is none of its edges (cycle property of maximum spanning trees).
    """

    def __init__(self, x: Rows, threshold: float, most: MostBits, guests: Int32, own: Int32) -> None:
        self._x, self._most, self._guests, self._own = x, most, guests, own
        self._slack = np.float32(search_margin(x.vectors.shape[1]))
        self._least = np.float32(threshold) - self._slack
        self._held = slice(0), np.zeros((0, 0), np.float32)
        some = own[:: -(-len(own) // CANDIDATES)]
        units = self._unit(some)
        alike = _products(units[:: -(-len(some) // JUDGES)], units).sum(axis=0)
        middle = some[np.argsort(-alike, kind="stable")[:MIDDLE]]
        ties = list(zip(middle, self._passing(middle[0], middle), strict=True))
        self._tied, self._own_tied = (
            np.maximum.reduce([np.minimum(self._passing(row, some), tie) for row, tie in ties]) - self._slack
            for some in (guests, own)
        )

    def untied(self, guests: slice, own: slice, i: Int32, j: Int32, count: int) -> int:
        """Move to the front those of `count` pairs of places in both slices that may be edges; returns how many."""
        if own != self._held[0]:
            self._held = own, self._unit(self._own[own])
        tile = _products(self._unit(self._guests[guests]), self._held[1])
        return _untied_loop(tile, self._least, self._tied[guests], self._own_tied[own], i, j, count)

    def _unit(self, rows: Int32) -> Float32:
        return to_unit(self._x.vectors[self._x.at[rows]])

    def _passing(self, row: int, others: Int32) -> Float32:
        """Scores of a row with others, -1 where the pair does not pass."""
        x = self._x
        assert x.sketches is not None
        score = cosine_pairs(x.vectors, np.full(len(others), x.at[row]), x.vectors, x.at[others], x.norms, x.norms)
        return np.where(passes(x.sketches[others], x.sketches[row], self._most), score, np.float32(-1))


def _products(x: Float32, y: Float32) -> Float32:
    import torch

    product: Float32 = (torch.from_numpy(x) @ torch.from_numpy(y).t()).numpy()
    return product
