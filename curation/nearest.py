"""The k nearest of a pool for each query: products of codes propose, bounds drop most, scores decide.

The pool goes by in blocks, or in the cells that queries visit; what is known of a query from one block is what the next
must surpass. The order is (similarity descending, image id, number), so that results of any blocks, merged, are those
of the whole pool.
"""

import numpy as np
import numpy.typing as npt

from curation.codes import allowances
from curation.join import Members
from curation.products import Multiplier
from curation.rooms import Found, empty, hold, insert, make_rooms, side_of
from curation.rows import Rows
from curation.scoring import cosine_pairs

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]
Words = npt.NDArray[np.uint64]

FIRST_ROWS = 256
"""Rows of a pool that are looked at before anything is known of the floors; at least 2 k."""
BATCH = 1 << 16
"""Candidates that are taken in at once, from as many cells as it takes."""
MAX_SCORED = 1 << 22
"""Candidates that are scored at once."""
MAX_QUERIES = 32_768
MAX_BYTES = 1 << 28
"""What rooms and results of the queries that are searched for at once may take."""

NONE = -1
"""The number that stands where fewer than k were found."""


def room_of(k: int) -> int:
    """Candidates of a query that are held."""
    return 2 * k + 32


def query_rows(k: int) -> int:
    """Queries that may be searched for at once."""
    return max(1, min(MAX_QUERIES, MAX_BYTES // (12 * room_of(k) + 28 * k + 32)))


class Nearest:
    """The k best of each of n queries, of all that has been searched.

    Holds 12 bytes for each candidate that a room takes and 28 k bytes, both a query.
    """

    def __init__(self, queries: Rows, k: int) -> None:
        """`k` is at least 1; `queries` are at most `query_rows(k)` where memory matters."""
        count = len(queries)
        self._queries, self._side = queries, side_of(queries)
        self._found = Found(
            np.full((count, k), -np.inf, dtype=np.float32),
            np.full((count, k, 2), np.iinfo(np.uint64).max, dtype=np.uint64),
            np.full((count, k), NONE, dtype=np.int64),
        )
        self._first = max(FIRST_ROWS, 2 * k)
        self._rooms = make_rooms(count, room_of(k), queries.codes.scale, k, np.empty(count, np.int32))

    def best(self) -> tuple[Float32, Words, Int64]:
        """Similarity float32 [n, k], ids uint64 [n, k, 2] and numbers (`Rows.nodes`) int64 [n, k], best first.

        Where there are fewer, the numbers that are left over are NONE.
        """
        return self._found

    def search(self, pool: Rows, words: Words, multiplier: Multiplier) -> None:
        """Look at all of `pool`, whose ids are `words` uint64 [m, 2]. Time grows with n m d."""
        allowance, block = self._allowance(pool), _Block(self, pool, words)
        for rows in (slice(0, self._first), slice(self._first, len(pool))):
            x, y = self._queries.codes.values, pool.codes.values[rows]
            for i, j, product in multiplier.candidates(x, y, self._rooms.cutoff, allowance[rows]):
                block.take(i, j + np.int32(rows.start), product)
        block.settle(self._rooms.held > 0)

    def search_cells(
        self, pool: Rows, words: Words, stored: Members, visiting: Members, multiplier: Multiplier
    ) -> None:
        """Look at what is stored in the cells that each query visits. Holds the codes of both sides once more.

        Args:
            pool: rows of the pool; words: their ids, uint64 [m, 2].
            stored: rows of `pool` in each cell; each lies in one cell.
            visiting: queries that visit each cell, by their place among the queries.
            multiplier: that proposes.
        """
        count, block = np.int32(len(self._queries)), _Block(self, pool, words)
        values = np.concatenate([self._queries.codes.values, pool.codes.values])
        allowance = np.concatenate([np.zeros(count, np.int32), self._allowance(pool)])
        cutoff = np.concatenate([self._rooms.cutoff, np.zeros(len(pool), np.int32)])
        self._rooms = self._rooms._replace(cutoff=cutoff[:count])  # what rises in rooms is read here
        batch: list[tuple[Int32, Int32, Int32]] = []
        held = 0
        for cell in np.flatnonzero((np.diff(stored.offsets) > 0) & (np.diff(visiting.offsets) > 0)):
            for found in multiplier.gathered(values, visiting.of(cell), stored.of(cell) + count, cutoff, allowance):
                batch.append(found)
                held += len(found[0])
            if held >= BATCH:
                block.take_batch(batch, count)
                batch, held = [], 0
        block.take_batch(batch, count)
        block.settle(self._rooms.held > 0)

    def _allowance(self, pool: Rows) -> Int32:
        return allowances(pool.codes, float(self._queries.codes.error.max(initial=0.0)))


class _Block:
    """Candidates of one block of the pool on their way into the rooms, and out of them by their scores."""

    def __init__(self, nearest: Nearest, pool: Rows, words: Words) -> None:
        self._nearest, self._pool, self._words, self._side = nearest, pool, words, side_of(pool)

    def take_batch(self, batch: list[tuple[Int32, Int32, Int32]], first: np.int32) -> None:
        """`take` of several results at once; rows of the pool are numbered from `first`."""
        if batch:
            i, j, product = (np.concatenate(column) for column in zip(*batch, strict=True))
            self.take(i, j - first, product)

    def take(self, i: Int32, j: Int32, product: Int32) -> None:
        """Hold candidates (query, row of the pool); where a room is too small for what ties, score at once."""
        rooms, over = self._nearest._rooms, np.empty(len(i), dtype=np.int64)
        count = hold(i, j, product, rooms, self._nearest._side, self._side, over)
        if count:
            self.settle(rooms.is_full)
            self._decide(i[over[:count]], j[over[:count]])

    def settle(self, which: npt.NDArray[np.bool_]) -> None:
        """Score what the rooms of some queries hold, and empty them."""
        rooms = self._nearest._rooms
        i, j = (np.empty(int(rooms.held[which].sum()), dtype=np.int32) for _ in range(2))
        count = empty(which, rooms, self._nearest._side, self._side, i, j)
        self._decide(i[:count], j[:count])

    def _decide(self, i: Int32, j: Int32) -> None:
        """Score pairs (query, row of the pool), each new, and keep the k best of each query."""
        mine, its = self._nearest._queries, self._pool
        for start in range(0, len(i), MAX_SCORED):
            a, b = i[start : start + MAX_SCORED], j[start : start + MAX_SCORED]
            score = cosine_pairs(mine.vectors, mine.at[a], its.vectors, its.at[b], mine.norms, its.norms)
            place = self._nearest._found, self._nearest._rooms
            insert(a, b, score, self._words, its.nodes, *place, mine.codes.error)
