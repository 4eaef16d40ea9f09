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
from curation.products import STEP_ROWS, Multiplier
from curation.sampling import proportional_shares
from curation.scoring import Vectors, compiled, norms

Int8 = npt.NDArray[np.int8]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]

POINTS_PER_COARSE = 64
"""Sampled vectors per coarse centroid: more do not make better cells."""

SEARCHED = 6
"""One in so many coarse cells is searched for lists: more find hardly more of ten million (docs/benchmarks.md)."""

HELD_PRODUCTS = 1 << 21
"""Products that are held at once where all centroids are ranked: they stay in a processor's cache."""
LISTS_BLOCK = 4_096
"""Rows that are grouped by coarse cell at a time: enough of them share each cell."""

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
        num_coarse: k1, at most C; by default the power of two nearest to sqrt(C) / 2 by ratio.
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
    """The power of two nearest to sqrt(num_lists) / 2 by ratio, at least 1.

    Cells of many lists: products with them are large, and their lists are ranked side by side.
    """
    return 2 ** max(0, round(np.log2(num_lists) / 2 - 1)) if num_lists > 0 else 0


def _fit_lists(
    points: Vectors, coarse: Float32, num_lists: int, iterations: int, seed: int, threads: int
) -> tuple[Int64, Float32]:
    """`starts` and `fine` of a Quantizer."""
    cell = _nearest(encode(points).values, encode(coarse).values, 1, Multiplier())[:, 0]
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

    Both are ranked by product of codes, ties by lowest number. Takes one thread beside torch's. Holds 4 m bytes a row,
    and the products of a block: 16 kB for each list that is ranked.

    Args:
        codes: of n vectors.
        quantizer: of vectors of the same dimension.
        m: lists per vector.
        probes: from 1 to k1, which searches all lists; by default k1 / SEARCHED.
        device: that multiplies.

    Returns:
        int32 [n, m], best first; -1 where fewer than m lists were searched.
    """
    num_coarse = len(quantizer.coarse)
    probes = max(1, num_coarse // SEARCHED) if probes is None else min(probes, num_coarse)
    lists = np.full((len(codes), m), -1, dtype=np.int32)
    multiplier = Multiplier(device)
    if probes == num_coarse:
        most = min(m, len(quantizer.fine))
        lists[:, :most] = _nearest(codes.values, quantizer.fine_codes, most, multiplier)
        return lists
    room = np.empty(0, np.int32)
    for start in range(0, len(codes), LISTS_BLOCK):
        block = slice(start, start + LISTS_BLOCK)
        room = _rank_block(codes.values[block], quantizer, probes, multiplier, room, lists[block])
    return lists


def _rank_block(
    values: Int8, quantizer: Quantizer, probes: int, multiplier: Multiplier, room: Int32, lists: Int32
) -> Int32:
    """`nearest_lists` of one block of codes, in `lists`; returns `room` for products, larger if it had to be.

    A row's cells are ascending, and so are the lists whose products stand side by side.
    """
    cells = np.sort(_nearest(values, quantizer.coarse_codes, probes, multiplier), axis=1)
    sizes = np.diff(quantizer.starts)[cells]
    ends = np.cumsum(sizes, axis=1)
    shape = len(values), int(ends[:, -1].max())
    if len(room) < shape[0] * shape[1]:
        room = np.empty(shape[0] * shape[1], np.int32)
    product = room[: shape[0] * shape[1]].reshape(shape)
    for c, rows, place in _group(cells, ends - sizes, len(quantizer.coarse)):
        fine = quantizer.fine_codes[quantizer.starts[c] : quantizer.starts[c + 1]]
        for some, columns, tile in multiplier.taken(values, rows, fine):
            _put_loop(tile, rows[some], place[some] + columns.start, columns.stop - columns.start, product)
    _name_loop(_top_columns(product, ends[:, -1], lists.shape[1]), cells, ends, sizes, quantizer.starts, lists)
    return room


def _nearest(values: Int8, centroids: Int8, m: int, multiplier: Multiplier) -> Int32:
    """The m centroids nearest to each code, int32 [n, m], best first, of equal products the lowest number first."""
    found = np.empty((len(values), m), dtype=np.int32)
    rows = max(STEP_ROWS, HELD_PRODUCTS // len(centroids) // STEP_ROWS * STEP_ROWS)
    for start in range(0, len(values), rows):
        block = slice(start, start + rows)
        product = multiplier.products(values[block], centroids)
        found[block] = _top_columns(product, np.full(len(product), len(centroids)), m)
    return found


def _top_columns(values: Int32, widths: Int64, m: int) -> Int32:
    """The m largest of the first widths[r] values of each row r: columns, int32 [n, m], by (value descending, column).

    -1 where a row has fewer.
    """
    columns = np.full((len(values), m), -1, dtype=np.int32)
    lanes = max(64, 2 ** (2 * m - 1).bit_length())
    _top_loop(values, widths, lanes, columns)
    return columns


def _group(cells: Int32, places: Int64, num_cells: int) -> Iterator[tuple[int, Int32, Int64]]:
    """Each cell that some row has, with its rows, int32 and increasing, and the place that each row has for it."""
    ends = np.cumsum(np.bincount(cells.reshape(-1), minlength=num_cells))
    starts = np.concatenate(([0], ends[:-1]))
    rows, place = np.empty(cells.size, dtype=np.int32), np.empty(cells.size, dtype=np.int64)
    _group_loop(cells, places, starts.copy(), rows, place)
    for c in range(num_cells):
        if starts[c] < ends[c]:
            yield c, rows[starts[c] : ends[c]], place[starts[c] : ends[c]]


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
def _group_loop(cells: Int32, places: Int64, at: Int64, rows: Int32, place: Int64) -> None:
    """Counting sort: `at` is where the next row of each cell goes."""
    for row in range(cells.shape[0]):
        for k in range(cells.shape[1]):
            c = cells[row, k]
            rows[at[c]], place[at[c]] = row, places[row, k]
            at[c] += 1


@compiled
def _put_loop(tile: Int32, rows: Int32, place: Int64, width: int, product: Int32) -> None:
    """Copy the first `width` of each line of `tile` to its row and place in `product`."""
    for i in range(rows.shape[0]):
        product[rows[i], place[i] : place[i] + width] = tile[i, :width]


@compiled
def _name_loop(columns: Int32, cells: Int32, ends: Int64, sizes: Int64, starts: Int64, lists: Int32) -> None:
    """Write the lists that stand for columns of products, of a row's cells side by side; -1 for column -1."""
    for row in range(columns.shape[0]):
        for t in range(columns.shape[1]):
            column, k = columns[row, t], 0
            if column < 0:
                continue
            while ends[row, k] <= column:
                k += 1
            lists[row, t] = starts[cells[row, k]] + column - (ends[row, k] - sizes[row, k])
