"""Steps of a join: pairs of near-copies among nodes, reduced to what components and verdicts need.

1. `sample`: the vectors of lowest keyed hash, which hubs and quantizers are found on.
2. `hubs`: pivots of dense places (`curation.hubs`).
3. `pairs`: here the exact join, a part for each block of nodes; `pipelines.partitioned` and `pipelines.faiss_join` have
   the others. Every part reduces its own pairs before it writes them.

The exact join holds a block with its codes (3 d bytes a vector), a piece of another, and 128 bytes a node for the
forest; time grows with the square of the nodes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation.forest import Edges, Forest
from curation.hashing import keyed_hash
from curation.hubs import find_pivots
from curation.join import Best, Join, comparable, unique
from curation.partwise import fixed_size_lists, matrix
from curation.products import Multiplier
from curation.rows import Rows, rows_of
from curation.schemas import embeddings
from curation.shards import GROUP_ROWS, PartWriter, ShardSet
from pipelines.executor import Needs
from pipelines.nodes import Nodes
from pipelines.unit import Step
from pipelines.vectors import BLOCK_ROWS

Int64 = npt.NDArray[np.int64]
Float16 = npt.NDArray[np.float16]

Keep = Literal["forest", "best", "both"]
"""What is kept of the pairs: a maximum spanning forest; each image's best reference; or both."""

EDGES = pa.schema([("a", pa.int64()), ("b", pa.int64()), ("similarity", pa.float32())])

JOIN_ROWS = 65_536
"""Nodes of a block of the exact join at most."""
LEAST_JOIN_ROWS = 8_192
PIECE_ROWS = 16_384
"""Nodes of another block that are held at once."""
JOIN_BLOCKS = 8
"""Blocks there are at least, as far as they do not become too small: what workers share."""
SAMPLE_BLOCK = 16 * BLOCK_ROWS
SAMPLE_PIECE = 8_192
"""Rows of a sample that are read at once, where not all are taken."""
HUB_SAMPLE = 32_768
"""Sampled vectors that hubs are looked for in."""


@dataclass
class SampleStep(Step):
    """The `size` nodes of lowest keyed hash of their image ids (all, where there are fewer), by number."""

    nodes: Nodes
    size: int
    seed: int
    purpose: str

    def schema(self) -> pa.Schema:
        return pa.schema([("number", pa.int64()), embeddings(self.nodes.vectors.dim).field("embedding")])

    def num_parts(self) -> int:
        return 1

    def write_part(self, part: int, writer: PartWriter) -> None:
        schema = self.schema()
        numbers = self._drawn()
        for start in range(0, len(self.nodes), SAMPLE_BLOCK):
            first, last = np.searchsorted(numbers, [start, start + SAMPLE_BLOCK])
            inside = numbers[first:last]
            if len(inside):
                values = self.nodes.vectors.read(int(inside[0]), int(inside[-1]) + 1)[inside - inside[0]]
                columns = [pa.array(inside), fixed_size_lists(values, schema.field("embedding").type)]
                writer.write(pa.table(columns, schema=schema), GROUP_ROWS)

    def _drawn(self) -> Int64:
        """Numbers of the sampled nodes, ascending; an image that two pools hold is drawn for the first one first."""
        draws, numbers = np.zeros(0, np.uint64), np.zeros(0, np.int64)
        most = np.uint64(2**64 - 1)
        for start in range(0, len(self.nodes), SAMPLE_BLOCK):
            stop = min(start + SAMPLE_BLOCK, len(self.nodes))
            chosen = self.nodes.chosen(start, stop)
            draw = keyed_hash(self.seed, self.purpose, self.nodes.vectors.words(start, stop)[chosen - start])
            low = draw <= most
            draws, numbers = np.concatenate([draws, draw[low]]), np.concatenate([numbers, chosen[low]])
            if len(draws) > 2 * self.size:
                lowest = np.lexsort((numbers, draws))[: self.size]
                draws, numbers = draws[lowest], numbers[lowest]
                most = draws[-1]
        return np.sort(numbers[np.lexsort((numbers, draws))[: self.size]])


def read_sample(uri: str, first: int = 0, every: int = 1) -> tuple[Int64, Float16]:
    """Numbers int64 [n] and vectors float16 [n, dim] of a set of sampled, or of pivotal, nodes.

    Of all these, every so many from the `first` on; what is between them is not held.
    """
    taken, seen = [ShardSet(uri).read_rows(0, 0, 0)], 0
    for table in ShardSet(uri).stream(0, rows=SAMPLE_PIECE):
        taken.append(table.take(np.arange((first - seen) % every, table.num_rows, every)))
        seen += table.num_rows
    numbers, values = (np.concatenate(each) for each in zip(*((t["number"], matrix(t)) for t in taken), strict=True))
    return numbers, values


@dataclass
class HubsStep(Step):
    """The pivots of the hubs: nodes and vectors."""

    sample: str

    def schema(self) -> pa.Schema:
        return ShardSet(self.sample).read_rows(0, 0, 0).schema

    def num_parts(self) -> int:
        return 1

    def write_part(self, part: int, writer: PartWriter) -> None:
        every = -(-ShardSet(self.sample).num_rows // HUB_SAMPLE) or 1
        numbers, values = read_sample(self.sample, 0, every)
        pivots, schema = find_pivots(values, Multiplier()), self.schema()
        columns = [pa.array(numbers[pivots]), fixed_size_lists(values[pivots], schema.field("embedding").type)]
        writer.write(pa.table(columns, schema=schema), GROUP_ROWS)


def edge_table(edges: Edges) -> pa.Table:
    """Edges as a table of schema EDGES."""
    return pa.table([pa.array(column) for column in edges], schema=EDGES)


def stream_edges(uris: list[str]) -> Iterator[Edges]:
    """All edges of the sets at `uris`, in pieces."""
    for uri in uris:
        edges = ShardSet(uri)
        for part in range(edges.num_parts):
            for table in edges.stream(part, rows=GROUP_ROWS):
                a, b, similarity = (table[name].to_numpy() for name in EDGES.names)
                yield a, b, similarity


def without(edges: Edges, hub: Edges) -> Edges:
    """`edges` but those of `hub`, (pivot, member, similarity): each member has one."""
    pivots, members, _ = hub
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


class Reducer:
    """What one task keeps of its pairs, by the nodes' numbers."""

    def __init__(self, nodes: Nodes, keep: Keep, threshold: float, numbers: Int64) -> None:
        """`numbers` int64 [n], ascending or not, name the nodes 0 .. n-1 of this task."""
        self._numbers = numbers
        self.forest = Forest(len(numbers), threshold, numbers) if keep != "best" else None
        self.best: Best | None = None
        if keep != "forest":
            is_reference = numbers >= nodes.num_pool
            rank = np.zeros(len(numbers), np.int64)
            rank[is_reference] = nodes.reference_ranks()[numbers[is_reference] - nodes.num_pool]
            self.best = Best(len(numbers), threshold, is_reference, rank)
        self.all = [reduction for reduction in (self.forest, self.best) if reduction is not None]

    def edges(self) -> Edges:
        """What was kept: of every edge the smaller number first."""
        found = [self.forest.edges()] if self.forest else []
        if self.best:
            a, b, similarity = self.best.edges()
            found.append((self._numbers[a], self._numbers[b], similarity))
        a, b, similarity = (np.concatenate(column) for column in zip(*found, strict=True))
        return a, b, similarity


class DeviceStep(Step):
    """A step that multiplies on its `device`.

    Each subclass lists `device` itself, for a field with a default must come after those without.
    """

    device: str

    @property
    def needs(self) -> Needs:
        return Needs(gpus=1 if self.device == "cuda" else 0)


@dataclass
class PairsStep(Step):
    """Writes pairs of `nodes` above `threshold`: of each part's, what `keep_of` says."""

    nodes: Nodes
    threshold: float
    keep_of: Keep

    def schema(self) -> pa.Schema:
        return EDGES

    def reducer(self, numbers: Int64) -> Reducer:
        """What a part keeps of the pairs among nodes `numbers`."""
        return Reducer(self.nodes, self.keep_of, self.threshold, numbers)


def block_rows(num_nodes: int) -> int:
    """Nodes of a block of the exact join."""
    return int(np.clip(-(-num_nodes // JOIN_BLOCKS), LEAST_JOIN_ROWS, JOIN_ROWS))


@dataclass
class ExactStep(PairsStep, DeviceStep):
    """Part i: block i against itself and half of the others, around in a circle; with keep `best`, pools' blocks alone
    against all blocks of references. Without `hubs` no two vectors are spared."""

    hubs: str | None
    device: str = "cpu"

    def _blocks(self, start: int, stop: int) -> list[tuple[int, int]]:
        rows = block_rows(len(self.nodes))
        return [(first, min(first + rows, stop)) for first in range(start, stop, rows)]

    def num_parts(self) -> int:
        return len(self._blocks(0, self.nodes.num_pool if self.keep_of == "best" else len(self.nodes)))

    def write_part(self, part: int, writer: PartWriter) -> None:
        multiplier = Multiplier(self.device)
        reducer = self.reducer(np.arange(len(self.nodes)))
        join = Join(self.threshold, reducer.all, multiplier)
        if self.keep_of == "best":
            own = self._rows(*self._blocks(0, self.nodes.num_pool)[part], multiplier)
            for span in self._blocks(self.nodes.num_pool, len(self.nodes)):
                self._meet(join, own, *span)
        else:
            spans = self._blocks(0, len(self.nodes))
            own = self._rows(*spans[part], multiplier, reducer.forest)
            join.among(own)
            for other in _others(part, len(spans)):
                self._meet(join, own, *spans[other])
        writer.write(edge_table(reducer.edges()), GROUP_ROWS)

    def _meet(self, join: Join, own: Rows, start: int, stop: int) -> None:
        """Compare `own` with another block, of which a piece is held at a time."""
        for first in range(start, stop, PIECE_ROWS):
            join.between(own, self._rows(first, min(first + PIECE_ROWS, stop), join.multiplier))

    def _rows(self, start: int, stop: int, multiplier: Multiplier, forest: Forest | None = None) -> Rows:
        """What is to be compared of a block; edges that stand for the rest go to `forest`."""
        numbers, values = self.nodes.read(start, stop)
        if self.keep_of != "forest":
            inside = comparable(values, self.threshold)
            return rows_of(numbers[inside], values[inside])
        none = np.zeros(0, np.int64), values[:0]
        pivots, centers = none if self.hubs is None else read_sample(self.hubs)
        found = unique(values, centers, self.threshold, multiplier)
        if forest is not None:
            lead, equal, similarity = found.equal
            forest.add(numbers[lead], numbers[equal], similarity)
            ball, member, similarity = found.hub
            forest.add(pivots[ball], numbers[member], similarity)
        return rows_of(numbers[found.rows], values[found.rows], found.ball)


def _others(block: int, num_blocks: int) -> Iterator[int]:
    """Blocks that part `block` compares its own with: each pair of blocks meets in one part, all parts alike long."""
    for step in range(1, num_blocks // 2 + 1):
        other = (block + step) % num_blocks
        if 2 * step < num_blocks or block < other:
            yield other
