"""SemDeDup (Abbas et al., arXiv 2303.09540): near-copies within one cluster, without components.

Unlike DINOv2's dedup, a row is dropped for its likeness to any earlier row, be that row dropped or not. So a chain in
which each row resembles the one before keeps its first alone; but two groups that only a later row joins keep one each.
"""

import numpy as np
import numpy.typing as npt

from curation.errors import LvdError
from curation.neighbors import pairs_above
from curation.scoring import Vectors, compiled

BLOCK_ROWS = 2_048
"""Rows compared with as many at once: were all of them copies, BLOCK_ROWS**2 pairs would be held (about 0.3 GB)."""

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]


@compiled
def _best_loop(i: Int64, j: Int64, similarity: Float32, best: Int64, best_similarity: Float32) -> None:
    """Enter each pair's i as best[j] where it is more similar; pairs come with i ascending, and ties keep the first."""
    for pair in range(i.shape[0]):
        row = j[pair]
        if similarity[pair] > best_similarity[row]:
            best[row], best_similarity[row] = i[pair], similarity[pair]


def semdedup(
    vectors: Vectors, distance: Float32, words: npt.NDArray[np.uint64], threshold: float
) -> tuple[npt.NDArray[np.bool_], Int64, Float32]:
    """Drop each row of a cluster that has an earlier one above `threshold` (1 - epsilon of the paper).

    Rows are ordered by (distance descending, image id): "hard" ones, far from the centroid, are kept, as the paper
    does by default. Earlier rows count whether dropped or not, as published. Holds BLOCK_ROWS**2 pairs at worst, two
    blocks of vectors and 36 bytes a row; time grows with the square of the rows.

    Args:
        vectors: stored vectors of one cluster [n, d].
        distance: of each to the cluster's centroid, float32 [n].
        words: ids as `hashing.id_words` gives them, uint64 [n, 2].
        threshold: of the cosine, strict, compared as float32.

    Returns:
        kept, bool [n]; the earlier row most similar to each dropped row (of equals, the first in the order), int64
        [n], -1 for kept ones; that similarity, float32 [n], NaN for kept ones.

    Raises:
        LvdError: lengths that differ.
    """
    if not len(vectors) == len(distance) == len(words):
        raise LvdError(f"{len(vectors)} vectors have {len(distance)} distances and {len(words)} ids")
    order = np.lexsort((words[:, 1], words[:, 0], -distance))
    best = np.full(len(order), -1, dtype=np.int64)
    best_similarity = np.full(len(order), -np.inf, dtype=np.float32)
    for later in range(0, len(order), BLOCK_ROWS):
        block = vectors[order[later : later + BLOCK_ROWS]]
        for earlier in range(0, later + 1, BLOCK_ROWS):
            own = earlier == later
            others = block if own else vectors[order[earlier : earlier + BLOCK_ROWS]]
            i, j, similarity = pairs_above(others, block, threshold, symmetric=own)
            _best_loop(i + earlier, j + later, similarity, best, best_similarity)
    original, similarity = np.empty_like(best), np.empty_like(best_similarity)
    kept = best < 0
    original[order] = np.where(kept, -1, order[best])
    similarity[order] = np.where(kept, np.nan, best_similarity)
    return original < 0, original, similarity
