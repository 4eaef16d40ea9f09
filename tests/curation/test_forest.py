import numpy as np
import pytest
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from curation import forest
from curation.components import spanning_forest
from curation.forest import Forest

BASE = 0.6


def below_one(rng: np.random.Generator, num_edges: int) -> np.ndarray:
    """Scores above the base: many equal, many at a few of the forest's own levels and next to them, many near 1."""
    levels = rng.choice(Forest(1, BASE).levels[1:], 3)
    choices = np.concatenate((levels, np.nextafter(levels, np.float32(2)), np.nextafter(levels, np.float32(0))))
    score = rng.choice(np.append(choices, np.float32([0.61, 0.7, 0.9, 1.0])), num_edges)
    fresh = rng.random(num_edges) < rng.choice([0.1, 0.4])
    score[fresh] = rng.uniform(BASE + 1e-4, 1, fresh.sum())
    high = rng.random(num_edges) < rng.choice([0.1, 0.4])
    score[high] = rng.uniform(0.985, 1.0 + 1e-7, high.sum())
    return score


def random_graph(rng: np.random.Generator, num_nodes: int) -> tuple[np.ndarray, ...]:
    num_edges = int(rng.integers(0, 12 * num_nodes))
    i, j = rng.integers(0, num_nodes, (2, num_edges))  # loops and repeated edges too
    return i, j, below_one(rng, num_edges)


def cliques(rng: np.random.Generator, num_nodes: int) -> tuple[np.ndarray, ...]:
    """Cliques of unequal size, each with scores around its own, and a few edges between them."""
    names, parts = rng.permutation(num_nodes), []
    for members in np.array_split(names, np.sort(rng.integers(0, num_nodes, 4))):
        i, j = (members[side] for side in np.triu_indices(len(members), 1))
        center = rng.uniform(BASE, 1.0)
        parts.append((i, j, np.clip(np.round(rng.normal(center, 0.03, len(i)), 3), 0.61, 1.0).astype(np.float32)))
    i, j = rng.integers(0, num_nodes, (2, num_nodes // 3))
    parts.append((i, j, below_one(rng, len(i))))
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


def expected_edges(i: np.ndarray, j: np.ndarray, score: np.ndarray, numbers: np.ndarray | None) -> tuple:
    if numbers is not None:
        i, j = numbers[i], numbers[j]
    a, b = np.minimum(i, j), np.maximum(i, j)
    kept = spanning_forest(a, b, score)
    return a[kept], b[kept], score[kept]


def stream(
    rng: np.random.Generator, into: Forest, i: np.ndarray, j: np.ndarray, score: np.ndarray, num_batches: int
) -> int:
    """Offer all edges in random order, with bounds from exact to lax, and add what is left; returns its number."""
    added, turned = 0, rng.random(len(i)) < 0.5
    i, j = np.where(turned, j, i), np.where(turned, i, j)
    slack = np.where(rng.random(len(i)) < 0.3, 0, rng.exponential(0.03, len(i))).astype(np.float32)
    for batch in np.array_split(rng.permutation(len(i)), num_batches):
        kind = np.int32 if rng.random() < 0.3 else np.int64
        a, b = i[batch].astype(kind), j[batch].astype(kind)
        left = into.undecided(a, b, score[batch] + slack[batch])
        assert left.dtype == np.bool_
        into.add(a[left], b[left], score[batch][left])
        added += left.sum()
        if rng.random() < 0.1:
            into.edges()  # reading in between changes nothing
    return added


def labels_above(num_nodes: int, edges: tuple, threshold: float) -> np.ndarray:
    i, j, score = edges
    above = score > np.float32(threshold)
    graph = coo_array((np.ones(above.sum()), (i[above], j[above])), shape=(num_nodes, num_nodes))
    return connected_components(graph, directed=False)[1]


def assert_edges(found: tuple, expected: tuple) -> None:
    assert [column.dtype for column in found] == [np.int64, np.int64, np.float32]
    for column, expected_column in zip(found, expected, strict=True):
        np.testing.assert_array_equal(column, expected_column)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("make", [random_graph, cliques])
@pytest.mark.parametrize("seed", range(8))
def test_a_stream_of_pairs_gives_the_spanning_forest_of_all(
    seed: int, make: type, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(seed)
    num_nodes = int(rng.integers(2, 120))
    i, j, score = make(rng, num_nodes)
    numbers = rng.permutation(5 * num_nodes)[:num_nodes] + 2**40 if named else None
    expected = expected_edges(i, j, score, numbers)
    for held, num_batches in ((1 << 21, 1), (1 << 21, 17), (1, 300), (1, 40)):
        monkeypatch.setattr(forest, "HELD_EDGES", held)
        into = Forest(num_nodes, BASE, numbers)
        stream(rng, into, i, j, score, num_batches)
        assert_edges(into.edges(), expected)
        assert_edges(into.edges(), expected)


def test_it_reduces_whenever_enough_edges_have_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forest, "HELD_EDGES", 30)
    sizes = []

    def spy(a: np.ndarray, b: np.ndarray, similarity: np.ndarray) -> np.ndarray:
        sizes.append(len(a))
        return spanning_forest(a, b, similarity)

    monkeypatch.setattr(forest, "spanning_forest", spy)
    rng = np.random.default_rng(0)
    i, j = np.triu_indices(20, 1)
    score = rng.uniform(0.99, 1.0, len(i)).astype(np.float32)  # above all levels: nothing is left out
    into = Forest(20, BASE)
    stream(rng, into, i, j, score, 19)
    assert len(sizes) >= 190 // 40
    assert max(sizes) <= 19 + 30 + 10
    assert_edges(into.edges(), expected_edges(i, j, score, None))


@pytest.mark.parametrize("base", [-2.0, 0.0, 0.45, 0.98, 0.9999])
def test_any_base(base: float) -> None:
    for seed in range(4):
        rng = np.random.default_rng(seed)
        i, j = rng.integers(0, 40, (2, 500))
        score = rng.uniform(np.nextafter(np.float32(base), np.float32(2)), 1, 500).astype(np.float32)
        score[:100] = np.nextafter(np.float32(base), np.float32(2))
        into = Forest(40, base)
        stream(rng, into, i, j, score, 20)
        assert_edges(into.edges(), expected_edges(i, j, score, None))


@pytest.mark.parametrize("make", [random_graph, cliques])
@pytest.mark.parametrize("seed", range(6))
def test_cut_anywhere_it_connects_what_all_edges_connect(seed: int, make: type) -> None:
    rng = np.random.default_rng(seed)
    num_nodes = 90
    i, j, score = make(rng, num_nodes)
    into = Forest(num_nodes, BASE)
    stream(rng, into, i, j, score, 11)
    for threshold in (BASE, 0.61, 0.7, 0.8, 0.9, 0.97, 0.99, 1.0):
        kept = labels_above(num_nodes, into.edges(), threshold)
        np.testing.assert_array_equal(kept, labels_above(num_nodes, (i, j, score), threshold))


@pytest.mark.parametrize("seed", range(3))
def test_a_pair_is_decided_where_its_ends_connect_above_the_next_level(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_nodes = 50
    edges = random_graph(rng, num_nodes)
    into = Forest(num_nodes, BASE)
    into.add(*edges)
    assert into.levels[0] == np.float32(BASE)
    a, b = (side.ravel() for side in np.indices((num_nodes, num_nodes)))
    for bound in np.concatenate((into.levels, below_one(rng, 40), np.float32([0.5, 1.5]))):
        left = into.undecided(a, b, np.full(len(a), bound, dtype=np.float32))
        levels = into.levels[into.levels >= bound]
        labels = labels_above(num_nodes, edges, levels[0]) if len(levels) else np.arange(num_nodes)
        np.testing.assert_array_equal(left, (labels[a] != labels[b]) if len(levels) else True)


def test_few_pairs_of_a_clique_are_scored() -> None:
    rng = np.random.default_rng(0)
    i, j = np.triu_indices(300, 1)
    score = rng.uniform(0.7, 0.9, len(i)).astype(np.float32)
    into = Forest(300, BASE)
    assert stream(rng, into, i, j, score, 100) < 0.2 * len(i)


@pytest.mark.parametrize("num_nodes", [0, 1, 5])
def test_forest_of_nothing(num_nodes: int) -> None:
    into = Forest(num_nodes, BASE)
    empty = np.zeros(0, dtype=np.int64)
    assert into.undecided(empty, empty, np.zeros(0, dtype=np.float32)).shape == (0,)
    into.add(empty, empty, np.zeros(0, dtype=np.float32))
    assert_edges(into.edges(), (empty, empty, np.zeros(0, dtype=np.float32)))
