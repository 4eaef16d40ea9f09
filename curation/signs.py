"""Signs of rotated vectors, 512 bits each, tell which pairs could be alike.

The sign of a rotated coordinate differs between two vectors with probability p = acos(cosine) / pi (Goemans and
Williamson, 1995; the rotation is that of `codes`), so the number of bits that differ tells the cosine to within about
0.05.

Half of the bits, looked at first, drop all but one in hundreds of the pairs that are not alike.

This proves nothing: a pair right at the threshold is lost with a probability of about 1 in 1,000 (DEVIATIONS), one
well above it never. A join whose recall is measured may use it; an exact one does not. Whether a pair passes depends on
its two vectors alone.
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Int8 = npt.NDArray[np.int8]
UInt64 = npt.NDArray[np.uint64]
Bool = npt.NDArray[np.bool_]

WORDS = 8
BITS = 64 * WORDS
"""Coordinates whose signs are taken. Shorter vectors give too few bits to tell much, and multiply fast anyway."""
DEVIATIONS = 3.0
"""Standard deviations by which a pair at the threshold may have more different bits than it is expected to."""
FIRST_WORDS, FIRST_DEVIATIONS = 4, 3.5
"""Words of a sketch that are looked at first, and the deviations there: so many that hardly a pair is lost by them."""


class MostBits(NamedTuple):
    """The numbers of different bits up to which a pair passes: of FIRST_WORDS words, and of all."""

    first: int
    all: int


def sketches(values: Int8) -> UInt64:
    """Signs of the first BITS coordinates of codes, uint64 [n, WORDS], from int8 [n, k] with k >= BITS."""
    bits = np.packbits(values[:, :BITS] < 0, axis=1, bitorder="little")
    return np.ascontiguousarray(bits).view(np.uint64)


def most_bits(threshold: float) -> MostBits:
    """The numbers of different bits up to which a pair may score above `threshold`."""
    share = math.acos(min(1.0, max(-1.0, threshold))) / math.pi
    limits = ((64 * FIRST_WORDS, FIRST_DEVIATIONS), (BITS, DEVIATIONS))
    return MostBits(*(math.floor(bits * share + far * math.sqrt(bits * share * (1 - share))) for bits, far in limits))


def helps(threshold: float, length: int) -> bool:
    """Whether a sieve drops unrelated pairs of vectors with codes of this length, half of whose bits differ."""
    return length >= BITS and most_bits(threshold).all < BITS / 2 - DEVIATIONS * math.sqrt(BITS) / 2


def passes(x: UInt64, y: UInt64, most: MostBits) -> Bool:
    """Which pairs of rows of `x` and `y`, uint64 [m, WORDS], differ in at most so many bits; bool [m]."""
    bits = np.bitwise_count(x ^ y)
    few: Bool = (bits[:, :FIRST_WORDS].sum(axis=1) <= most.first) & (bits.sum(axis=1) <= most.all)
    return few
