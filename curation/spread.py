"""Images spread over a cluster: greedy farthest-first choice (Gonzalez 1985), decided by `scoring`.

It favours what lies at the rim of a cluster, outliers included: of the strategies of balanced sampling it is the one to
choose for variety, not for typical images.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from curation.groups import group_sizes
from curation.scoring import Vectors, compiled, cosine_pairs

MAX_ROUNDS = 64
"""Images that are chosen one after the other; a group that gives more is cut at random into blocks that give fewer."""

Bools = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]


@compiled
def _farthest_loop(starts: Int64, ends: Int64, similarity: npt.NDArray[np.float32], chosen: Int64) -> None:
    """The first place of lowest similarity in each block."""
    for block in range(chosen.shape[0]):
        best = starts[block]
        for place in range(starts[block] + 1, ends[block]):
            if similarity[place] < similarity[best]:
                best = place
        chosen[block] = best


def take_spread(
    x: Vectors, group: npt.NDArray[Any], want: Int64, keys: npt.NDArray[Any], words: UInt64 | None = None
) -> Bools:
    """Rows of each group far from each other: first the lowest key, then whichever is least similar to all taken.

    Least similar: its highest cosine with a row taken is lowest; ties by (key, id). A group g that gives more than
    MAX_ROUNDS rows is cut into ceil(want[g] / MAX_ROUNDS) blocks, its rows dealt to them in order of their keys, and
    each block gives an equal part: so a row is compared at most MAX_ROUNDS - 1 times, whatever its group.

    Args:
        x: stored vectors [n, d]. Groups are independent: callers give as many whole groups at a time as they can hold.
        group, want, keys, words: as for `groups.take_lowest`.

    Returns:
        bool [n]. Holds about 90 bytes a row beside the arguments.
    """
    taken: Bools = want[group] >= group_sizes(group, len(want))[group]
    rows = np.flatnonzero(~taken & (want[group] > 0))
    if len(rows):
        tied = np.zeros((len(group), 2), dtype=np.uint64) if words is None else words
        rows = rows[np.lexsort((tied[rows, 1], tied[rows, 0], keys[rows], group[rows]))]
        rows, sizes, give = _blocks(rows, group[rows], want)
        taken[rows[_farthest_first(x, rows, sizes, give)]] = True
    return taken


def _blocks(rows: Int64, group: npt.NDArray[Any], want: Int64) -> tuple[Int64, Int64, Int64]:
    """Rows ordered by (group, key) dealt to blocks: rows by (block, key), size of each block, rows it gives.

    The blocks that give most come first, so that those with rounds to go are always the first ones.
    """
    starts = np.searchsorted(group, group)  # of each row's group
    place = np.arange(len(rows)) - starts
    num_blocks = -(-want[group] // MAX_ROUNDS)
    which = place % num_blocks
    share = want[group] // num_blocks + (which < want[group] % num_blocks)
    order = np.lexsort((place, which, starts, -share))
    begins = np.flatnonzero(place[order] < num_blocks[order])  # the first row of each block has been dealt first
    return rows[order], np.diff(begins, append=len(rows)), share[order][begins]


def _farthest_first(x: Vectors, rows: Int64, sizes: Int64, give: Int64) -> Bools:
    """Whether each place of `rows` is taken: in every round one of each block that has still to give."""
    ends = np.cumsum(sizes)
    starts = ends - sizes
    similarity = np.full(len(rows), -np.inf, dtype=np.float32)  # the highest with a row taken; infinite once taken
    lengths = np.full(len(x), -1.0)
    for done in range(int(give[0])):
        active = int(np.count_nonzero(give > done))
        chosen = np.empty(active, dtype=np.int64)
        _farthest_loop(starts, ends, similarity, chosen)
        similarity[chosen] = np.inf
        going_on = int(np.count_nonzero(give > done + 1))
        if going_on:
            reached = slice(0, ends[going_on - 1])
            i = np.repeat(rows[chosen[:going_on]], sizes[:going_on])
            fresh = cosine_pairs(x, i, x, rows[reached], lengths, lengths)
            similarity[reached] = np.maximum(similarity[reached], fresh)
    return np.isposinf(similarity)
