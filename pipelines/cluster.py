"""Stage `cluster`: spherical k-means over the semantic vectors of what dedup kept; fitted on a sample, assigned to all.

With levels the centroids are clustered in turn (`pipelines.level_steps`), and an image lies in a cluster of each level.

One task fits a sample of up to `memory_rows` images in memory: it holds 4 d bytes an image, 20 d k bytes, and 16 bytes
an image of the pools for the draw. A larger sample is streamed: centroids fitted on `memory_rows` of its images, then
rounds over all of it (`pipelines.cluster_rounds`), whose tasks hold one part and 24 d k bytes. Assignment holds one
part and the centroids with their codes. Time grows with images times clusters.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation import schemas, storage
from curation.clustering import assign
from curation.manifest import Input
from curation.shards import GROUP_ROWS, PartWriter, ShardSet
from pipelines.cluster_rounds import BoundStep, Kept, RoundStep, SampleStep, SumsStep
from pipelines.executor import Needs
from pipelines.level_steps import ClosestStep, RefitStep, StackStep
from pipelines.levels import centroid_table, centroids_of, kmeans_of, levels_of, num_levels, read_tree
from pipelines.recipe import ClusterSettings
from pipelines.unit import Step, Unit, set_input
from pipelines.vectors import check_same_model, kept_part

STREAMED_ROUNDS = 5
"""Rounds over a sample that is streamed, at most: they start from what part of it has been fitted to."""


def read_centroids(uri: str) -> npt.NDArray[np.float32]:
    """Centroids of level 1, float32 [k, d]."""
    return centroids_of(ShardSet(uri).require("centroids"))


@dataclass
class CentroidsStep(Step):
    """The centroids, fitted in memory on the `sample` images of lowest keyed hash."""

    pool: Kept
    settings: ClusterSettings
    sample: int

    @property
    def needs(self) -> Needs:
        return Needs(cpus=self.settings.threads)

    def schema(self) -> pa.Schema:
        return schemas.centroids(self.pool.dim)

    def num_parts(self) -> int:
        return 1

    def write_part(self, part: int, writer: PartWriter) -> None:
        drawn = self.pool.vectors(self.pool.places(), self.pool.bound(self.sample))
        sample = np.concatenate([np.zeros((0, self.pool.dim), np.float16), *drawn])
        level = levels_of(self.settings, self.pool.count())[0]
        kmeans = kmeans_of(self.settings, self.pool.seed)
        centroids = kmeans.fit(
            sample, level.num_clusters, iterations=kmeans.iterations, seed=kmeans.seed, threads=kmeans.threads
        )
        writer.write(centroid_table(centroids), GROUP_ROWS)


@dataclass
class AssignStep(Step):
    """Part k of `clusters/SOURCE`: the nearest centroid of each kept image of part k, and what that lies in."""

    embeddings: str
    duplicates: str
    centroids: str
    levels: int

    def schema(self) -> pa.Schema:
        return schemas.clusters(self.levels)

    def num_parts(self) -> int:
        return ShardSet(self.embeddings).num_parts

    def write_part(self, part: int, writer: PartWriter) -> None:
        ids, vectors = kept_part(ShardSet(self.embeddings), ShardSet(self.duplicates), part)
        cluster, distance = assign(vectors, read_centroids(self.centroids))
        path = read_tree(ShardSet(self.centroids)).path(cluster)
        columns = [pa.array(ids, pa.string()), *map(pa.array, path), pa.array(distance)]
        writer.write(pa.table(columns, schema=self.schema()), GROUP_ROWS)


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
    version = 2

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
        steps, levels = self._fit(), num_levels(self.settings)
        for embeddings, duplicates in zip(self.pools, self.duplicates, strict=True):
            labels = ShardSet(duplicates).labels
            place = storage.join(self.out, ShardSet(embeddings).source)
            steps.append(
                AssignStep(place, "clusters", labels, True, embeddings, duplicates, self.centroids_out, levels)
            )
        return steps

    def _fit(self) -> list[Step]:
        """The steps up to the centroids, of which the last is what is kept."""
        settings, kept = self.settings, Kept(self.pools, self.duplicates, self.seed)
        steps = self._fit_images(kept)
        for turn in range(1, settings.finest_fits):
            before = steps[-1].out
            closest = ClosestStep(*self._at(f"closest_{turn}"), kept, settings, before)
            refit = RefitStep(*self._at(f"refit_{turn}"), kept, settings, before, closest.out, turn)
            steps += [closest, refit]
        if num_levels(settings) > 1:
            steps.append(StackStep(*self._at("stack"), kept, settings, steps[-1].out))
        labels = {"embedder": ShardSet(self.pools[0]).labels["embedder"]}
        last = replace(steps[-1], out=self.centroids_out, kind="centroids", labels=labels, keep=True)
        return [*steps[:-1], last]

    def _fit_images(self, kept: Kept) -> list[Step]:
        """The steps up to centroids fitted on the sample."""
        settings = self.settings
        num_sampled = min(settings.sample, sum(ShardSet(uri).num_rows for uri in self.pools))
        rounds = min(settings.iterations, STREAMED_ROUNDS)
        if num_sampled <= settings.memory_rows or rounds == 0:
            return [CentroidsStep(*self._at("start"), kept, settings, num_sampled)]
        bound = BoundStep(*self._at("bound"), kept, num_sampled)
        sample = SampleStep(*self._at("sample"), kept, bound.out)
        steps = [bound, sample, CentroidsStep(*self._at("start"), kept, settings, settings.memory_rows)]
        for turn in range(rounds):
            sums = SumsStep(*self._at(f"sums_{turn}"), sample.out, kept.dim, steps[-1].out)
            where, last = self._at(f"round_{turn}"), sample.out if turn == rounds - 1 else None
            steps += [sums, RoundStep(*where, sums.out, steps[-1].out, kept.dim, self.seed, turn, last)]
        return steps

    def _at(self, name: str) -> tuple[str, str, dict[str, Any], bool]:
        return storage.join(self.out, f"_{name}"), name.replace("_", " "), {}, False
