"""Rounds of k-means over a sample that does not fit in memory, as steps: sums of groups of parts, then new centroids.

The sample is written once, 2 d bytes a vector, and deleted when its last round is complete. A round reads it once, part
by part. Its sums are exact, so neither the parts nor the groups change the centroids. Each group writes 8 d k bytes,
which are deleted when its round is complete.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from curation import schemas
from curation.distances import Points, Space, encode_points
from curation.hashing import id_words, keyed_hash
from curation.kmeans_rounds import Partial, combine, partial_sums, update
from curation.partwise import fixed_size_lists, kept_ids, matrix
from curation.shards import GROUP_ROWS, PartWriter, ShardSet
from pipelines.levels import centroid_table, centroids_of
from pipelines.unit import Step
from pipelines.vectors import Vectors, kept_part

GROUPS = 16
"""Groups of parts, at most: so many workers share a round, and so many sums are added up."""

BOUND = pa.schema([pa.field("draw", pa.uint64())])
"""The highest keyed hash of a sampled image; null where all are sampled."""

Place = tuple[ShardSet, ShardSet, int]


@dataclass(frozen=True)
class Kept:
    """What dedup kept of all pools, from which the images of lowest keyed hash are the sample."""

    pools: list[str]
    duplicates: list[str]
    seed: int

    @property
    def dim(self) -> int:
        return Vectors(self.pools).dim

    def places(self) -> list[Place]:
        """Every part: its embeddings, its verdicts, its number."""
        sets = zip(map(ShardSet, self.pools), map(ShardSet, self.duplicates), strict=True)
        return [(embeddings, verdicts, part) for embeddings, verdicts in sets for part in range(embeddings.num_parts)]

    def count(self) -> int:
        """How many these are, those that the model could not embed included."""
        return sum(pc.sum(verdicts.read(part, ["kept"])["kept"]).as_py() or 0 for _, verdicts, part in self.places())

    def bound(self, count: int) -> int | None:
        """The draw of the `count`-th image, None where there are no more. Holds 16 bytes an image."""
        ids = (kept_ids(verdicts.read(part, ["image_id", "kept"])) for _, verdicts, part in self.places())
        draws = np.concatenate([np.zeros(0, np.uint64), *map(self._draws, ids)])
        return int(np.partition(draws, count - 1)[count - 1]) if len(draws) > count else None

    def vectors(self, places: list[Place], bound: int | None) -> Iterator[npt.NDArray[np.float16]]:
        """The vectors of the sample in some parts, a part at a time."""
        for embeddings, verdicts, part in places:
            ids, vectors = kept_part(embeddings, verdicts, part)
            yield vectors if bound is None else vectors[self._draws(ids) <= np.uint64(bound)]

    def _draws(self, ids: list[str]) -> npt.NDArray[np.uint64]:
        return keyed_hash(self.seed, "cluster", id_words(ids))


@dataclass
class BoundStep(Step):
    """The highest draw of the sample."""

    kept: Kept
    sample: int

    def schema(self) -> pa.Schema:
        return BOUND

    def num_parts(self) -> int:
        return 1

    def write_part(self, part: int, writer: PartWriter) -> None:
        writer.write(pa.table([pa.array([self.kept.bound(self.sample)], pa.uint64())], schema=BOUND), GROUP_ROWS)


@dataclass
class SampleStep(Step):
    """Part k: the sampled vectors of the k-th part of all pools. Holds one part."""

    kept: Kept
    bound: str

    def schema(self) -> pa.Schema:
        return pa.schema([pa.field("vector", pa.list_(pa.float16(), self.kept.dim))])

    def num_parts(self) -> int:
        return len(self.kept.places())

    def write_part(self, part: int, writer: PartWriter) -> None:
        bound = ShardSet(self.bound).read(0)["draw"][0].as_py()
        (vectors,) = self.kept.vectors(self.kept.places()[part : part + 1], bound)
        writer.write(
            pa.table([fixed_size_lists(vectors, self.schema().field(0).type)], schema=self.schema()), GROUP_ROWS
        )

    def frees(self) -> list[str]:
        return [self.bound]


@dataclass
class SumsStep(Step):
    """Part g: what group g of the sample's parts contributes to a round. Holds 8 d k bytes and one part."""

    sample: str
    dim: int
    centroids: str

    def schema(self) -> pa.Schema:
        fields = {"count": pa.int64(), "square": pa.float64(), "sum": pa.list_(pa.float64(), self.dim)}
        return pa.schema([pa.field(name, kind) for name, kind in fields.items()])

    def num_parts(self) -> int:
        return max(1, min(GROUPS, ShardSet(self.sample).num_parts))

    def write_part(self, part: int, writer: PartWriter) -> None:
        found = partial_sums(self._blocks(part), centroids_of(ShardSet(self.centroids)), Space())
        columns = [pa.array(found.counts), pa.array(found.squares)]
        columns.append(fixed_size_lists(found.sums, self.schema().field("sum").type))
        writer.write(pa.table(columns, schema=self.schema()), GROUP_ROWS)

    def _blocks(self, group: int) -> Iterator[Points]:
        """The vectors of a group, a part at a time."""
        sample = ShardSet(self.sample)
        for part in range(group, sample.num_parts, self.num_parts()):
            yield encode_points(matrix(sample.read(part), "vector"), Space())


@dataclass
class RoundStep(Step):
    """The centroids after a round. Holds the sums of three groups, 24 d k bytes, while it adds them up.

    `sample` is the streamed sample, where this is the last round over it.
    """

    sums: str
    centroids: str
    dim: int
    seed: int
    turn: int
    sample: str | None = None

    def schema(self) -> pa.Schema:
        return schemas.centroids(self.dim)

    def num_parts(self) -> int:
        return 1

    def write_part(self, part: int, writer: PartWriter) -> None:
        total = combine(_read_sums(ShardSet(self.sums)))
        moved = update(centroids_of(ShardSet(self.centroids)), total, Space(), seed=self.seed, turn=self.turn)
        writer.write(centroid_table(moved), GROUP_ROWS)

    def frees(self) -> list[str]:
        return [self.sums, *([self.sample] if self.sample else [])]


def _read_sums(sums: ShardSet) -> Iterator[Partial]:
    for part in range(sums.num_parts):
        table = sums.read(part)
        yield Partial(matrix(table, "sum"), table["count"].to_numpy(), table["square"].to_numpy())
