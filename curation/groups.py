"""The lowest keys of every group, for very many rows and groups: a counting sort and a selection, both compiled.

"Random" means lowest keyed hash and "closest" means lowest distance, so balanced sampling, resampling and the remainder
of shares are all this one question. Time is linear in the rows but for the sort of each group's keys.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from curation.scoring import compiled, inlined

Bools = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]


@compiled
def _sum_loop(group: npt.NDArray[Any], values: npt.NDArray[Any], sums: Int64) -> None:
    for row in range(group.shape[0]):
        sums[group[row]] += values[row]


@compiled
def _count_loop(group: npt.NDArray[Any], sizes: Int64) -> None:
    for row in range(group.shape[0]):
        sizes[group[row]] += 1


@compiled
def _place_loop(group: npt.NDArray[Any], cursor: Int64, rows: npt.NDArray[Any]) -> None:
    """Rows by group, in order within it; cursor[g] moves from the first place of group g to the end of it."""
    for row in range(group.shape[0]):
        rows[cursor[group[row]]] = row
        cursor[group[row]] += 1


@inlined
def _narrow(
    rows: npt.NDArray[Any], count: int, want: int, keys: npt.NDArray[Any], room: UInt64, taken: Bools
) -> tuple[int, int]:
    """Take from rows[:count] what is below the `want`-th lowest key; rows that tie with it come to the front.

    Returns how many these are, and how many of them are still wanted.
    """
    for t in range(count):
        room[t] = keys[rows[t]]
    room[:count].sort()
    last, ties, left = room[want - 1], 0, want
    for t in range(count):
        row = rows[t]
        if keys[row] < last:
            taken[row] = True
            left -= 1
        elif keys[row] == last:
            rows[ties] = row
            ties += 1
    return ties, left


@compiled
def _take_loop(
    ends: Int64,
    rows: npt.NDArray[Any],
    want: Int64,
    keys: npt.NDArray[Any],
    words: UInt64,
    room: UInt64,
    taken: Bools,
) -> None:
    start = 0
    for group in range(ends.shape[0]):
        members = rows[start : ends[group]]
        count = ends[group] - start
        left = min(want[group], count)
        start = ends[group]
        if 0 < left < count:
            count, left = _narrow(members, count, left, keys, room, taken)
            for column in range(2 if words.shape[0] > 0 else 0):
                if left < count:
                    count, left = _narrow(members, count, left, words[:, column], room, taken)
        for t in range(left):
            taken[members[t]] = True


def _frozen(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The values as one read-only block, so that one compiled version serves files' columns and fresh arrays."""
    block = np.ascontiguousarray(values).view()
    block.flags.writeable = False
    return block


def group_sums(group: npt.NDArray[Any], values: npt.NDArray[Any], num_groups: int) -> Int64:
    """Exact sum of integers over each group, int64 [num_groups]; `group` int [n] lies within, and is not copied."""
    sums = np.zeros(num_groups, dtype=np.int64)
    _sum_loop(_frozen(group), _frozen(values), sums)
    return sums


def group_sizes(group: npt.NDArray[Any], num_groups: int) -> Int64:
    """Rows of each group, int64 [num_groups]; `group` int [n] lies within, and is not copied."""
    sizes = np.zeros(num_groups, dtype=np.int64)
    _count_loop(_frozen(group), sizes)
    return sizes


def take_lowest(group: npt.NDArray[Any], want: Int64, keys: npt.NDArray[Any], words: UInt64 | None = None) -> Bools:
    """Whether each row is among the want[g] rows of lowest key in its group g; a smaller group is taken whole.

    The lowest of a union are among the lowest of each of its parts: parts may be reduced first, in any order.

    Args:
        group: of each row, int [n], from 0 to k - 1 (callers check).
        want: rows wanted of each group, at least 0, int64 [k].
        keys: of each row, uint32 or uint64 [n].
        words: ids as `hashing.id_words` gives them, uint64 [n, 2]: they break ties. Without them the first row does.

    Returns:
        bool [n]. Holds 5 bytes a row (9 from 2**32 rows on), 16 bytes a group and 8 bytes a row of the largest group.
    """
    sizes = group_sizes(group, len(want))
    cursor = np.cumsum(sizes) - sizes
    rows = np.empty(len(group), dtype=np.uint32 if len(group) <= 2**32 else np.uint64)
    _place_loop(_frozen(group), cursor, rows)
    room = np.empty(int(sizes.max(initial=0)), dtype=np.uint64)
    taken = np.zeros(len(group), dtype=np.bool_)
    tied = np.zeros((0, 2), dtype=np.uint64) if words is None else words
    _take_loop(cursor, rows, np.ascontiguousarray(want, np.int64), _frozen(keys), _frozen(tied), room, taken)
    return taken


def distance_keys(distance: npt.NDArray[np.float32], draw: UInt64 | None = None) -> npt.NDArray[Any]:
    """Keys whose order is that of the distances: the closest come first.

    Args:
        distance: float32 [n], not NaN.
        draw: keyed hash of each row, uint64 [n], whose upper half orders rows at the same distance.

    Returns:
        uint64 [n]; without `draw` uint32 [n].
    """
    bits = (distance + np.float32(0)).view(np.uint32)  # + 0 makes -0 a 0
    keys: npt.NDArray[Any] = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))  # compares as the floats do
    return keys if draw is None else keys.astype(np.uint64) << np.uint64(32) | draw >> np.uint64(32)
