import numpy as np
import pytest

from curation import components
from curation.errors import LvdError


def slow_labels(num_nodes: int, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Smallest node of each component, by passing labels along edges until nothing changes."""
    labels = np.arange(num_nodes)
    changed = True
    while changed:
        changed = False
        for a, b in zip(i.tolist(), j.tolist(), strict=True):
            low = min(labels[a], labels[b])
            changed |= bool(labels[a] != low or labels[b] != low)
            labels[a] = labels[b] = low
    return labels


def slow_forest(i: np.ndarray, j: np.ndarray, sim: np.ndarray) -> list[int]:
    """Kruskal with a set of nodes per component."""
    groups = {node: {node} for node in {*i.tolist(), *j.tolist()}}
    kept = []
    for edge in sorted(range(len(i)), key=lambda e: (-sim[e], i[e], j[e], e)):
        a, b = groups[int(i[edge])], groups[int(j[edge])]
        if a is not b:
            kept.append(edge)
            a |= b
            groups.update(dict.fromkeys(b, a))
    return kept


def graph(seed: int) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """Chains, repeated edges, loops and lone nodes; similarities from few values, so that many tie."""
    rng = np.random.default_rng(seed)
    num_nodes = int(rng.integers(5, 60))
    num_edges = int(rng.integers(0, 2 * num_nodes))
    i, j = rng.integers(0, num_nodes, (2, num_edges))
    return num_nodes, i, j, rng.choice(np.array([0.61, 0.7, 0.75, 0.9, 1.0], dtype=np.float32), num_edges)


def labels_of(num_nodes: int, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    union_find = components.UnionFind(num_nodes)
    union_find.union(i, j)
    return union_find.labels()


@pytest.mark.parametrize("seed", range(12))
def test_labels_are_the_smallest_node_whatever_the_order(seed: int) -> None:
    num_nodes, i, j, _ = graph(seed)
    expected = slow_labels(num_nodes, i, j)
    assert labels_of(num_nodes, i, j).dtype == np.int64
    np.testing.assert_array_equal(labels_of(num_nodes, i, j), expected)
    shuffled = np.random.default_rng(seed).permutation(len(i))
    union_find = components.UnionFind(num_nodes)
    for block in np.array_split(shuffled, 4):
        union_find.union(j[block], i[block])
        union_find.labels()  # reading in between changes nothing
    np.testing.assert_array_equal(union_find.labels(), expected)


def test_a_long_chain_joined_from_either_end() -> None:
    nodes = np.arange(100_000)
    for order in (slice(None), slice(None, None, -1)):
        assert not labels_of(100_000, nodes[:-1][order], nodes[1:][order]).any()


def test_union_find_of_nothing() -> None:
    empty = np.empty(0, dtype=np.int64)
    assert labels_of(0, empty, empty).shape == (0,)
    assert labels_of(3, empty, empty).tolist() == [0, 1, 2]


def test_unknown_nodes_are_refused() -> None:
    union_find = components.UnionFind(3)
    for i, j in (([0], [3]), ([-1], [0])):
        with pytest.raises(LvdError, match="there are 3"):
            union_find.union(np.array(i), np.array(j))
    with pytest.raises(LvdError, match="2 and 1 ends"):
        union_find.union(np.array([0, 1]), np.array([1]))
    assert union_find.labels().tolist() == [0, 1, 2]


def read_only(values: np.ndarray, dtype: str) -> np.ndarray:
    """As a column of a file arrives."""
    column = values.astype(dtype)
    column.flags.writeable = False
    return column


@pytest.mark.parametrize("types", [("int32", "int32"), ("int64", "int32"), ("int32", "int64"), ("int16", "uint64")])
def test_columns_of_any_integer_type_join_alike(types: tuple[str, str]) -> None:
    num_nodes, i, j, _ = graph(1)
    found = labels_of(num_nodes, read_only(i, types[0]), read_only(j, types[1]))
    np.testing.assert_array_equal(found, slow_labels(num_nodes, i, j))
    strided = np.repeat(i, 2).astype(np.int32)[::2]
    np.testing.assert_array_equal(labels_of(num_nodes, strided, j), found)


def test_unknown_nodes_of_narrow_columns_are_refused() -> None:
    union_find = components.UnionFind(3)
    for node in (-1, 3, -(2**31), 2**31 - 1):
        with pytest.raises(LvdError, match="there are 3"):
            union_find.union(np.array([0, 0], dtype=np.int32), np.array([1, node], dtype=np.int32))
    assert union_find.labels().tolist() == [0, 1, 2]  # the known edge of a refused call is not joined either


@pytest.mark.parametrize("seed", range(12))
def test_forest_is_kruskals(seed: int) -> None:
    _, i, j, sim = graph(seed)
    assert components.spanning_forest(i, j, sim).tolist() == slow_forest(i, j, sim)
    big = np.int64(2**62) - 97 * np.arange(60)[::-1]  # node numbers as they come, in the same order
    assert components.spanning_forest(big[i], big[j], sim).tolist() == slow_forest(i, j, sim)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "nodes", [[0, 1, 2, 3], [10**9, 10**9 + 1, 7], [2**54, 5], [2**40, 2**55, 2**62, 5], [-(2**62), -5, 0, 9]]
)
def test_kruskal_order_is_by_similarity_then_ends(seed: int, nodes: list[int]) -> None:
    rng = np.random.default_rng(seed)
    sim = np.array([-np.inf, -1, -0.5, -1e-30, -0.0, 0.0, 1e-30, 0.5, np.nextafter(np.float32(0.5), 1), 1, np.inf])
    sim = rng.choice(sim, 300).astype(np.float32)
    i, j = rng.choice(nodes, (2, 300))
    np.testing.assert_array_equal(components.kruskal_order(i, j, sim), np.lexsort((j, i, -sim)))


@pytest.mark.parametrize("seed", range(6))
def test_forest_takes_nodes_of_any_number(seed: int) -> None:
    _, i, j, sim = graph(seed)
    for nodes in (np.arange(60) - 30, np.linspace(-(2**62), 2**62, 60).astype(np.int64)):
        assert components.spanning_forest(nodes[i], nodes[j], sim).tolist() == slow_forest(i, j, sim)


@pytest.mark.parametrize("seed", range(12))
def test_forest_keeps_components_and_strongest_edges_at_every_threshold(seed: int) -> None:
    num_nodes, i, j, sim = graph(seed)
    kept = components.spanning_forest(i, j, sim)
    for threshold in (0.6, 0.61, 0.7, 0.8, 0.95, 1.0):
        every, few = np.flatnonzero(sim > threshold), kept[sim[kept] > threshold]
        np.testing.assert_array_equal(labels_of(num_nodes, i[few], j[few]), slow_labels(num_nodes, i[every], j[every]))
    for node in range(num_nodes):
        mine = ((i == node) | (j == node)) & (i != j)
        assert sim[mine].max(initial=-1) == sim[kept][mine[kept]].max(initial=-1)


@pytest.mark.parametrize("seed", range(6))
def test_forest_of_forests_is_the_forest(seed: int) -> None:
    _, i, j, sim = graph(seed)
    parts = np.array_split(np.random.default_rng(seed).permutation(len(i)), 3)
    few = np.concatenate([part[components.spanning_forest(i[part], j[part], sim[part])] for part in parts])
    merged = few[components.spanning_forest(i[few], j[few], sim[few])]
    whole = components.spanning_forest(i, j, sim)
    for column in (i, j, sim):
        np.testing.assert_array_equal(column[merged], column[whole])


def test_forest_of_little() -> None:
    assert components.spanning_forest(np.empty(0, int), np.empty(0, int), np.empty(0, np.float32)).shape == (0,)
    assert components.spanning_forest(np.array([7]), np.array([7]), np.array([1], dtype=np.float32)).tolist() == []
    assert components.spanning_forest(
        np.array([7, 7]), np.array([9, 9]), np.array([0.7, 0.8], dtype=np.float32)
    ).tolist() == [1]


@pytest.mark.parametrize("lengths", [(3, 2, 3), (2, 3, 3), (3, 3, 2), (2, 2, 3)])
def test_columns_of_different_length_are_refused(lengths: tuple[int, int, int]) -> None:
    i, j, sim = (np.arange(length) for length in lengths)
    for function in (components.spanning_forest, components.kruskal_order):
        with pytest.raises(LvdError, match="similarities"):
            function(i, j, sim.astype(np.float32))


@pytest.mark.parametrize("seed", range(6))
def test_sizes_and_representatives(seed: int) -> None:
    num_nodes, i, j, _ = graph(seed)
    rng = np.random.default_rng(seed)
    labels = labels_of(num_nodes, i, j)
    area = rng.integers(1, 4, num_nodes)
    words = np.stack((rng.integers(0, 2, num_nodes), rng.permutation(num_nodes)), axis=1).astype(np.uint64)
    words[rng.random(num_nodes) < 0.5] += np.uint64(2**63)  # above int64
    found = components.representatives(labels, area, words)
    sizes = components.component_sizes(labels)
    assert found.dtype == np.int64
    assert sizes.dtype == np.int64
    for node in range(num_nodes):
        members = np.flatnonzero(labels == labels[node])
        assert sizes[node] == len(members)
        assert found[node] == min(members, key=lambda m: (-area[m], words[m, 0], words[m, 1]))


def test_sizes_and_representatives_of_nothing() -> None:
    empty = np.empty(0, dtype=np.int64)
    assert components.component_sizes(empty).shape == (0,)
    assert components.representatives(empty, empty, np.empty((0, 2), dtype=np.uint64)).shape == (0,)
