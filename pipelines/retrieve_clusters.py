"""Cluster-based retrieval over shard sets: which clusters the queries hit, and what is taken from them.

One task reads the queries and the pools' clusters once, a part at a time. It holds the centroids, what
`retrieval.ClusterDraw` holds (`images_per_cluster` of each cluster hit, or `cap`, whichever is less; about 100 bytes
each), and nothing that grows with the pools.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation.clustering import assign
from curation.hashing import keyed_hash
from curation.partwise import ids_of, matrix, words_of
from curation.retrieval import ClusterDraw, Members, Strategy, clusters_hit
from curation.shards import GROUP_ROWS, ShardSet
from pipelines.cluster import read_centroids
from pipelines.vectors import Vectors

Int64 = npt.NDArray[np.int64]

SLOT = 32
"""A place is the number of a part, this many bits up, and the row in it."""


@dataclass(frozen=True)
class ClusterRule:
    """Cluster-based retrieval: `images_per_cluster` of each cluster with at least `min_hits` queries, `cap` in all.

    Within a cluster `random` ones (of lowest keyed hash), or the `closest` to the centroid.
    """

    images_per_cluster: int
    min_hits: int
    cap: int | None
    strategy: Strategy = "random"


def query_counts(queries: str, centroids: str) -> Int64:
    """How many query images fall into each cluster of level 1, int64 [k]."""
    found = read_centroids(centroids)
    counts = np.zeros(len(found), np.int64)
    shard_set = ShardSet(queries)
    for part in range(shard_set.num_parts):
        vectors = matrix(shard_set.read(part, ["embedding"]))
        if len(vectors):
            counts += np.bincount(assign(vectors, found)[0], minlength=len(found))
    return counts


def retrieved_members(queries: str, clusters: list[str], centroids: str, rule: ClusterRule, seed: int) -> Members:
    """What the rule takes, in the order of the pools; `place` is the number of the part, and the row in it."""
    hit = clusters_hit(query_counts(queries, centroids), rule.min_hits)
    draw = ClusterDraw(hit, rule.images_per_cluster, rule.cap, rule.strategy)
    purpose = f"retrieve {ShardSet(queries).source}"
    for slot, (shard_set, part) in enumerate(Vectors(clusters).places):
        table = shard_set.read(part, ["image_id", "cluster_1", "distance"])
        words = words_of(table["image_id"])
        place = (slot << SLOT) + np.arange(table.num_rows)
        known = table["cluster_1"].to_numpy(), keyed_hash(seed, purpose, words), words, table["distance"].to_numpy()
        draw.add(Members(*known, place))
    return draw.taken()


def cluster_columns(members: Members) -> Iterator[tuple[Int64, dict[str, pa.Array]]]:
    """(numbers of the parts, columns of RETRIEVED that are of clusters), GROUP_ROWS rows at a time."""
    for start in range(0, len(members), GROUP_ROWS):
        piece = members.take(slice(start, start + GROUP_ROWS))
        columns = {"image_id": ids_of(piece.words), "cluster": pa.array(piece.cluster)}
        yield piece.place >> SLOT, columns
