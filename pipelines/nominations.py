"""Nominations: the images that each part of a recipe asks for, with where their bytes lie, scattered by id prefix."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation import schemas
from curation.hashing import bucket_of, id_words
from curation.partwise import kept_ids
from curation.shards import PartWriter, ShardSet
from pipelines.unit import Step

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
