import numpy as np
import pytest

from curation.errors import ConfigError
from curation.layout import Layout, destinations, home_cell, order_lists, order_near, plan_layout, split_lists
from curation.quantizer import Quantizer
from curation.scoring import to_unit


def clustered(rng: np.random.Generator, num_rows: int, dim: int = 16, num_blobs: int = 12) -> np.ndarray:
    centers = 2 * np.random.default_rng(99).standard_normal((num_blobs, dim))
    return to_unit((centers[rng.integers(0, num_blobs, num_rows)] + rng.standard_normal((num_rows, dim))).astype("f4"))


def quantizer_of(rng: np.random.Generator, num_coarse: int) -> Quantizer:
    """Cells of 1 to 6 lists near their coarse centroid."""
    starts = np.concatenate(([0], np.cumsum(rng.integers(1, 7, num_coarse))))
    coarse = clustered(rng, num_coarse)
    parents = np.repeat(coarse, np.diff(starts), axis=0)
    return Quantizer(coarse, to_unit(parents + 0.1 * rng.standard_normal(parents.shape).astype("f4")), starts)


def lists_of(quantizer: Quantizer, x: np.ndarray, m: int) -> np.ndarray:
    return np.argsort(-(x @ quantizer.fine.T), axis=1, kind="stable")[:, :m].astype(np.int32)


def random_lists(rng: np.random.Generator, num_rows: int, num_lists: int, m: int) -> np.ndarray:
    """Distinct lists, unevenly popular, with -1 at the end of some rows."""
    weight = rng.uniform(0, 1, (num_rows, num_lists)) ** np.linspace(0.2, 3, num_lists)
    lists = np.argsort(-weight, axis=1)[:, :m].astype(np.int32)
    lists[np.arange(m) >= rng.integers(1, 2 * m, num_rows)[:, None]] = -1
    return lists


def random_layout(rng: np.random.Generator, num_lists: int, num_partitions: int) -> Layout:
    """Lists of 1 to 4 cells in shuffled order."""
    num_cells, order = rng.integers(1, 5, num_lists), rng.permutation(num_lists)
    first_cell = np.empty(num_lists, dtype=np.int64)
    first_cell[order] = np.cumsum(num_cells[order]) - num_cells[order]
    partition = np.arange(num_cells.sum()) * num_partitions // num_cells.sum()
    return Layout(first_cell, num_cells, partition.astype(np.int32), num_partitions)


def hashes_of(rng: np.random.Generator, num_rows: int) -> np.ndarray:
    return rng.integers(0, 2**64, num_rows, dtype=np.uint64)


def assert_valid(layout: Layout, order: np.ndarray) -> None:
    """Cells in the order of the lists, partitions ranges of them, none empty."""
    expected = np.cumsum(layout.num_cells[order]) - layout.num_cells[order]
    np.testing.assert_array_equal(layout.first_cell[order], expected)
    assert len(layout.partition) == layout.num_cells.sum()
    assert layout.partition.dtype == np.int32
    np.testing.assert_array_equal(np.unique(layout.partition), np.arange(layout.num_partitions))
    assert (np.diff(layout.partition) >= 0).all()


def slow_destinations(lists: np.ndarray, layout: Layout) -> list[tuple[int, int]]:
    pairs = set()
    for row, numbers in enumerate(lists):
        for number in numbers[numbers >= 0]:
            for cell in range(layout.num_cells[number]):
                pairs.add((int(layout.partition[layout.first_cell[number] + cell]), row))
    return sorted(pairs)


@pytest.mark.parametrize("seed", range(5))
def test_destinations_are_the_partitions_of_all_cells_of_all_lists(seed: int) -> None:
    rng = np.random.default_rng(seed)
    layout = random_layout(rng, 40, [1, 2, 7, 25, 40][seed])
    for m in (1, 6):
        lists = random_lists(rng, 80, 40, m)
        row, partition = destinations(lists, layout)
        assert (row.dtype, partition.dtype) == (np.int64, np.int32)
        assert list(zip(partition.tolist(), row.tolist(), strict=True)) == slow_destinations(lists, layout)


@pytest.mark.parametrize("seed", range(5))
def test_a_vector_meets_all_that_its_lists_store(seed: int) -> None:
    rng = np.random.default_rng(seed)
    layout = random_layout(rng, 30, 11)
    lists, hashes = random_lists(rng, 120, 30, 5), hashes_of(rng, 120)
    row, partition = destinations(lists, layout)
    travels = set(zip(row.tolist(), partition.tolist(), strict=True))
    cell = home_cell(lists, hashes, layout)
    met = 0
    for i in range(120):
        for j in np.flatnonzero(np.isin(lists[:, 0], lists[i])):
            home = int(layout.partition[cell[j]])
            assert {(i, home), (int(j), home)} <= travels
            met += 1
    assert met > 120


@pytest.mark.parametrize("seed", range(3))
def test_home_cells_lie_in_the_first_list_and_follow_the_hash(seed: int) -> None:
    rng = np.random.default_rng(seed)
    layout = random_layout(rng, 10, 4)
    lists, hashes = random_lists(rng, 4_000, 10, 3), hashes_of(rng, 4_000)
    cell = home_cell(lists, hashes, layout)
    assert cell.dtype == np.int64
    for number, value, found in zip(lists[:, 0], hashes.tolist(), cell, strict=True):
        assert found == layout.first_cell[number] + value % int(layout.num_cells[number])
    for number in range(10):
        rows = cell[lists[:, 0] == number] - layout.first_cell[number]
        share = np.bincount(rows, minlength=layout.num_cells[number]) / max(len(rows), 1)
        assert len(rows) < 300 or (abs(share - 1 / layout.num_cells[number]) < 0.15).all()


def test_no_rows_and_lists_that_do_not_exist() -> None:
    layout = random_layout(np.random.default_rng(0), 5, 2)
    none = np.empty((0, 3), dtype=np.int32)
    assert [len(column) for column in destinations(none, layout)] == [0, 0]
    assert len(home_cell(none, np.empty(0, dtype=np.uint64), layout)) == 0
    for wrong in ([[0, 5]], [[-1, 0]], [[0, -2]]):
        lists = np.array(wrong, dtype=np.int32)
        with pytest.raises(IndexError, match="of 5"):
            destinations(lists, layout)
        with pytest.raises(IndexError, match="of 5"):
            home_cell(lists, np.zeros(1, dtype=np.uint64), layout)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_points", [0, 1, 2, 3, 5, 64])
def test_order_near_has_every_point_once(num_points: int, seed: int) -> None:
    points = clustered(np.random.default_rng(seed), num_points)
    points[: num_points // 2] = points[:1]
    order = order_near(points) if num_points else np.empty(0)
    np.testing.assert_array_equal(np.sort(order), np.arange(num_points))


@pytest.mark.parametrize("seed", range(4))
def test_order_near_goes_along_an_arc_and_keeps_blobs_together(seed: int) -> None:
    rng = np.random.default_rng(seed)
    angle = rng.permutation(np.linspace(0, 2.5, 70))
    arc = np.stack((np.cos(angle), np.sin(angle)), axis=1).astype(np.float32)
    steps = np.diff(angle[order_near(arc)])
    assert (steps > 0).all() or (steps < 0).all()

    points = clustered(rng, 128, dim=32, num_blobs=8)
    order = order_near(points)
    similar = (points[order[1:]] * points[order[:-1]]).sum(axis=1).mean()
    shuffled = (points[1:] * points[:-1]).sum(axis=1).mean()
    assert similar > shuffled + 0.3


@pytest.mark.parametrize("seed", range(3))
def test_lists_of_a_cell_stay_together(seed: int) -> None:
    quantizer = quantizer_of(np.random.default_rng(seed), 20)
    cell = np.repeat(np.arange(20), np.diff(quantizer.starts))
    order = order_lists(quantizer)
    np.testing.assert_array_equal(np.sort(order), np.arange(len(quantizer.fine)))
    changes = np.flatnonzero(np.diff(cell[order]))
    assert len(changes) == 19
    np.testing.assert_array_equal(cell[order][np.append(changes, -1)], order_near(quantizer.coarse))


def test_split_lists() -> None:
    stored = np.array([0, 1, 9, 10, 11, 20, 21])
    assert split_lists(stored, 10).tolist() == [1, 1, 1, 1, 2, 2, 3]


def test_few_vectors_need_one_partition() -> None:
    quantizer = quantizer_of(np.random.default_rng(0), 5)
    num_lists = len(quantizer.fine)
    stored = np.full(num_lists, 3)
    layout = plan_layout(quantizer, stored, np.empty((0, 4), dtype=np.int32), 3 * num_lists, 3 * num_lists)
    assert_valid(layout, np.arange(num_lists))
    assert layout.num_partitions == 1
    with pytest.raises(ConfigError, match="no sample"):
        plan_layout(quantizer, stored, np.empty((0, 4), dtype=np.int32), 3 * num_lists + 1, 3 * num_lists)
    with pytest.raises(ConfigError, match="0 rows"):
        plan_layout(quantizer, stored, np.zeros((1, 4), dtype=np.int32), 10, 0)


def rows_of_partitions(lists: np.ndarray, layout: Layout) -> np.ndarray:
    return np.bincount(destinations(lists, layout)[1], minlength=layout.num_partitions)


@pytest.mark.parametrize("seed", range(4))
def test_no_partition_exceeds_the_bound_and_one_fewer_would_not_do(seed: int) -> None:
    rng = np.random.default_rng(seed)
    quantizer = quantizer_of(rng, 40)
    x = clustered(rng, 3_000)
    lists = lists_of(quantizer, x, 4)
    stored = np.bincount(lists[:, 0], minlength=len(quantizer.fine))
    sets = [set(np.flatnonzero((lists == number).any(axis=1)).tolist()) for number in range(len(stored))]
    widest = max(len(rows) for rows in sets)
    for max_rows in (widest, widest + 50, 2_000, 2_999):
        layout = plan_layout(quantizer, stored, lists, 3_000, max_rows)
        order = order_lists(quantizer)
        assert_valid(layout, order)
        rows = rows_of_partitions(lists, layout)
        assert rows.max() <= max_rows
        # Filling greedily in this order gives the fewest ranges; evenly cut, the largest is no larger than need be.
        assert layout.num_partitions == len(greedy(sets, order, max_rows))
        assert len(greedy(sets, order, int(rows.max()) - 1)) > layout.num_partitions or rows.max() == widest


def greedy(sets: list[set[int]], order: np.ndarray, limit: int) -> list[set[int]]:
    ranges: list[set[int]] = []
    for number in order:
        if ranges and len(ranges[-1] | sets[number]) <= limit:
            ranges[-1] |= sets[number]
        else:
            ranges.append(set(sets[number]))
    return ranges


def test_a_sample_stands_for_all() -> None:
    rng = np.random.default_rng(1)
    quantizer = quantizer_of(rng, 60)
    lists = lists_of(quantizer, clustered(rng, 20_000), 3)
    stored = np.bincount(lists[:, 0], minlength=len(quantizer.fine))
    layout = plan_layout(quantizer, stored, lists[::5], 20_000, 8_000)
    rows = rows_of_partitions(lists, layout)
    assert layout.num_partitions > 2
    assert rows.max() <= 8_000 * 1.05
    assert rows.mean() > 4_000


def test_what_is_stored_counts_where_the_sample_sees_nobody() -> None:
    rng = np.random.default_rng(2)
    quantizer = quantizer_of(rng, 30)
    stored = np.full(len(quantizer.fine), 10)
    unseen = np.full((50, 2), -1, dtype=np.int32)
    unseen[:, 0] = 0
    layout = plan_layout(quantizer, stored, unseen, int(stored.sum()), 100)
    held = np.bincount(layout.partition, minlength=layout.num_partitions) * 10
    assert (held[layout.partition[layout.first_cell[np.arange(1, len(stored))]]] <= 100).all()
    assert layout.num_partitions >= len(stored) // 10


@pytest.mark.parametrize("seed", range(3))
def test_crowded_lists_are_split_and_lie_alone(seed: int) -> None:
    """Half of all vectors in one list: its visitors exceed any bound; the other partitions keep to it."""
    rng = np.random.default_rng(seed)
    quantizer = quantizer_of(rng, 30)
    lists = lists_of(quantizer, clustered(rng, 2_000), 2)
    order = order_lists(quantizer)
    crowd = int(order[(0, len(order) // 2, -1)[seed]])
    lists[1_000:] = [crowd, -1]
    stored = np.bincount(lists[:, 0], minlength=len(quantizer.fine))
    layout = plan_layout(quantizer, stored, lists, 2_000, 800)
    assert_valid(layout, order)
    np.testing.assert_array_equal(layout.num_cells, split_lists(stored, 200))
    cells = layout.first_cell[crowd] + np.arange(layout.num_cells[crowd])
    assert len(cells) >= 5
    alone = layout.partition[cells]
    assert len(np.unique(alone)) == len(cells)
    assert not np.isin(np.delete(layout.partition, cells), alone).any()
    rows = rows_of_partitions(lists, layout)
    assert (rows[alone] == (lists == crowd).any(axis=1).sum()).all()
    assert np.delete(rows, alone).max() <= 800
    cell = home_cell(lists, hashes_of(rng, 2_000), layout)
    assert np.bincount(cell, minlength=len(layout.partition))[cells].min() > 100
