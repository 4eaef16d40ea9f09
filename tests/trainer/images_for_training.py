"""Parquet files of numbered samples, which are not images, and what a loader makes of them."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedders.images import UndecodableImage

BROKEN = b"broken"


def number(data: bytes, key: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    """The sample's number and its key."""
    if data == BROKEN:
        raise UndecodableImage("broken")
    return int(data), key


def batch(views: list[tuple[int, tuple[int, int]]], image_ids: list[str], step: int) -> tuple[int, list[object]]:
    """The step, and what was made with its id."""
    return step, list(zip(views, image_ids, strict=True))


def write_files(folder: Path, groups: Sequence[Sequence[int]], broken: Sequence[int] = (), first: int = 0) -> int:
    """Files with row groups of so many rows, which hold numbers from `first` on; returns the number after the last."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, sizes in enumerate(groups):
        bounds = np.cumsum([first, *sizes]).tolist()
        schema = pa.schema([("image_id", pa.string()), ("image", pa.binary()), ("other", pa.int64())])
        with pq.ParquetWriter(folder / f"{file:03}.parquet", schema) as writer:
            for start, stop in pairwise(bounds):
                rows = range(start, stop)
                data = [BROKEN if row in broken else str(row).encode() for row in rows]
                writer.write_table(pa.table([[f"id{row}" for row in rows], data, rows], schema=schema))
        first = bounds[-1]
    return first


def random_files(rng: np.random.Generator) -> list[list[int]]:
    """Rows of the row groups of some files; some groups are empty."""
    return [rng.integers(0, 9, rng.integers(1, 6)).tolist() for _ in range(rng.integers(1, 12))] + [[3]]
