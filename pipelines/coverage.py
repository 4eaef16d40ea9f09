"""How images and queries spread over the clusters of each level: sizes, what is selected, what query sets touch.

Level 1 is the finest; a cluster of a higher level is made of whole clusters of level 1, so that a query touches at
every level what holds its nearest centroid of level 1. One pass reads the clusters and the selection, one part of each
at a time; a few numbers are held for each cluster, and the centroids of level 1 while queries are compared with them.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from curation.groups import group_sizes, group_sums
from curation.hashing import id_words, keyed_hash
from curation.neighbors import top_k
from curation.partwise import matrix
from curation.sampling import Tree
from curation.shards import ShardSet
from pipelines.levels import centroids_of, read_tree
from pipelines.lookalikes import Selected

MAX_PRODUCTS = 10**12
"""Multiplications that comparing one query set with the centroids may take; a larger set is sampled."""

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]


@dataclass
class Spread:
    """The clusters of a run.

    Attributes:
        centroids: their set.
        clusters: what of them each pool's images lie in.
        selected: the final set, or None while there is none.
    """

    centroids: ShardSet
    clusters: list[ShardSet]
    selected: Selected | None

    @cached_property
    def finest(self) -> Float32:
        """Centroids of level 1, float32 [k, d]."""
        return centroids_of(self.centroids, 1)

    @cached_property
    def tree(self) -> Tree:
        return read_tree(self.centroids)

    @cached_property
    def _counts(self) -> tuple[list[Int64], list[Int64]]:
        """By level: images of the pool, and of the selection (with copies)."""
        sizes, taken = (np.zeros(self.tree.num_clusters[0], np.int64) for _ in range(2))
        for shard_set in self.clusters:
            for part in range(shard_set.num_parts):
                table = shard_set.read(part, ["image_id", "cluster_1"])
                cluster = table["cluster_1"].to_numpy()
                sizes += group_sizes(cluster, len(sizes))
                taken += group_sums(cluster, self._copies(shard_set.source, part, table["image_id"]), len(taken))
        return self.tree.totals(sizes), self.tree.totals(taken)

    def _copies(self, source: str, part: int, ids: pa.ChunkedArray) -> Int64:
        """How often each image of a part is selected, int64 [n]."""
        table = self.selected.part(source, part, ["image_id", "copies"]) if self.selected is not None else None
        copies = np.zeros(len(ids), np.int64)
        if table is not None and table.num_rows:
            at = pc.index_in(ids, value_set=table["image_id"].combine_chunks()).to_numpy(zero_copy_only=False)
            there = ~np.isnan(at.astype(np.float64))
            copies[there] = table["copies"].to_numpy()[at[there].astype(np.int64)]
        return copies

    @property
    def sizes(self) -> list[Int64]:
        """Images of the pool in each cluster, int64 [k], by level."""
        return self._counts[0]

    @property
    def taken(self) -> list[Int64]:
        """Selected images of the pool, copies counted, in each cluster, int64 [k], by level."""
        return self._counts[1]

    def lift(self, counts: Int64, level: int) -> Int64:
        """Counts over the finest clusters, int64 [k_1], as counts over those of a level, from 0 for level 1."""
        return self.tree.totals(counts)[level]

    def query_counts(self, queries: ShardSet) -> tuple[Int64, int]:
        """How many queries have each finest centroid nearest, int64 [k_1], and how many were compared.

        Of more than MAX_PRODUCTS allow, those of lowest keyed hash are compared.
        """
        num_clusters, dim = self.finest.shape
        share = min(1.0, MAX_PRODUCTS / max(queries.num_rows * num_clusters * dim, 1))
        words = np.zeros((num_clusters, 2), np.uint64)
        words[:, 1] = np.arange(num_clusters)
        counts, compared = np.zeros(num_clusters, np.int64), 0
        for part in range(queries.num_parts):
            table = queries.read(part)
            draws = keyed_hash(0, "seed coverage", id_words(table["image_id"].to_pylist()))
            vectors = matrix(table)[draws.astype(np.float64) <= share * 2.0**64]
            if len(vectors) and num_clusters:
                nearest = top_k(vectors, self.finest, 1, words)[0][:, 0]
                counts += np.bincount(nearest, minlength=num_clusters)
                compared += len(vectors)
        return counts, compared
