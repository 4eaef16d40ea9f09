"""Step `pairs` of the partitioned join where vectors lie flat on this machine (`pipelines.flat`): nothing travels.

A task compares what is stored in a range of one quantizer's lists. It holds 60 bytes a node to know whom it compares, 8
bytes for each visit, and the forest, 128 bytes for each node that it meets; vectors and codes its worker maps once.
Its time grows with visits times the vectors stored in a list.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from curation.forest import Edges
from curation.join import Join, Members, join_cells
from curation.products import Multiplier
from curation.scoring import compiled
from curation.shards import GROUP_ROWS, PartWriter, ShardSet
from pipelines.executor import Needs
from pipelines.flat import Flat, read_leads
from pipelines.join import DeviceStep, PairsStep, edge_table, read_sample, without
from pipelines.partitioned import read_lists

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
Bool = npt.NDArray[np.bool_]
Found = tuple[Int32, Int32]

VISITS = 1 << 25
"""Visits of one task, about: vectors times lists joined, over the ranges that lists are cut into. More would crowd
vectors out of memory, fewer read the lists more often."""


@dataclass
class InPlaceStep(PairsStep, DeviceStep):
    """Part r * ranges + k: the pairs that meet in the k-th range of the lists of quantizer r, reduced.

    Part 0 also tells the edges of hubs and of equal vectors.
    """

    hubs: str
    flat: str
    leads: str
    lists: str
    num_lists: int
    quantizers: int
    lists_joined: int
    device: str = "cpu"

    @property
    def needs(self) -> Needs:
        return replace(super().needs, resident=True)

    @cached_property
    def _flat(self) -> Flat:
        return Flat(self.flat)

    @cached_property
    def _takes_part(self) -> Bool:
        takes_part: Bool = read_leads(self.leads)[0] == np.arange(len(self._flat))
        return takes_part

    def _ranges(self) -> int:
        return -(-len(self.nodes) * self.lists_joined // VISITS)

    def num_parts(self) -> int:
        return self.quantizers * self._ranges()

    def frees(self) -> list[str]:
        return [self.flat]

    def write_part(self, part: int, writer: PartWriter) -> None:
        number, place = divmod(part, self._ranges())
        first, last = (self.num_lists * p // self._ranges() for p in (place, place + 1))
        stored, visiting = self._members(number, first, last)
        hub = self._hub_edges()
        met, name = _named(len(self._flat), stored.rows, visiting.rows, hub[0])
        reducer = self.reducer(met)
        if reducer.forest is not None:
            inside = name[hub[1]] >= 0
            reducer.forest.add(name[hub[0][inside]], name[hub[1][inside]], hub[2][inside])
        join = Join(self.threshold, reducer.all, Multiplier(self.device))
        join_cells(join, replace(self._flat.rows, nodes=name), stored, visiting, among=self.keep_of != "best")
        writer.write(edge_table(without(reducer.edges(), hub)), GROUP_ROWS)
        if part == 0:
            lead, similarity = read_leads(self.leads)
            equal = np.flatnonzero((lead >= 0) & ~self._takes_part)
            for edges in (hub, (lead[equal], equal, similarity[equal])):
                writer.write(edge_table(edges), GROUP_ROWS)

    def _hub_edges(self) -> Edges:
        """(pivot, member, similarity) of the members of hubs, other than pivots."""
        ball = self._flat.rows.ball
        member = np.flatnonzero(self._takes_part & (ball >= 0))
        if not len(member):
            return member, member, np.zeros(0, np.float32)
        pivot = read_sample(self.hubs)[0][ball[member]]
        apart = pivot != member
        return pivot[apart], member[apart], self._flat.column("near")[member[apart]]

    def _members(self, number: int, first: int, last: int) -> tuple[Members, Members]:
        """What is stored in lists [first, last) of quantizer `number`, and what visits them.

        Where references alone are compared with, they alone are stored, and they visit none.
        """
        pieces: tuple[list[Found], list[Found]] = ([], [])
        images = self.nodes.num_pool if self.keep_of == "best" else 0
        start = 0
        for block in range(ShardSet(self.lists).num_parts):
            lists = read_lists(self.lists, block, number)
            room = np.empty((4, lists.size), np.int32)
            among = self.keep_of != "best"
            own, guests = _find_loop(lists, first, last, start, images, among, self._takes_part[start:], *room)
            pieces[0].append((room[0, :own].copy(), room[1, :own].copy()))
            pieces[1].append((room[2, :guests].copy(), room[3, :guests].copy()))
            start += len(lists)
        stored, visiting = (_by_list(found, last - first) for found in pieces)
        return stored, visiting


def _named(num_nodes: int, *met: npt.NDArray[np.integer]) -> tuple[Int64, Int32]:
    """All nodes that are met, ascending, and each node's place among them, int32 [num_nodes]; -1 for the others."""
    name = np.full(num_nodes, -1, np.int32)
    for nodes in met:
        name[nodes] = 0
    numbers = np.flatnonzero(name == 0)
    name[numbers] = np.arange(len(numbers), dtype=np.int32)
    return numbers, name


def _by_list(found: list[Found], num_lists: int) -> Members:
    """Rows by list, ascending, from pieces of (row, list)."""
    counts = np.zeros(num_lists, np.int64)
    for _, lists in found:
        counts += np.bincount(lists, minlength=num_lists)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    place, rows = offsets[:-1].copy(), np.empty(int(offsets[-1]), np.int32)
    while found:  # let go of one by one
        _place_loop(*found.pop(0), place, rows)
    return Members(offsets, rows)


@compiled
def _find_loop(
    lists: Int32,
    first: int,
    last: int,
    start: int,
    images: int,
    among: bool,
    takes_part: Bool,
    own_row: Int32,
    own_list: Int32,
    guest_row: Int32,
    guest_list: Int32,
) -> tuple[int, int]:
    """Find what rows start, start + 1, ... have to do with lists [first, last); returns how many (own, guests).

    With `among` a row is stored in its nearest list and visits the others. Without, rows below `images` visit all
    theirs, and the others are stored.
    """
    own, guests = 0, 0
    for row in range(lists.shape[0]):
        if not takes_part[row]:
            continue
        is_image = start + row < images
        for k in range(lists.shape[1]):
            if not first <= lists[row, k] < last:
                continue
            if k == 0 and not is_image:
                own_row[own], own_list[own] = start + row, lists[row, k] - first
                own += 1
            elif is_image or among:
                guest_row[guests], guest_list[guests] = start + row, lists[row, k] - first
                guests += 1
    return own, guests


@compiled
def _place_loop(row: Int32, lists: Int32, place: Int64, rows: Int32) -> None:
    """Counting sort: `place` is where the next row of each list goes."""
    for t in range(row.shape[0]):
        rows[place[lists[t]]] = row[t]
        place[lists[t]] += 1
