"""Steps of sample-based retrieval in partitions: queries meet the pool images that lie in lists near to them.

After quantizers were fitted on a sample of the pools (`pipelines.partitioned.QuantizersStep`), and both sides were
given lists (`ListsStep`: the one that a pool image is stored in, the nearest that a query visits):

1. `stored`, `visits`: vectors travel to ranges of lists. A pool image goes to one range for each quantizer, a query
   to each range in which it visits a list.
2. `met`: a part is one range of one quantizer's lists; the k best of what each query met there.

1 holds one block, 2 the pool images of a range with their codes (4 d bytes a vector) and some queries with what
`nearest.Nearest` holds: memory grows neither with the pools nor with the queries, and nothing need lie on one machine.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from curation.join import Members
from curation.nearest import Nearest, query_rows
from curation.partwise import fixed_size_lists, matrix, packed, unpacked
from curation.products import Multiplier
from curation.rows import rows_of
from curation.shards import PartWriter, ShardSet
from pipelines.join import DeviceStep
from pipelines.near import NEAR, write_near
from pipelines.nodes import Nodes
from pipelines.partitioned import LIST_ROWS, lists_type, read_lists
from pipelines.unit import Step

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
Float16 = npt.NDArray[np.float16]


@dataclass(frozen=True)
class Ranges:
    """The lists of some quantizers, each cut into as many ranges of about equally many lists.

    Attributes:
        quantizers: their set.
        count: ranges wanted of each quantizer.
    """

    quantizers: str
    count: int

    @property
    def num_quantizers(self) -> int:
        """How many quantizers there are."""
        return ShardSet(self.quantizers).num_parts

    def num_lists(self, number: int) -> int:
        """Lists of a quantizer."""
        return int(pc.count(ShardSet(self.quantizers).read(number, ["cell"])["cell"]).as_py())

    def of(self, lists: Int32, number: int) -> Int64:
        """The range that each list of a quantizer lies in, int64 of the same shape; -1 for no list."""
        return lists.astype(np.int64) * self.count // self.num_lists(number)


@dataclass
class TravelStep(Step):
    """Part k: the vectors of block k, under each quantizer once for each range that one of their lists lies in.

    Range p of quantizer r is bucket r * ranges + p. With `with_ids` their image ids go along.
    """

    nodes: Nodes
    lists: str
    lists_joined: int
    ranges: Ranges
    with_ids: bool

    def schema(self) -> pa.Schema:
        vector = pa.field("vector", pa.binary(2 * self.nodes.vectors.dim))
        ids = [pa.field("high", pa.uint64()), pa.field("low", pa.uint64())] if self.with_ids else []
        lists = pa.field("lists", lists_type(self.lists_joined))
        return pa.schema([pa.field("number", pa.int64()), lists, vector, *ids])

    def num_parts(self) -> int:
        return ShardSet(self.lists).num_parts

    def write_part(self, part: int, writer: PartWriter) -> None:
        start, stop = part * LIST_ROWS, min((part + 1) * LIST_ROWS, len(self.nodes))
        numbers, values = self.nodes.read(start, stop)
        words = self.nodes.vectors.words(start, stop)[numbers - start] if self.with_ids else None
        schema = self.schema()
        for number in range(self.ranges.num_quantizers):
            lists = read_lists(self.lists, part, number)[numbers - start]
            rows, ranges = _destinations(self.ranges.of(lists, number))
            columns = [numbers[rows], fixed_size_lists(lists[rows], schema.field("lists").type), packed(values[rows])]
            columns += [words[rows, 0], words[rows, 1]] if words is not None else []
            writer.write_buckets(pa.table(columns, schema=schema), number * self.ranges.count + ranges)


def _destinations(ranges: Int64) -> tuple[Int64, Int64]:
    """(row, range) once for each range of a row, int64 [t] each, by row; `ranges` int64 [n, m], -1 for none."""
    ordered = np.sort(ranges, axis=1)
    is_new = ordered >= 0
    is_new[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]
    rows, places = np.nonzero(is_new)
    return rows, ordered[rows, places]


@dataclass
class MeetStep(DeviceStep):
    """Part r * ranges + p: what queries met in range p of the lists of quantizer r."""

    queries: str
    stored: str
    visits: str
    ranges: Ranges
    k: int
    device: str = "cpu"

    def schema(self) -> pa.Schema:
        return NEAR

    def num_parts(self) -> int:
        return self.ranges.num_quantizers * self.ranges.count

    def frees(self) -> list[str]:
        return [self.stored, self.visits]

    def write_part(self, part: int, writer: PartWriter) -> None:
        number = part // self.ranges.count
        num_lists = self.ranges.num_lists(number)
        tables = list(ShardSet(self.stored).gather(part))
        if not tables:
            return
        lists = np.concatenate([matrix(table, "lists")[:, 0] for table in tables])
        words = np.concatenate([np.stack([table["high"], table["low"]], axis=1) for table in tables])
        numbers = np.concatenate([table["number"].to_numpy() for table in tables])
        order = np.argsort(lists, kind="stable")
        stored = Members(np.searchsorted(lists[order], np.arange(num_lists + 1)), np.arange(len(order), dtype=np.int32))
        pool, words = rows_of(numbers[order], _vectors(tables, order)), words[order]
        multiplier, offsets = Multiplier(self.device), ShardSet(self.queries).offsets
        for numbers, values, asked in self._asked(part):
            inside = self.ranges.of(asked, number) == part % self.ranges.count
            nearest = Nearest(rows_of(numbers, values), self.k)
            nearest.search_cells(pool, words, stored, _visiting(asked, inside, num_lists), multiplier)
            write_near(writer, numbers, nearest, offsets)

    def _asked(self, part: int) -> Iterator[tuple[Int64, Float16, Int32]]:
        """Numbers, vectors and lists of the queries that visit, in order, about as many at a time as may be asked."""
        held: list[pa.Table] = []
        for table in ShardSet(self.visits).gather(part):
            for start in range(0, table.num_rows, query_rows(self.k)):
                piece = table.slice(start, query_rows(self.k))
                if held and sum(t.num_rows for t in held) + piece.num_rows > query_rows(self.k):
                    yield _columns(held)
                    held = []
                held.append(piece)
        if held:
            yield _columns(held)


def _columns(tables: list[pa.Table]) -> tuple[Int64, Float16, Int32]:
    numbers = np.concatenate([table["number"].to_numpy() for table in tables])
    lists = np.concatenate([matrix(table, "lists") for table in tables])
    return numbers, _vectors(tables, np.arange(len(numbers))), lists


def _vectors(tables: list[pa.Table], order: Int64) -> Float16:
    """The vectors of tables in the order of the rows named, float16 [n, dim]; lets go of the tables one by one."""
    dim = tables[0].schema.field("vector").type.byte_width // 2
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    values = np.empty((len(order), dim), np.float16)
    start = 0
    while tables:
        table = tables.pop(0)
        values[place[start : start + table.num_rows]] = unpacked(table)
        start += table.num_rows
    return values


def _visiting(lists: Int32, inside: npt.NDArray[np.bool_], num_lists: int) -> Members:
    """Which rows visit each list, of the places of `lists` [n, m] that are `inside`."""
    rows, _ = np.nonzero(inside)
    order = np.argsort(lists[inside], kind="stable")
    offsets = np.searchsorted(lists[inside][order], np.arange(num_lists + 1))
    return Members(offsets, rows[order].astype(np.int32))
