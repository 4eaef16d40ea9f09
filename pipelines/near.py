"""Steps of sample-based retrieval: the k nearest kept images of the pools for each query image, exactly.

`compared`: a part is a block of queries against a span of the pools, which goes by in blocks. It holds one block of
each side with its codes (3 d bytes a vector) and what `nearest.Nearest` holds of the queries; its time grows with
queries times pool images. `pipelines.near_lists` has the partitioned way. Either leaves, for each query, the best of
each task; `merged` makes them one.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from curation.nearest import NONE, Nearest, query_rows
from curation.products import Multiplier
from curation.rows import rows_of
from curation.shards import PartWriter, ShardSet
from pipelines.join import DeviceStep, read_sample
from pipelines.nodes import Nodes
from pipelines.vectors import Vectors

Int64 = npt.NDArray[np.int64]
Float16 = npt.NDArray[np.float16]
Float32 = npt.NDArray[np.float32]
Words = npt.NDArray[np.uint64]

SPAN_ROWS = 1 << 20
"""Pool images that a task compares its queries with."""
POOL_ROWS = 65_536
"""Of these, the ones that are held at a time."""

NEAR = pa.schema(
    [
        ("query", pa.int64()),
        ("number", pa.int64()),
        ("similarity", pa.float32()),
        ("high", pa.uint64()),
        ("low", pa.uint64()),
    ]
)
"""A query by its number in its set, a neighbor by its number among the pools' vectors, and both words of its id."""


@dataclass
class KeptNodes(Nodes):
    """The pools' vectors, of which what dedup kept takes part; `duplicates` are its verdicts, a set for each pool."""

    duplicates: list[str] = field(default_factory=list)

    @cached_property
    def _verdicts(self) -> list[tuple[ShardSet, int]]:
        """(set, part) of the verdicts on each part of the vectors."""
        return Vectors(self.duplicates).places

    def chosen(self, start: int, stop: int) -> Int64:
        found = [np.zeros(0, np.int64)]
        offsets = self.vectors.offsets
        for slot in range(int(np.searchsorted(offsets, start, side="right")) - 1, len(self.vectors.places)):
            if offsets[slot] >= stop:
                break
            found.append(offsets[slot] + self._kept(slot))
        numbers = np.concatenate(found)
        return numbers[(numbers >= start) & (numbers < stop)]

    def _kept(self, slot: int) -> Int64:
        """Rows of one part that take part."""
        shard_set, part = self.vectors.places[slot]
        verdicts, same = self._verdicts[slot]
        table = verdicts.read(same, ["image_id", "kept"])
        kept = table.filter(table["kept"])["image_id"].combine_chunks()
        inside = pc.is_in(shard_set.read(part, ["image_id"])["image_id"], value_set=kept)
        return np.flatnonzero(inside.to_numpy())


@dataclass
class CompareStep(DeviceStep):
    """Part i * spans + j: query block i against span j of the pools; the k best of that span.

    With `sample`, a set of sampled queries, these alone are asked.
    """

    queries: str
    pool: KeptNodes
    k: int
    sample: str | None = None
    device: str = "cpu"

    def schema(self) -> pa.Schema:
        return NEAR

    def _spans(self) -> int:
        return -(-len(self.pool) // SPAN_ROWS)

    def num_parts(self) -> int:
        count = len(Vectors([self.queries])) if self.sample is None else ShardSet(self.sample).num_rows
        return -(-count // query_rows(self.k)) * self._spans()

    def write_part(self, part: int, writer: PartWriter) -> None:
        block, span = divmod(part, self._spans())
        numbers, values = self._asked(block)
        nearest, multiplier = Nearest(rows_of(numbers, values), self.k), Multiplier(self.device)
        end = min((span + 1) * SPAN_ROWS, len(self.pool))
        for start in range(span * SPAN_ROWS, end, POOL_ROWS):
            stop = min(start + POOL_ROWS, end)
            nodes, vectors = self.pool.read(start, stop)
            words = self.pool.vectors.words(start, stop)[nodes - start]
            nearest.search(rows_of(nodes, vectors), words, multiplier)
        write_near(writer, numbers, nearest, ShardSet(self.queries).offsets)

    def _asked(self, block: int) -> tuple[Int64, Float16]:
        """Numbers and vectors of the queries of a block."""
        rows = query_rows(self.k)
        if self.sample is not None:
            numbers, values = read_sample(self.sample)
            return numbers[block * rows :][:rows], values[block * rows :][:rows]
        vectors = Vectors([self.queries])
        start, stop = block * rows, min((block + 1) * rows, len(vectors))
        return np.arange(start, stop), vectors.read(start, stop)


def write_near(writer: PartWriter, numbers: Int64, nearest: Nearest, offsets: Int64) -> None:
    """Write what was found for queries `numbers`, for `merged` to find by their part; `offsets` are the parts'."""
    similarity, words, found = nearest.best()
    there = found != NONE
    query = np.broadcast_to(numbers[:, None], found.shape)[there]
    columns = [query, found[there], similarity[there], words[there, 0], words[there, 1]]
    table = pa.table([pa.array(column) for column in columns], schema=NEAR)
    writer.write_buckets(table, np.searchsorted(offsets, query, side="right") - 1)


def merged(uri: str, part: int, k: int) -> pa.Table:
    """The k best that any task found for each query of a part of the queries, best first, as a table of NEAR.

    Of what tasks found more than once (one image in lists of several quantizers), one stays.
    """
    return best_of(ShardSet(uri).gather(part), k)


def best_of(tables: Iterable[pa.Table], k: int) -> pa.Table:
    """`merged` of tables at hand."""
    table = pa.concat_tables([NEAR.empty_table(), *tables])
    query, number, similarity, high, low = (table[name].to_numpy() for name in NEAR.names)
    order = np.lexsort((number, low, high, -similarity, query))
    query, number = query[order], number[order]
    is_new = np.ones(len(order), np.bool_)
    is_new[1:] = (query[1:] != query[:-1]) | (number[1:] != number[:-1])
    order, query = order[is_new], query[is_new]
    rank = np.arange(len(order)) - np.searchsorted(query, query)
    return table.take(pa.array(order[rank < k]))
