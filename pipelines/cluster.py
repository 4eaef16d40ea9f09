"""Stage `cluster`: spherical k-means over the semantic vectors of what dedup kept; fitted on a sample, assigned to all.

Fitting holds the sample (4 d bytes a vector) and 16 bytes an image for the draw; assignment holds one part and the
centroids. Time of assignment grows with images times clusters.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation import schemas, storage
from curation.clustering import assign, fit_kmeans
from curation.hashing import id_words, keyed_hash
from curation.manifest import Input
from curation.partwise import fixed_size_lists, kept_ids, matrix
from curation.shards import GROUP_ROWS, PartWriter, ShardSet
from pipelines.recipe import ClusterSettings
from pipelines.unit import Step, Unit, set_input
from pipelines.vectors import Vectors, check_same_model, kept_part


def read_centroids(uri: str) -> npt.NDArray[np.float32]:
    """Centroids of level 1, float32 [k, d]."""
    return matrix(ShardSet(uri).require("centroids").read(0), "centroid")


@dataclass
class CentroidsStep(Step):
    """The centroids, fitted on the images of lowest keyed hash."""

    pools: list[str]
    duplicates: list[str]
    settings: ClusterSettings
    seed: int

    def schema(self) -> pa.Schema:
        return schemas.centroids(Vectors(self.pools).dim)

    def num_parts(self) -> int:
        return 1

    def write_part(self, part: int, writer: PartWriter) -> None:
        draws = np.concatenate([np.zeros(0, np.uint64), *self._draws()])
        limit = (
            np.partition(draws, self.settings.sample - 1)[self.settings.sample - 1]
            if len(draws) > self.settings.sample
            else None
        )
        sample = np.concatenate([np.zeros((0, Vectors(self.pools).dim), np.float16), *self._sampled(limit)])
        settings = self.settings
        centroids = fit_kmeans(
            sample, settings.num_clusters, iterations=settings.iterations, seed=self.seed, threads=settings.threads
        )
        numbers = np.arange(len(centroids), dtype=np.int32)
        columns = [pa.array(np.ones_like(numbers)), pa.array(numbers)]
        columns.append(fixed_size_lists(centroids, self.schema().field("centroid").type))
        writer.write(pa.table(columns, schema=self.schema()), GROUP_ROWS)

    def _draws(self) -> Iterator[npt.NDArray[np.uint64]]:
        for uri in self.duplicates:
            for part in range(ShardSet(uri).num_parts):
                ids = kept_ids(ShardSet(uri).read(part, ["image_id", "kept"]))
                yield keyed_hash(self.seed, "cluster", id_words(ids))

    def _sampled(self, limit: np.uint64 | None) -> Iterator[npt.NDArray[np.float16]]:
        for embeddings, duplicates in zip(self.pools, self.duplicates, strict=True):
            for part in range(ShardSet(embeddings).num_parts):
                ids, vectors = kept_part(ShardSet(embeddings), ShardSet(duplicates), part)
                draws = keyed_hash(self.seed, "cluster", id_words(ids))
                yield vectors if limit is None else vectors[draws <= limit]


@dataclass
class AssignStep(Step):
    """Part k of `clusters/SOURCE`: the nearest centroid of each kept image of part k."""

    embeddings: str
    duplicates: str
    centroids: str

    def schema(self) -> pa.Schema:
        return schemas.CLUSTERS

    def num_parts(self) -> int:
        return ShardSet(self.embeddings).num_parts

    def write_part(self, part: int, writer: PartWriter) -> None:
        ids, vectors = kept_part(ShardSet(self.embeddings), ShardSet(self.duplicates), part)
        cluster, distance = assign(vectors, read_centroids(self.centroids))
        columns = [pa.array(ids, pa.string()), pa.array(cluster), pa.array(distance)]
        writer.write(pa.table(columns, schema=schemas.CLUSTERS), GROUP_ROWS)


@dataclass
class ClusterUnit(Unit):
    """All pools together: `centroids`, and `clusters/SOURCE` for each pool."""

    pools: list[str]
    duplicates: list[str]
    settings: ClusterSettings
    seed: int
    centroids_out: str
    out: str

    stage = "cluster"

    @property
    def title(self) -> str:
        return "cluster"

    def inputs(self) -> list[Input]:
        check_same_model(self.pools)
        embeddings = [set_input(uri, "embeddings") for uri in self.pools]
        return [*embeddings, *(set_input(uri, "duplicates") for uri in self.duplicates)]

    def config(self) -> dict[str, Any]:
        return {"cluster": self.settings.model_dump(exclude={"embedder"}), "seed": self.seed}

    def steps(self) -> list[Step]:
        embedder = {"embedder": ShardSet(self.pools[0]).labels["embedder"]}
        fit = CentroidsStep(
            self.centroids_out, "centroids", embedder, True, self.pools, self.duplicates, self.settings, self.seed
        )
        steps: list[Step] = [fit]
        for embeddings, duplicates in zip(self.pools, self.duplicates, strict=True):
            labels = ShardSet(duplicates).labels
            place = storage.join(self.out, ShardSet(embeddings).source)
            steps.append(AssignStep(place, "clusters", labels, True, embeddings, duplicates, self.centroids_out))
        return steps
