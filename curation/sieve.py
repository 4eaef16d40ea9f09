"""Signs of rotated vectors, 512 bits each: by them a partitioned join drops most of the pairs that meet.

The sign of a rotated coordinate differs between two vectors with probability p = acos(cosine) / pi (Goemans and
Williamson, 1995; the rotation is that of `codes`), so the number of bits that differ tells the cosine to within about
0.05. Counting them takes a few cycles, where a product of codes takes hundreds of operations. Pairs that are left go on
to their codes, whose bound is proven.

A sieve proves nothing: a pair right at the threshold is lost with a probability of about 1 in 1,000 (DEVIATIONS), one
well above it never. A join whose recall is measured may use it; an exact one does not. Whether a pair passes depends on
its two vectors alone.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from curation.codes import Codes, margin
from curation.forest import Forest, is_decided
from curation.scoring import FETCHED, compiled, inlined, popcount, touched

Int8 = npt.NDArray[np.int8]
Int32 = npt.NDArray[np.int32]
UInt64 = npt.NDArray[np.uint64]
Float32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]

WORDS = 8
BITS = 64 * WORDS
"""Coordinates whose signs are taken. Shorter vectors give too few bits to tell much, and multiply fast anyway."""
DEVIATIONS = 3.0
"""Standard deviations by which a pair at the threshold may have more different bits than it is expected to."""
SPAN = 256
"""Counts that are compared with the limit at once."""
GUESTS = 64
"""Sketches that are fetched from afar side by side."""
OWN_ROWS = 1_024
"""Rows of a list that guests are compared with at a time: their codes stay in a processor's cache."""
NO_PARENT = np.zeros((0, 0), np.int32)
ROOM = 1 << 17
"""Pairs that are found before they are handed on, more than OWN_ROWS."""


def sketches(values: Int8) -> UInt64:
    """Signs of the first BITS coordinates of codes, uint64 [n, WORDS], from int8 [n, k] with k >= BITS."""
    bits = np.packbits(values[:, :BITS] < 0, axis=1, bitorder="little")
    return np.ascontiguousarray(bits).view(np.uint64)


def most_bits(threshold: float) -> int:
    """The number of different bits up to which a pair may score above `threshold`."""
    share = math.acos(min(1.0, max(-1.0, threshold))) / math.pi
    return math.floor(BITS * share + DEVIATIONS * math.sqrt(BITS * share * (1 - share)))


def helps(threshold: float, length: int) -> bool:
    """Whether a sieve drops unrelated pairs of vectors with codes of this length, half of whose bits differ."""
    return length >= BITS and most_bits(threshold) < BITS / 2 - DEVIATIONS * math.sqrt(BITS) / 2


def passes(x: UInt64, y: UInt64, most: int) -> Bool:
    """Which pairs of rows of `x` and `y`, uint64 [m, WORDS], differ in at most so many bits; bool [m]."""
    few: Bool = np.bitwise_count(x ^ y).sum(axis=1) <= most
    return few


@compiled
def _turn_loop(sketch: UInt64, rows: Int32, turned: UInt64) -> None:
    for j in range(rows.shape[0]):
        for word in range(sketch.shape[1]):
            turned[word, j] = sketch[rows[j], word]


@compiled
def _sieve_loop(
    sketch: UInt64,
    own: Int32,
    turned: UInt64,
    guests: Int32,
    first: int,
    upper: bool,
    limit: int,
    i: Int32,
    j: Int32,
) -> tuple[int, int]:
    """Sieve guests[first:] against `own`; returns how many pairs were found, and the first guest not looked at."""
    found, most = 0, np.uint64(limit)
    count, near = np.empty(SPAN, np.uint64), np.empty((GUESTS, WORDS), np.uint64)
    for g in range(first, guests.shape[0]):
        if found + own.shape[0] > i.shape[0]:
            return found, g
        place = (g - first) % GUESTS
        if place == 0:  # loads that do not wait for each other
            for n in range(min(GUESTS, guests.shape[0] - g)):
                for word in range(WORDS):
                    near[n, word] = sketch[guests[g + n], word]
        guest = guests[g]
        a, b, c, d = near[place, 0], near[place, 1], near[place, 2], near[place, 3]
        e, f, h, k = near[place, 4], near[place, 5], near[place, 6], near[place, 7]
        for start in range(0, own.shape[0], SPAN):
            stop = min(start + SPAN, own.shape[0])
            line, left = count[: stop - start], 0
            w0, w1, w2, w3 = turned[0, start:stop], turned[1, start:stop], turned[2, start:stop], turned[3, start:stop]
            w4, w5, w6, w7 = turned[4, start:stop], turned[5, start:stop], turned[6, start:stop], turned[7, start:stop]
            for t in range(line.shape[0]):
                one = popcount(a ^ w0[t]) + popcount(b ^ w1[t]) + popcount(c ^ w2[t]) + popcount(d ^ w3[t])
                two = popcount(e ^ w4[t]) + popcount(f ^ w5[t]) + popcount(h ^ w6[t]) + popcount(k ^ w7[t])
                line[t] = one + two
                left += one + two <= most
            t = 0
            while left:
                if line[t] <= most:
                    left -= 1
                    if not upper or guest < own[start + t]:
                        i[found], j[found] = guest, own[start + t]
                        found += 1
                t += 1
    return found, guests.shape[0]


@inlined
def _product(codes: Int8, i: int, j: int) -> np.int32:
    x, y, total = codes[i], codes[j], np.int32(0)
    for n in range(x.shape[0]):  # cut back to 32 bits at each step: numba widens to 64, which takes three times as long
        total = np.int32(total + np.int32(np.int32(x[n]) * np.int32(y[n])))
    return total


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
    i: Int32,
    j: Int32,
    product: Int32,
    count: int,
) -> tuple[int, int]:
    """Move those of the first `count` pairs that are left to the front; returns how many (and a sum of no meaning)."""
    kept, seen, last = 0, 0, -1
    for t in range(count):
        if t % FETCHED == 0:
            for ahead in range(t, min(t + FETCHED, count)):
                if i[ahead] != last:
                    last = i[ahead]
                    seen += touched(codes[last])
        guest, other = i[t], j[t]
        total = _product(codes, guest, other)
        if total + allowance[other] < cutoff[guest]:
            continue
        bound = total * scale + margin(error[guest], error[other])
        if levels.shape[0] and is_decided(parent, levels, nodes[guest], nodes[other], bound):
            continue
        i[kept], j[kept], product[kept] = guest, other, total
        kept += 1
    return kept, seen


def sieved(
    sketch: UInt64,
    codes: Codes,
    guests: Int32,
    own: Int32,
    most: int,
    cutoff: Int32,
    allowance: Int32,
    upper: bool = False,
    nodes: npt.NDArray[Any] | None = None,
    forest: Forest | None = None,
) -> Iterator[tuple[Int32, Int32, Int32]]:
    """Pairs of chosen rows whose sketches differ in at most `most` bits and whose codes reach their cutoff.

    Args:
        sketch, codes: of all rows; sketches are uint64 [n, WORDS].
        guests, own: the rows, int32 [g] and int32 [s].
        most: as `most_bits` tells.
        cutoff, allowance: of all rows, int32 [n]; see `codes.cutoffs`.
        upper: only pairs (i, j) with i < j; both must ascend.
        nodes, forest: what a forest calls the rows, int [n]; left out are then pairs that can be none of its edges.
            Most pairs of a large group are such, and are told fastest where they are found.

    Yields:
        i int32 [t] of `guests`, j int32 [t] of `own` and products of their codes, int32 [t].
    """
    i, j, product = np.empty((3, ROOM), np.int32)
    nodes = own if nodes is None else nodes  # without a forest they are not read
    levels, parent = (np.zeros(0, np.float32), NO_PARENT) if forest is None else (forest.levels, forest.parent)
    known = codes.values, cutoff, allowance, nodes, codes.error, np.float32(codes.scale**2), levels, parent
    for start in range(0, len(own), OWN_ROWS):
        block = own[start : start + OWN_ROWS]
        turned = np.empty((WORDS, len(block)), np.uint64)
        _turn_loop(sketch, block, turned)
        first, last = 0, np.searchsorted(guests, block[-1]) if upper else len(guests)
        while first < last:
            found, first = _sieve_loop(sketch, block, turned, guests[:last], first, upper, most, i, j)
            kept, _ = _product_loop(*known, i, j, product, found)
            if kept:
                yield i[:kept].copy(), j[:kept].copy(), product[:kept].copy()
