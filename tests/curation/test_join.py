"""Joins in memory find exactly the pairs that they are to compare, and their forest."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from curation import hubs
from curation.codes import encode
from curation.components import spanning_forest
from curation.errors import LvdError
from curation.forest import Edges, Forest
from curation.join import Best, Join, Members, join_cells, unique, visitors
from curation.products import Multiplier
from curation.rows import Rows, rows_of
from curation.scoring import cosine_pairs
from curation.signs import MostBits, passes, sketches

NUM_ROWS = 3000


@pytest.fixture(scope="module")
def multiplier() -> Multiplier:
    return Multiplier()


@dataclass
class Everything:
    """A reduction that keeps all pairs as they come."""

    parts: list[Edges] = field(default_factory=list)

    def undecided(self, a: np.ndarray, b: np.ndarray, bound: np.ndarray) -> np.ndarray:
        return np.ones(len(a), dtype=np.bool_)

    def add(self, a: np.ndarray, b: np.ndarray, similarity: np.ndarray) -> None:
        self.parts.append((a, b, similarity))

    def pairs(self) -> Edges:
        """Smaller node first, sorted by both; pairs that came twice are there twice."""
        empty = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32)
        a, b, similarity = (np.concatenate(column) for column in zip(empty, *self.parts, strict=True))
        a, b = np.minimum(a, b), np.maximum(a, b)
        order = np.lexsort((b, a))
        return a[order], b[order], similarity[order]


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def mixed(weight: np.ndarray, toward: np.ndarray, other: np.ndarray) -> np.ndarray:
    return weight[:, None] * toward + np.sqrt(1 - weight**2)[:, None] * other


def vectors(rng: np.random.Generator, num_rows: int, dim: int) -> np.ndarray:
    """Groups of near-copies, two crowds of nearly equal vectors, duplicates and zeros among random ones, float16."""
    x = unit(rng.standard_normal((num_rows, dim)))
    copies = np.flatnonzero(rng.random(num_rows) < 0.4)
    origin = (rng.random(len(copies)) ** 3 * num_rows).astype(int)
    x[copies] = mixed(rng.uniform(0.6, 0.97, len(copies)), x[origin], x[copies])
    for crowd in np.split(rng.permutation(num_rows)[: num_rows // 10], 2):
        center = np.broadcast_to(x[crowd[0]], (len(crowd), dim))
        aside = unit(x[crowd] - (x[crowd] @ x[crowd[0]])[:, None] * center + 1e-9)
        x[crowd] = mixed(1 - 0.02 * rng.random(len(crowd)) ** 5, unit(center), aside)
    same = np.flatnonzero(rng.random(num_rows) < 0.05)
    x[same] = x[rng.integers(0, num_rows, len(same))]
    x[rng.random(num_rows) < 0.02] = 0
    return x.astype(np.float16)


def pairs_of(x: np.ndarray, y: np.ndarray | None, above: float) -> Edges:
    """All pairs above `above`, i < j where there is no `y`, one by one."""
    if y is None:
        i, j = np.triu_indices(len(x), 1)
    else:
        i, j = np.divmod(np.arange(len(x) * len(y)), len(y))
    similarity = cosine_pairs(x, i, x if y is None else y, j)
    kept = similarity > np.float32(above)
    return i[kept], j[kept], similarity[kept]


def forest_of(edges: Edges) -> Edges:
    kept = spanning_forest(*edges)
    return edges[0][kept], edges[1][kept], edges[2][kept]


def assert_same(found: Edges, expected: Edges) -> None:
    for column, expected_column in zip(found, expected, strict=True):
        np.testing.assert_array_equal(column, expected_column)


def components(num_nodes: int, edges: Edges, threshold: float) -> np.ndarray:
    """The smallest node of each node's component above the threshold."""
    above = edges[2] > np.float32(threshold)
    ends = edges[0][above], edges[1][above]
    labels = connected_components(coo_array((np.ones(above.sum()), ends), shape=(num_nodes,) * 2), directed=False)[1]
    return np.unique(labels, return_index=True)[1][labels]


def joined(edges: list[Edges]) -> Edges:
    a, b, similarity = (np.concatenate(column) for column in zip(*edges, strict=True))
    return a, b, similarity


@pytest.mark.parametrize(("dim", "seed"), [(32, 0), (128, 1), (128, 2)])
def test_among_finds_all_pairs_and_their_forest(dim: int, seed: int, multiplier: Multiplier) -> None:
    rng = np.random.default_rng(seed)
    x = vectors(rng, NUM_ROWS, dim)
    every = pairs_of(x, None, 0.45)
    shuffled = rng.permutation(NUM_ROWS)
    rows = rows_of(np.arange(NUM_ROWS), x).take(shuffled)
    for threshold in (0.45, 0.6, 0.75, 0.9):
        above = every[2] > np.float32(threshold)
        expected = every[0][above], every[1][above], every[2][above]
        alone, beside, found = Forest(NUM_ROWS, threshold), Forest(NUM_ROWS, threshold), Everything()
        Join(threshold, [alone], multiplier).among(rows)
        assert_same(alone.edges(), forest_of(expected))
        Join(threshold, [beside, found], multiplier).among(rows)
        assert_same(beside.edges(), forest_of(expected))
        assert_same(found.pairs(), expected)
        assert len(expected[0]) > 1000


@pytest.mark.parametrize(("dim", "seed"), [(32, 3), (128, 4)])
def test_between_finds_all_pairs_and_their_forest(dim: int, seed: int, multiplier: Multiplier) -> None:
    rng = np.random.default_rng(seed)
    x, y = vectors(rng, 1100, dim), vectors(rng, 1900, dim)
    y[:700] = x[rng.integers(0, 1100, 700)] + (rng.standard_normal((700, dim)) * 0.04).astype(np.float16)
    i, j, similarity = pairs_of(x, y, 0.45)
    left, right = rows_of(np.arange(1100), x), rows_of(np.arange(1100, 3000), y)
    numbers = rng.permutation(3000) + 10**12
    for threshold in (0.45, 0.6, 0.9):
        above = similarity > np.float32(threshold)
        a, b = i[above], j[above] + 1100
        forest, found = Forest(3000, threshold, numbers), Everything()
        Join(threshold, [forest], multiplier).between(right, left)
        named = np.minimum(numbers[a], numbers[b]), np.maximum(numbers[a], numbers[b]), similarity[above]
        assert_same(forest.edges(), forest_of(named))
        Join(threshold, [found], multiplier).between(left, right)
        assert_same(found.pairs(), (a, b, similarity[above]))
        assert len(a) > 500


@pytest.mark.parametrize("seed", range(3))
def test_codes_that_are_far_off_lose_no_pair(seed: int, multiplier: Multiplier) -> None:
    """Spikes in 65 numbers, which no transform spreads, do not fit in int8: errors and the bound are large."""
    rng = np.random.default_rng(seed)
    x = np.eye(65)[rng.integers(0, 65, 400)] + rng.standard_normal((400, 65)) * rng.choice([0.02, 0.08, 3], (400, 1))
    x = x.astype(np.float16)
    rows = rows_of(np.arange(400), x)
    spiky = rows.codes.error > 0.3
    assert 50 < spiky.sum() < 350
    order = np.argsort(spiky, kind="stable")  # so that a join meets rows of small errors with rows of large ones
    cut = int((~spiky).sum())
    for threshold in (0.45, 0.6, 0.9):
        expected = pairs_of(x, None, threshold)
        forest, found, split = Forest(400, threshold), Everything(), Everything()
        Join(threshold, [forest], multiplier).among(rows)
        Join(threshold, [found], multiplier).among(rows)
        join, calm, wild = Join(threshold, [split], multiplier), rows.take(order[:cut]), rows.take(order[cut:])
        join.among(calm)
        join.between(calm, wild)
        join.among(wild)
        assert_same(forest.edges(), forest_of(expected))
        assert_same(found.pairs(), expected)
        assert_same(split.pairs(), expected)


def test_a_threshold_is_compared_as_float32(multiplier: Multiplier) -> None:
    x = np.array([[3, 4], [1, 0], [0, 1]], dtype=np.float16)  # cosines of exactly 0.6 and 0.8
    for threshold, expected in ((0.6, [2]), (0.8, []), (0.59, [1, 2])):
        found = Everything()
        Join(threshold, [found], multiplier).among(rows_of(np.arange(3), x))
        assert found.pairs()[1].tolist() == expected


def test_joins_of_nothing(multiplier: Multiplier) -> None:
    x = rows_of(np.arange(3), np.ones((3, 8), dtype=np.float16), np.array([0, -1, 0], dtype=np.int32))
    none, one = x.take(slice(0, 0)), x.take(slice(0, 1))
    found = Everything()
    join = Join(0.5, [found], multiplier)
    join.among(none)
    join.among(one)
    for left, right in ((none, x), (x, none), (none, none)):
        join.between(left, right)
    assert len(found.pairs()[0]) == 0


def test_rows_that_are_not_finite_are_refused() -> None:
    x = np.ones((3, 8), dtype=np.float16)
    x[1, 2] = np.inf
    with pytest.raises(LvdError, match="row 1 has NaN or infinite"):
        rows_of(np.arange(3), x)


def hub_rows(x: np.ndarray, threshold: float, multiplier: Multiplier) -> tuple[Rows, list[Edges]]:
    """Rows that take part, and the edges that stand for the others; hubs are nodes from len(x) on."""
    pivots = x[hubs.find_pivots(x, multiplier)]
    assert len(pivots) >= 2
    left = unique(x, pivots, threshold, multiplier)
    hub, members, similarity = left.hub
    assert len(members) > 100 and len(left.equal[0]) > 10
    return rows_of(left.rows, x[left.rows], left.ball), [left.equal, (hub + len(x), members, similarity)]


@pytest.mark.parametrize(("dim", "seed"), [(32, 0), (128, 1)])
def test_hubs_keep_components_at_every_threshold_below_tau(dim: int, seed: int, multiplier: Multiplier) -> None:
    rng = np.random.default_rng(seed)
    x = vectors(rng, NUM_ROWS, dim)
    every = pairs_of(x, None, 0.45)
    for base in (0.45, 0.6, 0.9):
        rows, stand_ins = hub_rows(x, base, multiplier)
        whole, halves = Forest(NUM_ROWS, base), Forest(NUM_ROWS, base)
        Join(base, [whole], multiplier).among(rows)
        one, other = rows.take(np.arange(0, len(rows), 2)), rows.take(np.arange(1, len(rows), 2))
        join = Join(base, [halves], multiplier)
        join.among(one)
        join.between(other, one)
        join.among(other)
        for forest in (whole, halves):
            edges = joined([forest.edges(), *stand_ins])
            for threshold in (*np.arange(base, hubs.TAU - 1e-6, 0.1), hubs.TAU - 1e-6):
                found = components(NUM_ROWS + 99, edges, threshold)[:NUM_ROWS]
                np.testing.assert_array_equal(found, components(NUM_ROWS, every, threshold))


@pytest.mark.parametrize("seed", range(2))
def test_only_pairs_within_hubs_are_left_out(seed: int, multiplier: Multiplier) -> None:
    rng = np.random.default_rng(seed)
    x = vectors(rng, 1500, 64)
    rows, _ = hub_rows(x, 0.6, multiplier)
    i, j, similarity = pairs_of(x, None, 0.6)
    takes_part, ball = np.zeros(1500, dtype=bool), np.full(1500, -1)
    takes_part[rows.nodes], ball[rows.nodes] = True, rows.ball
    compared = takes_part[i] & takes_part[j] & ((ball[i] < 0) | (ball[i] != ball[j]))
    assert 100 < (~compared).sum() < 0.9 * len(i)
    whole, split = Everything(), Everything()
    Join(0.6, [whole], multiplier).among(rows)
    join, cut = Join(0.6, [split], multiplier), len(rows) // 3
    join.among(rows.take(slice(0, cut)))
    join.between(rows.take(slice(0, cut)), rows.take(slice(cut, None)))
    join.among(rows.take(slice(cut, None)))
    for found in (whole, split):
        assert_same(found.pairs(), (i[compared], j[compared], similarity[compared]))


def references(rng: np.random.Generator, num_nodes: int) -> tuple[np.ndarray, np.ndarray]:
    return rng.random(num_nodes) < 0.3, rng.permutation(num_nodes) * 7 - 50


def slow_best(num_nodes: int, edges: Edges, base: float, is_reference: np.ndarray, rank: np.ndarray) -> list[tuple]:
    """(image, best reference, similarity) of each image that has one."""
    options: dict[int, list[tuple]] = {}
    for a, b, similarity in zip(*(column.tolist() for column in edges), strict=True):
        if is_reference[a] != is_reference[b] and similarity > np.float32(base):
            image, reference = (b, a) if is_reference[a] else (a, b)
            options.setdefault(image, []).append((-similarity, rank[reference], reference))
    return [(image, min(options[image])[2], -min(options[image])[0]) for image in sorted(options)]


def assert_best(found: Edges, expected: list[tuple]) -> None:
    assert [column.dtype for column in found] == [np.int64, np.int64, np.float32]
    assert list(zip(*(column.tolist() for column in found), strict=True)) == expected


@pytest.mark.parametrize("seed", range(5))
def test_best_is_the_most_similar_reference_then_lowest_rank_in_any_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    is_reference, rank = references(rng, 60)
    a, b = rng.integers(0, 60, (2, 900))  # also image with image and reference with reference
    similarity = rng.choice(np.array([0.61, 0.7, 0.8, 0.8000001, 0.9], dtype=np.float32), 900)
    level: dict[tuple[int, int], np.float32] = {}
    for at in range(900):  # one score for each pair
        similarity[at] = level.setdefault((min(a[at], b[at]), max(a[at], b[at])), similarity[at])
    expected = slow_best(60, (a, b, similarity), 0.6, is_reference, rank)
    assert len(expected) > 20
    for num_batches in (1, 7, 900):
        best = Best(60, 0.6, is_reference, rank)
        for batch in np.array_split(rng.permutation(900), num_batches):
            left = best.undecided(a[batch], b[batch], similarity[batch])
            kept = batch[left | (rng.random(len(batch)) < 0.2)]
            best.add(a[kept], b[kept], similarity[kept])
        assert_best(best.edges(), expected)


def test_best_needs_only_pairs_of_image_and_reference_that_may_win() -> None:
    is_reference, rank = np.array([False, True, False, True]), np.array([3, 1, 0, 2])
    best = Best(4, 0.6, is_reference, rank)
    best.add(np.array([0]), np.array([3]), np.array([0.75], dtype=np.float32))
    a, b = np.array([0, 1, 3, 0, 1, 2, 2, 0]), np.array([1, 0, 0, 2, 3, 1, 1, 1])
    bound = np.array([0.76, 0.74, 0.75, 0.99, 0.99, 0.61, 0.59, 0.75], dtype=np.float32)
    assert best.undecided(a, b, bound).tolist() == [True, False, True, False, False, True, False, True]


@pytest.mark.parametrize(("dim", "seed"), [(32, 5), (128, 6)])
def test_best_of_a_join_beside_a_forest(dim: int, seed: int, multiplier: Multiplier) -> None:
    rng = np.random.default_rng(seed)
    x = vectors(rng, 1500, dim)
    edges = pairs_of(x, None, 0.45)
    is_reference, rank = references(rng, 1500)
    rows = rows_of(np.arange(1500), x)
    for threshold, base in ((0.45, 0.45), (0.6, 0.6), (0.45, 0.7)):
        alone, beside = (Best(1500, base, is_reference, rank) for _ in range(2))
        forest = Forest(1500, threshold)
        Join(threshold, [alone], multiplier).among(rows.take(rng.permutation(1500)))
        join, cut = Join(threshold, [forest, beside], multiplier), int(rng.integers(1, 1500))
        join.between(rows.take(slice(0, cut)), rows.take(slice(cut, None)))
        join.among(rows.take(slice(cut, None)))
        join.among(rows.take(slice(0, cut)))
        above = edges[2] > np.float32(threshold)
        expected = slow_best(1500, edges, base, is_reference, rank)
        assert_best(alone.edges(), expected)
        assert_best(beside.edges(), expected)
        assert_same(forest.edges(), forest_of((edges[0][above], edges[1][above], edges[2][above])))


@pytest.mark.parametrize("threshold", [-0.5, 0.0, 0.6, 0.97, 0.98, 0.99, 1.0])
@pytest.mark.parametrize("seed", range(2))
def test_unique_leaves_out_copies_and_zeros_and_finds_members(
    seed: int, threshold: float, multiplier: Multiplier
) -> None:
    rng = np.random.default_rng(seed)
    x = vectors(rng, 800, 32)
    pivots = x[hubs.find_pivots(x, multiplier)]
    found = unique(x, pivots, threshold, multiplier)
    first: dict[bytes, int] = {}
    lead = np.array([first.setdefault(row.tobytes(), at) for at, row in enumerate(x)])
    is_zero = ~x.any(axis=1)
    assert is_zero.sum() > 2
    copy = (lead != np.arange(800)) & (np.where(is_zero, 0.0, 1.0) > threshold)
    expected = np.where(is_zero, 0, 1)[copy].astype(np.float32)
    assert_same(found.equal, (lead[copy], np.flatnonzero(copy), expected))
    np.testing.assert_array_equal(found.rows, np.flatnonzero(~copy & ~(is_zero & (threshold >= 0))))
    ball, near = hubs.balls(x[found.rows], pivots, multiplier)
    if threshold >= hubs.TAU:
        ball[:] = -1
    np.testing.assert_array_equal(found.ball, ball)
    inside = ball >= 0
    assert inside.any() == (threshold < hubs.TAU)
    assert_same(found.hub, (ball[inside], found.rows[inside], near[inside]))


def test_unique_of_nothing(multiplier: Multiplier) -> None:
    found = unique(np.empty((0, 8), np.float16), np.ones((2, 8), np.float16), 0.6, multiplier)
    assert len(found.rows) == len(found.ball) == len(found.equal[0]) == len(found.hub[0]) == 0


@dataclass(frozen=True)
class Travel:
    """Rows with lists and homes; `cells` are what each row visits, its home among them."""

    lists: np.ndarray
    home: np.ndarray
    first_cell: np.ndarray
    num_cells: np.ndarray
    cells: list[set[int]]


def travel(rng: np.random.Generator, num_rows: int, num_lists: int, visits: int) -> Travel:
    """Lists of one to three cells in any order; every row visits 1 to `visits` lists, all cells of each."""
    num_cells = rng.integers(1, 4, num_lists)
    order = rng.permutation(num_lists)
    first_cell = np.empty(num_lists, dtype=np.int64)
    first_cell[order] = np.cumsum(num_cells[order]) - num_cells[order]
    lists = np.argsort(rng.random((num_rows, num_lists)), axis=1)[:, :visits].astype(np.int32)
    lists[:, 1:][rng.random((num_rows, visits - 1)) < 0.3] = -1
    home = first_cell[lists[:, 0]] + rng.integers(0, 6, num_rows) % num_cells[lists[:, 0]]
    cells = [
        {
            cell
            for number in row
            if number >= 0
            for cell in range(first_cell[number], first_cell[number] + num_cells[number])
        }
        for row in lists.tolist()
    ]
    return Travel(lists, home, first_cell, num_cells, cells)


@pytest.mark.parametrize("seed", range(5))
def test_visitors_are_who_visits_and_is_not_at_home(seed: int) -> None:
    rng = np.random.default_rng(seed)
    t = travel(rng, 80, 9, int(rng.integers(1, 6)))
    wanted = rng.random(int(t.num_cells.sum())) < rng.choice([0.5, 1.0])
    visiting = visitors(t.lists, t.home, t.first_cell, t.num_cells, wanted)
    assert (visiting.offsets.dtype, visiting.rows.dtype) == (np.int64, np.int32)
    assert len(visiting.offsets) == len(wanted) + 1
    for cell, is_wanted in enumerate(wanted):
        expected = [row for row in range(80) if is_wanted and cell in t.cells[row] and t.home[row] != cell]
        assert visiting.of(cell).tolist() == expected


def test_nobody_visits() -> None:
    t = travel(np.random.default_rng(0), 0, 3, 2)
    visiting = visitors(t.lists, t.home, t.first_cell, t.num_cells, np.ones(t.num_cells.sum(), dtype=bool))
    assert visiting.offsets.tolist() == [0] * (t.num_cells.sum() + 1)
    assert len(visiting.rows) == 0


def join_partition(
    join: Join, x: np.ndarray, t: Travel, wanted: np.ndarray, among: bool = True, ball: np.ndarray | None = None
) -> None:
    """Join inside the wanted cells."""
    rows = np.flatnonzero(wanted[t.home])
    rows = rows[np.argsort(t.home[rows], kind="stable")].astype(np.int32)
    offsets = np.concatenate(([0], np.cumsum(np.bincount(t.home[rows], minlength=len(wanted)))))
    visiting = visitors(t.lists, t.home, t.first_cell, t.num_cells, wanted)
    x_rows = rows_of(np.arange(len(x)), x, ball).sketched(join.threshold)
    join_cells(join, x_rows, Members(offsets, rows), visiting, among)


def expected_visits(t: Travel) -> set[tuple[int, int]]:
    num_rows = len(t.home)
    return {
        (i, j)
        for i in range(num_rows)
        for j in range(i + 1, num_rows)
        if t.home[j] in t.cells[i] or t.home[i] in t.cells[j] or t.home[i] == t.home[j]
    }


@pytest.mark.parametrize("num_partitions", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_join_cells_compares_exactly_who_meets(seed: int, num_partitions: int, multiplier: Multiplier) -> None:
    rng = np.random.default_rng(seed)
    t = travel(rng, 90, 12, 3)
    x, num_cells = rng.standard_normal((90, 8)).astype(np.float16), int(t.num_cells.sum())
    found, forest = Everything(), Forest(90, -2.0)
    for cells in np.array_split(np.arange(num_cells), num_partitions):
        wanted = np.isin(np.arange(num_cells), cells)
        join_partition(Join(-2.0, [found], multiplier), x, t, wanted)
        join_partition(Join(-2.0, [forest], multiplier), x, t, wanted)
    a, b, similarity = found.pairs()
    expected = expected_visits(t)
    assert set(zip(a.tolist(), b.tolist(), strict=True)) == expected
    assert 90 < len(expected) < 90 * 89 // 2
    assert np.unique(a * 90 + b, return_counts=True)[1].max() <= 2  # once from either side
    np.testing.assert_array_equal(similarity, cosine_pairs(x, a, x, b))
    assert_same(forest.edges(), forest_of((a, b, similarity)))


def test_join_cells_can_leave_out_what_is_stored_together(multiplier: Multiplier) -> None:
    rng = np.random.default_rng(7)
    t = travel(rng, 60, 6, 3)
    x, num_cells = rng.standard_normal((60, 8)).astype(np.float16), int(t.num_cells.sum())
    found = Everything()
    join_partition(Join(-2.0, [found], multiplier), x, t, np.ones(num_cells, dtype=bool), among=False)
    a, b, _ = found.pairs()
    expected = {(i, j) for i, j in expected_visits(t) if t.home[i] != t.home[j]}
    assert set(zip(a.tolist(), b.tolist(), strict=True)) == expected


class Elsewhere:
    """Multiplies as `multiplier` does, as if it did so on another device."""

    device = SimpleNamespace(type="elsewhere")

    def __init__(self, multiplier: Multiplier) -> None:
        self.candidates, self.gathered = multiplier.candidates, multiplier.gathered


@pytest.mark.parametrize("is_elsewhere", [False, True])
@pytest.mark.parametrize("among", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_join_cells_compares_what_passes_the_sieve(
    seed: int, among: bool, is_elsewhere: bool, multiplier: Multiplier
) -> None:
    """On every device, with hubs or without: who meets, scores above the threshold and differs in few bits."""
    rng = np.random.default_rng(seed)
    t = travel(rng, 240, 9, 4)
    weight = rng.uniform(0.765, 0.79, (240, 1))  # of one family, most of them about 0.6 alike
    center = rng.standard_normal(512)
    x = (weight * center + np.sqrt(1 - weight**2) * rng.standard_normal((240, 512))).astype(np.float16)
    ball = np.full(240, -1, np.int32)
    ball[rng.permutation(240)[:20]] = 0
    found, threshold = Everything(), 0.6
    join = Join(threshold, [found], Elsewhere(multiplier) if is_elsewhere else multiplier)  # type: ignore[arg-type]
    join.most_bits = MostBits(*(limit - 15 for limit in join.most_bits))  # so that it drops what it seldom does
    join_partition(join, x, t, np.ones(int(t.num_cells.sum()), dtype=bool), among, ball)
    a, b = (np.asarray(end) for end in zip(*sorted(expected_visits(t)), strict=True))
    if not among:
        a, b = a[t.home[a] != t.home[b]], b[t.home[a] != t.home[b]]
    sketch = sketches(encode(x).values)
    passed = passes(sketch[a], sketch[b], join.most_bits)
    above = (cosine_pairs(x, a, x, b) > np.float32(threshold)) & ((ball[a] < 0) | (ball[b] < 0))
    expected = set(zip(a[above & passed].tolist(), b[above & passed].tolist(), strict=True))
    i, j, _ = found.pairs()
    assert set(zip(i.tolist(), j.tolist(), strict=True)) == expected
    assert (above & ~passed).any() and len(expected) > 500
