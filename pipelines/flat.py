"""Steps that lay a join's vectors out flat, so that tasks on this machine map them and nothing travels.

1. `flat`: vectors, codes and sketches, 3 d + 64 bytes a node, in files that every task maps into its memory; what else
   a join asks of a vector stands in the set's rows.
2. `leads`: who takes part. Equal vectors take part once.

The files are what the page cache holds, not what a process does. 1 holds one block, 2 and each reader about 40 bytes a
node.
"""

import mmap
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation import storage
from curation.codes import Codes, encode
from curation.hubs import TAU, balls, content_hash, leaders
from curation.products import Multiplier
from curation.rows import Rows
from curation.scoring import cosine_pairs, norms
from curation.shards import GROUP_ROWS, PartWriter, ShardSet
from curation.signs import WORDS, helps, sketches
from pipelines.join import DeviceStep, read_sample
from pipelines.nodes import Nodes
from pipelines.unit import Step

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]

POPULATE_READ = 22
"""Linux's MADV_POPULATE_READ, which this Python's mmap does not name."""
FLAT_ROWS = 65_536
"""Nodes of a part."""
FLAT = pa.schema(
    [
        ("hash", pa.uint64()),
        ("norm", pa.float64()),
        ("error", pa.float32()),
        ("ball", pa.int32()),
        ("near", pa.float32()),
    ]
)
LEADS = pa.schema([("lead", pa.int64()), ("similarity", pa.float32())])


def bytes_flat(num_nodes: int, dim: int) -> int:
    """What the files take at most: short vectors have no sketches."""
    return num_nodes * (2 * dim + _code_length(dim) + 8 * WORDS)


def _code_length(dim: int) -> int:
    return -(-dim // 8) * 8


def _path(uri: str, name: str) -> str:
    """Where a file of the set lies on this machine."""
    return str(storage.filesystem(storage.join(uri, name))[1])


@dataclass
class FlatStep(DeviceStep):
    """Part k: nodes of block k. Those that take no part leave zeros. With `hubs`, the ball that each lies in."""

    nodes: Nodes
    threshold: float
    hubs: str | None
    device: str = "cpu"

    def schema(self) -> pa.Schema:
        return FLAT

    def num_parts(self) -> int:
        return -(-len(self.nodes) // FLAT_ROWS)

    def info(self) -> dict[str, Any]:
        dim = self.nodes.vectors.dim
        return {"dim": dim, "sketched": helps(self.threshold, _code_length(dim))}

    def write_part(self, part: int, writer: PartWriter) -> None:
        start, stop = part * FLAT_ROWS, min((part + 1) * FLAT_ROWS, len(self.nodes))
        numbers, chosen = self.nodes.read(start, stop)
        values = np.zeros((stop - start, chosen.shape[1]), np.float16)
        values[numbers - start] = chosen
        codes = encode(values)
        _write_at(_path(self.out, "vectors"), values, start)
        _write_at(_path(self.out, "codes"), codes.values, start)
        if self.info()["sketched"]:
            _write_at(_path(self.out, "sketches"), sketches(codes.values), start)
        ball, near = np.full(len(values), -1, np.int32), np.zeros(len(values), np.float32)
        if self.hubs is not None and self.threshold < TAU:
            ball, near = balls(values, read_sample(self.hubs)[1], Multiplier(self.device), codes)
        columns = [content_hash(values), norms(values), codes.error, ball, near]
        writer.write(pa.table([pa.array(column) for column in columns], schema=FLAT))


def _write_at(path: str, values: npt.NDArray[Any], row: int) -> None:
    """Put rows in their place in a file that other tasks write to, and see that they are on disk."""
    with storage.storage_errors(path):
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            left, offset = values.data.cast("B"), row * values[0].nbytes
            while len(left):
                written = os.pwrite(file, left, offset)
                left, offset = left[written:], offset + written
            os.fsync(file)
        finally:
            os.close(file)


def _mapped(path: str, dtype: Any, shape: tuple[int, int]) -> npt.NDArray[Any]:
    """A file as an array, read here and there.

    What of it is not in memory is fetched from end to end at once: page by page a disk takes twenty times as long. What
    is crowded out later is fetched by the page, not by 32, so that it crowds out less.
    """
    # Copy-on-write, for arrays that are not writable would be another type to all that is compiled.
    held = np.memmap(path, dtype, "c", shape=shape)
    base = held.base
    if isinstance(base, mmap.mmap):
        with suppress(OSError):  # a system from before Linux 5.14
            base.madvise(POPULATE_READ)
        base.madvise(mmap.MADV_RANDOM)
    return np.asarray(held)


class Flat:
    """What `FlatStep` has made, mapped."""

    def __init__(self, uri: str) -> None:
        self._set = ShardSet(uri)
        info = self._set.manifest["info"]
        count, dim = self._set.num_rows, int(info["dim"])
        self.vectors = _mapped(_path(uri, "vectors"), np.float16, (count, dim))
        self._codes = _mapped(_path(uri, "codes"), np.int8, (count, _code_length(dim)))
        self._sketches: npt.NDArray[np.uint64] | None = None
        if info["sketched"]:
            self._sketches = _mapped(_path(uri, "sketches"), np.uint64, (count, WORDS))

    def __len__(self) -> int:
        return len(self.vectors)

    def column(self, name: str) -> npt.NDArray[Any]:
        """A column of all nodes."""
        return np.concatenate([np.zeros(0, FLAT.field(name).type.to_pandas_dtype()), *self._pieces(name)])

    def _pieces(self, name: str) -> Iterator[npt.NDArray[Any]]:
        for part in range(self._set.num_parts):
            yield self._set.read(part, [name])[name].to_numpy()

    @cached_property
    def rows(self) -> Rows:
        """All nodes as rows of a join, none of them copied, under their own numbers."""
        codes = Codes(self._codes, self.column("error"), encode(self.vectors[:0]).scale)
        at = np.arange(len(self))
        return Rows(at, at, self.vectors, self.column("norm"), codes, self.column("ball"), self._sketches)


@dataclass
class LeadsStep(Step):
    """One row a node: itself if it takes part; -1 if it can score above the threshold with none; else the first node
    equal to it, and their score. Where references are compared with images nothing is collapsed."""

    flat: str
    threshold: float
    collapse: bool

    def schema(self) -> pa.Schema:
        return LEADS

    def num_parts(self) -> int:
        return 1

    def write_part(self, part: int, writer: PartWriter) -> None:
        flat = Flat(self.flat)
        lead, similarity = np.arange(len(flat)), np.zeros(len(flat), np.float32)
        lengths = flat.column("norm")
        if self.collapse:
            found = leaders(flat.vectors, flat.column("hash"))
            equal = np.flatnonzero(found != lead)
            score = cosine_pairs(flat.vectors, found[equal], flat.vectors, equal, lengths, lengths)
            above = score > np.float32(self.threshold)  # not so where zero vectors are equal
            lead[equal[above]], similarity[equal[above]] = found[equal[above]], score[above]
        if self.threshold >= 0:
            lead[lengths == 0] = -1  # zero vectors score 0
        for start in range(0, len(lead), GROUP_ROWS):
            piece = slice(start, start + GROUP_ROWS)
            writer.write(pa.table([pa.array(lead[piece]), pa.array(similarity[piece])], schema=LEADS))


def read_leads(uri: str) -> tuple[Int64, Float32]:
    """Columns `lead` and `similarity` of all nodes."""
    table = ShardSet(uri).read(0)
    return table["lead"].to_numpy(), table["similarity"].to_numpy()
