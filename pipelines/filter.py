"""Stage `filter`: uniqueness by image_id, and the rules that need no model.

Three passes: every image part is looked at and its ids are scattered by prefix; each prefix is sorted and repeats
are found (this index stays, for look-up); verdicts return to the parts. A task holds the ids of one part, or
BUCKET_ROWS ids; nothing else grows.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from curation import schemas, storage
from curation.filters import repeated, rule_verdict
from curation.hashing import bucket_of, id_words
from curation.manifest import Input
from curation.shards import GROUP_ROWS, IMAGE_GROUP_ROWS, PartWriter, ShardSet
from embedders.images import UndecodableImage, decode_picture
from pipelines.recipe import FilterSettings
from pipelines.unit import Step, Unit, set_input

BUCKET_ROWS = 500_000


@dataclass
class KeysStep(Step):
    """Verdicts of the rules on each part, scattered by id prefix."""

    images: str
    settings: FilterSettings
    max_pixels: int

    def schema(self) -> pa.Schema:
        return schemas.INDEX

    def num_parts(self) -> int:
        return ShardSet(self.images).num_parts

    def write_part(self, part: int, writer: PartWriter) -> None:
        ids, rows, reasons = [], [], []
        columns = ["image_id", "row", "image", "width", "height"]
        for table in ShardSet(self.images).stream(part, columns, IMAGE_GROUP_ROWS):
            for image in table.to_pylist():
                ids.append(image["image_id"])
                rows.append(image["row"])
                reasons.append(self._verdict(image))
        values = [ids, rows, [part] * len(ids), range(len(ids)), reasons]
        table = pa.table(
            [pa.array(v, f.type) for v, f in zip(values, schemas.INDEX, strict=True)], schema=schemas.INDEX
        )
        writer.write_buckets(table, bucket_of(id_words(ids)[:, 0], num_buckets(ShardSet(self.images))))

    def _verdict(self, image: dict[str, Any]) -> str | None:
        try:
            decode_picture(image["image"], min_side=self.settings.min_side, max_pixels=self.max_pixels)
            decodable = True
        except UndecodableImage:
            decodable = False
        limits = (self.settings.min_side, self.settings.max_aspect_ratio)
        return rule_verdict(image["width"], image["height"], decodable, *limits)


def num_buckets(images: ShardSet) -> int:
    """How many ranges of id prefixes the rows of a set are sorted in."""
    return max(1, -(-images.num_rows // BUCKET_ROWS))


@dataclass
class IndexStep(Step):
    """All rows of a range of ids, sorted by id; the lowest row of each image stands for it, the others are repeats."""

    images: str
    keys: str

    def schema(self) -> pa.Schema:
        return schemas.INDEX

    def num_parts(self) -> int:
        return num_buckets(ShardSet(self.images))

    def write_part(self, part: int, writer: PartWriter) -> None:
        table = pa.concat_tables([schemas.INDEX.empty_table(), *ShardSet(self.keys).gather(part)])
        table = table.sort_by([("image_id", "ascending"), ("row", "ascending")])
        again = repeated(id_words(table["image_id"].to_pylist()), table["row"].to_numpy())
        reasons = ["exact_duplicate" if a else r for a, r in zip(again, table["reason"].to_pylist(), strict=True)]
        writer.write(table.set_column(4, "reason", pa.array(reasons, pa.string())), GROUP_ROWS)


@dataclass
class RepeatsStep(Step):
    """The repeats of one part of the index, sorted by the part of the images they lie in."""

    index: str

    def schema(self) -> pa.Schema:
        return schemas.INDEX

    def num_parts(self) -> int:
        return ShardSet(self.index).num_parts

    def write_part(self, part: int, writer: PartWriter) -> None:
        table = ShardSet(self.index).read(part)
        repeats = np.asarray([reason == "exact_duplicate" for reason in table["reason"].to_pylist()], dtype=bool)
        table = table.filter(pa.array(repeats)).sort_by([("part", "ascending"), ("position", "ascending")])
        writer.write(table, GROUP_ROWS)


@dataclass
class VerdictsStep(Step):
    """One verdict for each row of a part of the images: `filtered/SOURCE`."""

    keys: str
    repeats: str

    def schema(self) -> pa.Schema:
        return schemas.FILTERED

    def num_parts(self) -> int:
        return ShardSet(self.keys).num_parts

    def write_part(self, part: int, writer: PartWriter) -> None:
        table = ShardSet(self.keys).read(part).sort_by("position")
        reasons = table["reason"].to_pylist()
        for repeats in ShardSet(self.repeats).lookup("part", part):
            for position in repeats["position"].to_pylist():
                reasons[position] = "exact_duplicate"
        kept = [reason is None for reason in reasons]
        columns = [table["row"], table["image_id"], pa.array(kept, pa.bool_()), pa.array(reasons, pa.string())]
        writer.write(pa.table(columns, schema=schemas.FILTERED), GROUP_ROWS)


@dataclass
class FilterUnit(Unit):
    """One source's verdicts and its index by image_id."""

    images: str
    settings: FilterSettings
    max_pixels: int
    out: str
    index_out: str

    stage = "filter"

    @property
    def title(self) -> str:
        return f"filter {self.images.rpartition('/')[2]}"

    def inputs(self) -> list[Input]:
        return [set_input(self.images, "images")]

    def config(self) -> dict[str, Any]:
        return {"filter": self.settings.model_dump(), "max_pixels": self.max_pixels}

    def steps(self) -> list[Step]:
        labels = ShardSet(self.images).labels
        keys, repeats = storage.join(self.out, "_keys"), storage.join(self.out, "_repeats")
        return [
            KeysStep(keys, "keys", labels, False, self.images, self.settings, self.max_pixels),
            IndexStep(self.index_out, "index", labels, True, self.images, keys),
            RepeatsStep(repeats, "repeats", labels, False, self.index_out),
            VerdictsStep(self.out, "filtered", labels, True, keys, repeats),
        ]
