"""Exact neighbors: all pairs above a threshold, and the k best of a pool. Codes propose, `scoring` decides.

Functions take blocks; callers stream over parts and merge (`merge_top_k`, `components.spanning_forest`).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from curation.codes import Codes, allowances, at_most, cutoffs, encode
from curation.errors import ConfigError
from curation.products import Multiplier
from curation.scoring import Vectors, check_comparable, cosine_pairs, norms

MAX_EXACT_VECTORS = 1_000_000
"""Exact search compares at most this many vectors with as many others; its time grows with their product."""

QUERY_BLOCK = 1_024
FIRST_CHUNK, LAST_CHUNK = 1_024, 65_536
"""Rows of the pool that are looked at before the bounds rise again: few at first, when nothing is known."""
MAX_HELD = 1 << 22
"""Candidates for the k best of a block of queries that are held (24 bytes each) before they are scored."""

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]
Words = npt.NDArray[np.uint64]


def check_exact_size(num_vectors: int, num_others: int) -> None:
    """Raise ConfigError where num_vectors x num_others exceeds MAX_EXACT_VECTORS squared."""
    if num_vectors * num_others > MAX_EXACT_VECTORS**2:
        raise ConfigError(
            f"exact search of {num_vectors:,} vectors against {num_others:,} is too large: it compares at most "
            f"{MAX_EXACT_VECTORS:,} with {MAX_EXACT_VECTORS:,}; take a smaller pool"
        )


def pairs_above(x: Vectors, y: Vectors, threshold: float, *, symmetric: bool = False) -> tuple[Int64, Int64, Float32]:
    """All pairs of rows with cosine similarity above `threshold` (strictly, both as float32).

    Codes of int8 propose, `scoring` decides (see `codes`). Beside the result this holds both sets' codes, d bytes a
    vector, and one tile of products. The result is 20 bytes a pair, three times that while it is sorted, and n k pairs
    at worst: callers choose blocks accordingly.

    Args:
        x, y: stored vectors [n, d] and [k, d].
        threshold: of the cosine; any number; below -1 gives all pairs.
        symmetric: `y` is `x`; only pairs with i < j are searched and returned.

    Returns:
        i int64 [m], rows of `x`; j int64 [m], rows of `y`; similarity float32 [m]; sorted by (i, j).

    Raises:
        LvdError: vectors of different length, or not finite.
    """
    check_comparable(x, y)
    left = encode(x)
    right = left if symmetric else encode(y)
    x_norms, y_norms = np.full(len(x), -1.0), np.full(len(y), -1.0)
    parts = [_no_pairs()]
    allowance = allowances(right, float(left.error.max(initial=0.0)))
    for i, j, _ in Multiplier().candidates(left.values, right.values, cutoffs(threshold, left), allowance, symmetric):
        similarity = cosine_pairs(x, i, y, j, x_norms, y_norms)
        above = similarity > np.float32(threshold)
        parts.append((i[above].astype(np.int64), j[above].astype(np.int64), similarity[above]))
    rows, others, scores = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((others, rows))
    return rows[order], others[order], scores[order]


def top_k(queries: Vectors, pool: Vectors, k: int, pool_words: Words) -> tuple[Int64, Float32]:
    """The k best rows of `pool` for each query, by (similarity descending, image id ascending): exact.

    Codes propose what may be among the k best, by bounds on its score that rise as the pool goes by; then `scoring`
    decides. Holds both sets' codes, d bytes a vector, and about MAX_HELD candidates; callers stream over pool blocks
    and merge with `merge_top_k`.

    Args:
        queries, pool: stored vectors [n, d] and [m, d].
        k: neighbors per query; min(k, m) are returned.
        pool_words: ids of the pool as `hashing.id_words` gives them, uint64 [m, 2].

    Returns:
        row of `pool` int64 [n, min(k, m)] and similarity float32 of the same shape, best first.
    """
    check_comparable(queries, pool)
    k = min(k, len(pool))
    rows = np.empty((len(queries), k), dtype=np.int64)
    similarity = np.empty((len(queries), k), dtype=np.float32)
    if rows.size:
        id_rank = np.empty(len(pool), dtype=np.int64)
        id_rank[np.lexsort((pool_words[:, 1], pool_words[:, 0]))] = np.arange(len(pool))
        codes, multiplier, lengths = encode(pool), Multiplier(), norms(pool)
        for start in range(0, len(queries), QUERY_BLOCK):
            block = slice(start, start + QUERY_BLOCK)
            best = _Best(queries[block], pool, codes, k, id_rank, lengths)
            rows[block], similarity[block] = best.search(multiplier)
    return rows, similarity


class _Best:
    """The k best of one block of queries, found chunk by chunk of the pool."""

    def __init__(
        self, queries: Vectors, pool: Vectors, codes: Codes, k: int, id_rank: Int64, lengths: npt.NDArray[np.float64]
    ) -> None:
        self._queries, self._pool, self._k, self._id_rank, self._lengths = queries, pool, k, id_rank, lengths
        self._left, self._right = encode(queries), codes
        self._floor = np.full(len(queries), -np.inf, dtype=np.float32)  # each query's k-th best scores at least this
        empty = np.zeros(0, dtype=np.int64)
        self._held = (empty, empty, np.zeros(0, np.float32), np.zeros(0, np.float32))

    def search(self, multiplier: Multiplier) -> tuple[Int64, Float32]:
        allowance = allowances(self._right, float(self._left.error.max()))
        start, size = 0, max(FIRST_CHUNK, 2 * self._k)
        self._begin(size, multiplier)
        while start < len(self._pool):
            chunk = slice(start, start + size)
            cutoff = cutoffs(self._floor, self._left)
            for found in multiplier.candidates(self._left.values, self._right.values[chunk], cutoff, allowance[chunk]):
                self._take(found[0], found[1] + np.int64(start), found[2])
            self._raise()
            start, size = start + size, min(2 * size, LAST_CHUNK)
        return self._decide()

    def _begin(self, size: int, multiplier: Multiplier) -> None:
        """The first floors: each query's k-th highest lower bound among the first `size` rows of the pool."""
        first = self._right.take(slice(0, size))
        product = multiplier.products(self._left.values, first.values)
        errors = self._left.error[:, None], first.error[None, :]
        middle = product.astype(np.float32) * np.float32(first.scale**2)
        least = middle - (at_most(product, *errors, first.scale) - middle)
        self._floor = np.partition(least, len(first) - self._k, axis=1)[:, len(first) - self._k].copy()

    def _take(self, i: Int32, j: Int64, product: Int32) -> None:
        """Hold candidates with the least and the most that each can score."""
        errors = self._left.error[i], self._right.error[j]
        most = at_most(product, *errors, self._right.scale)
        middle = product.astype(np.float32) * np.float32(self._right.scale**2)
        fresh = (i.astype(np.int64), j, middle - (most - middle), most)
        if len(self._held[0]) + len(i) > MAX_HELD:
            self._raise()
            self._score()
        rows, others, lower, upper = self._held
        self._held = (
            np.concatenate([rows, fresh[0]]),
            np.concatenate([others, fresh[1]]),
            np.concatenate([lower, fresh[2]]),
            np.concatenate([upper, fresh[3]]),
        )

    def _raise(self) -> None:
        """Raise each query's floor to the k-th highest lower bound, and drop what can no longer be among the k best."""
        i, _, least, most = self._held
        order = np.lexsort((-least, i))
        first = np.searchsorted(i[order], np.arange(len(self._queries) + 1))
        full = np.flatnonzero(np.diff(first) >= self._k)
        self._floor[full] = np.maximum(self._floor[full], least[order[first[full] + self._k - 1]])
        self._keep(most >= self._floor[i])

    def _score(self) -> None:
        """Replace the bounds of what is held by scores; of equal scores the k of lowest id stay."""
        i, j, _, _ = self._held
        score = cosine_pairs(self._queries, i, self._pool, j, None, self._lengths)
        order = np.lexsort((self._id_rank[j], -score, i))
        place = np.arange(len(order)) - np.searchsorted(i[order], i[order])
        self._held = (i, j, score, score)
        self._keep(np.sort(order[place < self._k]))

    def _keep(self, chosen: npt.NDArray[Any]) -> None:
        i, j, least, most = self._held
        self._held = (i[chosen], j[chosen], least[chosen], most[chosen])

    def _decide(self) -> tuple[Int64, Float32]:
        self._score()
        i, j, score, _ = self._held
        order = np.lexsort((self._id_rank[j], -score, i))
        shape = (len(self._queries), self._k)
        return j[order].reshape(shape), score[order].reshape(shape)


def merge_top_k(
    similarity: Sequence[Float32], words: Sequence[Words], payload: Sequence[Int64], k: int
) -> tuple[Float32, Words, Int64]:
    """The k best of several `top_k` results for the same n queries, in the same order (similarity, then image id).

    Args:
        similarity: per result, float32 [n, k_r]; results may differ in k_r.
        words: per result, ids of the neighbors, uint64 [n, k_r, 2].
        payload: per result, what comes back with each neighbor (such as its row in the pool), int64 [n, k_r].
        k: neighbors to keep.

    Returns:
        similarity [n, k'], words [n, k', 2], payload [n, k'], with k' = min(k, sum of k_r), best first.
    """
    all_similarity: Float32 = np.concatenate(similarity, axis=1)
    all_words: Words = np.concatenate(words, axis=1)
    all_payload: Int64 = np.concatenate(payload, axis=1)
    order = np.lexsort((all_words[:, :, 1], all_words[:, :, 0], -all_similarity))[:, :k]
    take = np.arange(len(order))[:, None], order
    return all_similarity[take], all_words[take], all_payload[take]


def _no_pairs() -> tuple[Int64, Int64, Float32]:
    return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
