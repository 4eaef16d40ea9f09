"""Signs of rotated vectors, 512 bits each, tell which pairs could be alike.

The sign of a rotated coordinate differs between two vectors with probability p = acos(cosine) / pi (Goemans and
Williamson, 1995; the rotation is that of `codes`), so the number of bits that differ tells the cosine to within about
0.05.

This proves nothing: a pair right at the threshold is lost with a probability of about 1 in 1,000 (DEVIATIONS), one
well above it never. A join whose recall is measured may use it; an exact one does not. Whether a pair passes depends on
its two vectors alone.
"""

import math

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
