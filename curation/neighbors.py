"""Exact neighbors: all pairs above a threshold, and the k best of a pool. Codes propose, `scoring` decides.

Functions take blocks; callers stream over parts and merge (`merge_top_k`, `components.spanning_forest`).
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from curation.codes import allowances, cutoffs, encode
from curation.nearest import Nearest, query_rows
from curation.products import Multiplier
from curation.rows import all_rows
from curation.scoring import Vectors, check_comparable, cosine_pairs

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Words = npt.NDArray[np.uint64]


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

    Holds both sets' codes, d bytes a vector, and what `nearest.Nearest` holds of some queries; callers stream over pool
    blocks and merge with `merge_top_k`, or keep a `Nearest`, which then knows what later blocks must surpass.

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
        others, multiplier, size = all_rows(pool), Multiplier(), query_rows(k)
        for start in range(0, len(queries), size):
            block = slice(start, start + size)
            nearest = Nearest(all_rows(queries[block]), k)
            nearest.search(others, pool_words, multiplier)
            similarity[block], _, rows[block] = nearest.best()
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


def _no_pairs() -> tuple[Int64, Int64, Float32]:
    return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
