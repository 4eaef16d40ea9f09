"""Stage `retrieve`: what of the pools resembles one query set (DINOv2, section 3 and appendix A.4).

Sample-based: the k nearest kept pool images of each query image (`pipelines.near`, `pipelines.near_lists`).
Cluster-based: images of the clusters in which at least `min_hits` query images fall (`pipelines.retrieve_clusters`).
Here both become one set. A part holds what was found for one part of the queries, or a group of rows of the clusters'.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation import schemas, storage
from curation.errors import ConfigError
from curation.manifest import Input
from curation.partwise import ids_of
from curation.shards import GROUP_ROWS, PartWriter, ShardSet
from pipelines.engine import Engine
from pipelines.near import KeptNodes, merged
from pipelines.recipe import RetrieveSettings
from pipelines.retrieve_clusters import ClusterRule, cluster_columns, retrieved_members
from pipelines.retrieve_engine import Search, resolve
from pipelines.unit import Step, Unit, set_input
from pipelines.vectors import Vectors, check_made_from, check_same_model

Int64 = npt.NDArray[np.int64]


@dataclass
class RetrieveStep(Step):
    """`retrieved/QUERY`: with `k`, one part for each part of the queries, from `near`; with `rule`, one part more."""

    queries: str
    pools: list[str]
    clusters: list[str]
    centroids: str
    near: str
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
        """Queries in order, their neighbors best first."""
        queries, pools = ShardSet(self.queries), Vectors(self.pools)
        table = merged(self.near, part, self.k or 0)
        row = table["query"].to_numpy() - queries.offsets[part]
        slots = np.searchsorted(pools.offsets, table["number"].to_numpy(), side="right") - 1
        values = {
            "query_image_id": queries.read(part, ["image_id"])["image_id"].take(pa.array(row)),
            "image_id": ids_of(np.stack([table["high"], table["low"]], axis=1)),
            "mode": pa.array(["sample"] * len(row)),
            "rank": pa.array(1 + np.arange(len(row)) - np.searchsorted(row, row), pa.int32()),
            "similarity": table["similarity"],
        }
        writer.write(self._retrieved(slots, values), GROUP_ROWS)

    def _write_clusters(self, rule: ClusterRule, writer: PartWriter) -> None:
        members = retrieved_members(self.queries, self.clusters, self.centroids, rule, self.seed)
        for slots, values in cluster_columns(members):
            writer.write(self._retrieved(slots, {**values, "mode": pa.array(["cluster"] * len(slots))}))

    def _retrieved(self, slots: Int64, values: dict[str, Any]) -> pa.Table:
        """A table of retrieved images in parts `slots` of the pools; columns that do not apply are null."""
        places = Vectors(self.pools).places
        sources = pa.array([shard_set.source for shard_set, _ in places], pa.string())
        parts = pa.array([part for _, part in places], pa.int32())
        at = pa.array(slots)
        values |= {"source": sources.take(at), "part": parts.take(at)}
        columns = [values.get(f.name, pa.nulls(len(slots), f.type)) for f in schemas.RETRIEVED]
        return pa.table(columns, schema=schemas.RETRIEVED)


@dataclass
class RetrieveUnit(Unit):
    """One query set against all pools: `retrieved/QUERY`. `clusters` and `centroids` serve the cluster mode alone.

    Where the search is not exact, its measured recall is kept as `retrieved/_recall_QUERY`.
    """

    queries: str
    pools: list[str]
    duplicates: list[str]
    clusters: list[str]
    centroids: str
    k: int | None
    rule: ClusterRule | None
    seed: int
    out: str
    settings: RetrieveSettings = field(default_factory=RetrieveSettings)

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
        values: dict[str, Any] = {}
        if self.k:
            engine = self._engine()
            values |= {"k": self.k, "engine": engine.name}
            if engine.name != "exact":
                values |= {engine.name: engine.values, "seed": self.seed}
        if self.rule:
            values |= {"cluster": vars(self.rule), "seed": self.seed}
        return values

    def notes(self) -> list[str]:
        return self._engine().notes() if self.k else []

    def _engine(self) -> Engine:
        pool = Vectors(self.pools)
        return resolve(self.settings, len(Vectors([self.queries])), len(pool), pool.dim)

    def steps(self) -> list[Step]:
        source = ShardSet(self.queries).source
        labels = {key: value for key, value in ShardSet(self.queries).labels.items() if key != "embedder"}
        steps: list[Step] = []
        near = ""
        if self.k:
            engine, pool = self._engine(), KeptNodes(self.pools, [], duplicates=self.duplicates)
            search = Search(self.queries, pool, self.k, self.seed, self.out, f"{source}_")
            steps, near = search.plan(engine)
            if engine.name != "exact":
                recall = recall_uri(self.out, source)
                steps += search.audit(engine, near, recall, labels, self.settings.min_recall)
        where = (self.queries, self.pools, self.clusters, self.centroids, near)
        place = storage.join(self.out, source)
        return [*steps, RetrieveStep(place, "retrieved", labels, True, *where, self.k, self.rule, self.seed)]


def recall_uri(out: str, source: str) -> str:
    """Where the recall of a query set's search is kept, beside what was retrieved."""
    return storage.join(out, f"_recall_{source}")
