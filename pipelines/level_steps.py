"""Steps that refit the clusters of images on those nearest to their centroids, and that stack levels above them.

A refit is a map over groups of parts and a reduce: each group gives the images nearest to each centroid, and one task
takes the nearest of all, reads their vectors and fits afresh. A group holds one part and about twice the images that
it gives, 16 bytes each; the reduce 2 d + 32 bytes an image taken, and what a fit holds. Time is that of an assignment
of all images, and of a fit. The levels above the first are one task, which holds all centroids and a fit on them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation import schemas
from curation.clustering import assign
from curation.hierarchy import Closest, closest_points, reduce_closest, stack_levels
from curation.shards import GROUP_ROWS, PartWriter, ShardSet
from pipelines.cluster_rounds import GROUPS, Kept
from pipelines.executor import Needs
from pipelines.levels import centroid_table, centroids_of, kmeans_of, levels_of
from pipelines.recipe import ClusterSettings
from pipelines.unit import Step
from pipelines.vectors import Vectors, kept_part

CLOSEST = pa.schema(
    [pa.field("cluster", pa.int32()), pa.field("key", pa.uint32()), pa.field("row", pa.int64())],
)
"""Images nearest to their centroids; `row` counts the kept images of a part from its first embedding on."""


@dataclass
class _LevelStep(Step):
    """A step on the way to the centroids of all levels."""

    kept: Kept
    settings: ClusterSettings
    centroids: str

    @property
    def needs(self) -> Needs:
        return Needs(cpus=self.settings.threads)

    def schema(self) -> pa.Schema:
        return schemas.centroids(self.kept.dim)

    def num_parts(self) -> int:
        return 1

    @property
    def nearest(self) -> int:
        """Images of each cluster that a refit takes."""
        return levels_of(self.settings, self.kept.count())[0].nearest


@dataclass
class ClosestStep(_LevelStep):
    """Part g: of group g, a range of parts, the images nearest to each centroid."""

    def schema(self) -> pa.Schema:
        return CLOSEST

    def num_parts(self) -> int:
        return max(1, min(GROUPS, len(self.kept.places())))

    def write_part(self, part: int, writer: PartWriter) -> None:
        centroids = centroids_of(ShardSet(self.centroids))
        places = np.array_split(np.arange(len(self.kept.places())), self.num_parts())[part]  # in the order of rows
        found = reduce_closest(self._closest(places, centroids), self.nearest, len(centroids))
        columns = [pa.array(found.cluster), pa.array(found.keys), pa.array(found.row)]
        writer.write(pa.table(columns, schema=CLOSEST), GROUP_ROWS)

    def _closest(self, places: npt.NDArray[np.int64], centroids: npt.NDArray[np.float32]) -> Iterator[Closest]:
        nearest, begins = self.nearest, Vectors(self.kept.pools).offsets
        yield Closest(np.zeros(0, np.int32), np.zeros(0, np.uint32), np.zeros(0, np.int64))
        for place in places:
            _, vectors = kept_part(*self.kept.places()[place])
            cluster, distance = assign(vectors, centroids)
            yield closest_points(cluster, distance, nearest, len(centroids), int(begins[place]))


@dataclass
class RefitStep(_LevelStep):
    """The centroids of level 1, fitted to the images nearest to those before.

    Attributes:
        closest: what `ClosestStep` found.
        turn: number of this fit; the first, on the sample, is 0.
    """

    closest: str
    turn: int

    def write_part(self, part: int, writer: PartWriter) -> None:
        centroids = centroids_of(ShardSet(self.centroids))
        rows = reduce_closest(self._found(), self.nearest, len(centroids)).row
        if len(rows) > len(centroids):  # else there is nothing to fit to, as in `hierarchy.fit_level`
            kmeans = kmeans_of(self.settings, self.kept.seed)
            centroids = kmeans.centroids(self._vectors(rows), len(centroids), 1, self.turn)
        writer.write(centroid_table(centroids), GROUP_ROWS)

    def frees(self) -> list[str]:
        return [self.closest]

    def _found(self) -> Iterator[Closest]:
        shard_set = ShardSet(self.closest)
        for part in range(shard_set.num_parts):
            table = shard_set.read(part)
            yield Closest(*(table[name].to_numpy() for name in ("cluster", "key", "row")))

    def _vectors(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float16]:
        """The vectors of images by their rows, ascending, float16 [n, d]."""
        begins = Vectors(self.kept.pools).offsets
        found = np.empty((len(rows), self.kept.dim), np.float16)
        ends = np.searchsorted(rows, begins)
        for place, where in enumerate(self.kept.places()):
            mine = slice(ends[place], ends[place + 1])
            if mine.stop > mine.start:
                found[mine] = kept_part(*where)[1][rows[mine] - begins[place]]
        return found


@dataclass
class StackStep(_LevelStep):
    """The centroids of level 1, and of the levels above them."""

    def write_part(self, part: int, writer: PartWriter) -> None:
        above = levels_of(self.settings, self.kept.count())[1:]
        kmeans = kmeans_of(self.settings, self.kept.seed)
        found = stack_levels(centroids_of(ShardSet(self.centroids)), above, kmeans)
        parents = [*found.tree.parents, None]
        for level, (centroids, parent) in enumerate(zip(found.centroids, parents, strict=True), 1):
            writer.write(centroid_table(centroids, level, parent), GROUP_ROWS)
