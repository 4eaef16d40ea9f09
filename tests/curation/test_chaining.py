import numpy as np
import pytest

from curation import chaining
from curation.components import UnionFind, component_sizes, spanning_forest
from curation.errors import ConfigError, LvdError

Forest = tuple[int, np.ndarray, np.ndarray, np.ndarray]


def forest(seed: int, max_nodes: int = 60) -> Forest:
    """A spanning forest in any order of edges; similarities from few values, so that many tie."""
    rng = np.random.default_rng(seed)
    num_nodes = int(rng.integers(5, max_nodes))
    i, j = rng.integers(0, num_nodes, (2, int(rng.integers(0, 2 * num_nodes))))
    sim = rng.choice(np.array([0.61, 0.7, 0.75, 0.9, 1.0], dtype=np.float32), len(i))
    kept = rng.permutation(spanning_forest(i, j, sim))
    return num_nodes, i[kept], j[kept], sim[kept]


def labels_of(num_nodes: int, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    union_find = UnionFind(num_nodes)
    union_find.union(i, j)
    return union_find.labels()


def slow_capped(i: np.ndarray, j: np.ndarray, sim: np.ndarray, num_nodes: int, max_size: int) -> np.ndarray:
    """Cut the weakest edge of one component above the cap, label again, repeat."""
    stays = np.ones(len(i), dtype=bool)
    while True:
        labels = labels_of(num_nodes, i[stays], j[stays])
        above = stays & (component_sizes(labels)[i] > max_size)
        if not above.any():
            return stays
        mine = np.flatnonzero(stays & (labels[i] == labels[i[above][0]]))
        stays[min(mine, key=lambda e: (sim[e], -i[e], -j[e]))] = False


@pytest.mark.parametrize("seed", range(20))
def test_capped_cuts_at_the_weakest_edges_until_none_is_above(seed: int) -> None:
    num_nodes, i, j, sim = forest(seed)
    for max_size in (1, 2, 3, 5, 10, 30, 60):
        stays = chaining.capped(i, j, sim, num_nodes, max_size)
        np.testing.assert_array_equal(stays, slow_capped(i, j, sim, num_nodes, max_size))
        assert component_sizes(labels_of(num_nodes, i[stays], j[stays])).max() <= max_size
    assert chaining.capped(i, j, sim, num_nodes, num_nodes).all()


def test_a_cut_is_not_undone_by_weaker_edges_that_would_fit() -> None:
    """0-1-2 and 3 make four; the weakest edge, to 4, is cut, and so is the one to 3, although 3-4 alone would fit."""
    i, j = np.array([0, 1, 2, 3]), np.array([1, 2, 3, 4])
    sim = np.array([0.9, 0.9, 0.8, 0.7], dtype=np.float32)
    assert chaining.capped(i, j, sim, 5, 3).tolist() == [True, True, False, False]


def test_ties_are_cut_from_the_highest_nodes_on() -> None:
    i, j, sim = np.array([1, 0, 0]), np.array([3, 2, 1]), np.full(3, 0.8, dtype=np.float32)
    assert chaining.capped(i, j, sim, 4, 3).tolist() == [False, True, True]


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_capped_takes_columns_as_files_have_them(dtype: str) -> None:
    num_nodes, i, j, sim = forest(3)
    expected = chaining.capped(i, j, sim, num_nodes, 4)
    columns = i.astype(dtype), j.astype(dtype), sim.copy()
    for column in columns:
        column.flags.writeable = False
    np.testing.assert_array_equal(chaining.capped(*columns, num_nodes, 4), expected)


def test_a_long_chain_is_capped() -> None:
    nodes = np.arange(50_000)
    for sim in (np.full(49_999, 0.8), np.linspace(0.6, 1, 49_999), np.random.default_rng(0).uniform(0.6, 1, 49_999)):
        stays = chaining.capped(nodes[:-1], nodes[1:], sim.astype(np.float32), 50_000, 100)
        assert component_sizes(labels_of(50_000, nodes[:-1][stays], nodes[1:][stays])).max() <= 100


def test_what_is_no_forest_is_refused() -> None:
    sim = np.full(3, 0.8, dtype=np.float32)
    with pytest.raises(LvdError, match="close a cycle"):
        chaining.capped(np.array([0, 1, 0]), np.array([1, 2, 2]), sim, 3, 9)
    with pytest.raises(LvdError, match="close a cycle"):
        chaining.curve(np.array([0]), np.array([0]), sim[:1], 3, [0.7])
    with pytest.raises(LvdError, match="there are 3"):
        chaining.capped(np.array([0]), np.array([3]), sim[:1], 3, 9)
    with pytest.raises(ConfigError, match="at least 1"):
        chaining.capped(np.array([0]), np.array([1]), sim[:1], 3, 0)


@pytest.mark.parametrize("seed", range(12))
def test_curve_is_what_joining_again_would_give(seed: int) -> None:
    num_nodes, i, j, sim = forest(seed)
    thresholds = np.array([0.8, 0.6, 0.61, 0.7, 0.75, 0.9, 0.95, 1.0, 2.0])
    kept, largest = chaining.curve(i, j, sim, num_nodes, thresholds)
    assert kept.dtype == largest.dtype == np.int64
    for at, threshold in enumerate(thresholds):
        above = sim > np.float32(threshold)
        labels = labels_of(num_nodes, i[above], j[above])
        assert kept[at] == len(np.unique(labels))
        assert largest[at] == component_sizes(labels).max()


def test_curve_of_little() -> None:
    empty, none = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
    for num_nodes, expected in ((0, ([0], [0])), (4, ([4], [1]))):
        kept, largest = chaining.curve(empty, empty, none, num_nodes, [0.6])
        assert (kept.tolist(), largest.tolist()) == expected
    assert chaining.capped(empty, empty, none, 0, 1).shape == (0,)
