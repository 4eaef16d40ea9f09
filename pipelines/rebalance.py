"""Stage `rebalance`: the selection, one row for each image of the final set, with every reason it is there for.

1. `shares`: for parts balanced over clusters, how often each pool image is taken. Holds about 90 bytes an image.
2. `nominations`: what each part of the recipe asks for, scattered by id prefix.
3. `merged`: images of one range of ids made unique, sorted by where their bytes lie. Holds BUCKET_ROWS nominations.
4. `selection`: part k holds the selected images of part k of all sources' images, numbered through, in their order.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation import schemas, storage
from curation.errors import ConfigError
from curation.hashing import bucket_of, id_words, keyed_hash
from curation.manifest import Input
from curation.partwise import ids_of, kept_ids, words_of
from curation.sampling import draw_copies, equal_shares
from curation.shards import GROUP_ROWS, PartWriter, ShardSet
from pipelines.recipe import PartSettings
from pipelines.unit import Step, Unit, set_input

BUCKET_ROWS = 500_000

NOMINATIONS = pa.schema(
    [
        schemas.ID,
        pa.field("slot", pa.int64(), nullable=False),
        pa.field("copies", pa.int32(), nullable=False),
        pa.field("recipe_part", pa.int32(), nullable=False),
        pa.field("rank", pa.int32()),
        pa.field("similarity", pa.float32()),
    ]
)
MERGED = pa.schema([schemas.ID, pa.field("slot", pa.int64()), *list(schemas.SELECTION)[2:]])


@dataclass(frozen=True)
class Slots:
    """Parts of several sources' sets, numbered through; a slot is one such number."""

    uris: tuple[str, ...]

    @cached_property
    def sets(self) -> list[ShardSet]:
        return [ShardSet(uri) for uri in self.uris]

    @cached_property
    def begins(self) -> dict[str, int]:
        """The first slot of each source."""
        found, begin = {}, 0
        for shard_set in self.sets:
            found[shard_set.source] = begin
            begin += shard_set.num_parts
        return found

    def __len__(self) -> int:
        return sum(shard_set.num_parts for shard_set in self.sets)

    def at(self, slot: int) -> tuple[ShardSet, int]:
        """The set and the part that a slot is."""
        for shard_set in self.sets:
            if slot < shard_set.num_parts:
                return shard_set, slot
            slot -= shard_set.num_parts
        raise IndexError(slot)


@dataclass
class SharesStep(Step):
    """Part i: the nominations of the i-th balanced part of the recipe."""

    clusters: list[str]
    parts: list[tuple[int, PartSettings]]
    slots: Slots
    seed: int

    def schema(self) -> pa.Schema:
        return NOMINATIONS

    def num_parts(self) -> int:
        return len(self.parts)

    def write_part(self, part: int, writer: PartWriter) -> None:
        number, settings = self.parts[part]
        cluster, words, slots = self._rows()
        sizes = np.bincount(cluster)
        shares = equal_shares(sizes, settings.target or 0, settings.max_copies, self._order(len(sizes), number))
        draw = keyed_hash(self.seed, f"balance {number}", words)
        copies = draw_copies(cluster, shares, draw, words)
        taken = np.flatnonzero(copies)
        for start in range(0, len(taken), GROUP_ROWS):
            rows = taken[start : start + GROUP_ROWS]
            writer.write(nominations(ids_of(words[rows]), slots[rows], number, copies[rows]))

    def _order(self, num_clusters: int, number: int) -> npt.NDArray[np.uint64]:
        """Draws that say which clusters give one image more when shares do not come out even."""
        numbers = np.zeros((num_clusters, 2), np.uint64)
        numbers[:, 1] = np.arange(num_clusters)
        return keyed_hash(self.seed, f"balance clusters {number}", numbers)

    def _rows(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
        cluster, words = [np.zeros(0, np.int32)], [np.zeros((0, 2), np.uint64)]
        slots = [np.zeros(0, np.int64)]
        for uri in self.clusters:
            shard_set = ShardSet(uri)
            for part in range(shard_set.num_parts):
                table = shard_set.read(part, ["image_id", "cluster_1"])
                cluster.append(table["cluster_1"].to_numpy())
                words.append(words_of(table["image_id"]))
                slots.append(np.full(table.num_rows, self.slots.begins[shard_set.source] + part))
        return np.concatenate(cluster), np.concatenate(words), np.concatenate(slots)


def nominations(
    ids: list[str] | pa.StringArray,
    slots: npt.NDArray[np.int64],
    number: int,
    copies: npt.NDArray[np.int32] | None = None,
    table: pa.Table | None = None,
) -> pa.Table:
    """Nominations by part `number` of the recipe; rank and similarity from the table of what was retrieved, if any."""
    count = len(ids)
    columns = [
        pa.array(ids, pa.string()),
        pa.array(slots, pa.int64()),
        pa.array(np.ones(count, np.int32) if copies is None else copies, pa.int32()),
        pa.array(np.full(count, number, np.int32)),
        table["rank"] if table is not None else pa.nulls(count, pa.int32()),
        table["similarity"] if table is not None else pa.nulls(count, pa.float32()),
    ]
    return pa.table(columns, schema=NOMINATIONS)


@dataclass(frozen=True)
class Asked:
    """One set that nominates: what a part of the recipe refers to."""

    recipe_part: int
    kind: str
    uri: str
    mode: str | None = None


@dataclass
class NominationsStep(Step):
    """One part for each part of every set that nominates, scattered by id prefix."""

    asked: list[Asked]
    slots: Slots
    buckets: int

    def schema(self) -> pa.Schema:
        return NOMINATIONS

    def num_parts(self) -> int:
        return sum(ShardSet(asked.uri).num_parts for asked in self.asked)

    def write_part(self, part: int, writer: PartWriter) -> None:
        for asked in self.asked:
            shard_set = ShardSet(asked.uri)
            if part < shard_set.num_parts:
                table = self._nominated(asked, shard_set, part)
                words = id_words(table["image_id"].to_pylist())
                writer.write_buckets(table, bucket_of(words[:, 0], self.buckets))
                return
            part -= shard_set.num_parts

    def _nominated(self, asked: Asked, shard_set: ShardSet, part: int) -> pa.Table:
        table = shard_set.read(part)
        if asked.kind == "filtered":
            ids = kept_ids(table)
            return nominations(ids, np.full(len(ids), self.slots.begins[shard_set.source] + part), asked.recipe_part)
        if asked.kind == "shares":
            return table
        table = table.filter(pa.array([mode == asked.mode for mode in table["mode"].to_pylist()], pa.bool_()))
        begins = [self.slots.begins[source] for source in table["source"].to_pylist()]
        slots = np.asarray(begins, np.int64) + table["part"].to_numpy()
        return nominations(table["image_id"].to_pylist(), slots, asked.recipe_part, table=table)


@dataclass
class MergedStep(Step):
    """Images of one range of ids: unique, with all reasons, sorted by slot."""

    nominations: str
    parts: list[PartSettings]
    buckets: int

    def schema(self) -> pa.Schema:
        return MERGED

    def num_parts(self) -> int:
        return self.buckets

    def write_part(self, part: int, writer: PartWriter) -> None:
        found = pa.concat_tables([NOMINATIONS.empty_table(), *ShardSet(self.nominations).gather(part)])
        found = found.sort_by([("image_id", "ascending"), ("recipe_part", "ascending"), ("rank", "ascending")])
        merged = [self._merge(group) for group in _groups(found.to_pylist())]
        merged.sort(key=lambda row: (row["slot"], row["image_id"]))
        writer.write(pa.Table.from_pylist(merged, MERGED), GROUP_ROWS)

    def _merge(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Nominations of one image as one row. Of several queries of one set the best match is the reason."""
        reasons: dict[int, dict[str, Any]] = {}
        for row in rows:
            settings = self.parts[row["recipe_part"]]
            reason = {"part": settings.title, "query_set": settings.retrieved, "mode": settings.mode}
            known = reasons.get(row["recipe_part"])
            if known is None or _is_better(row, known):
                reasons[row["recipe_part"]] = {**reason, "rank": row["rank"], "similarity": row["similarity"]}
        return {
            "image_id": rows[0]["image_id"],
            "slot": min(row["slot"] for row in rows),
            "copies": max(row["copies"] for row in rows),
            "reasons": [reasons[number] for number in sorted(reasons)],
        }


def _is_better(row: dict[str, Any], known: dict[str, Any]) -> bool:
    if row["rank"] is None or known["rank"] is None:
        return False
    return bool((row["rank"], -row["similarity"]) < (known["rank"], -known["similarity"]))


def _groups(rows: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Consecutive rows of one image."""
    begin = 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or rows[end]["image_id"] != rows[begin]["image_id"]:
            yield rows[begin:end]
            begin = end


@dataclass
class SelectionStep(Step):
    """Part k: the selected images of slot k, in the order of its images."""

    merged: str
    slots: Slots

    def schema(self) -> pa.Schema:
        return schemas.SELECTION

    def num_parts(self) -> int:
        return len(self.slots)

    def write_part(self, part: int, writer: PartWriter) -> None:
        table = pa.concat_tables([MERGED.empty_table(), *ShardSet(self.merged).lookup("slot", part)])
        filtered, place = self.slots.at(part)
        order = {name: i for i, name in enumerate(kept_ids(filtered.read(place, ["image_id", "kept"])))}
        names = table["image_id"].to_pylist()
        if unknown := [name for name in names if name not in order]:
            raise ConfigError(f"{filtered.part_uri(place)}: image {unknown[0]} is selected but not kept here")
        table = table.take(pa.array(np.argsort([order[name] for name in names]), pa.int64()))
        columns = [table["image_id"], pa.array([filtered.source] * table.num_rows, pa.string())]
        writer.write(pa.table([*columns, table["copies"], table["reasons"]], schema=schemas.SELECTION), GROUP_ROWS)


@dataclass
class RebalanceUnit(Unit):
    """The selection by all parts of a recipe.

    Attributes:
        parts: of the recipe, in order.
        filtered: verdicts of every source that images may come from, in order of precedence: where the same bytes
            lie in several, the first provides them.
        retrieved: `retrieved` set of each query set that parts refer to.
        clusters: of the pools; used by balanced parts alone.
    """

    parts: list[PartSettings]
    filtered: list[str]
    retrieved: dict[str, str]
    clusters: list[str]
    seed: int
    out: str

    stage = "rebalance"

    @property
    def title(self) -> str:
        return "rebalance"

    def inputs(self) -> list[Input]:
        found = [set_input(uri, "filtered") for uri in self.filtered]
        found += [set_input(uri, "retrieved") for uri in self.retrieved.values()]
        if self._balanced():
            found += [set_input(uri, "clusters") for uri in self.clusters]
        return found

    def _balanced(self) -> list[tuple[int, PartSettings]]:
        return [(number, part) for number, part in enumerate(self.parts) if part.balanced]

    def config(self) -> dict[str, Any]:
        keys = {"name", "as_is", "retrieved", "mode", "balanced", "target", "max_copies"}
        parts = {str(i): p.model_dump(include=keys, exclude_none=True) for i, p in enumerate(self.parts)}
        return {"parts": parts, "seed": self.seed}

    def steps(self) -> list[Step]:
        slots = Slots(tuple(self.filtered))
        shares, asked, merged = (storage.join(self.out, name) for name in ("_shares", "_nominations", "_merged"))
        sources = self._asked(shares)
        rows = sum(ShardSet(a.uri).num_rows for a in sources if a.kind != "shares")
        buckets = max(1, -(-(rows + sum(p.target or 0 for p in self.parts)) // BUCKET_ROWS))
        return [
            SharesStep(shares, "shares", {}, False, self.clusters, self._balanced(), slots, self.seed),
            NominationsStep(asked, "nominations", {}, False, sources, slots, buckets),
            MergedStep(merged, "merged", {}, False, asked, self.parts, buckets),
            SelectionStep(self.out, "selection", {}, True, merged, slots),
        ]

    def _asked(self, shares: str) -> list[Asked]:
        by_source = {ShardSet(uri).source: uri for uri in self.filtered}
        found = []
        for number, part in enumerate(self.parts):
            if part.as_is:
                found.append(Asked(number, "filtered", by_source[part.as_is]))
            elif part.retrieved:
                found.append(Asked(number, "retrieved", self.retrieved[part.retrieved], part.mode))
        return [*found, Asked(-1, "shares", shares)] if self._balanced() else found


def parts_from_sets(as_is: list[str], retrieved: list[str], target: int | None, max_copies: int) -> list[PartSettings]:
    """The parts of a recipe that sets at hand stand for: what was retrieved says itself by which modes."""
    parts = [PartSettings(as_is=name) for name in as_is]
    for uri in retrieved:
        shard_set = ShardSet(uri).require("retrieved")
        config, name = shard_set.manifest["config"], shard_set.source
        if "k" in config:
            parts.append(PartSettings(retrieved=name, mode="sample", k=config["k"]))
        if "cluster" in config:
            rule = config["cluster"]
            parts.append(PartSettings(retrieved=name, mode="cluster", images_per_cluster=rule["images_per_cluster"]))
    if target is not None:
        parts.append(PartSettings(balanced="pool", target=target, max_copies=max_copies))
    return parts
