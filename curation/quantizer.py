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
from curation.scoring import Vectors, compiled, inlined, lowest_bit, norms, single_bits

Int8 = npt.NDArray[np.int8]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]

POINTS_PER_COARSE = 64
"""Sampled vectors per coarse centroid: more do not make better cells."""

SEARCHED = 6
"""One in so many coarse cells is searched for lists: more find hardly more of ten million (docs/benchmarks.md)."""

LISTS_BLOCK = 16_384
"""Rows that are grouped by coarse cell at a time: enough of them share each cell, and their codes stay in a cache."""
COMPARED = 64
"""Products that are compared at once with the least of a row's best, one bit of a word for each that reaches it."""

NO_LIST = np.int64(-(2**63))
"""A key less than that of any product."""
LOWER_HALF = np.int64(2**32 - 1)


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

    Cells of many lists, so that products with them are large.
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

    Both are ranked by product of codes, ties by lowest number. Takes one thread beside torch's. Holds 8 m bytes for
    each row of a block, and one tile of products.

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
    for start in range(0, len(codes), LISTS_BLOCK):
        block = slice(start, start + LISTS_BLOCK)
        if probes == num_coarse:
            lists[block] = _nearest(codes.values[block], quantizer.fine_codes, m, multiplier)
        else:
            lists[block] = _nearest_in_cells(codes.values[block], quantizer, m, probes, multiplier)
    return lists


def _nearest_in_cells(values: Int8, quantizer: Quantizer, m: int, probes: int, multiplier: Multiplier) -> Int32:
    """`nearest_lists` of one block of codes.

    Each row meets its nearest cell first: what it finds there bounds what is worth a place from the others.
    """
    best = np.full((len(values), m), NO_LIST, dtype=np.int64)
    cells = _nearest(values, quantizer.coarse_codes, probes, multiplier)
    for some in (cells[:, :1], cells[:, 1:]):
        for c, rows in _group(some, len(quantizer.coarse)):
            first, stop = quantizer.starts[c], quantizer.starts[c + 1]
            for chosen, columns, tile in multiplier.taken(values, rows, quantizer.fine_codes[first:stop]):
                _keep_loop(tile, rows[chosen], first + columns.start, columns.stop - columns.start, best)
    return _lists_of(best)


def _nearest(values: Int8, centroids: Int8, m: int, multiplier: Multiplier) -> Int32:
    """The m centroids nearest to each code, int32 [n, m], best first, of equal products the lowest number first.

    -1 where there are fewer.
    """
    best = np.full((len(values), m), NO_LIST, dtype=np.int64)
    numbers = np.arange(len(values), dtype=np.int32)
    for rows, columns, tile in multiplier.tiles(values, centroids):
        _keep_loop(tile, numbers[rows], columns.start, columns.stop - columns.start, best)
    return _lists_of(best)


def _lists_of(best: Int64) -> Int32:
    """The lists that keys stand for: see `_keep_loop`."""
    return np.where(best == NO_LIST, np.int64(-1), LOWER_HALF - (best & LOWER_HALF)).astype(np.int32)


def _group(cells: Int32, num_cells: int) -> Iterator[tuple[int, Int32]]:
    """Each cell that some row has, with its rows, int32 and increasing."""
    ends = np.cumsum(np.bincount(cells.reshape(-1), minlength=num_cells))
    starts = np.concatenate(([0], ends[:-1]))
    rows = np.empty(cells.size, dtype=np.int32)
    _group_loop(cells, starts.copy(), rows)
    for c in range(num_cells):
        if starts[c] < ends[c]:
            yield c, rows[starts[c] : ends[c]]


@inlined
def _reached(line: Int32, m: int) -> np.int32:
    """A product that at least m of a line reach, and few more: halves the range in which it may lie."""
    low, high = int(line[0]), int(line[0])
    for j in range(line.shape[0]):
        low, high = min(low, int(line[j])), max(high, int(line[j]))
    high += 1
    while high - low > 1:
        middle, count = (low + high) >> 1, 0
        least = np.int32(middle)
        for j in range(line.shape[0]):
            count += line[j] >= least
        if count < m:
            high = middle
        else:
            low = middle
            if count <= m + m // 4:
                break
    return np.int32(low)


@compiled
def _keep_loop(tile: Int32, rows: Int32, first: int, width: int, best: Int64) -> None:
    """Take the first `width` products of line i of `tile`, of lists from `first` on, into the best of row rows[i].

    A list is kept as a key, its product in the upper half, in the lower one what is larger for lower numbers; keys
    stand in descending order.
    """
    none, one, bit = np.uint64(0), np.uint64(1), single_bits()
    for i in range(rows.shape[0]):
        keys = best[rows[i]]
        least = np.int32(keys[-1] >> 32)
        if keys[-1] == NO_LIST and width > keys.shape[0]:
            least = _reached(tile[i, :width], keys.shape[0])
        for start in range(0, width, COMPARED):
            # No branch depends on one product alone: a processor would guess half of them wrong.
            line, enough = tile[i, start : min(start + COMPARED, width)], none
            for j in range(line.shape[0]):
                enough |= bit[j] if line[j] >= least else none
            while enough:
                place = start + lowest_bit(enough)
                enough &= enough - one
                key = (np.int64(tile[i, place]) << 32) + (LOWER_HALF - np.int64(first + place))
                for t in range(keys.shape[0]):
                    keys[t], key = max(keys[t], key), min(keys[t], key)
            least = max(least, np.int32(keys[-1] >> 32))


@compiled
def _group_loop(cells: Int32, at: Int64, rows: Int32) -> None:
    """Counting sort: `at` is where the next row of each cell goes."""
    for row in range(cells.shape[0]):
        for k in range(cells.shape[1]):
            rows[at[cells[row, k]]] = row
            at[cells[row, k]] += 1
