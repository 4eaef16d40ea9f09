"""Step `pairs` of the partitioned join: what one partition of one quantizer finds.

A task holds its partition: vectors and codes (3 d bytes a vector), 128 bytes a vector for the forest, and four for each
visit. Its time grows with the vectors met: visits times the vectors stored in a cell.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation.forest import Edges
from curation.hubs import content_hash
from curation.join import Join, Rows, Unique, all_rows, comparable, join_cells, unique, visitors
from curation.layout import home_cell
from curation.partwise import matrix
from curation.products import Multiplier
from curation.shards import GROUP_ROWS, PartWriter, ShardSet
from pipelines.executor import Needs
from pipelines.join import EDGES, Keep, Reducer, edge_table, on_device, read_sample
from pipelines.nodes import Nodes
from pipelines.partitioned import read_block, read_layout
from pipelines.unit import Step

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
Float16 = npt.NDArray[np.float16]
Bool = npt.NDArray[np.bool_]


QUANTIZERS_PER_TASK = 2
"""Where one partition holds everything, a task joins under so many quantizers: it reads and encodes once for them."""


@dataclass
class Held:
    """The vectors of a partition: numbers int64 [n], ascending; stored values; lists int32 [n, quantizers * m]."""

    numbers: Int64
    values: Float16
    lists: Int32


def gather_partition(
    nodes: Nodes, lists_uri: str, scattered: str | None, part: int, quantizers: list[int], lists_joined: int, keep: Keep
) -> Held:
    """What travelled to partition `part`, with its lists under the quantizer that it was scattered by.

    With `scattered` None nothing has travelled: all is read where it lies, with its lists under those `quantizers`.
    """
    dim = nodes.vectors.dim
    if scattered is None:
        blocks = range(ShardSet(lists_uri).num_parts)
        pieces = [read_block(nodes, lists_uri, block, quantizers, lists_joined, keep) for block in blocks]
    else:
        pieces = [_columns(table, dim) for table in ShardSet(scattered).gather(part)]
    rows = sum(len(numbers) for numbers, _, _ in pieces)
    width = len(quantizers) * lists_joined
    held = Held(np.empty(rows, np.int64), np.empty((rows, dim), np.float16), np.empty((rows, width), np.int32))
    start = 0
    while pieces:  # let go of one by one: all of them twice would be too much
        numbers, values, lists = pieces.pop(0)
        stop = start + len(numbers)
        held.numbers[start:stop], held.values[start:stop], held.lists[start:stop] = numbers, values, lists
        start = stop
    return held


@dataclass
class PartitionStep(Step):
    """Part p: the pairs in partition p of the one quantizer in `numbers`, reduced.

    With `scattered` None there is one partition, and part p is what some quantizers of `numbers` find in it. Else what
    was scattered is no longer needed once all parts are done.
    """

    nodes: Nodes
    threshold: float
    keep_of: Keep
    hubs: str
    lists: str
    layout: str
    scattered: str | None
    numbers: list[int]
    lists_joined: int
    device: str = "cpu"

    @property
    def needs(self) -> Needs:
        return on_device(self.device)

    def schema(self) -> pa.Schema:
        return EDGES

    def num_parts(self) -> int:
        if self.scattered is None:
            return -(-len(self.numbers) // QUANTIZERS_PER_TASK)
        return read_layout(self.layout, self.numbers[0]).num_partitions

    def frees(self) -> list[str]:
        return [] if self.scattered is None else [self.scattered]

    def write_part(self, part: int, writer: PartWriter) -> None:
        mine = self.numbers if self.scattered else self.numbers[part * QUANTIZERS_PER_TASK :][:QUANTIZERS_PER_TASK]
        at = (self.nodes, self.lists, self.scattered, part, mine, self.lists_joined, self.keep_of)
        held = gather_partition(*at)
        multiplier = Multiplier(self.device)
        found, pivots = self._unique(held, multiplier)
        absent = pivots[~np.isin(pivots, held.numbers)]
        names = np.concatenate([held.numbers, absent])
        reducer = Reducer(self.nodes, self.keep_of, self.threshold, names)
        hub, member, similarity = found.hub
        by_name = np.argsort(names, kind="stable")
        center = by_name[np.searchsorted(names, pivots[hub], sorter=by_name)] if len(hub) else hub
        apart = center != member
        if reducer.forest is not None:
            reducer.forest.add(center[apart], member[apart], similarity[apart])
        join = Join(self.threshold, reducer.all, multiplier)
        x = all_rows(held.values)
        is_teller = np.full(len(held.numbers), part == 0)
        if self.scattered is None:
            for slot, number in enumerate(mine):
                self._meet(join, x, held, found, number, 0, slot)
        else:
            is_stored = self._meet(join, x, held, found, self.numbers[0], part, 0)
            is_teller = is_stored if self.numbers[0] == 0 else np.zeros(len(held.numbers), np.bool_)
        silent = ~is_teller[member]
        writer.write(edge_table(_without(reducer.edges(), names[member[silent]], names[center[silent]])), GROUP_ROWS)
        lead, equal, similarity = found.equal
        told = is_teller[equal]
        edges = held.numbers[lead[told]], held.numbers[equal[told]], similarity[told]
        writer.write(edge_table(edges), GROUP_ROWS)

    def _unique(self, held: Held, multiplier: Multiplier) -> tuple[Unique, Int64]:
        """What takes part in the join, and the pivots of hubs. With references everything does."""
        if self.keep_of == "forest":
            pivots, centers = read_sample(self.hubs)
            return unique(held.values, centers, self.threshold, multiplier), pivots
        rows = np.flatnonzero(comparable(held.values, self.threshold))
        nothing = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32)
        return Unique(rows, np.full(len(rows), -1, np.int32), nothing, nothing), np.zeros(0, np.int64)

    def _meet(self, join: Join, x: Rows, held: Held, found: Unique, number: int, partition: int, slot: int) -> Bool:
        """Join inside one partition of quantizer `number`, whose lists are the slot-th held; what is stored there."""
        layout = read_layout(self.layout, number)
        lists = held.lists[:, slot * self.lists_joined : (slot + 1) * self.lists_joined]
        home = home_cell(lists, content_hash(held.values), layout)
        is_stored = layout.partition[home] == partition
        if self.keep_of == "best":
            is_stored &= held.numbers >= self.nodes.num_pool
        home[~is_stored] = -1
        # What is stored by cell, then visitors, near ones together.
        place = np.where(is_stored, home, lists[:, 0])[found.rows]
        order = np.lexsort((place, ~is_stored[found.rows]))
        at, ball = found.rows[order], found.ball[order]
        home = home[at]
        starts = np.searchsorted(home[: int((home >= 0).sum())], np.arange(len(layout.partition) + 1))
        wanted = layout.partition == partition
        guests = visitors(lists[at], home, layout.first_cell, layout.num_cells, wanted)
        join_cells(join, replace(x.take(at), ball=ball), starts, *guests, among=self.keep_of != "best")
        stored: Bool = is_stored
        return stored


def _without(edges: Edges, members: Int64, pivots: Int64) -> Edges:
    """`edges` but those between a member and its pivot."""
    if not len(members):
        return edges
    order = np.argsort(members, kind="stable")
    members, pivots = members[order], pivots[order]
    a, b, similarity = edges
    dropped = np.zeros(len(a), np.bool_)
    for end, other in ((a, b), (b, a)):
        place = np.minimum(np.searchsorted(members, end), len(members) - 1)
        dropped |= (members[place] == end) & (pivots[place] == other)
    return a[~dropped], b[~dropped], similarity[~dropped]


def _columns(table: pa.Table, dim: int) -> tuple[Int64, Float16, Int32]:
    """Columns of a scattered table as arrays."""
    column = table["vector"].combine_chunks()
    values = np.frombuffer(column.buffers()[1], np.float16)[column.offset * dim :][: table.num_rows * dim]
    return table["number"].to_numpy(), values.reshape(table.num_rows, dim), matrix(table, "lists")
