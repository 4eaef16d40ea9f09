"""Which source each sample of a step comes from, and how many each source gave before.

A source marked homogeneous gives whole steps, in the ratio of its weight to the weights of all; in the other steps the
samples are mixed of the other sources by their weights, one by one (DINOv3, arXiv 2508.10104: a tenth of the steps is
ImageNet-1k alone, the rest a mixture).

Both choices follow a rotation: the n-th choice is the share in which frac(start + n * golden ratio) falls. Its counts
deviate from the exact ratios by a few in any stretch, less than those of random draws, and have a closed form, so that
any step is found at once.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from curation.hashing import keyed_hash

CIRCLE = 2**32
STRIDE = 2_654_435_769
"""2^32 times the golden ratio's fraction, odd: all of the circle is visited."""

Int64 = npt.NDArray[np.int64]


def floor_sum(count: int, modulus: int, factor: int, offset: int) -> int:
    """Sum of floor((factor * k + offset) / modulus) over k = 0 .. count - 1; none is negative. In O(log modulus).

    Whole multiples of the modulus are summed directly. What remains counts lattice points below a line, and counting
    them along the other axis is the same problem with factor and modulus exchanged, as in Euclid's algorithm.
    """
    total = 0
    while True:
        total += count * (count - 1) // 2 * (factor // modulus) + count * (offset // modulus)
        factor, offset = factor % modulus, offset % modulus
        highest = factor * count + offset
        if highest < modulus:
            return total
        count, offset, modulus, factor = highest // modulus, highest % modulus, factor, modulus


class Rotation:
    """An endless sequence of choices in given ratios."""

    def __init__(self, weights: Sequence[float], seed: int, purpose: str) -> None:
        """`weights`: of the choices, not negative and not all 0; where the sequence begins is drawn by the seed."""
        shares = np.cumsum(np.asarray(weights, np.float64)) / np.sum(weights, dtype=np.float64)
        self._bounds: Int64 = np.rint(shares * CIRCLE).astype(np.int64)
        start = keyed_hash(seed, f"trainer mixture of {purpose}", np.zeros((1, 2), np.uint64))
        self._start = int(start[0]) % CIRCLE

    def choices(self, first: int, count: int) -> Int64:
        """Choices [first, first + count), int64."""
        at = (self._start + first * STRIDE) % CIRCLE
        points = (np.uint64(at) + np.arange(count, dtype=np.uint64) * np.uint64(STRIDE)) % np.uint64(CIRCLE)
        return np.searchsorted(self._bounds, points.astype(np.int64), side="right")

    def counts(self, num: int) -> list[int]:
        """How often each choice is made among the first `num`; the sum is `num`."""
        below = [self._count_below(num, int(bound)) for bound in self._bounds]
        return [after - before for before, after in zip([0, *below], below, strict=False)]

    def _count_below(self, num: int, bound: int) -> int:
        """Points below `bound`: x mod m < b where floor(x / m) - floor((x - b) / m) is 1, not 0; sums of that."""
        wraps = floor_sum(num, CIRCLE, STRIDE, self._start)
        return wraps - floor_sum(num, CIRCLE, STRIDE, self._start + CIRCLE - bound) + num


class Mixture:
    """The sources of every step's samples. The number of samples of a step is part of it."""

    def __init__(self, weights: Sequence[float], homogeneous: Sequence[bool], step_size: int, seed: int) -> None:
        """
        Args:
            weights: of the sources, above 0.
            homogeneous: which of them give whole steps.
            step_size: samples of a step, over all ranks.
            seed: of the run.
        """
        self._step_size, self._num_sources = step_size, len(weights)
        self._alone = [source for source, alone in enumerate(homogeneous) if alone]
        self._mixed = [source for source, alone in enumerate(homogeneous) if not alone]
        mixed_weights = [weights[source] for source in self._mixed]
        self._steps = Rotation([*(weights[source] for source in self._alone), sum(mixed_weights)], seed, "steps")
        self._samples = Rotation(mixed_weights, seed, "samples") if self._mixed else None

    def part(self, step: int, first: int, last: int) -> tuple[Int64, list[int]]:
        """Samples [first, last) of a step.

        Returns:
            the source of each, int64 [last - first]; and for each source the number of its samples before these, in
            all steps: its samples here are those that follow in its order.
        """
        *alone, mixed = self._steps.counts(step)
        before = [0] * self._num_sources
        for source, steps in zip(self._alone, alone, strict=True):
            before[source] = steps * self._step_size
        choice = int(self._steps.choices(step, 1)[0])
        begin = mixed * self._step_size
        if choice < len(self._alone):
            sources = np.full(last - first, self._alone[choice])
            before[self._alone[choice]] += first
        else:
            begin += first
        if self._samples is not None:
            for source, count in zip(self._mixed, self._samples.counts(begin), strict=True):
                before[source] = count
            if choice == len(self._alone):
                sources = np.asarray(self._mixed)[self._samples.choices(begin, last - first)]
        return sources, before
