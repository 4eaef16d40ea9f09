"""Step `mixture` of the stage `rebalance`: which of the images asked for make a set of exact size and ratios.

An image counts for the first part of the recipe that asks for it, and keeps all its reasons. Of each part the images of
lowest keyed hash are taken. One task holds 9 bytes for each image asked for.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation.hashing import keyed_hash
from curation.mixture import mixture_counts
from curation.partwise import words_of
from curation.shards import PartWriter, ShardSet
from pipelines.recipe import PartSettings
from pipelines.unit import Step

UInt64 = npt.NDArray[np.uint64]

LIMITS = pa.schema([("recipe_part", pa.int32()), ("limit", pa.uint64())])


@dataclass
class MixtureStep(Step):
    """One row for each part of the recipe that gives images: the highest draw that is taken."""

    merged: str
    parts: list[PartSettings]
    target: int
    seed: int

    def schema(self) -> pa.Schema:
        return LIMITS

    def num_parts(self) -> int:
        return 1

    def write_part(self, part: int, writer: PartWriter) -> None:
        merged = ShardSet(self.merged)
        numbers, draws = [np.zeros(0, np.int8)], [np.zeros(0, np.uint64)]
        for bucket in range(merged.num_parts):
            table = merged.read(bucket, ["image_id", "reasons"])
            numbers.append(first_parts(table, self.parts).astype(np.int8))
            draws.append(mixture_draws(table, self.seed))
        number, draw = np.concatenate(numbers), np.concatenate(draws)
        sizes = np.bincount(number, minlength=len(self.parts)).tolist()
        titles = [settings.title for settings in self.parts]
        counts = mixture_counts(sizes, [settings.ratio or 0.0 for settings in self.parts], self.target, titles)
        given = np.flatnonzero(counts)
        limits = [np.partition(draw[number == p], counts[p] - 1)[counts[p] - 1] for p in given]
        writer.write(pa.table([pa.array(given, pa.int32()), pa.array(limits, pa.uint64())], schema=LIMITS))


def first_parts(table: pa.Table, parts: list[PartSettings]) -> npt.NDArray[np.int64]:
    """The first part of the recipe that asks for each image of a merged table, int64 [n]."""
    numbers = {settings.title: number for number, settings in enumerate(parts)}
    return np.asarray([numbers[reasons[0]["part"]] for reasons in table["reasons"].to_pylist()], np.int64)


def mixture_draws(table: pa.Table, seed: int) -> UInt64:
    """The draw of each image of a table, uint64 [n]."""
    return keyed_hash(seed, "mixture", words_of(table["image_id"]))


def in_mixture(table: pa.Table, limits: str, parts: list[PartSettings], seed: int) -> npt.NDArray[np.bool_]:
    """Which images of a merged table the mixture takes, bool [n]."""
    limit, gives = np.zeros(len(parts), np.uint64), np.zeros(len(parts), np.bool_)
    known = ShardSet(limits).read(0)
    limit[known["recipe_part"].to_numpy()], gives[known["recipe_part"].to_numpy()] = known["limit"].to_numpy(), True
    number = first_parts(table, parts)
    return gives[number] & (mixture_draws(table, seed) <= limit[number])
