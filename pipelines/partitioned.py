"""Steps of the partitioned join: vectors meet only inside the lists of quantizers.

1. `quantizers`: part r fits quantizer r on the sample.
2. `lists`: under each quantizer the m nearest lists of each vector, best first. A vector is stored in the nearest and
   compared with all that is stored in any of them.

Where vectors lie flat on this machine, `pipelines.in_place` then joins list by list. Else they travel:

3. `layout`: part r arranges the lists of quantizer r in partitions of bounded size, near lists together.
4. `scatter`, for each quantizer: every vector goes once to each partition that it is wanted in, and
   `pipelines.partition` joins within each.

Misses of independent quantizers multiply. 1 holds its part of the sample, 2 the quantizers and one block, 3 two numbers
a list, 4 one block. Time of 2 grows with vectors times centroids looked at.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation.codes import encode
from curation.hubs import balls
from curation.layout import Layout, destinations, plan_layout
from curation.partwise import fixed_size_lists, matrix, packed
from curation.products import Multiplier
from curation.quantizer import SEARCHED, Quantizer, fit_quantizer, nearest_lists
from curation.scoring import norms
from curation.shards import GROUP_ROWS, PartWriter, ShardSet
from pipelines.executor import Needs
from pipelines.join import DeviceStep, Keep, read_sample
from pipelines.nodes import Nodes
from pipelines.unit import Step

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
Float16 = npt.NDArray[np.float16]

LIST_ROWS = 65_536
"""Nodes of a block that is given lists, or scattered, at a time."""
POINTS_PER_LIST = 10
"""Sampled vectors that a list is fitted on."""
LAYOUT_SAMPLE = 65_536
"""Nodes whose lists tell how vectors spread over partitions."""
LISTS_RANKED = 16
"""At least so many lists are ranked for each one that is joined: where many are, a few cells do not have the nearest.
All are where all are joined."""
LEAST_RANKED = 2_048
"""Lists that are ranked at least, or all there are: so few are ranked as fast as those of chosen cells."""


def lists_type(count: int) -> pa.DataType:
    """The type of a column of so many lists a vector."""
    return pa.list_(pa.field("item", pa.int32(), nullable=False), count)


@dataclass
class QuantizersStep(Step):
    """Part r: the centroids of quantizer r; coarse cells first (no `cell`), then lists, each with its cell.

    Each is fitted on vectors of its own, where there are enough: on the same ones quantizers have more of their borders
    in common, and twice as many pairs are missed.

    Members of hubs are left out of the sample, or most lists would lie in one hub; so are lists beyond what is left.
    """

    sample: str
    num_lists: int
    quantizers: int
    seed: int
    hubs: str | None = None

    def schema(self) -> pa.Schema:
        dim = matrix(ShardSet(self.sample).read_rows(0, 0, 1)).shape[1]
        item = pa.field("item", pa.float32(), nullable=False)
        return pa.schema([("cell", pa.int32()), ("centroid", pa.list_(item, dim))])

    def num_parts(self) -> int:
        return self.quantizers

    def write_part(self, part: int, writer: PartWriter) -> None:
        enough = ShardSet(self.sample).num_rows >= POINTS_PER_LIST * self.num_lists * self.quantizers
        _, values = read_sample(self.sample, part, self.quantizers) if enough else read_sample(self.sample)
        if self.hubs is not None:
            _, centers = read_sample(self.hubs)
            values = np.concatenate([values[balls(values, centers, Multiplier())[0] < 0], centers])
            values = values[norms(values) > 0]
        num_lists = min(self.num_lists, max(1, len(values)))
        found = fit_quantizer(values, num_lists, seed=self.seed + part, threads=1)
        schema = self.schema()
        cells = np.repeat(np.arange(len(found.coarse), dtype=np.int32), np.diff(found.starts))
        for cell, centroids in ((pa.nulls(len(found.coarse), pa.int32()), found.coarse), (pa.array(cells), found.fine)):
            columns = [cell, fixed_size_lists(centroids, schema.field("centroid").type)]
            writer.write(pa.table(columns, schema=schema), GROUP_ROWS)


def read_quantizer(uri: str, number: int) -> Quantizer:
    """Quantizer `number` of a set that `QuantizersStep` made."""
    table = ShardSet(uri).read(number)
    centroids = matrix(table, "centroid")
    num_coarse = table["cell"].null_count
    cells = table["cell"].slice(num_coarse).to_numpy()
    starts = np.searchsorted(cells, np.arange(num_coarse + 1))
    return Quantizer(centroids[:num_coarse], centroids[num_coarse:], starts)


@dataclass
class ListsStep(DeviceStep):
    """One row a node, those that take no part included (all lists -1): its lists under each quantizer, best first."""

    nodes: Nodes
    quantizers: str
    lists_joined: int
    device: str = "cpu"

    @property
    def needs(self) -> Needs:
        return replace(super().needs, resident=True)

    @cached_property
    def _quantizers(self) -> list[Quantizer]:
        return [read_quantizer(self.quantizers, number) for number in range(ShardSet(self.quantizers).num_parts)]

    def schema(self) -> pa.Schema:
        numbers = range(ShardSet(self.quantizers).num_parts)
        return pa.schema([(lists_column(number), lists_type(self.lists_joined)) for number in numbers])

    def num_parts(self) -> int:
        return -(-len(self.nodes) // LIST_ROWS)

    def write_part(self, part: int, writer: PartWriter) -> None:
        start, stop = part * LIST_ROWS, min((part + 1) * LIST_ROWS, len(self.nodes))
        numbers, values = self.nodes.read(start, stop)
        codes = encode(values)
        columns = []
        for quantizer in self._quantizers:
            lists = np.full((stop - start, self.lists_joined), -1, np.int32)
            probes = probes_of(quantizer, self.lists_joined)
            lists[numbers - start] = nearest_lists(codes, quantizer, self.lists_joined, probes, self.device)
            columns.append(fixed_size_lists(lists, lists_type(self.lists_joined)))
        writer.write(pa.table(columns, schema=self.schema()), GROUP_ROWS)


def lists_column(number: int) -> str:
    """The column of a set of lists that is of quantizer `number`."""
    return f"lists_{number}"


def probes_of(quantizer: Quantizer, lists_joined: int) -> int:
    """Coarse cells whose lists are ranked."""
    num_coarse = len(quantizer.coarse)
    enough = -(-max(LISTS_RANKED * lists_joined, LEAST_RANKED) * num_coarse // len(quantizer.fine))
    return min(num_coarse, max(1, num_coarse // SEARCHED, enough))


def read_lists(uri: str, part: int, number: int) -> Int32:
    """Lists under quantizer `number` of the nodes of a block, int32 [rows, m]."""
    lists: Int32 = matrix(ShardSet(uri).read(part, [lists_column(number)]), lists_column(number))
    return lists


@dataclass
class LayoutStep(Step):
    """Part r: of each list of quantizer r the partitions of its cells."""

    nodes: Nodes
    quantizers: str
    lists: str
    partition_rows: int

    def schema(self) -> pa.Schema:
        return pa.schema([("partitions", pa.list_(pa.int32()))])

    def num_parts(self) -> int:
        return ShardSet(self.quantizers).num_parts

    def write_part(self, part: int, writer: PartWriter) -> None:
        quantizer = read_quantizer(self.quantizers, part)
        stored = np.zeros(len(quantizer.fine), np.int64)
        sample, total = [], 0
        every = -(-len(self.nodes) // LAYOUT_SAMPLE)
        for block in range(ShardSet(self.lists).num_parts):
            lists = read_lists(self.lists, block, part)
            lists = lists[lists[:, 0] >= 0]
            stored += np.bincount(lists[:, 0], minlength=len(stored))
            sample.append(lists[::every])
            total += len(lists)
        found = plan_layout(quantizer, stored, np.concatenate(sample), total, self.partition_rows)
        offsets = np.concatenate([[0], np.cumsum(found.num_cells)])
        # Cells of a list follow one another, lists do not: gather each list's cells.
        cells = np.repeat(found.first_cell - offsets[:-1], found.num_cells) + np.arange(offsets[-1])
        column = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(found.partition[cells]))
        writer.write(pa.table([column], schema=self.schema()), GROUP_ROWS)


def read_layout(uri: str, number: int) -> Layout:
    """The layout of quantizer `number`, its cells numbered list by list."""
    column = ShardSet(uri).read(number)["partitions"].combine_chunks()
    offsets = column.offsets.to_numpy().astype(np.int64)
    partition: Int32 = column.values.to_numpy()
    return Layout(offsets[:-1], np.diff(offsets), partition, int(partition.max(initial=-1)) + 1)


@dataclass
class ScatterStep(Step):
    """Part k: the vectors of block k, once for each partition of one quantizer that they are wanted in."""

    nodes: Nodes
    lists: str
    layout: str
    number: int
    lists_joined: int
    keep_of: Keep

    def schema(self) -> pa.Schema:
        return pa.schema(
            [
                ("number", pa.int64()),
                ("vector", pa.binary(2 * self.nodes.vectors.dim)),
                ("lists", lists_type(self.lists_joined)),
            ]
        )

    def num_parts(self) -> int:
        return ShardSet(self.lists).num_parts

    def write_part(self, part: int, writer: PartWriter) -> None:
        numbers, values, lists = self._block(part)
        rows, partitions = destinations(lists, read_layout(self.layout, self.number))
        columns = [numbers[rows], packed(values[rows]), fixed_size_lists(lists[rows], lists_type(self.lists_joined))]
        writer.write_buckets(pa.table(columns, schema=self.schema()), partitions.astype(np.int64))

    def _block(self, block: int) -> tuple[Int64, Float16, Int32]:
        """Numbers, vectors and lists of the block's nodes that take part.

        Where only images are compared with references, references are stored and visit no list but their own.
        """
        start, stop = block * LIST_ROWS, min((block + 1) * LIST_ROWS, len(self.nodes))
        numbers, values = self.nodes.read(start, stop)
        lists = read_lists(self.lists, block, self.number)[numbers - start]
        if self.keep_of == "best":
            lists[numbers >= self.nodes.num_pool, 1:] = -1
        return numbers, values, lists
