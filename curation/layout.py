"""Layout of a quantizer's lists into partitions, and the partitions that each vector travels to.

A vector is stored in one cell of its nearest list and looks for its like in all cells of its m nearest lists. So lists
that are near each other share a partition, where a vector that visits several of them is held once.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from curation.errors import ConfigError
from curation.quantizer import Quantizer
from curation.scoring import compiled, cosine_pairs

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]
UInt64 = npt.NDArray[np.uint64]

CELLS_PER_PARTITION = 4
"""A cell stores at most this fraction of a partition's rows, so that cuts between cells can follow the load."""


@dataclass(frozen=True)
class Layout:
    """Cells of each list, and the partition of each cell.

    Attributes:
        first_cell: of each list, int64 [C]; its cells follow one another.
        num_cells: of each list, int64 [C], at least 1.
        partition: of each cell, int32, never decreasing: a partition is a range of cells.
        num_partitions: how many there are; none is without cells.
    """

    first_cell: Int64
    num_cells: Int64
    partition: Int32
    num_partitions: int


def plan_layout(quantizer: Quantizer, stored: Int64, sample_lists: Int32, num_vectors: int, max_rows: int) -> Layout:
    """The fewest partitions of lists in `order_lists` that are expected to hold at most `max_rows` rows each.

    A partition holds the vectors that travel to it, each once: their number is estimated from a sample, and is at least
    what is stored there. Among layouts with as few partitions, the largest partition is made as small as can be. Lists
    that store more than a CELLS_PER_PARTITION-th of `max_rows` are split. A cell whose visitors alone are more than
    `max_rows` gets a partition to itself, which exceeds the bound: splitting further would not thin out the visitors.

    Args:
        quantizer: of C lists.
        stored: vectors stored in each list, int64 [C].
        sample_lists: the lists that each of a sample of the vectors visits, int32 [s, m], best first, -1 for none.
        num_vectors: that travel in all.
        max_rows: of a partition. One partition holds all where `num_vectors` is no more.

    Raises:
        ConfigError: no sample, or `max_rows` below 1.
    """
    if max_rows < 1:
        raise ConfigError(f"a partition cannot hold {max_rows} rows: set at least 1")
    if num_vectors <= max_rows:
        ones = np.ones(len(stored), dtype=np.int64)
        return Layout(np.arange(len(stored)), ones, np.zeros(len(stored), dtype=np.int32), 1)
    if not len(sample_lists):
        raise ConfigError(f"{num_vectors:,} vectors need several partitions, and no sample tells how they spread")
    order = order_lists(quantizer)
    num_cells = split_lists(stored, max(1, max_rows // CELLS_PER_PARTITION))
    first_cell = np.empty(len(stored), dtype=np.int64)
    first_cell[order] = np.cumsum(num_cells[order]) - num_cells[order]
    list_of_cell = np.repeat(order, num_cells[order])
    partition = _cut(list_of_cell, stored / num_cells, sample_lists, num_vectors / len(sample_lists), max_rows)
    return Layout(first_cell, num_cells, partition, int(partition[-1]) + 1)


def split_lists(stored: Int64, max_cell_rows: int) -> Int64:
    """Cells of each list, int64 [C]: at least 1, and as few as store `max_cell_rows` vectors each on average."""
    return np.maximum(-(-stored // max_cell_rows), 1)


def order_lists(quantizer: Quantizer) -> Int64:
    """All lists, int64 [C], near ones close to each other: coarse cells in order, and within each its lists in order.

    The scoring rule decides, so the order is the same on every machine.
    """
    order = []
    for c in order_near(quantizer.coarse):
        first, last = quantizer.starts[c], quantizer.starts[c + 1]
        order.append(first + order_near(quantizer.fine[first:last]))
    return np.concatenate(order)


def order_near(points: npt.NDArray[np.float32]) -> Int64:
    """Rows of `points` [n, d], int64 [n], near ones close to each other, by bisection between far ends.

    Points are sorted by how much nearer they are to one of two distant points than to the other; then each half is, on
    its own. A half starts at the point next to the half before it, and so do its halves.
    """
    done, left = [], [np.arange(len(points))]
    while left:
        rows = left.pop()
        if len(rows) < 3:
            done.append(rows)
            continue
        end = rows[_to(points, rows, rows[0]).argmin()]
        start = rows[_to(points, rows, end).argmin()]
        nearer = _to(points, rows, start) - _to(points, rows, end)
        rows = rows[np.argsort(-nearer, kind="stable")]
        left += [rows[len(rows) // 2 :], rows[: len(rows) // 2]]
    return np.concatenate(done)


def _to(points: npt.NDArray[np.float32], rows: Int64, row: int) -> npt.NDArray[np.float32]:
    """Similarity of some rows to one."""
    return cosine_pairs(points, rows, points, np.full(len(rows), row))


def _cut(list_of_cell: Int64, stored: Float64, sample_lists: Int32, weight: float, max_rows: int) -> Int32:
    """Partition of each cell, int32, as `plan_layout` tells.

    Args:
        list_of_cell: in the order of the cells.
        stored: vectors in each cell of each list, float64 [C].
        sample_lists: as `plan_layout` takes them; each row stands for `weight` vectors.
        max_rows: of a partition.
    """
    row, column = np.nonzero(sample_lists >= 0)
    lists = sample_lists[row, column]
    visitors = row[np.argsort(lists, kind="stable")]
    starts = np.concatenate(([0], np.cumsum(np.bincount(lists, minlength=len(stored)))))
    partition = np.empty(len(list_of_cell), dtype=np.int32)

    def fill(limit: int) -> int:
        last = np.full(len(sample_lists), -1, dtype=np.int64)
        return _fill_loop(list_of_cell, stored, starts, visitors, weight, float(limit), last, partition)

    fewest = fill(max_rows)
    low, high = 1, max_rows
    while low < high:
        middle = (low + high) // 2
        if fill(middle) <= fewest:
            high = middle
        else:
            low = middle + 1
    fill(high)
    return partition


@compiled
def _fill_loop(
    list_of_cell: Int64,
    stored: Float64,
    starts: Int64,
    visitors: Int64,
    weight: float,
    limit: float,
    last: Int64,
    partition: Int32,
) -> int:
    """Fill one partition after the other up to `limit` rows; returns how many. `last` is each visitor's last one."""
    now, held, rows, is_empty = 0, 0.0, 0, True
    for cell in range(list_of_cell.shape[0]):
        number = list_of_cell[cell]
        first, end = starts[number], starts[number + 1]
        new = 0
        for v in range(first, end):
            new += last[visitors[v]] != now
        if not is_empty and max(held + stored[number], (rows + new) * weight) > limit:
            now, held, rows, new = now + 1, 0.0, 0, end - first
        for v in range(first, end):
            last[visitors[v]] = now
        held, rows, is_empty = held + stored[number], rows + new, False
        partition[cell] = now
    return now + 1


def home_cell(lists: Int32, hashes: UInt64, layout: Layout) -> Int64:
    """The cell that stores each vector, int64 [n]: of its nearest list, drawn by a hash of its content.

    Args:
        lists: of each vector, int32 [n, m], best first; the first is never -1.
        hashes: uint64 [n]; equal vectors have equal ones.
        layout: of the lists.

    Raises:
        IndexError: a list that does not exist.
    """
    _check_lists(lists, layout)
    home = lists[:, 0]
    return layout.first_cell[home] + (hashes % layout.num_cells[home].astype(np.uint64)).astype(np.int64)


def destinations(lists: Int32, layout: Layout) -> tuple[Int64, Int32]:
    """The partitions that each vector travels to: those of all cells of its lists, its home cell among them.

    Args:
        lists: of each vector, int32 [n, m], best first; the first is never -1.
        layout: of the lists.

    Returns:
        row int64 [t] and partition int32 [t], each pair once, by (partition, row).

    Raises:
        IndexError: a list that does not exist.
    """
    _check_lists(lists, layout)
    counts = np.zeros(layout.num_partitions, dtype=np.int64)
    where = layout.first_cell, layout.num_cells, layout.partition
    _travel_loop(lists, *where, counts, np.empty(0, dtype=np.int64))
    rows = np.empty(counts.sum(), dtype=np.int64)
    _travel_loop(lists, *where, np.cumsum(counts) - counts, rows)
    return rows, np.repeat(np.arange(layout.num_partitions, dtype=np.int32), counts)


def _check_lists(lists: Int32, layout: Layout) -> None:
    """Raise IndexError unless every row has a first list and all lists exist."""
    if len(lists) and (lists[:, 0].min() < 0 or lists.min() < -1 or lists.max() >= len(layout.first_cell)):
        raise IndexError(f"vectors name lists {lists.min()} to {lists.max()} of {len(layout.first_cell)}")


@compiled
def _travel_loop(
    lists: Int32, first_cell: Int64, num_cells: Int64, partition: Int32, place: Int64, rows: Int64
) -> None:
    """Write each row to the next place of each partition it travels to; without room in `rows`, only count."""
    last = np.full(place.shape[0], -1)
    for row in range(lists.shape[0]):
        for number in lists[row]:
            if number < 0:
                continue
            for cell in range(first_cell[number], first_cell[number] + num_cells[number]):
                p = partition[cell]
                if last[p] != row:
                    last[p] = row
                    if rows.shape[0] > 0:
                        rows[place[p]] = row
                    place[p] += 1
