"""Stage `retrieve`: what of the pools resembles one query set (DINOv2, section 3 and appendix A.4).

Sample-based: the k nearest kept pool images of each query image. Cluster-based: images of the clusters in which at
least `min_hits` query images fall. A sample task holds one part of the queries and one block of the pool, and its
time grows with their product; the cluster task holds about 140 bytes for each pool image in a cluster hit.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation import schemas, storage
from curation.clustering import assign
from curation.errors import ConfigError
from curation.hashing import id_words, keyed_hash
from curation.manifest import Input
from curation.neighbors import check_exact_size, merge_top_k, top_k
from curation.partwise import ids_of, matrix
from curation.retrieval import clusters_hit, take_from_clusters
from curation.shards import GROUP_ROWS, PartWriter, ShardSet
from pipelines.cluster import read_centroids
from pipelines.unit import Step, Unit, set_input
from pipelines.vectors import BLOCK_ROWS, Vectors, check_made_from, check_same_model, kept_part


@dataclass(frozen=True)
class ClusterRule:
    """Cluster-based retrieval: `images_per_cluster` of each cluster with at least `min_hits` queries, `cap` in all."""

    images_per_cluster: int
    min_hits: int
    cap: int | None


@dataclass
class RetrieveStep(Step):
    """`retrieved/QUERY`: with `k`, one part for each part of the queries; with `rule`, one part more."""

    queries: str
    pools: list[str]
    duplicates: list[str]
    clusters: list[str]
    centroids: str
    k: int | None
    rule: ClusterRule | None
    seed: int

    def schema(self) -> pa.Schema:
        return schemas.RETRIEVED

    def _sample_parts(self) -> int:
        return ShardSet(self.queries).num_parts if self.k else 0

    def num_parts(self) -> int:
        return self._sample_parts() + (1 if self.rule else 0)

    def write_part(self, part: int, writer: PartWriter) -> None:
        if part < self._sample_parts():
            self._write_sample(part, writer)
        elif self.rule:
            self._write_clusters(self.rule, writer)

    def _write_sample(self, part: int, writer: PartWriter) -> None:
        table = ShardSet(self.queries).read(part)
        queries, query_ids = matrix(table), table["image_id"].to_pylist()
        if not query_ids:
            return
        similarity = np.zeros((len(queries), 0), np.float32)
        words = np.zeros((len(queries), 0, 2), np.uint64)
        slots = np.zeros((len(queries), 0), np.int64)
        k = self.k or 0
        for block, block_words, block_slots in self._blocks():
            rows, near = top_k(queries, block, k, block_words)
            found = ([similarity, near], [words, block_words[rows]], [slots, block_slots[rows]])
            similarity, words, slots = merge_top_k(*found, k)
        writer.write(self._sample_table(query_ids, similarity, words, slots), GROUP_ROWS)

    def _sample_table(
        self,
        query_ids: list[str],
        similarity: npt.NDArray[np.float32],
        words: npt.NDArray[np.uint64],
        slots: npt.NDArray[np.int64],
    ) -> pa.Table:
        """Neighbors [queries, k] as rows, queries in order, best first."""
        places = Vectors(self.pools).places
        count = similarity.shape[1]
        values = {
            "query_image_id": np.repeat(query_ids, count),
            "image_id": ids_of(words.reshape(-1, 2)),
            "source": [places[slot][0].source for slot in slots.ravel()],
            "part": [places[slot][1] for slot in slots.ravel()],
            "mode": ["sample"] * slots.size,
            "rank": np.tile(np.arange(1, count + 1), len(query_ids)),
            "similarity": similarity.ravel(),
        }
        return _retrieved(values)

    def _blocks(self) -> Iterator[tuple[npt.NDArray[np.float16], npt.NDArray[np.uint64], npt.NDArray[np.int64]]]:
        """Kept pool vectors with their ids and parts, in blocks of about BLOCK_ROWS."""
        vectors: list[npt.NDArray[np.float16]] = []
        ids: list[str] = []
        slots: list[int] = []
        slot = 0
        for embeddings, duplicates in zip(self.pools, self.duplicates, strict=True):
            for part in range(ShardSet(embeddings).num_parts):
                names, found = kept_part(ShardSet(embeddings), ShardSet(duplicates), part)
                vectors.append(found)
                ids += names
                slots += [slot] * len(names)
                slot += 1
                if len(ids) >= BLOCK_ROWS:
                    yield np.concatenate(vectors), id_words(ids), np.asarray(slots)
                    vectors, ids, slots = [], [], []
        if ids:
            yield np.concatenate(vectors), id_words(ids), np.asarray(slots)

    def _write_clusters(self, rule: ClusterRule, writer: PartWriter) -> None:
        hit = clusters_hit(self._query_counts(), rule.min_hits)
        cluster, words, slots = self._members(hit)
        draw = keyed_hash(self.seed, f"retrieve {ShardSet(self.queries).source}", words)
        taken = take_from_clusters(cluster, draw, words, hit, rule.images_per_cluster, rule.cap)
        places = Vectors(self.pools).places
        for start in range(0, len(taken), GROUP_ROWS):
            rows = taken[start : start + GROUP_ROWS]
            values = {
                "image_id": ids_of(words[rows]),
                "source": [places[slot][0].source for slot in slots[rows]],
                "part": [places[slot][1] for slot in slots[rows]],
                "mode": ["cluster"] * len(rows),
                "cluster": cluster[rows],
            }
            writer.write(_retrieved(values))

    def _query_counts(self) -> npt.NDArray[np.int64]:
        """How many query images fall into each cluster, int64 [k]."""
        centroids = read_centroids(self.centroids)
        counts = np.zeros(len(centroids), np.int64)
        queries = ShardSet(self.queries)
        for part in range(queries.num_parts):
            vectors = matrix(queries.read(part, ["embedding"]))
            if len(vectors):
                counts += np.bincount(assign(vectors, centroids)[0], minlength=len(centroids))
        return counts

    def _members(
        self, hit: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
        """Cluster, id and part number of every pool image in the clusters hit."""
        clusters: list[npt.NDArray[np.int32]] = [np.zeros(0, np.int32)]
        words = [np.zeros((0, 2), np.uint64)]
        slots = [np.zeros(0, np.int64)]
        slot = 0
        for uri in self.clusters:
            for part in range(ShardSet(uri).num_parts):
                table = ShardSet(uri).read(part, ["image_id", "cluster_1"])
                cluster = table["cluster_1"].to_numpy()
                inside = np.isin(cluster, hit)
                clusters.append(cluster[inside])
                words.append(id_words(table["image_id"].filter(pa.array(inside)).to_pylist()))
                slots.append(np.full(int(inside.sum()), slot))
                slot += 1
        return np.concatenate(clusters), np.concatenate(words), np.concatenate(slots)


def _retrieved(values: dict[str, Any]) -> pa.Table:
    """A table of retrieved images; columns that do not apply are null."""
    count = len(values["image_id"])
    columns = [
        pa.array(values[field.name], field.type) if field.name in values else pa.nulls(count, field.type)
        for field in schemas.RETRIEVED
    ]
    return pa.table(columns, schema=schemas.RETRIEVED)


@dataclass
class RetrieveUnit(Unit):
    """One query set against all pools: `retrieved/QUERY`. `clusters` and `centroids` serve the cluster mode alone."""

    queries: str
    pools: list[str]
    duplicates: list[str]
    clusters: list[str]
    centroids: str
    k: int | None
    rule: ClusterRule | None
    seed: int
    out: str

    stage = "retrieve"

    @property
    def title(self) -> str:
        return f"retrieve {self.queries.rpartition('/')[2]}"

    def inputs(self) -> list[Input]:
        check_same_model([self.queries, *self.pools])
        found = [set_input(uri, "embeddings") for uri in [self.queries, *self.pools]]
        found += [set_input(uri, "duplicates") for uri in self.duplicates]
        if self.rule:
            check_made_from(self.centroids, self.pools)
            found += [set_input(self.centroids, "centroids"), *(set_input(uri, "clusters") for uri in self.clusters)]
        return found

    def config(self) -> dict[str, Any]:
        if not self.k and not self.rule:
            raise ConfigError("retrieval needs k (sample-based), images_per_cluster (cluster-based) or both")
        values: dict[str, Any] = {"k": self.k} if self.k else {}
        if self.rule:
            values |= {"cluster": vars(self.rule), "seed": self.seed}
        return values

    def steps(self) -> list[Step]:
        if self.k:
            check_exact_size(len(Vectors([self.queries])), len(Vectors(self.pools)))
        labels = {k: v for k, v in ShardSet(self.queries).labels.items() if k != "embedder"}
        where = (self.queries, self.pools, self.duplicates, self.clusters, self.centroids)
        place = storage.join(self.out, ShardSet(self.queries).source)
        return [RetrieveStep(place, "retrieved", labels, True, *where, self.k, self.rule, self.seed)]
