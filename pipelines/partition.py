"""Step `pairs` of the partitioned join where vectors travel: what one partition of one quantizer finds.

A task holds its partition: vectors and codes (3 d bytes a vector), 128 bytes a vector for the forest, and four for each
visit. Its time grows with the vectors met: visits times the vectors stored in a cell.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation.hubs import content_hash
from curation.join import Join, Members, Unique, comparable, join_cells, unique, visitors
from curation.layout import home_cell
from curation.partwise import matrix, unpacked
from curation.products import Multiplier
from curation.rows import all_rows
from curation.shards import GROUP_ROWS, PartWriter, ShardSet
from pipelines.join import DeviceStep, PairsStep, edge_table, read_sample, without
from pipelines.partitioned import read_layout

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
Float16 = npt.NDArray[np.float16]
Bool = npt.NDArray[np.bool_]


@dataclass
class Held:
    """The vectors of a partition: numbers int64 [n], ascending; stored values; lists int32 [n, m]."""

    numbers: Int64
    values: Float16
    lists: Int32

    @cached_property
    def hashes(self) -> npt.NDArray[np.uint64]:
        """Of the stored values, uint64 [n]."""
        return content_hash(self.values)


def gather_partition(scattered: str, part: int, dim: int, lists_joined: int) -> Held:
    """What travelled to partition `part`."""
    pieces = [_columns(table) for table in ShardSet(scattered).gather(part)]
    rows = sum(len(numbers) for numbers, _, _ in pieces)
    held = Held(np.empty(rows, np.int64), np.empty((rows, dim), np.float16), np.empty((rows, lists_joined), np.int32))
    start = 0
    while pieces:  # let go of one by one: all of them twice would be too much
        numbers, values, lists = pieces.pop(0)
        stop = start + len(numbers)
        held.numbers[start:stop], held.values[start:stop], held.lists[start:stop] = numbers, values, lists
        start = stop
    return held


@dataclass
class PartitionStep(PairsStep, DeviceStep):
    """Part p: the pairs in partition p of quantizer `number`, reduced.

    What was scattered is no longer needed once all parts are done.
    """

    hubs: str
    layout: str
    scattered: str
    number: int
    lists_joined: int
    device: str = "cpu"

    def num_parts(self) -> int:
        return read_layout(self.layout, self.number).num_partitions

    def frees(self) -> list[str]:
        return [self.scattered]

    def write_part(self, part: int, writer: PartWriter) -> None:
        held = gather_partition(self.scattered, part, self.nodes.vectors.dim, self.lists_joined)
        multiplier = Multiplier(self.device)
        found, pivots = self._unique(held, multiplier)
        absent = pivots[~np.isin(pivots, held.numbers)]
        names = np.concatenate([held.numbers, absent])
        reducer = self.reducer(names)
        hub, member, similarity = found.hub
        by_name = np.argsort(names, kind="stable")
        center = by_name[np.searchsorted(names, pivots[hub], sorter=by_name)] if len(hub) else hub
        apart = center != member
        center, member, similarity = center[apart], member[apart], similarity[apart]
        if reducer.forest is not None:
            reducer.forest.add(center, member, similarity)
        is_stored = self._meet(Join(self.threshold, reducer.all, multiplier), held, found, part)
        # What is stored here tells, under the first quantizer, what stands for it.
        is_teller = is_stored if self.number == 0 else np.zeros(len(is_stored), np.bool_)
        silent = ~is_teller[member]
        known = names[center[silent]], names[member[silent]], similarity[silent]
        writer.write(edge_table(without(reducer.edges(), known)), GROUP_ROWS)
        lead, equal, similarity = found.equal
        told = is_teller[equal]
        edges = held.numbers[lead[told]], held.numbers[equal[told]], similarity[told]
        writer.write(edge_table(edges), GROUP_ROWS)

    def _unique(self, held: Held, multiplier: Multiplier) -> tuple[Unique, Int64]:
        """What takes part in the join, and the pivots of hubs. With references everything does."""
        if self.keep_of == "forest":
            pivots, centers = read_sample(self.hubs)
            return unique(held.values, centers, self.threshold, multiplier, held.hashes), pivots
        rows = np.flatnonzero(comparable(held.values, self.threshold))
        nothing = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32)
        return Unique(rows, np.full(len(rows), -1, np.int32), nothing, nothing), np.zeros(0, np.int64)

    def _meet(self, join: Join, held: Held, found: Unique, part: int) -> Bool:
        """Join inside the partition; what is stored there."""
        layout = read_layout(self.layout, self.number)
        lists = held.lists
        home = home_cell(lists, held.hashes, layout)
        is_stored = layout.partition[home] == part
        if self.keep_of == "best":
            is_stored &= held.numbers >= self.nodes.num_pool
        home[~is_stored] = -1
        # What is stored by cell, then visitors, near ones together.
        place = np.where(is_stored, home, lists[:, 0])[found.rows]
        order = np.lexsort((place, ~is_stored[found.rows]))
        at, ball = found.rows[order], found.ball[order]
        home = home[at]
        num_stored = int((home >= 0).sum())
        offsets = np.searchsorted(home[:num_stored], np.arange(len(layout.partition) + 1))
        stored = Members(offsets, np.arange(num_stored, dtype=np.int32))
        visiting = visitors(lists[at], home, layout.first_cell, layout.num_cells, layout.partition == part)
        x = replace(all_rows(held.values).take(at), ball=ball).sketched(self.threshold)
        join_cells(join, x, stored, visiting, among=self.keep_of != "best")
        is_home: Bool = is_stored
        return is_home


def _columns(table: pa.Table) -> tuple[Int64, Float16, Int32]:
    """Columns of a scattered table as arrays."""
    return table["number"].to_numpy(), unpacked(table), matrix(table, "lists")
