"""Stage `shard`: the selected images with their provenance, shuffled across the whole set, as final shards.

Where a copy of an image goes, and where it stands there, is a keyed hash of (seed, image_id, copy). Images are
scattered by destination: straight to the shards where these are few, by way of groups of shards where they are many,
so that no task writes more than about the square root of their number of pieces. Scattering holds BUFFER_BYTES or
`slice_bytes` of images, writing a shard holds that shard twice.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from curation import schemas, storage
from curation.errors import ConfigError
from curation.hashing import bucket_of, id_words, keyed_hash
from curation.manifest import Input
from curation.shards import IMAGE_GROUP_ROWS, PartWriter, ShardSet
from pipelines.nominations import Slots
from pipelines.recipe import ShardSettings
from pipelines.unit import Step, Unit, set_input

BUFFER_BYTES = 64_000_000
KEYED = schemas.SHARDS.append(pa.field("key", pa.uint64(), nullable=False))


@dataclass(frozen=True)
class Layout:
    """How many shards there are, and by which way images get there.

    Attributes:
        num_shards: final shards.
        per_group: shards of one group; 1 where images are scattered to the shards at once.
        slices: tasks that scatter one group on.
        slice_parts: parts of the first pass that one of these reads.
    """

    num_shards: int
    per_group: int
    slices: int
    slice_parts: int

    @property
    def num_groups(self) -> int:
        return -(-self.num_shards // self.per_group)


def plan_layout(total_bytes: int, num_parts: int, settings: ShardSettings) -> Layout:
    """The layout for that many bytes of images in `num_parts` parts."""
    num_shards = max(1, round(total_bytes / settings.shard_bytes))
    if num_shards <= settings.max_fan_out:
        return Layout(num_shards, 1, 1, max(1, num_parts))
    per_group = math.isqrt(num_shards - 1) + 1
    num_groups = -(-num_shards // per_group)
    piece = max(1.0, total_bytes / (max(1, num_parts) * num_groups))
    slice_parts = max(1, int(settings.slice_bytes // piece))
    return Layout(num_shards, per_group, -(-num_parts // slice_parts), slice_parts)


@dataclass(frozen=True)
class Provenance:
    """Per-image sets that tell more about a source's images: its clusters and duplicates, where there are some."""

    clusters: str | None = None
    duplicates: str | None = None

    def of_part(self, part: int) -> tuple[dict[str, list[int]], dict[str, int]]:
        """Cluster paths and component sizes of a part's images, by image_id."""
        clusters: dict[str, list[int]] = {}
        sizes: dict[str, int] = {}
        if self.clusters:
            table = ShardSet(self.clusters).read(part)
            levels = [name for name in table.schema.names if name.startswith("cluster_")]
            paths = zip(*(table[level].to_pylist() for level in levels), strict=True)
            clusters = {name: list(path) for name, path in zip(table["image_id"].to_pylist(), paths, strict=True)}
        if self.duplicates:
            table = ShardSet(self.duplicates).read(part, ["image_id", "component_size"])
            sizes = dict(zip(table["image_id"].to_pylist(), table["component_size"].to_pylist(), strict=True))
        return clusters, sizes


@dataclass
class ScatterStep(Step):
    """Part k: the selected images of slot k, copies told apart, scattered by group of shards."""

    selection: str
    images: Slots
    provenance: dict[str, Provenance]
    layout: Layout
    seed: int

    def schema(self) -> pa.Schema:
        return KEYED

    def num_parts(self) -> int:
        return len(self.images)

    def write_part(self, part: int, writer: PartWriter) -> None:
        selected = {row["image_id"]: row for row in ShardSet(self.selection).read(part).to_pylist()}
        if not selected:
            return
        held: list[pa.Table] = []
        for table in self._selected(part, selected):
            held.append(table)
            if sum(t.nbytes for t in held) > BUFFER_BYTES:
                self._scatter(held, writer)
                held = []
        if held:
            self._scatter(held, writer)
        if selected:
            raise ConfigError(
                f"{self.selection}: image {min(selected)} is selected but not in {self.images.at(part)[0].uri}"
            )

    def _selected(self, part: int, selected: dict[str, dict[str, Any]]) -> Iterator[pa.Table]:
        """Rows of the slot's selected images, row group by row group; takes them out of `selected`."""
        images, place = self.images.at(part)
        clusters, sizes = self.provenance.get(images.source, Provenance()).of_part(place)
        for table in images.stream(place, rows=IMAGE_GROUP_ROWS):
            rows = []
            for image in table.to_pylist():
                chosen = selected.pop(image["image_id"], None)
                if chosen is None:
                    continue
                del image["row"]
                more = {"source": images.source, "reasons": chosen["reasons"]}
                more |= {"clusters": clusters.get(image["image_id"]), "component_size": sizes.get(image["image_id"])}
                rows += [{**image, **more, "key": key} for key in self._keys(image["image_id"], chosen["copies"])]
            if rows:
                yield pa.Table.from_pylist(rows, KEYED)

    def _keys(self, name: str, copies: int) -> list[int]:
        words = np.repeat(id_words([name]), copies, axis=0)
        return [int(key) for key in keyed_hash(self.seed, "shuffle", words, np.arange(copies))]

    def _scatter(self, tables: list[pa.Table], writer: PartWriter) -> None:
        table = pa.concat_tables(tables)
        shards = bucket_of(table["key"].to_numpy(), self.layout.num_shards)
        writer.write_buckets(table, shards // self.layout.per_group)


@dataclass
class RescatterStep(Step):
    """One slice of one group, scattered on by shard."""

    scattered: str
    layout: Layout

    def schema(self) -> pa.Schema:
        return KEYED

    def num_parts(self) -> int:
        return self.layout.num_groups * self.layout.slices

    def write_part(self, part: int, writer: PartWriter) -> None:
        group, number = divmod(part, self.layout.slices)
        first = number * self.layout.slice_parts
        before = ShardSet(self.scattered)
        parts = range(first, min(first + self.layout.slice_parts, before.num_parts))
        tables = list(before.gather(group, parts))
        if tables:
            table = pa.concat_tables(tables)
            writer.write_buckets(table, bucket_of(table["key"].to_numpy(), self.layout.num_shards))


@dataclass
class ShardsStep(Step):
    """One final shard: all that was scattered to it, in the order of the keys."""

    scattered: str
    layout: Layout

    def schema(self) -> pa.Schema:
        return schemas.SHARDS

    def num_parts(self) -> int:
        return self.layout.num_shards

    def write_part(self, part: int, writer: PartWriter) -> None:
        parts = None
        if self.layout.per_group > 1:
            first = part // self.layout.per_group * self.layout.slices
            parts = range(first, first + self.layout.slices)
        table = pa.concat_tables([KEYED.empty_table(), *ShardSet(self.scattered).gather(part, parts)])
        table = table.sort_by([("key", "ascending"), ("image_id", "ascending")])
        writer.write(table.select(schemas.SHARDS.names), IMAGE_GROUP_ROWS)


@dataclass
class ShardUnit(Unit):
    """The final shards from a selection.

    Attributes:
        images: of every source that images may come from, in the order the selection was made with.
        clusters, duplicates: of the pools, by source; they tell more of each image.
    """

    selection: str
    images: list[str]
    clusters: dict[str, str]
    duplicates: dict[str, str]
    settings: ShardSettings
    seed: int
    out: str

    stage = "shard"

    @property
    def title(self) -> str:
        return "shard"

    def inputs(self) -> list[Input]:
        found = [set_input(self.selection, "selection"), *(set_input(uri, "images") for uri in self.images)]
        found += [set_input(uri, "clusters") for uri in self.clusters.values()]
        return found + [set_input(uri, "duplicates") for uri in self.duplicates.values()]

    def config(self) -> dict[str, Any]:
        return {"shard": self.settings.model_dump(), "seed": self.seed}

    @cached_property
    def layout(self) -> Layout:
        """From the selected copies and the mean size of each source's images."""
        selection, slots = ShardSet(self.selection), Slots(tuple(self.images))
        if selection.num_parts != len(slots):
            raise ConfigError(f"{selection.uri} was made from other images than {', '.join(self.images)}")
        total, slot = 0.0, 0
        for images in slots.sets:
            mean = images.manifest["bytes"] / max(1, images.num_rows)
            for _ in range(images.num_parts):
                if selection.rows_per_part[slot]:
                    total += mean * sum(selection.read(slot, ["copies"])["copies"].to_pylist())
                slot += 1
        return plan_layout(int(total), len(slots), self.settings)

    def steps(self) -> list[Step]:
        slots, layout = Slots(tuple(self.images)), self.layout
        sources = [shard_set.source for shard_set in slots.sets]
        provenance = {s: Provenance(self.clusters.get(s), self.duplicates.get(s)) for s in sources}
        first, second = storage.join(self.out, "_scattered"), storage.join(self.out, "_rescattered")
        steps: list[Step] = [
            ScatterStep(first, "scattered", {}, False, self.selection, slots, provenance, layout, self.seed)
        ]
        if layout.per_group > 1:
            steps.append(RescatterStep(second, "rescattered", {}, False, first, layout))
        last = second if layout.per_group > 1 else first
        return [*steps, ShardsStep(self.out, "shards", {}, True, last, layout)]
