"""Cluster-based retrieval (DINOv2, section 3 and appendix A.4); sample-based retrieval is `neighbors.top_k`.

The paper does not say how images are drawn within a cluster or above the cap: here both are the lowest keyed hashes.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from curation.sampling import draw_ranks

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]


def clusters_hit(counts: npt.NDArray[Any], min_hits: int) -> Int64:
    """Clusters with at least `min_hits` query images (the paper's "more than 3" is 4), ascending, int64 [h].

    `counts` int64 [k] is the number of query images assigned to each cluster.
    """
    return np.flatnonzero(np.asarray(counts) >= min_hits)


def take_from_clusters(
    cluster: npt.NDArray[Any], draw: UInt64, words: UInt64, hit: Int64, per_cluster: int, cap: int | None
) -> Int64:
    """Rows that a query set retrieves: of each cluster hit the lowest draws, and of those again the lowest up to `cap`.

    Args:
        cluster: of each pool row, int32 [n].
        draw: keyed hash of each row, uint64 [n].
        words: ids as `hashing.id_words` gives them, uint64 [n, 2]; they break ties.
        hit: clusters to take from, int64 [h].
        per_cluster: rows of each cluster (10,000 in the paper); a shorter cluster gives all it has.
        cap: rows in all (1,000,000 in the paper), or None.

    Returns:
        int64 [t], ascending rows. Holds about 60 bytes for each row in a cluster hit.
    """
    rows = np.flatnonzero(np.isin(cluster, hit))
    rows = rows[draw_ranks(cluster[rows], draw[rows], words[rows]) < per_cluster]
    if cap is not None and len(rows) > cap:
        order = np.lexsort((words[rows, 1], words[rows, 0], draw[rows]))
        rows = np.sort(rows[order[:cap]])
    return rows
