"""What an approximate join finds of the true near-copies: recall over sampled vectors, and how sure of it one can be.

A partitioned join assigns every vector, under each of R quantizers, to its m nearest lists; it stores the vector in the
nearest and compares it with all that is stored in any of the m. The exact pairs of a sample of vectors tell how many
were compared, how many with fewer lists, and how many lie in one component in the end. Shares are averaged over
vectors, not over pairs: a hub's many pairs are no better evidence than one, and would hide all others.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from curation.errors import LvdError

PAPER_K = 64
"""Neighbors that DINOv2 looks at per image (section 3): of more than these it can only see some."""

RESAMPLES = 1_000

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
Float64 = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Estimate:
    """A recall from 0 to 1 and its 95 % interval. Where nothing was measured: 1, from 0 to 1."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Recall:
    """What an audit found.

    Attributes:
        joined: share of true pairs that were compared, with as many lists as the join used; None for other engines.
        component: share of true pairs that lie in one component; not below `joined`, since components are transitive.
        num_sampled: vectors looked at.
        num_with_pairs: those of them that have a true pair; only these count in the averages.
        num_pairs: their true pairs, stored or not; a pair of two sampled vectors counts for both.
        k_too_short: sampled vectors with more than PAPER_K true pairs.
        joined_at: what `joined` would be with 1, 2, ... lists, as far as lists are known; empty for other engines.
    """

    joined: Estimate | None
    component: Estimate
    num_sampled: int
    num_with_pairs: int
    num_pairs: int
    k_too_short: int
    joined_at: tuple[float, ...]

    def needed_lists(self, target: float) -> int | None:
        """The fewest lists with which `joined` reaches `target`; None where none that is known does."""
        if not self.num_with_pairs:
            return None
        return next((m for m, value in enumerate(self.joined_at, 1) if value >= target), None)


def joined_with(lists_i: Int32, lists_j: Int32) -> Int32:
    """The fewest lists m' with which a join compares each pair.

    Args:
        lists_i, lists_j: the lists of both vectors of each pair, int32 [p, R, m], nearest first; -1 for no list.

    Returns:
        int32 [p], from 1 (stored in one list) to m; m + 1 for pairs that are not compared.
    """
    fewest: Int32 = np.minimum(_place(lists_i[:, :, 0], lists_j), _place(lists_j[:, :, 0], lists_i)) + 1
    return fewest


def _place(stored: Int32, lists: Int32) -> Int32:
    """The first place, int32 [p], at which `lists` [p, R, m] has what `stored` [p, R] has for the same quantizer."""
    same = (lists == stored[:, :, None]) & (lists >= 0)
    found = same.any(axis=1)
    place: Int32 = np.where(found.any(axis=1), found.argmax(axis=1), lists.shape[2]).astype(np.int32)
    return place


def joined(lists_i: Int32, lists_j: Int32) -> Bool:
    """Whether a join compares each pair with all its lists, bool [p]; arguments as in `joined_with`."""
    compared: Bool = joined_with(lists_i, lists_j) <= lists_i.shape[2]
    return compared


def macro_average(shares: Float64) -> float:
    """The mean of the shares that were found of each vector's true pairs, float64 [v]; 1 for no vectors."""
    return float(shares.mean()) if len(shares) else 1.0


def bootstrap(shares: Float64, seed: int, resamples: int = RESAMPLES) -> tuple[float, float]:
    """The 95 % percentile interval of `macro_average` when vectors (not pairs) are drawn again with replacement.

    Drawing n of n vectors is drawing how often each distinct share occurs, so it holds 16 bytes for each resample and
    distinct share. The same for the same shares and seed, whatever the order of the vectors. No vectors tell nothing:
    (0, 1). Vectors that all have the same share give an interval of no width, however few they are.
    """
    if not len(shares):
        return 0.0, 1.0
    values, counts = np.unique(shares, return_counts=True)
    drawn = np.random.default_rng(seed % 2**64).multinomial(len(shares), counts / len(shares), size=resamples)
    means = (drawn * values).sum(axis=1) / len(shares)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


class RecallTally:
    """Sums what is found of each sampled vector's true pairs, stratum by stratum; 8 (m + 2) bytes a sampled vector.

    A stratum is what one call of `add` brings of a vector. Of its true pairs, which are counted, an unbiased sample may
    stand for all: its share of hits then stands for the stratum's, and strata weigh by their true pairs.
    """

    def __init__(self, num_sampled: int, num_lists: int = 0) -> None:
        """`num_lists` is the m of `joined_with`; 0 where no lists are known."""
        self._true: Int64 = np.zeros(num_sampled, dtype=np.int64)
        self._together: Float64 = np.zeros(num_sampled)
        self._joined: Float64 = np.zeros((num_sampled, num_lists))

    def add(self, vector: Int64, num_true: Int64, together: Bool, needed: Int32 | None) -> None:
        """Add one stratum for each vector that is named.

        Args:
            vector: place of each pair's vector in the sample, int64 [p].
            num_true: true pairs of that vector in the stratum, int64 [p]: the same for all its pairs, at least as many.
            together: whether the pair lies in one component, bool [p].
            needed: `joined_with` of the pair, int32 [p]; None where no lists are known.

        Raises:
            LvdError: a vector has fewer true pairs than pairs.
        """
        num_sampled, num_lists = self._joined.shape
        given = np.bincount(vector, minlength=num_sampled)
        true = np.zeros(num_sampled, dtype=np.int64)
        true[vector] = num_true
        if (true < given).any():
            raise LvdError("a sampled vector has more pairs than were counted: its truth was damaged")
        self._true += true
        # Hits times true pairs are whole numbers: all found gives a share of exactly 1.
        self._together += np.bincount(vector[together], minlength=num_sampled) * true / np.maximum(given, 1)
        if needed is not None:
            slots = np.bincount(vector * (num_lists + 1) + needed - 1, minlength=num_sampled * (num_lists + 1))
            hits = slots.reshape(num_sampled, num_lists + 1)[:, :num_lists].cumsum(axis=1)
            self._joined += hits * true[:, None] / np.maximum(given, 1)[:, None]

    def recall(self, num_lists: int, seed: int) -> Recall:
        """The recall of a join that used the first `num_lists` of the known lists; `seed` is of the intervals."""
        counted = self._true > 0
        true = self._true[counted]
        shares = self._joined[counted] / true[:, None]
        known = shares.shape[1] > 0
        return Recall(
            joined=_estimate(shares[:, num_lists - 1], seed) if known else None,
            component=_estimate(self._together[counted] / true, seed),
            num_sampled=len(self._true),
            num_with_pairs=len(true),
            num_pairs=int(true.sum()),
            k_too_short=int((true > PAPER_K).sum()),
            joined_at=tuple(macro_average(column) for column in np.ascontiguousarray(shares.T)),
        )


def _estimate(shares: npt.NDArray[Any], seed: int) -> Estimate:
    shares = np.ascontiguousarray(shares)
    return Estimate(macro_average(shares), *bootstrap(shares, seed))
