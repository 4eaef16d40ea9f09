"""Coarse quantizer of two levels: coarse cells, lists within them, and the lists nearest to a vector.

Lists place vectors for the partitioned join. k-means fits them (`clustering.fit_kmeans`), and products of codes
(`codes.encode`) rank them: integers only, so a vector has the same lists on every machine. All vectors of a dimension
share one scale, so that products rank as the cosines of their codes do.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from curation.clustering import fit_kmeans
from curation.codes import Codes, encode
from curation.errors import ConfigError
from curation.kmeans_init import draw_rows
from curation.products import Multiplier
from curation.sampling import proportional_shares
from curation.scoring import Vectors, compiled, inlined, norms

Int8 = npt.NDArray[np.int8]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]

POINTS_PER_COARSE = 64
"""Sampled vectors per coarse centroid: more do not make better cells."""

COARSE_BLOCK = 2_048
"""Rows that are ranked against all coarse cells at a time."""
FINE_BLOCK = 8192
"""Rows that are grouped by coarse cell at a time: their codes stay in a processor's cache while cells gather them."""
SPAN = 32
"""Products that are compared with a row's bound at once."""
ROOM = 4
"""Products that are held of a row, for each list wanted, before the best of them are chosen."""

NOTHING = np.int32(-(2**31))
"""Less than any product."""


@dataclass(frozen=True)
class Quantizer:
    """Centroids of k1 coarse cells and of the C lists within them.

    Attributes:
        coarse: float32 [k1, d], unit length.
        fine: float32 [C, d], unit length; fine[starts[c] : starts[c + 1]] lie in coarse cell c.
        starts: int64 [k1 + 1], increasing: every cell has a list.
    """

    coarse: Float32
    fine: Float32
    starts: Int64

    @cached_property
    def coarse_codes(self) -> Int8:
        """Codes of `coarse`, int8 [k1, k]."""
        return encode(self.coarse).values

    @cached_property
    def fine_codes(self) -> Int8:
        """Codes of `fine`, int8 [C, k]."""
        return encode(self.fine).values


def fit_quantizer(
    sample: Vectors, num_lists: int, *, num_coarse: int | None = None, iterations: int = 4, seed: int, threads: int
) -> Quantizer:
    """Fit coarse cells on a subsample, then lists within each cell on the sampled vectors nearest to it.

    Lists are shared out in proportion to the vectors of a cell; a cell without any keeps its centroid as its one list.
    The same for the same arguments. Holds the sample twice and its codes.

    Args:
        sample: stored vectors [n, d]; vectors of length zero are left out.
        num_lists: C, at most the number of vectors with a direction.
        num_coarse: k1, at most C; by default the power of two nearest to 2 sqrt(C) by ratio.
        iterations: of k-means, on both levels.
        seed: of the subsample and of k-means.
        threads: that assign points to the coarse cells; as many cells are then fitted at once, each by one thread.

    Raises:
        ConfigError: fewer vectors than lists, or fewer lists than coarse cells.
    """
    points: Vectors = sample[norms(sample) > 0]
    num_coarse = default_num_coarse(num_lists) if num_coarse is None else num_coarse
    if len(points) < num_lists:
        raise ConfigError(
            f"a quantizer of {num_lists:,} lists needs as many vectors, but the sample has {len(points):,} usable "
            "ones: set fewer lists or a larger sample"
        )
    if not 1 <= num_coarse <= num_lists:
        raise ConfigError(f"{num_lists:,} lists cannot lie in {num_coarse:,} coarse cells: set between 1 and as many")
    some = draw_rows(len(points), num_coarse * POINTS_PER_COARSE, seed, "coarse cells")
    coarse = fit_kmeans(points[some], num_coarse, iterations=iterations, seed=seed, threads=threads)
    starts, fine = _fit_lists(points, coarse, num_lists, iterations, seed, threads)
    return Quantizer(coarse, fine, starts)


def default_num_coarse(num_lists: int) -> int:
    """The power of two nearest to 2 sqrt(num_lists) by ratio, at most num_lists."""
    return min(num_lists, 2 ** round(1 + np.log2(num_lists) / 2)) if num_lists > 0 else 0


def _fit_lists(
    points: Vectors, coarse: Float32, num_lists: int, iterations: int, seed: int, threads: int
) -> tuple[Int64, Float32]:
    """`starts` and `fine` of a Quantizer."""
    cell = _nearest_cells(encode(points).values, encode(coarse).values, 1, Multiplier())[:, 0]
    size = np.bincount(cell, minlength=len(coarse))
    rows = np.split(np.argsort(cell, kind="stable"), np.cumsum(size)[:-1])
    shares = proportional_shares(size, num_lists)

    def fit(c: int) -> Float32:
        if not size[c]:
            return coarse[c : c + 1]
        return fit_kmeans(points[rows[c]], int(shares[c]), iterations=iterations, seed=seed, threads=1)

    with ThreadPoolExecutor(threads) as pool:
        fine = np.concatenate(list(pool.map(fit, range(len(coarse)))))
    return np.concatenate(([0], np.cumsum(shares))), fine


def nearest_lists(codes: Codes, quantizer: Quantizer, m: int, probes: int | None = None, device: str = "cpu") -> Int32:
    """The m lists nearest to each vector, of those in the `probes` coarse cells nearest to it.

    Both are ranked by product of codes, ties by lowest number. Takes one thread beside torch's. Holds 4 m bytes a row.

    Args:
        codes: of n vectors.
        quantizer: of vectors of the same dimension.
        m: lists per vector.
        probes: from 1 to k1, which searches all lists; by default k1 / 8.
        device: that multiplies.

    Returns:
        int32 [n, m], best first; -1 where fewer than m lists were searched.
    """
    num_coarse = len(quantizer.coarse)
    probes = max(1, num_coarse // 8) if probes is None else min(probes, num_coarse)
    lists = np.full((len(codes), m), -1, dtype=np.int32)
    multiplier = Multiplier(device)
    for start in range(0, len(codes), FINE_BLOCK):
        block = slice(start, start + FINE_BLOCK)
        _rank_block(codes.values[block], quantizer, probes, multiplier, lists[block])
    return lists


def _rank_block(values: Int8, quantizer: Quantizer, probes: int, multiplier: Multiplier, lists: Int32) -> None:
    """`nearest_lists` of one block of codes; `lists` holds -1 and receives the result."""
    cells = _nearest_cells(values, quantizer.coarse_codes, probes, multiplier)
    room = len(values), ROOM * lists.shape[1]
    value, number = np.full(room, NOTHING), np.empty(room, dtype=np.int32)
    held, bound = np.zeros(len(values), dtype=np.int32), np.full(len(values), NOTHING)
    for c, rows in _group(cells, len(quantizer.coarse)):  # ascending, so that of equal products the lowest list stays
        first, last = quantizer.starts[c], quantizer.starts[c + 1]
        for some, columns, tile in multiplier.taken(values, rows, quantizer.fine_codes[first:last]):
            width, offset = columns.stop - columns.start, first + columns.start
            _keep_loop(tile, rows[some], width, offset, lists.shape[1], value, number, held, bound)
    _order_loop(value, number, held, lists)


def _nearest_cells(values: Int8, coarse: Int8, probes: int, multiplier: Multiplier) -> Int32:
    """The `probes` nearest coarse cells of each code, int32 [n, probes], nearest first."""
    cells = np.empty((len(values), probes), dtype=np.int32)
    for start in range(0, len(values), COARSE_BLOCK):
        block = slice(start, start + COARSE_BLOCK)
        product = multiplier.products(values[block], coarse)
        cells[block] = _top_columns(product, np.full(len(product), len(coarse)), probes)
    return cells


def _top_columns(values: Int32, widths: Int64, m: int) -> Int32:
    """The m largest of the first widths[r] values of each row r: columns, int32 [n, m], by (value descending, column).

    -1 where a row has fewer.
    """
    columns = np.full((len(values), m), -1, dtype=np.int32)
    lanes = max(64, 2 ** (2 * m - 1).bit_length())
    _top_loop(values, widths, lanes, columns)
    return columns


def _group(cells: Int32, num_cells: int) -> Iterator[tuple[int, Int32]]:
    """Each cell that some row has, with its rows, int32 and increasing."""
    ends = np.cumsum(np.bincount(cells.reshape(-1), minlength=num_cells))
    starts = np.concatenate(([0], ends[:-1]))
    rows = np.empty(cells.size, dtype=np.int32)
    _group_loop(cells, starts.copy(), rows)
    for c in range(num_cells):
        if starts[c] < ends[c]:
            yield c, rows[starts[c] : ends[c]]


@compiled
def _top_loop(values: Int32, widths: Int64, lanes: int, columns: Int32) -> None:
    """Values fall into lanes; the m-th largest of the lanes' maxima bounds the m-th largest value from below."""
    m = columns.shape[1]
    best = np.empty(lanes, np.int32)
    found_value, found_column = np.empty(values.shape[1], np.int32), np.empty(values.shape[1], np.int32)
    for row in range(values.shape[0]):
        width = widths[row]
        line = values[row, :width]
        best[:] = NOTHING
        for start in range(0, width, lanes):
            piece = line[start : start + lanes]
            for lane in range(piece.shape[0]):
                best[lane] = max(best[lane], piece[lane])
        low, high = np.int64(NOTHING), np.int64(2**31)
        while high - low > 1:
            middle = (low + high) // 2
            reached = 0
            for lane in range(lanes):
                reached += best[lane] >= middle
            if reached >= m:
                low = middle
            else:
                high = middle
        count = 0
        for column in range(width):
            if line[column] >= low:
                found_value[count], found_column[count] = line[column], column
                count += 1
        for t in range(count):
            value, at = found_value[t], min(t, m)
            if at == m and value <= found_value[m - 1]:
                continue
            column = found_column[t]
            at = min(at, m - 1)
            while at > 0 and value > found_value[at - 1]:
                found_value[at], found_column[at] = found_value[at - 1], found_column[at - 1]
                at -= 1
            found_value[at], found_column[at] = value, column
        for k in range(min(count, m)):
            columns[row, k] = found_column[k]


@compiled
def _group_loop(cells: Int32, place: Int64, rows: Int32) -> None:
    """Counting sort: `place` is where the next row of each cell goes."""
    for row in range(cells.shape[0]):
        for c in cells[row]:
            rows[place[c]] = row
            place[c] += 1


@inlined
def _cut(value: Int32, number: Int32, m: int) -> int:
    """Move the m largest values, of equal ones the first, to the front with their numbers; returns the least kept."""
    low, high = value[0], value[0]
    for t in range(value.shape[0]):
        low, high = min(low, value[t]), max(high, value[t])
    high += np.int32(1)
    while high - low > 1:
        middle = np.int32(low + (high - low) // 2)
        reached = np.int32(0)
        for t in range(value.shape[0]):
            reached += np.int32(value[t] >= middle)
        if reached >= m:
            low = middle
        else:
            high = middle
    above = 0
    for t in range(value.shape[0]):
        above += value[t] > low
    equal, kept = m - above, 0
    for t in range(value.shape[0]):
        is_equal = value[t] == low
        if value[t] > low or (is_equal and equal > 0):
            equal -= is_equal
            value[kept], number[kept] = value[t], number[t]
            kept += 1
    return int(low)


@compiled
def _keep_loop(
    tile: Int32,
    rows: Int32,
    width: int,
    first: int,
    m: int,
    value: Int32,
    number: Int32,
    held: Int32,
    bound: Int32,
) -> None:
    """Hold products that may be among the m best of their row: line i is of row rows[i], column j of list first + j.

    Lists come in ascending order, so a later one of equal product stays behind. What is held is cut to the m best
    whenever a row's room is full; then `bound` is the least of them. Most products are below it, which is told SPAN at
    a time.
    """
    for i in range(rows.shape[0]):
        row = rows[i]
        least, count = bound[row], held[row]
        for start in range(0, width, SPAN):
            line, largest = tile[i, start : min(start + SPAN, width)], least
            for j in range(line.shape[0]):  # without branches: many at once
                largest = max(largest, line[j])
            if largest == least:
                continue
            for j in range(line.shape[0]):
                if line[j] > least:
                    value[row, count], number[row, count] = line[j], first + start + j
                    count += 1
                    if count == value.shape[1]:
                        least, count = np.int32(_cut(value[row], number[row], m)), m
        bound[row], held[row] = least, count


@compiled
def _order_loop(value: Int32, number: Int32, held: Int32, lists: Int32) -> None:
    """The lists of the best values held, best first, of equal ones the first held first."""
    m = lists.shape[1]
    for row in range(lists.shape[0]):
        count = held[row]
        if count > m:
            value[row, count:] = value[row, :count].min()  # behind all others, and no nearer to overflow
            _cut(value[row], number[row], m)
            count = m
        for t in range(count):
            this, its, at = value[row, t], number[row, t], t
            while at > 0 and value[row, at - 1] < this:
                value[row, at], lists[row, at] = value[row, at - 1], lists[row, at - 1]
                at -= 1
            value[row, at], lists[row, at] = this, its
