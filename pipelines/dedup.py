"""Stage `dedup`: near-copies of each other and of reference images, as DINOv2 drops them (section 3, appendix A.3).

1. The pools are joined with themselves (`pipelines.engine`): edges above the threshold, reduced part by part.
2. `forest`: the maximum spanning forest of all edges; it tells the components at every higher threshold, too.
3. `components`: union-find over the forest; one representative each: largest area, then smallest image_id.
4. `recall`: what a join that is not exact has found, measured on a sample.
5. Representatives and references are joined, at the references' threshold.
6. `leaks`: components of 5 that a reference belongs to, and the best reference of each image.
7. `duplicates/SOURCE`: one verdict a row.

2, 3 and 6 hold O(n) small scalars: about 110 bytes an image, and in 2 another 80 for each image that has a near-copy.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation import schemas, storage
from curation.chaining import capped
from curation.components import UnionFind, component_sizes, representatives, spanning_forest
from curation.errors import ConfigError
from curation.forest import Edges
from curation.join import keep_best
from curation.manifest import Input
from curation.partwise import ids_of
from curation.shards import GROUP_ROWS, PartWriter, ShardSet
from pipelines.engine import Engine, Planned, plan_join, resolve
from pipelines.join import EDGES, HubsStep, Keep, SampleStep, edge_table, stream_edges
from pipelines.nodes import Nodes
from pipelines.recall import RecallStep, TruthStep
from pipelines.recipe import DedupSettings
from pipelines.semdedup import SEMDEDUP_ENGINE, plan_semdedup, semdedup_engine
from pipelines.unit import Step, Unit, set_input
from pipelines.vectors import BLOCK_ROWS, Vectors, areas, check_same_model

Int64 = npt.NDArray[np.int64]
Rule = Literal["component", "direct"]

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

SEMDEDUP_THRESHOLD = 0.97
"""SemDeDup's epsilon of 0.03: half of LAION-440M has a near-copy at it (arXiv 2303.09540)."""
REDUCE_ROWS = 1 << 22
"""Edges that are reduced at once, beside the forest so far; as many as the forest has, where those are more."""


@dataclass
class ForestStep(Step):
    """The maximum spanning forest of all edges: a < b, strongest first. SemDeDup's edges are kept as they are."""

    edges: list[str]
    is_reduced: bool

    def schema(self) -> pa.Schema:
        return EDGES

    def num_parts(self) -> int:
        return 1

    def write_part(self, part: int, writer: PartWriter) -> None:
        if not self.is_reduced:
            for edges in stream_edges(self.edges):
                writer.write(edge_table(edges), GROUP_ROWS)
            return
        held: Edges = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32)
        fresh: list[Edges] = []
        num_fresh = 0
        for edges in stream_edges(self.edges):
            fresh.append(edges)
            num_fresh += len(edges[0])
            if num_fresh >= max(REDUCE_ROWS, len(held[0])):  # so the forest is sorted again only when it has doubled
                held, fresh, num_fresh = _reduced(held, fresh), [], 0
        writer.write(edge_table(_reduced(held, fresh)), GROUP_ROWS)


def _reduced(forest: Edges, fresh: list[Edges]) -> Edges:
    """The maximum spanning forest of a forest and more edges."""
    a, b, similarity = (np.concatenate(column) for column in zip(forest, *fresh, strict=True))
    kept = spanning_forest(a, b, similarity)
    return a[kept], b[kept], similarity[kept]


@dataclass
class ComponentsStep(Step):
    """One row an image, in the pools' order: its component, its representative, its strongest edge.

    With `is_rooted` edges lead from an image that another was dropped for, to that other (SemDeDup), and the
    representative is the one that was not dropped.
    """

    pools: list[str]
    images: list[str]
    forest: str
    max_component: int | None
    is_rooted: bool

    def schema(self) -> pa.Schema:
        return COMPONENTS

    def num_parts(self) -> int:
        return 1

    def write_part(self, part: int, writer: PartWriter) -> None:
        vectors = Vectors(self.pools)
        found = UnionFind(len(vectors))
        strongest = np.full(len(vectors), np.nan, np.float32)
        is_root = np.ones(len(vectors), np.bool_)
        for a, b, similarity in self._edges(len(vectors)):
            found.union(a, b)
            np.fmax.at(strongest, a, similarity)
            np.fmax.at(strongest, b, similarity)
            is_root[b] = not self.is_rooted
        labels = found.labels()
        sizes = component_sizes(labels)
        words = np.concatenate([np.zeros((0, 2), np.uint64), *self._words(vectors)])
        chosen = representatives(labels, np.where(is_root, self._areas(vectors), -1), words)
        for start in range(0, len(vectors), GROUP_ROWS):
            rows = slice(start, start + GROUP_ROWS)
            nearest = pa.array(strongest[rows], mask=np.isnan(strongest[rows]))
            values = [*map(pa.array, (labels[rows], sizes[rows], chosen[rows])), ids_of(words[chosen[rows]]), nearest]
            writer.write(pa.table(values, schema=COMPONENTS))

    def _edges(self, num_nodes: int) -> Iterator[Edges]:
        if self.max_component is None:
            yield from stream_edges([self.forest])
            return
        pieces = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32)), *stream_edges([self.forest])]
        a, b, similarity = (np.concatenate(column) for column in zip(*pieces, strict=True))
        stays = capped(a, b, similarity, num_nodes, self.max_component)
        yield a[stays], b[stays], similarity[stays]

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
class LeaksStep(Step):
    """One row an image, in the pools' order: whether a reference takes it along, and its best reference."""

    pools: list[str]
    references: list[str]
    edges: list[str]
    rule: Rule

    def schema(self) -> pa.Schema:
        return LEAKS

    def num_parts(self) -> int:
        return 1

    def write_part(self, part: int, writer: PartWriter) -> None:
        num_pool, num_references = len(Vectors(self.pools)), len(Vectors(self.references)) if self.references else 0
        found = UnionFind(num_pool + num_references)
        best = np.full(num_pool, -1, np.int64)
        best_similarity = np.full(num_pool, -np.inf, np.float32)
        rank = Nodes(self.pools, self.references).reference_ranks() if self.references else np.zeros(0, np.int64)
        for a, b, similarity in stream_edges(self.edges):
            found.union(a, b)
            direct = (a < num_pool) & (b >= num_pool)
            keep_best(best, best_similarity, a[direct], b[direct] - num_pool, similarity[direct], rank)
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


@dataclass
class VerdictsStep(Step):
    """Part k of `duplicates/SOURCE`: the verdicts on part k of the source's embeddings."""

    pools: list[str]
    number: int
    references: list[str]
    components: str
    leaks: str
    rule: Rule

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

    Thresholds left None are those that the embedder states for itself. `forest` and `recall` are kept beside.
    """

    pools: list[str]
    images: list[str]
    references: list[str]
    settings: DedupSettings
    seed: int
    out: str
    forest: str
    recall: str

    stage = "dedup"
    version = 3

    @property
    def title(self) -> str:
        return "dedup"

    def inputs(self) -> list[Input]:
        check_same_model([*self.pools, *self.references])
        embeddings = [set_input(uri, "embeddings") for uri in [*self.pools, *self.references]]
        return [*embeddings, *(set_input(uri, "images") for uri in self.images)]

    def config(self) -> dict[str, Any]:
        own, reference = self._thresholds()
        engine = self._engine(self.pools)
        values: dict[str, Any] = {"threshold": own, "preset": self.settings.preset, "seed": self.seed}
        values |= {"engine": engine.name, engine.name: engine.values, "max_component": self.settings.max_component}
        if engine.name not in ("exact", SEMDEDUP_ENGINE):
            values["recall_sample"] = self.settings.join.recall_sample
        if self.references:
            across = self._engine([*self.pools, *self.references])
            values |= {"reference_threshold": reference, "rule": self._rule, "reference_engine": across.name}
            values |= {f"reference_{across.name}": across.values}
        return values

    @property
    def _rule(self) -> Rule:
        return self.settings.rule or ("component" if self.settings.preset == "paper" else "direct")

    def notes(self) -> list[str]:
        return self._engine(self.pools).notes()

    def _engine(self, uris: list[str]) -> Engine:
        """How the pools, or the pools and references, are joined."""
        vectors = Vectors(uris)
        if self.settings.preset == "semdedup" and uris == self.pools:
            return semdedup_engine(self.settings.join, len(vectors))
        return resolve(self.settings.join, len(vectors), vectors.dim)

    def _thresholds(self) -> tuple[float, float]:
        """Given thresholds, or the embedder's. Raises ConfigError when neither is there."""
        info = ShardSet(self.pools[0]).manifest["info"]
        stated = info["copy_thresholds"] or {}
        own, reference = stated.get("self_dedup"), stated.get("reference")
        if self.settings.preset == "precise":
            own = reference = stated.get("precise")
        elif self.settings.preset == "semdedup":
            own = SEMDEDUP_THRESHOLD
        own = self.settings.threshold if self.settings.threshold is not None else own
        reference = self.settings.reference_threshold if self.settings.reference_threshold is not None else reference
        if own is None or (reference is None and self.references):
            raise ConfigError(
                f"{info['model']} states no copy thresholds of its own for preset {self.settings.preset}: "
                "set dedup.threshold and dedup.reference_threshold"
            )
        return float(own), float(reference if reference is not None else own)

    def steps(self) -> list[Step]:
        threshold, _ = self._thresholds()
        pools, engine = Nodes(self.pools, []), self._engine(self.pools)
        is_semdedup = engine.name == SEMDEDUP_ENGINE
        plan = plan_semdedup if is_semdedup else plan_join
        found = plan(engine, pools, threshold, "forest", self.seed, self.out, "")
        forest = ForestStep(self.forest, "forest", self._labels(self.pools[0]), True, found.edges, not is_semdedup)
        components = ComponentsStep(
            *self._at("components"), self.pools, self.images, forest.out, self.settings.max_component, is_semdedup
        )
        steps = [*found.steps, forest, components]
        if engine.name in ("partitioned", "faiss"):
            steps += self._audit(engine, pools, threshold, found, components.out)
        return [*steps, *self._across(components.out)]

    def _at(self, name: str) -> tuple[str, str, dict[str, Any], bool]:
        return storage.join(self.out, f"_{name}"), name.replace("_", " "), {}, False

    def _labels(self, uri: str) -> dict[str, Any]:
        return {"embedder": ShardSet(uri).labels["embedder"]}

    def _audit(self, engine: Engine, pools: Nodes, threshold: float, found: Planned, components: str) -> list[Step]:
        join = self.settings.join
        sample = SampleStep(*self._at("recall_sample"), pools, join.recall_sample, self.seed, "recall")
        hubs = next((step.out for step in found.steps if isinstance(step, HubsStep)), None)
        truth = TruthStep(*self._at("recall_truth"), self.pools, sample.out, threshold, self.seed, hubs)
        recall = RecallStep(
            self.recall,
            "recall",
            self._labels(self.pools[0]),
            True,
            sample.out,
            truth.out,
            components,
            join.min_recall,
            self.seed,
            found.lists,
            engine.values.get("quantizers", 0),
            engine.values.get("lists_joined", 0),
        )
        return [sample, truth, recall]

    def _across(self, components: str) -> list[Step]:
        """The relative step, and the verdicts."""
        edges, steps = [], []
        if self.references:
            keep: Keep = "both" if self._rule == "component" else "best"
            nodes = Nodes(self.pools, self.references, components)
            engine = self._engine([*self.pools, *self.references])
            found = plan_join(engine, nodes, self._thresholds()[1], keep, self.seed, self.out, "reference_")
            edges, steps = found.edges, found.steps
        leaks = LeaksStep(*self._at("leaks"), self.pools, self.references, edges, self._rule)
        steps = [*steps, leaks]
        for number, shard_set in enumerate(Vectors(self.pools).sets):
            place = storage.join(self.out, shard_set.source)
            labels = {key: value for key, value in shard_set.labels.items() if key != "embedder"}
            where = (self.pools, number, self.references, components, leaks.out, self._rule)
            steps.append(VerdictsStep(place, "duplicates", labels, True, *where))
        return steps
