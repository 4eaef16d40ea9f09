"""Exact neighbors: all pairs above a threshold, and the k best of a pool. FAISS proposes, `scoring` decides.

Functions take blocks; callers stream over parts and merge (`merge_top_k`, `components.spanning_forest`).
"""

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from curation.errors import ConfigError
from curation.faiss_setup import require_faiss
from curation.scoring import Vectors, check_comparable, cosine_pairs, search_margin, to_unit

MAX_EXACT_VECTORS = 1_000_000
"""Exact search compares at most this many vectors with as many others; its time grows with their product."""

POOL_BLOCK = 16_384
QUERY_BLOCK = 4_096
MAX_CANDIDATES = 1 << 23
"""Range search of one sub-block proposes at most this many pairs (FAISS holds 12 bytes each)."""

EXTRA = 8
"""Neighbors that FAISS is asked for beyond k, so that the k best are usually proven by the first search."""

Int64 = npt.NDArray[np.int64]
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

    The search runs over sub-blocks of POOL_BLOCK rows of `y` and as many of `x` as keep their product at
    MAX_CANDIDATES, and scores each sub-block's candidates at once. So beside the result it holds one float32 copy of a
    sub-block of `y` and, at worst, MAX_CANDIDATES pairs (about 0.5 GB). The result is 20 bytes a pair, three times that
    while it is sorted, and n k pairs at worst: callers choose blocks accordingly.

    Args:
        x, y: stored vectors [n, d] and [k, d].
        threshold: of the cosine; any number; below -1 gives all pairs.
        symmetric: `y` is `x`; only pairs with i < j are searched and returned.

    Returns:
        i int64 [m], rows of `x`; j int64 [m], rows of `y`; similarity float32 [m]; sorted by (i, j).

    Raises:
        ConfigError: more vectors than MAX_EXACT_VECTORS allows; LvdError: vectors of different length.
    """
    check_exact_size(len(x), len(y))
    check_comparable(x, y)
    faiss = require_faiss()
    parts = [_no_pairs()]
    for start in range(0, len(y), POOL_BLOCK):
        block = y[start : start + POOL_BLOCK]
        index = _flat_index(faiss, block)
        last = start + len(block) - 1 if symmetric else len(x)
        for rows in _slices(last, min(QUERY_BLOCK, MAX_CANDIDATES // len(block))):
            i, j, _ = _range_search(index, to_unit(x[rows]), threshold - search_margin(x.shape[1]))
            if symmetric:
                below = i + rows.start < j + start
                i, j = i[below], j[below]
            similarity = cosine_pairs(x[rows], i, block, j)
            above = similarity > np.float32(threshold)
            parts.append((i[above] + rows.start, j[above] + start, similarity[above]))
    i, j, similarity = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((j, i))
    return i[order], j[order], similarity[order]


def top_k(queries: Vectors, pool: Vectors, k: int, pool_words: Words) -> tuple[Int64, Float32]:
    """The k best rows of `pool` for each query, by (similarity descending, image id ascending): exact.

    Holds a float32 copy of the pool (4 d bytes a row) beside blocks of QUERY_BLOCK queries; callers stream over pool
    blocks and merge with `merge_top_k`.

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
        index = _flat_index(require_faiss(), pool)
        id_rank = np.empty(len(pool), dtype=np.int64)
        id_rank[np.lexsort((pool_words[:, 1], pool_words[:, 0]))] = np.arange(len(pool))
        for block in _slices(len(queries), QUERY_BLOCK):
            rows[block], similarity[block] = _block_top_k(queries[block], pool, k, id_rank, index)
    return rows, similarity


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


def _block_top_k(queries: Vectors, pool: Vectors, k: int, id_rank: Int64, index: Any) -> tuple[Int64, Float32]:
    """`top_k` of one block of queries.

    With margin e, the k best proposals all score at least f_k - e, f_k being the k-th proposed product. So the k best
    have products of f_k - 2 e or more: the proposals hold them all where the last one lies below that `floor`.
    Queries left open (many near-ties) get every row above their floor by range search.
    """
    units = to_unit(queries)
    product, found = index.search(units, min(k + EXTRA, len(pool)))
    floor = product[:, k - 1] - np.float32(2 * search_margin(queries.shape[1]))
    is_open = (product[:, -1] >= floor) & (found.shape[1] < len(pool))
    rows = np.empty((len(queries), k), dtype=np.int64)
    similarity = np.empty((len(queries), k), dtype=np.float32)

    closed = np.flatnonzero(~is_open)
    query, column = np.nonzero(product[closed] >= floor[closed, None])
    rows[closed], similarity[closed] = _decide(queries[closed], pool, query, found[closed[query], column], k, id_rank)

    still_open = np.flatnonzero(is_open)
    still_open = still_open[np.argsort(floor[still_open])]  # neighbors in a sub-block share the lowest floor
    for block in _slices(len(still_open), max(1, MAX_CANDIDATES // len(pool))):
        at = still_open[block]
        query, row, product_found = _range_search(index, units[at], float(np.nextafter(floor[at[0]], np.float32(-2))))
        near = product_found >= floor[at[query]]
        rows[at], similarity[at] = _decide(queries[at], pool, query[near], row[near], k, id_rank)
    return rows, similarity


def _decide(queries: Vectors, pool: Vectors, query: Int64, row: Int64, k: int, id_rank: Int64) -> tuple[Int64, Float32]:
    """The k best candidates (query, row) of each query by score, then id; every query has at least k candidates."""
    similarity = cosine_pairs(queries, query, pool, row)
    order = np.lexsort((id_rank[row], -similarity, query))
    first = np.searchsorted(query[order], np.arange(len(queries)))
    best = order[first[:, None] + np.arange(k)]
    return row[best], similarity[best]


def _flat_index(faiss: ModuleType, x: Vectors) -> Any:
    """FAISS's exact index over the rows of `x`; converts by blocks, so that only one float32 copy exists."""
    index = faiss.IndexFlatIP(x.shape[1])
    for block in _slices(len(x), POOL_BLOCK):
        index.add(to_unit(x[block]))
    return index


def _range_search(index: Any, units: Float32, radius: float) -> tuple[Int64, Int64, Float32]:
    """Pairs (query, row) whose product exceeds `radius`, with the product."""
    limits, product, row = index.range_search(units, radius)
    query = np.repeat(np.arange(len(units)), np.diff(limits.astype(np.int64)))
    return query, row, product


def _no_pairs() -> tuple[Int64, Int64, Float32]:
    return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)


def _slices(num_rows: int, size: int) -> Iterator[slice]:
    """Consecutive slices of `size` rows (the last may be shorter)."""
    return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))
