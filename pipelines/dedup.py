"""Stage `dedup`: near-copies of each other and of reference images, as DINOv2 drops them (section 3, appendix A.3).

1. `edges`: blocks of pool vectors against each other; pairs above the threshold, reduced to a spanning forest.
2. `components`: union-find over the forests; one representative each: largest area, then smallest image_id.
3. `cross`: blocks of representatives against each other and against the references, at the references' threshold.
4. `leaks`: components of 3 that a reference belongs to.
5. `duplicates/SOURCE`: one verdict a row.

Joins hold two blocks and their pairs; 2 and 4 hold O(n) small scalars, about 110 bytes an image. Search is exact:
time grows with the square of the images, and more than MAX_EXACT_VECTORS are refused.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation import schemas, storage
from curation.components import UnionFind, component_sizes, representatives, spanning_forest
from curation.errors import ConfigError
from curation.manifest import Input
from curation.neighbors import check_exact_size, pairs_above
from curation.shards import GROUP_ROWS, PartWriter, ShardSet
from pipelines.unit import Step, Unit, set_input
from pipelines.vectors import BLOCK_ROWS, Vectors, areas, check_same_model

Int64 = npt.NDArray[np.int64]
Edges = tuple[Int64, Int64, npt.NDArray[np.float32]]

EDGES = pa.schema([("a", pa.int64()), ("b", pa.int64()), ("similarity", pa.float32())])
COMPONENTS = pa.schema(
    [
        ("component", pa.int64()),
        ("component_size", pa.int64()),
        ("representative", pa.int64()),
        ("representative_id", pa.string()),
        ("similarity", pa.float32()),
    ]
)
LEAKS = pa.schema([("leaked", pa.bool_()), ("reference", pa.int64()), ("reference_similarity", pa.float32())])


PAIR_ROWS = 2_048
"""Rows of a block that are compared at once: were all of them copies, PAIR_ROWS * BLOCK_ROWS pairs would be held."""


def _pairs(x: npt.NDArray[np.float16], y: npt.NDArray[np.float16], threshold: float) -> Iterator[Edges]:
    """Pairs of rows of two blocks above the threshold, some rows of `x` at a time."""
    for start in range(0, len(x), PAIR_ROWS):
        i, j, similarity = pairs_above(x[start : start + PAIR_ROWS], y, threshold)
        yield i + start, j, similarity


def _edge_table(edges: Edges) -> pa.Table:
    return pa.table([pa.array(column) for column in edges], schema=EDGES)


def _reduced(pieces: Iterator[Edges]) -> Edges:
    """The spanning forest of all pieces; holds one piece and a forest."""
    held: Edges = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32)
    for i, j, s in pieces:
        a, b = np.concatenate([held[0], i]), np.concatenate([held[1], j])
        similarity = np.concatenate([held[2], s])
        forest = spanning_forest(a, b, similarity)
        held = a[forest], b[forest], similarity[forest]
    return held


def _stream_edges(uri: str) -> Iterator[Edges]:
    edges = ShardSet(uri)
    for part in range(edges.num_parts):
        for table in edges.stream(part, rows=GROUP_ROWS):
            a, b, similarity = (table[name].to_numpy() for name in EDGES.names)
            yield a, b, similarity


@dataclass
class EdgesStep(Step):
    """Part i: the forest of block i of the pools against itself and all later blocks."""

    pools: list[str]
    threshold: float

    def schema(self) -> pa.Schema:
        return EDGES

    def num_parts(self) -> int:
        return Vectors(self.pools).num_blocks

    def write_part(self, part: int, writer: PartWriter) -> None:
        writer.write(_edge_table(_reduced(self._across(part))), GROUP_ROWS)

    def _across(self, part: int) -> Iterator[Edges]:
        vectors = Vectors(self.pools)
        block = vectors.block(part)
        for other in range(part, vectors.num_blocks):
            against = block if other == part else vectors.block(other)
            for i, j, similarity in _pairs(block, against, self.threshold):
                a, b = i + part * BLOCK_ROWS, j + other * BLOCK_ROWS
                yield a[a < b], b[a < b], similarity[a < b]


@dataclass
class ComponentsStep(Step):
    """One row an image, in the pools' order: its component, its representative, its strongest edge."""

    pools: list[str]
    images: list[str]
    edges: str

    def schema(self) -> pa.Schema:
        return COMPONENTS

    def num_parts(self) -> int:
        return 1

    def write_part(self, part: int, writer: PartWriter) -> None:
        vectors = Vectors(self.pools)
        found = UnionFind(len(vectors))
        strongest = np.full(len(vectors), np.nan, np.float32)
        for a, b, similarity in _stream_edges(self.edges):
            found.union(a, b)
            np.fmax.at(strongest, a, similarity)
            np.fmax.at(strongest, b, similarity)
        labels = found.labels()
        sizes = component_sizes(labels)
        words = np.concatenate([np.zeros((0, 2), np.uint64), *self._words(vectors)])
        chosen = representatives(labels, self._areas(vectors), words)
        for start in range(0, len(vectors), GROUP_ROWS):
            rows = slice(start, start + GROUP_ROWS)
            names = [f"{high:016x}{low:016x}" for high, low in words[chosen[rows]].tolist()]
            nearest = pa.array(strongest[rows], mask=np.isnan(strongest[rows]))
            values = [labels[rows], sizes[rows], chosen[rows], names, nearest]
            writer.write(pa.table([pa.array(v) for v in values], schema=COMPONENTS))

    def _words(self, vectors: Vectors) -> Iterator[npt.NDArray[np.uint64]]:
        for block in range(vectors.num_blocks):
            yield vectors.words(block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, len(vectors)))

    def _areas(self, vectors: Vectors) -> Int64:
        images = [ShardSet(uri) for uri in self.images]
        found = [np.zeros(0, np.int64)]
        for shard_set, part in vectors.places:
            ids = shard_set.read(part, ["image_id"])["image_id"].to_pylist()
            found.append(areas(images[vectors.sets.index(shard_set)], part, ids))
        return np.concatenate(found)


@dataclass
class CrossStep(Step):
    """Part i: representatives of block i against the references (nodes after the pools'), and against each other.

    Edges to references are all there, so that each image's best one is; edges between representatives, which matter
    for the component rule alone, are reduced to a forest.
    """

    pools: list[str]
    references: list[str]
    components: str
    threshold: float
    rule: Literal["component", "direct"]

    def schema(self) -> pa.Schema:
        return EDGES

    def num_parts(self) -> int:
        return Vectors(self.pools).num_blocks if self.references else 0

    def write_part(self, part: int, writer: PartWriter) -> None:
        vectors, references = Vectors(self.pools), Vectors(self.references)
        nodes, block = self._representatives(vectors, part)
        for other in range(references.num_blocks):
            first = other * BLOCK_ROWS + len(vectors)
            for i, j, similarity in _pairs(block, references.block(other), self.threshold):
                writer.write(_edge_table((nodes[i], j + first, similarity)), GROUP_ROWS)
        if self.rule == "component":
            writer.write(_edge_table(_reduced(self._among(vectors, part, nodes, block))), GROUP_ROWS)

    def _representatives(self, vectors: Vectors, number: int) -> tuple[Int64, npt.NDArray[np.float16]]:
        """Numbers and vectors of the representatives in a block."""
        start = number * BLOCK_ROWS
        block = vectors.block(number)
        chosen = ShardSet(self.components).read_rows(0, start, start + len(block), ["representative"])
        own = np.arange(start, start + len(block))
        mine = chosen["representative"].to_numpy() == own
        return own[mine], block[mine]

    def _among(self, vectors: Vectors, part: int, nodes: Int64, block: npt.NDArray[np.float16]) -> Iterator[Edges]:
        for other in range(part, vectors.num_blocks):
            others, against = (nodes, block) if other == part else self._representatives(vectors, other)
            for i, j, similarity in _pairs(block, against, self.threshold):
                a, b = nodes[i], others[j]
                yield a[a < b], b[a < b], similarity[a < b]


@dataclass
class LeaksStep(Step):
    """One row an image, in the pools' order: whether a reference takes it along, and its best reference."""

    pools: list[str]
    references: list[str]
    cross: str
    rule: Literal["component", "direct"]

    def schema(self) -> pa.Schema:
        return LEAKS

    def num_parts(self) -> int:
        return 1

    def write_part(self, part: int, writer: PartWriter) -> None:
        num_pool, num_references = len(Vectors(self.pools)), len(Vectors(self.references)) if self.references else 0
        found = UnionFind(num_pool + num_references)
        best = np.full(num_pool, -1, np.int64)
        best_similarity = np.full(num_pool, -np.inf, np.float32)
        rank = self._reference_ranks()
        for a, b, similarity in _stream_edges(self.cross):
            found.union(a, b)
            direct = b >= num_pool
            _keep_best(best, best_similarity, a[direct], b[direct] - num_pool, similarity[direct], rank)
        leaked = best >= 0
        if self.rule == "component":
            labels = found.labels()
            touched = np.zeros(num_pool + num_references, dtype=bool)
            touched[labels[num_pool:]] = True
            leaked = touched[labels[:num_pool]]
        for start in range(0, num_pool, GROUP_ROWS):
            rows = slice(start, start + GROUP_ROWS)
            none = best[rows] < 0
            values = [
                pa.array(leaked[rows]),
                pa.array(best[rows], mask=none),
                pa.array(best_similarity[rows], mask=none),
            ]
            writer.write(pa.table(values, schema=LEAKS))

    def _reference_ranks(self) -> Int64:
        """Places of the references by image_id, which breaks ties."""
        if not self.references:
            return np.zeros(0, np.int64)
        references = Vectors(self.references)
        words = references.words(0, len(references))
        rank = np.empty(len(words), np.int64)
        rank[np.lexsort((words[:, 1], words[:, 0]))] = np.arange(len(words))
        return rank


def _keep_best(
    best: Int64,
    best_similarity: npt.NDArray[np.float32],
    nodes: Int64,
    references: Int64,
    similarity: npt.NDArray[np.float32],
    rank: Int64,
) -> None:
    """Update each node's best reference in place: highest similarity, then lowest rank."""
    order = np.lexsort((rank[references], -similarity, nodes))
    nodes, references, similarity = nodes[order], references[order], similarity[order]
    first = np.concatenate([[True], nodes[1:] != nodes[:-1]])[: len(nodes)]
    nodes, references, similarity = nodes[first], references[first], similarity[first]
    better = similarity > best_similarity[nodes]
    tied = (similarity == best_similarity[nodes]) & (rank[references] < rank[best[nodes]])
    chosen = better | tied
    best[nodes[chosen]] = references[chosen]
    best_similarity[nodes[chosen]] = similarity[chosen]


@dataclass
class VerdictsStep(Step):
    """Part k of `duplicates/SOURCE`: the verdicts on part k of the source's embeddings."""

    pools: list[str]
    number: int
    references: list[str]
    components: str
    leaks: str
    rule: Literal["component", "direct"]

    def schema(self) -> pa.Schema:
        return schemas.DUPLICATES

    def num_parts(self) -> int:
        return ShardSet(self.pools[self.number]).num_parts

    def write_part(self, part: int, writer: PartWriter) -> None:
        vectors = Vectors(self.pools)
        own = vectors.sets[self.number]
        slot = sum(s.num_parts for s in vectors.sets[: self.number]) + part
        start, stop = int(vectors.offsets[slot]), int(vectors.offsets[slot + 1])
        ids = own.read(part, ["image_id"])["image_id"]
        components = ShardSet(self.components).read_rows(0, start, stop)
        leaks = ShardSet(self.leaks).read_rows(0, start, stop)
        chosen = components["representative"].to_numpy() == np.arange(start, stop)
        leaked = leaks["leaked"].to_numpy(zero_copy_only=False)
        reasons = [
            "near_duplicate" if not own else f"reference_{self.rule}" if taken else None
            for own, taken in zip(chosen, leaked, strict=True)
        ]
        names, sources = self._references(leaks["reference"].to_pylist())
        values = {
            "image_id": ids,
            **{name: components[name] for name in ("component", "component_size", "representative_id", "similarity")},
            "kept": pa.array(chosen & ~leaked),
            "reason": pa.array(reasons, pa.string()),
            "reference": pa.array(names, pa.string()),
            "reference_source": pa.array(sources, pa.string()),
            "reference_similarity": leaks["reference_similarity"],
        }
        writer.write(
            pa.table([values[name] for name in schemas.DUPLICATES.names], schema=schemas.DUPLICATES), GROUP_ROWS
        )

    def _references(self, numbers: list[int | None]) -> tuple[list[str | None], list[str | None]]:
        """Image ids and sources of references by their numbers."""
        if not self.references:
            return [None] * len(numbers), [None] * len(numbers)
        references = Vectors(self.references)
        found: dict[int | None, tuple[str | None, str | None]] = {None: (None, None)}
        for number in sorted({n for n in numbers if n is not None}):
            slot = int(np.searchsorted(references.offsets, number, side="right")) - 1
            shard_set, part = references.places[slot]
            row = number - int(references.offsets[slot])
            name = shard_set.read_rows(part, row, row + 1, ["image_id"])["image_id"][0].as_py()
            found[number] = (name, shard_set.source)
        return [found[n][0] for n in numbers], [found[n][1] for n in numbers]


@dataclass
class DedupUnit(Unit):
    """All pools against each other and against the references: `duplicates/SOURCE` for each pool.

    Thresholds left None are those that the embedder states for itself.
    """

    pools: list[str]
    images: list[str]
    references: list[str]
    threshold: float | None
    reference_threshold: float | None
    rule: Literal["component", "direct"]
    out: str

    stage = "dedup"

    @property
    def title(self) -> str:
        return "dedup"

    def inputs(self) -> list[Input]:
        check_same_model([*self.pools, *self.references])
        embeddings = [set_input(uri, "embeddings") for uri in [*self.pools, *self.references]]
        return [*embeddings, *(set_input(uri, "images") for uri in self.images)]

    def config(self) -> dict[str, Any]:
        own, reference = self._thresholds()
        values: dict[str, Any] = {"threshold": own, "engine": "exact", "block_rows": BLOCK_ROWS}
        if self.references:
            values |= {"reference_threshold": reference, "rule": self.rule}
        return values

    def _thresholds(self) -> tuple[float, float]:
        """Given thresholds, or the embedder's. Raises ConfigError when neither is there."""
        info = ShardSet(self.pools[0]).manifest["info"]
        own = info["copy_thresholds"] or {}
        threshold = self.threshold if self.threshold is not None else own.get("self_dedup")
        reference = self.reference_threshold if self.reference_threshold is not None else own.get("reference")
        if threshold is None or (reference is None and self.references):
            raise ConfigError(
                f"{info['model']} states no copy thresholds of its own: "
                "set dedup.threshold and dedup.reference_threshold"
            )
        return float(threshold), float(reference if reference is not None else threshold)

    def steps(self) -> list[Step]:
        vectors = Vectors(self.pools)
        check_exact_size(len(vectors), len(vectors))
        threshold, reference_threshold = self._thresholds()
        edges, components, cross, leaks = (
            storage.join(self.out, f"_{n}") for n in ("edges", "components", "cross", "leaks")
        )
        steps: list[Step] = [
            EdgesStep(edges, "edges", {}, False, self.pools, threshold),
            ComponentsStep(components, "components", {}, False, self.pools, self.images, edges),
            CrossStep(
                cross, "cross", {}, False, self.pools, self.references, components, reference_threshold, self.rule
            ),
            LeaksStep(leaks, "leaks", {}, False, self.pools, self.references, cross, self.rule),
        ]
        for number, shard_set in enumerate(vectors.sets):
            place = storage.join(self.out, shard_set.source)
            labels = {key: value for key, value in shard_set.labels.items() if key != "embedder"}
            where = (self.pools, number, self.references, components, leaks, self.rule)
            steps.append(VerdictsStep(place, "duplicates", labels, True, *where))
        return steps
