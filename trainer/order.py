"""The endless order of one source's samples: shuffled anew each epoch, and any place in it found by arithmetic.

An epoch has every row once. Its order is made in three steps, so that what is read stays in large pieces:

- files are shuffled, and taken FILES_TOGETHER at a time; the row groups of those files are shuffled together;
- windows of some row groups follow one another;
- within a window, the rows of each group are shuffled and cut into short runs, and the runs are shuffled.

With runs of one row a window is in uniformly random order. Longer runs bound what many readers read in vain: whoever
takes a part of a window reads a row group for each run of that part, or each group once if that is less.

Everything is a keyed hash of (seed, source, epoch, file or group or row): no state, no stream, and nothing depends on
who asks. Held: 8 bytes for each row group, as many for each of two epochs, and 16 bytes for each row of a few windows.
A new epoch costs one sort of the row groups.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from curation.hashing import keyed_hash

FILES_TOGETHER = 8
"""Files whose row groups are mixed, so that few files are open at a time."""
WINDOWS_HELD = 8

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Groups:
    """The row groups of one source.

    Attributes:
        file: the number of each one's file, int [R].
        rows: how many rows it has, above 0, int [R].
        window: groups whose rows are shuffled together.
        run: rows of one group that follow one another.
    """

    file: npt.NDArray[np.int32]
    rows: npt.NDArray[np.int32]
    window: int
    run: int

    @cached_property
    def num_rows(self) -> int:
        """Rows of all groups."""
        return int(self.rows.sum(dtype=np.int64))


@dataclass(frozen=True)
class _Epoch:
    """The row groups of an epoch in order, int64 [R], and the place of each window's first row, int64 [windows + 1]."""

    groups: Int64
    starts: Int64


class Order:
    """The order of the samples of one source; what it draws is keyed by `seed` and `name`."""

    def __init__(self, groups: Groups, seed: int, name: str) -> None:
        self._groups, self._seed, self._name = groups, seed, name
        self._epoch = lru_cache(2)(self._shuffled_groups)
        self._window = lru_cache(WINDOWS_HELD)(self._shuffled_rows)

    def stretch(self, first: int, count: int) -> Int64:
        """Samples [first, first + count) of the endless order: group and row in it, int64 [count, 2]."""
        pieces = [np.empty((0, 2), np.int64)]
        while count > 0:
            epoch, window, inside = self._locate(first)
            piece = self._window(epoch, window)[inside : inside + count]
            pieces.append(piece)
            first, count = first + len(piece), count - len(piece)
        return np.concatenate(pieces)

    def instead(self, position: int, attempt: int, anywhere: bool) -> tuple[int, int]:
        """Group and row of a sample in the place of one that cannot be used: of the same window, or from anywhere.

        Args:
            position: in the endless order.
            attempt: 0, 1, ... give independent draws.
            anywhere: whether all of the epoch is drawn from, not just what is at hand.
        """
        epoch, window, _ = self._locate(position)
        starts = self._epoch(epoch).starts
        first, last = (0, starts[-1]) if anywhere else starts[window : window + 2]
        draw = int(self._hash("instead", np.array([position]), np.array([attempt]))[0])
        drawn = epoch * self._groups.num_rows + int(first) + draw % int(last - first)
        group, row = self.stretch(drawn, 1)[0].tolist()
        return group, row

    def _locate(self, position: int) -> tuple[int, int, int]:
        """Epoch, window in it, and place in that."""
        epoch, inside = divmod(position, self._groups.num_rows)
        starts = self._epoch(epoch).starts
        window = int(np.searchsorted(starts, inside, side="right")) - 1
        return epoch, window, inside - int(starts[window])

    def _shuffled_groups(self, epoch: int) -> _Epoch:
        files, num_groups = self._groups.file, len(self._groups.file)
        shuffled = np.argsort(self._hash("files", np.full(files.max() + 1, epoch), np.arange(files.max() + 1)))
        together = np.empty_like(shuffled)
        together[shuffled] = np.arange(len(shuffled)) // FILES_TOGETHER
        key = self._hash("groups", np.full(num_groups, epoch), np.arange(num_groups))
        groups = np.lexsort((key, together[files]))
        ends = np.cumsum(self._groups.rows[groups], dtype=np.int64)
        of_windows = np.append(ends[self._groups.window - 1 : -1 : self._groups.window], ends[-1])
        return _Epoch(groups, np.concatenate([[0], of_windows]))

    def _shuffled_rows(self, epoch: int, window: int) -> Int64:
        """The samples of a window in order: group and row, int64 [n, 2]."""
        first = window * self._groups.window
        groups = self._epoch(epoch).groups[first : first + self._groups.window]
        counts = self._groups.rows[groups].astype(np.int64)
        place = np.repeat(np.arange(len(groups)), counts)
        inside = np.arange(len(place)) - np.repeat(np.cumsum(counts) - counts, counts)
        epochs, group = np.full(len(place), epoch), groups[place]
        row = inside[np.lexsort((self._hash("rows", epochs, group, inside), place))]
        order = np.argsort(self._hash("runs", epochs, group, inside // self._groups.run), kind="stable")
        return np.stack([group, row], axis=1)[order]

    def _hash(self, purpose: str, first: Int64, second: Int64, third: Int64 | int = 0) -> npt.NDArray[np.uint64]:
        words = np.stack([first, second], axis=1).astype(np.uint64)
        return keyed_hash(self._seed, f"trainer {purpose} of {self._name}", words, third)
