"""Embeddings of several sources as one sequence of vectors, read in blocks of bounded size.

Global steps number vectors through: sources in order, their parts in order. `Vectors` translates, and reads any
block of rows without holding more than it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from curation.errors import ConfigError, LvdError
from curation.partwise import matrix, positions_in, words_of
from curation.scoring import not_finite
from curation.shards import ShardSet

BLOCK_ROWS = 8_192
"""Vectors of one block of a join; with d numbers each a block takes 2d bytes a vector, 4d more while it is searched."""


@dataclass
class Vectors:
    """The embedding sets at `uris`, numbered through."""

    uris: list[str]

    @cached_property
    def sets(self) -> list[ShardSet]:
        return [ShardSet(uri) for uri in self.uris]

    @cached_property
    def places(self) -> list[tuple[ShardSet, int]]:
        """(set, part) of every part in order."""
        return [(shard_set, part) for shard_set in self.sets for part in range(shard_set.num_parts)]

    @cached_property
    def offsets(self) -> npt.NDArray[np.int64]:
        """int64 [number of parts + 1]: number of the first vector of each part."""
        counts = np.concatenate([np.zeros(1, np.int64), *(shard_set.rows_per_part for shard_set in self.sets)])
        return np.cumsum(counts, dtype=np.int64)

    def __len__(self) -> int:
        return int(self.offsets[-1])

    @property
    def dim(self) -> int:
        """Numbers of a vector."""
        return int(self.sets[0].manifest["info"]["dim"])

    @property
    def num_blocks(self) -> int:
        """Blocks of BLOCK_ROWS vectors."""
        return -(-len(self) // BLOCK_ROWS)

    def block(self, number: int) -> npt.NDArray[np.float16]:
        """Vectors [number * BLOCK_ROWS, ...), float16 [at most BLOCK_ROWS, dim]."""
        return self.read(number * BLOCK_ROWS, min((number + 1) * BLOCK_ROWS, len(self)))

    def read(self, start: int, stop: int) -> npt.NDArray[np.float16]:
        """Vectors [start, stop), float16 [stop - start, dim]. Raises LvdError where one is not finite."""
        found, filled = np.empty((max(0, stop - start), self.dim), np.float16), 0
        for table in self._tables(start, stop, "embedding"):
            found[filled : filled + table.num_rows] = matrix(table)
            filled += table.num_rows
        found = found[:filled]
        row = not_finite(found)
        if row is not None:
            slot = int(np.searchsorted(self.offsets, start + row, side="right")) - 1
            shard_set, part = self.places[slot]
            raise LvdError(
                f"{shard_set.part_uri(part)}: the vector in row {start + row - int(self.offsets[slot])} has NaN or "
                "infinite values; embed its source again"
            )
        return found

    def words(self, start: int, stop: int) -> npt.NDArray[np.uint64]:
        """Ids of vectors [start, stop), uint64 [stop - start, 2]."""
        tables = self._tables(start, stop, "image_id")
        return np.concatenate([np.zeros((0, 2), np.uint64), *(words_of(table["image_id"]) for table in tables)])

    def _tables(self, start: int, stop: int, column: str) -> Iterator[pa.Table]:
        first = int(np.searchsorted(self.offsets, start, side="right")) - 1
        for slot in range(first, len(self.places)):
            begin, end = int(self.offsets[slot]), int(self.offsets[slot + 1])
            if begin >= stop:
                return
            shard_set, part = self.places[slot]
            low, high = max(start, begin), min(stop, end)
            if high > low:
                yield from shard_set.stream_rows(part, low - begin, high - begin, [column])


def check_same_model(uris: list[str]) -> None:
    """Refuse (ConfigError) sets of vectors that different models, or one in different precision, have made."""
    sets = [ShardSet(uri).require("embeddings") for uri in uris]
    first = sets[0].manifest["config"]
    for other in sets[1:]:
        config = other.manifest["config"]
        if config != first:
            keys = [key for key in sorted({*first, *config}) if first.get(key) != config.get(key)]
            raise ConfigError(
                f"{sets[0].uri} ({_made_by(sets[0], keys)}) and {other.uri} ({_made_by(other, keys)}) "
                "were not made by one model in one way; embed one of them again"
            )


def _made_by(embeddings: ShardSet, keys: list[str]) -> str:
    """The model by name and fingerprint, and the other settings among `keys`."""
    config = embeddings.manifest["config"]
    model = f"{embeddings.manifest['info']['model']} {str(config['model'])[:12]}"
    return ", ".join([model, *(f"{key} {config.get(key, 'unset')}" for key in keys if key != "model")])


def check_made_from(made: str, uris: list[str]) -> None:
    """Refuse (ConfigError) a set, such as centroids, that was not made from the very vectors at `uris`."""
    contents = {record["content"] for record in ShardSet(made).manifest["inputs"]}
    for uri in uris:
        if ShardSet(uri).content not in contents:
            raise ConfigError(f"{made} was not made from {uri}: its vectors are of another model or other images")


def kept_part(embeddings: ShardSet, duplicates: ShardSet, part: int) -> tuple[list[str], npt.NDArray[np.float16]]:
    """Ids and vectors, float16 [n, dim], of the images of a part that dedup kept and that have a vector."""
    verdicts, table = duplicates.read(part, ["image_id", "kept"]), embeddings.read(part)
    chosen = pc.is_in(table["image_id"], value_set=verdicts.filter(verdicts["kept"])["image_id"])
    return table["image_id"].filter(chosen).to_pylist(), matrix(table)[chosen.to_numpy()]


def areas(images: ShardSet, part: int, ids: list[str]) -> npt.NDArray[np.int64]:
    """Pixels of the images called `ids`, which lie in that part in that order; int64 [len(ids)]."""
    table = images.read(part, ["image_id", "width", "height"])
    at = positions_in(ids, table["image_id"].to_pylist(), images.part_uri(part))
    pixels: npt.NDArray[np.int64] = table["width"].to_numpy().astype(np.int64) * table["height"].to_numpy()
    return pixels[at]
