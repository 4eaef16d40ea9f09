"""Stage `rebalance`: the selection, one row for each image of the final set, with every reason it is there for.

1. `shares`: for parts balanced over clusters, how often each pool image is taken (`pipelines.balanced`).
2. `nominations`: what each part of the recipe asks for, scattered by id prefix (`pipelines.nominations`).
3. `merged`: images of one range of ids made unique, sorted by where their bytes lie. Holds BUCKET_ROWS nominations.
4. `mixture`, where the recipe has one: what of them makes a set of exact size and ratios (`pipelines.mixing`).
5. `selection`: part k holds the selected images of part k of all sources' images, numbered through, in their order.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from curation import schemas, storage
from curation.errors import ConfigError
from curation.manifest import Input
from curation.partwise import kept_ids
from curation.shards import GROUP_ROWS, PartWriter, ShardSet
from pipelines.balanced import SharesStep
from pipelines.mixing import MixtureStep, in_mixture
from pipelines.nominations import NOMINATIONS, Asked, NominationsStep, Slots
from pipelines.recipe import PartSettings
from pipelines.unit import Step, Unit, set_input
from pipelines.vectors import check_made_from

BUCKET_ROWS = 500_000

MERGED = pa.schema([schemas.ID, pa.field("slot", pa.int64()), *list(schemas.SELECTION)[2:]])


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
    parts: list[PartSettings]
    mixture: str | None
    seed: int

    def schema(self) -> pa.Schema:
        return schemas.SELECTION

    def num_parts(self) -> int:
        return len(self.slots)

    def write_part(self, part: int, writer: PartWriter) -> None:
        table = pa.concat_tables([MERGED.empty_table(), *ShardSet(self.merged).lookup("slot", part)])
        if self.mixture is not None:
            table = table.filter(pa.array(in_mixture(table, self.mixture, self.parts, self.seed)))
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
        embeddings: of the pools, by the model of the clusters; used by balanced parts that are spread alone.
        mixture: the size of the set, which the parts share by their ratios; None takes all that parts ask for.
    """

    parts: list[PartSettings]
    filtered: list[str]
    retrieved: dict[str, str]
    clusters: list[str]
    seed: int
    out: str
    embeddings: list[str] = field(default_factory=list)
    mixture: int | None = None

    stage = "rebalance"

    @property
    def title(self) -> str:
        return "rebalance"

    def inputs(self) -> list[Input]:
        found = [set_input(uri, "filtered") for uri in self.filtered]
        found += [set_input(uri, "retrieved") for uri in self.retrieved.values()]
        if self._balanced():
            found += [set_input(uri, "clusters") for uri in self.clusters]
        if any(part.balanced and part.strategy == "spread" for part in self.parts):
            found += [set_input(uri, "embeddings") for uri in self._spread_over()]
        return found

    def _spread_over(self) -> list[str]:
        """The vectors that the clusters were made from. Raises ConfigError where they are not at hand."""
        vectors = {ShardSet(uri).source: uri for uri in self.embeddings}
        for uri in self.clusters:
            if ShardSet(uri).source not in vectors:
                raise ConfigError(f"strategy spread needs the vectors that {uri} was made from")
            check_made_from(uri, [vectors[ShardSet(uri).source]])
        return self.embeddings

    def _balanced(self) -> list[tuple[int, PartSettings]]:
        return [(number, part) for number, part in enumerate(self.parts) if part.balanced]

    def config(self) -> dict[str, Any]:
        keys = {"name", "as_is", "retrieved", "mode", "balanced", "target", "max_copies", "levels", "strategy", "ratio"}
        parts = {str(i): p.model_dump(include=keys, exclude_none=True) for i, p in enumerate(self.parts)}
        return {"parts": parts, "seed": self.seed} | ({"mixture": self.mixture} if self.mixture else {})

    def steps(self) -> list[Step]:
        slots = Slots(tuple(self.filtered))
        shares, asked, merged = (storage.join(self.out, name) for name in ("_shares", "_nominations", "_merged"))
        sources = self._asked(shares)
        rows = sum(ShardSet(a.uri).num_rows for a in sources if a.kind != "shares")
        buckets = max(1, -(-(rows + sum(p.target or 0 for p in self.parts)) // BUCKET_ROWS))
        mixed: list[Step] = []
        limits = None
        if self.mixture:
            limits = storage.join(self.out, "_mixture")
            mixed = [MixtureStep(limits, "mixture", {}, False, merged, self.parts, self.mixture, self.seed)]
        return [
            SharesStep(shares, "shares", {}, False, self.clusters, self.embeddings, self._balanced(), slots, self.seed),
            NominationsStep(asked, "nominations", {}, False, sources, slots, buckets),
            MergedStep(merged, "merged", {}, False, asked, self.parts, buckets),
            *mixed,
            SelectionStep(self.out, "selection", {}, True, merged, slots, self.parts, limits, self.seed),
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


def parts_from_sets(
    as_is: list[str], retrieved: list[str], target: int | None, max_copies: int, strategy: str = "random"
) -> list[PartSettings]:
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
        values = {"balanced": "pool", "target": target, "max_copies": max_copies, "strategy": strategy}
        parts.append(PartSettings.model_validate(values))
    return parts
