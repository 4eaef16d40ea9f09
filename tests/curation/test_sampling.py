import itertools
import math

import numpy as np
import pytest

from curation import spread
from curation.balance_measures import (
    balance,
    balance_by_level,
    effective_clusters,
    entropy,
    gini,
    kl_to_uniform,
    normalized_entropy,
)
from curation.errors import ConfigError, LvdError
from curation.groups import distance_keys, group_sizes, group_sums, take_lowest
from curation.sampling import Tree, draw_copies, draw_ranks, equal_shares, proportional_shares, tree_shares
from curation.scoring import cosine_pairs


class Slow:
    """Shares of a tree, unit by unit: each goes to the child with images to spare that has the least so far."""

    def __init__(self, tree: Tree, sizes: list[int], max_copies: int, orders: list[list[int]]) -> None:
        self.parents = [p.tolist() for p in tree.parents] + [[0] * tree.num_clusters[-1]]
        self.room = [[size * max_copies for size in sizes]]
        for level, above in enumerate((*tree.num_clusters[1:], 1)):
            below = [[self.room[level][c] for c in self.children(level, node)] for node in range(above)]
            self.room.append([sum(rooms) for rooms in below])
        self.given = [[0] * len(room) for room in self.room]
        self.orders = orders

    def children(self, level: int, node: int) -> list[int]:
        return [child for child, parent in enumerate(self.parents[level]) if parent == node]

    def give(self) -> None:
        node = 0
        for level in reversed(range(len(self.parents))):
            spare = [c for c in self.children(level, node) if self.given[level][c] < self.room[level][c]]
            node = min(spare, key=lambda c: (self.given[level][c], self.orders[level][c], c))
            self.given[level][node] += 1


def random_tree(rng: np.random.Generator) -> Tree:
    """One to four levels; nodes without children, with one, and with many."""
    counts = sorted(rng.integers(1, 25, rng.integers(1, 5)).tolist(), reverse=True)
    parents = [rng.integers(0, above, below).astype(np.int32) for below, above in itertools.pairwise(counts)]
    return Tree(tuple(counts), tuple(parents))


def random_sizes(rng: np.random.Generator, count: int) -> np.ndarray:
    """Long-tailed, some empty, at times all of them or all equal."""
    kind = rng.integers(0, 10)
    if kind < 2:
        return np.full(count, kind, dtype=np.int64)
    return (rng.pareto(1, count) * 3).astype(np.int64).clip(0, 50) * (rng.random(count) < 0.8)


@pytest.mark.parametrize("seed", range(300))
def test_tree_shares_are_given_unit_by_unit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tree = random_tree(rng)
    sizes, max_copies = random_sizes(rng, tree.num_clusters[0]), int(rng.integers(1, 5))
    orders = tuple(rng.integers(0, 6, count).astype(np.uint64) for count in tree.num_clusters)
    reachable = int(sizes.sum()) * max_copies
    target = int(rng.choice([0, reachable, max(0, reachable - 1), rng.integers(0, reachable + 1)]))
    shares = tree_shares(tree, sizes, target, max_copies, orders)
    slow = Slow(tree, sizes.tolist(), max_copies, [order.tolist() for order in orders])
    for _ in range(target):
        slow.give()
    assert shares.dtype == np.int64
    assert shares.sum() == target
    assert shares.tolist() == slow.given[0]
    by_number = Slow(tree, sizes.tolist(), max_copies, [[0] * count for count in tree.num_clusters])
    for _ in range(target):
        by_number.give()
    assert tree_shares(tree, sizes, target, max_copies).tolist() == by_number.given[0]
    with pytest.raises(ConfigError, match=rf"largest possible target is {reachable:,}$"):
        tree_shares(tree, sizes, reachable + 1, max_copies)


def test_shares_of_known_trees() -> None:
    tree = Tree((5, 3), (np.array([0, 0, 0, 1, 1], np.int32),))  # node 2 has no children
    assert tree_shares(tree, np.array([10, 10, 10, 10, 1]), 12).tolist() == [2, 2, 2, 5, 1]
    assert tree_shares(tree, np.array([1, 0, 0, 10, 10]), 12).tolist() == [1, 0, 0, 6, 5]
    assert tree_shares(tree, np.array([1, 0, 0, 10, 10]), 12, max_copies=4).tolist() == [4, 0, 0, 4, 4]
    order = (np.array([0, 0, 0, 1, 0], np.uint64), np.array([1, 0, 0], np.uint64))
    assert tree_shares(tree, np.array([9, 9, 9, 9, 9]), 7, orders=order).tolist() == [1, 1, 1, 2, 2]
    assert tree_shares(tree, np.array([9, 9, 9, 9, 9]), 1, orders=order).tolist() == [0, 0, 0, 0, 1]
    assert tree.totals(np.arange(5))[1].tolist() == [3, 7, 0]
    assert [level.tolist() for level in tree.path(np.array([4, 0], np.int32))] == [[4, 0], [1, 0]]


@pytest.mark.parametrize("parents", [(), ([0, 1],), ([0, 0, 2],), ([0, -1, 0],), ([0, 0, 0], [0, 0])])
def test_trees_that_lead_nowhere_are_refused(parents: tuple[list[int], ...]) -> None:
    with pytest.raises(LvdError, match="parents"):
        Tree((3, 2), tuple(np.array(p, np.int32) for p in parents))


def test_equal_shares_of_known_clusters() -> None:
    assert equal_shares(np.array([100, 3, 0, 50]), 43).tolist() == [20, 3, 0, 20]
    assert equal_shares(np.array([5, 5, 5]), 8, order=np.array([9, 2, 1], dtype=np.uint64)).tolist() == [2, 3, 3]
    assert equal_shares(np.array([2**40, 2**41]), 2**41 + 1).tolist() == [2**40, 2**40 + 1]
    assert equal_shares(np.empty(0, dtype=np.int64), 0).tolist() == []


@pytest.mark.parametrize("target", [-1, 21])
def test_targets_out_of_reach_are_refused(target: int) -> None:
    with pytest.raises(ConfigError, match="largest possible target is 20"):
        equal_shares(np.array([3, 7]), target, max_copies=2)
    with pytest.raises(ConfigError, match="target is 0"):
        equal_shares(np.empty(0, dtype=np.int64), 1)


def rows(seed: int, num_rows: int = 50, num_clusters: int = 6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Clusters (one of them empty), draws that tie, and ids whose first words tie."""
    rng = np.random.default_rng(seed)
    cluster = rng.integers(0, num_clusters - 1, num_rows)
    cluster[cluster == 2] = num_clusters - 1
    words = np.stack((rng.integers(0, 2, num_rows), rng.permutation(num_rows)), axis=1).astype(np.uint64)
    return cluster, rng.integers(0, 4, num_rows).astype(np.uint64) + np.uint64(2**63), words


@pytest.mark.parametrize("seed", range(8))
def test_draw_ranks(seed: int) -> None:
    cluster, draw, words = rows(seed)
    ranks = draw_ranks(cluster, draw, words)
    for c in np.unique(cluster):
        members = np.flatnonzero(cluster == c)
        ordered = sorted(members, key=lambda r: (draw[r], words[r, 0], words[r, 1]))
        assert ranks[ordered].tolist() == list(range(len(members)))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_take_lowest(seed: int, kind: type) -> None:
    cluster, draw, words = rows(seed)
    want = np.random.default_rng(seed).integers(0, 15, 6)
    by_words = take_lowest(cluster.astype(kind), want, draw, words)
    by_row = take_lowest(cluster.astype(kind), want, (draw - np.uint64(2**63)).astype(np.uint32))
    expected_by_words, expected_by_row = np.zeros((2, 50), dtype=bool)
    for c in range(6):
        members = np.flatnonzero(cluster == c).tolist()
        expected_by_words[sorted(members, key=lambda r: (draw[r], *words[r]))[: want[c]]] = True
        expected_by_row[sorted(members, key=lambda r: draw[r])[: want[c]]] = True
    np.testing.assert_array_equal(by_words, expected_by_words)
    np.testing.assert_array_equal(by_row, expected_by_row)


def test_take_lowest_of_little_and_of_read_only_rows() -> None:
    assert take_lowest(np.empty(0, np.int32), np.zeros(0, np.int64), np.empty(0, np.uint64)).shape == (0,)
    group, keys = np.array([1, 1, 0], np.int32), np.array([5, 4, 9], np.uint64)
    group.flags.writeable = keys.flags.writeable = False
    assert take_lowest(group, np.array([0, 1, 3]), keys).tolist() == [False, True, False]
    assert take_lowest(np.repeat(group, 2)[::2], np.array([0, 1, 3]), np.repeat(keys, 2)[::2]).tolist() == [0, 1, 0]


def test_group_sums_are_exact() -> None:
    group = np.array([2, 0, 2, 2], np.int32)
    assert group_sizes(group, 4).tolist() == [1, 0, 3, 0]
    assert group_sums(group, np.array([1, 2, 2**60, 3]), 4).tolist() == [2, 0, 2**60 + 4, 0]


def test_distance_keys_order_as_distances_do() -> None:
    distance = np.array([0.5, -0.0, 0.0, 2.0, -1e-7, 1e-7, 0.5], np.float32)
    draw = np.arange(7, 0, -1).astype(np.uint64) << np.uint64(40)
    expected = [4, 2, 1, 5, 6, 0, 3]
    assert np.argsort(distance_keys(distance, draw), kind="stable").tolist() == expected
    assert np.argsort(distance_keys(distance), kind="stable").tolist() == [4, 1, 2, 5, 0, 6, 3]


@pytest.mark.parametrize("seed", range(8))
def test_draw_copies_tiles_and_draws_the_rest(seed: int) -> None:
    cluster, draw, words = rows(seed)
    sizes = np.bincount(cluster, minlength=6)
    shares = equal_shares(sizes, int(sizes.sum() * 1.7), max_copies=3)
    copies = draw_copies(cluster, shares, draw, words)
    assert copies.dtype == np.int32
    np.testing.assert_array_equal(np.bincount(cluster, weights=copies, minlength=6), shares)
    for c in np.flatnonzero(sizes):
        members = sorted(np.flatnonzero(cluster == c), key=lambda r: (draw[r], words[r, 0], words[r, 1]))
        laid_out = (members * 4)[: shares[c]]  # the cluster, over and over
        assert [laid_out.count(r) for r in members] == copies[members].tolist()


@pytest.mark.parametrize("seed", range(5))
def test_closest_takes_the_least_distances(seed: int) -> None:
    cluster, draw, _ = rows(seed, 200)
    draw <<= np.uint64(62)
    distance = np.random.default_rng(seed).integers(0, 20, 200).astype(np.float32) / 20
    shares = equal_shares(np.bincount(cluster, minlength=6), 70)
    copies = draw_copies(cluster, shares, distance_keys(distance, draw))
    for c in range(6):
        members = np.flatnonzero(cluster == c).tolist()
        chosen = sorted(members, key=lambda r: (distance[r], draw[r], r))[: shares[c]]
        assert np.flatnonzero((cluster == c) & (copies == 1)).tolist() == sorted(chosen)


def test_draw_copies_of_little() -> None:
    none = np.empty(0, dtype=np.int32), np.zeros(3, dtype=np.int64), np.empty(0, np.uint64), np.empty((0, 2), np.uint64)
    assert draw_copies(*none).shape == (0,)
    assert draw_copies(*none, vectors=np.empty((0, 4), np.float16)).shape == (0,)
    draw, words = np.zeros(1, np.uint64), np.zeros((1, 2), np.uint64)
    assert draw_copies(np.array([0]), np.array([5]), draw, words).tolist() == [5]
    with pytest.raises(LvdError, match="cluster 1 has a share but no images"):
        draw_copies(np.array([0]), np.array([1, 1]), draw, words)
    for cluster in (-1, 2):
        with pytest.raises(LvdError, match="there are 2 shares"):
            draw_copies(np.array([cluster]), np.array([1, 1]), draw, words)


def slow_spread(x: np.ndarray, members: list[int], want: int) -> list[int]:
    """Farthest-first over members in order: the first, then whichever is least similar to all taken."""
    taken = members[: min(want, 1)]
    while len(taken) < want:
        rest = [r for r in members if r not in taken]
        highest = [cosine_pairs(x, np.full(len(taken), r), x, np.array(taken)).max() for r in rest]
        taken.append(rest[int(np.argmin(highest))])
    return taken


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("max_rounds", [4, 64])
def test_spread_takes_the_farthest_first(seed: int, max_rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "MAX_ROUNDS", max_rounds)
    rng = np.random.default_rng(seed)
    cluster, draw, words = rows(seed, 90)
    x = rng.integers(-2, 3, (90, 3)).astype(np.float16)  # many equal vectors, some zero
    shares = np.minimum(rng.integers(0, 15, 6), np.bincount(cluster, minlength=6))
    shares[0] = np.count_nonzero(cluster == 0) * 2 + 3  # whole copies, then a spread
    copies = draw_copies(cluster, shares, draw, words, x)
    np.testing.assert_array_equal(np.bincount(cluster, weights=copies, minlength=6), shares)
    for c in range(6):
        members = sorted(np.flatnonzero(cluster == c).tolist(), key=lambda r: (draw[r], *words[r]))
        whole, want = divmod(int(shares[c]), max(1, len(members)))
        num_blocks = -(-want // max_rounds)
        chosen = []
        for block in range(num_blocks):
            part = want // num_blocks + (block < want % num_blocks)
            chosen += slow_spread(x, members[block::num_blocks], part)
        assert np.flatnonzero((cluster == c) & (copies == whole + 1)).tolist() == sorted(chosen)


def test_spread_covers_more_than_chance() -> None:
    """Of four kinds of rows, two of them rare, four rows taken are one of each."""
    x = np.repeat(np.eye(4, dtype=np.float32), [500, 3, 500, 2], axis=0).astype(np.float16)
    draw = np.random.default_rng(0).permutation(len(x)).astype(np.uint64)
    copies = draw_copies(np.zeros(len(x), np.int32), np.array([4]), draw, vectors=x)
    assert x[copies > 0].any(axis=0).all()


@pytest.mark.parametrize("seed", range(5))
def test_measures_by_definition(seed: int) -> None:
    counts = np.random.default_rng(seed).integers(0, 9, 12)
    total = counts.sum()
    by_definition = -sum(c / total * math.log(c / total) for c in counts if c)
    assert entropy(counts) == pytest.approx(by_definition)
    assert normalized_entropy(counts) == pytest.approx(by_definition / math.log(12))
    assert kl_to_uniform(counts) == pytest.approx(sum(c / total * math.log(c / total * 12) for c in counts if c))
    assert effective_clusters(counts) == pytest.approx(math.exp(by_definition))
    differences = sum(abs(int(a) - int(b)) for a in counts for b in counts)
    assert gini(counts) == pytest.approx(differences / (2 * 12 * total))


def test_measures_at_the_ends() -> None:
    for equal in (np.array([4]), np.array([4, 4, 4])):
        assert normalized_entropy(equal) == pytest.approx(1.0)
        assert gini(equal) == 0.0
        assert kl_to_uniform(equal) == pytest.approx(0.0)
        assert effective_clusters(equal) == pytest.approx(len(equal))
    assert entropy(np.array([0, 7, 0])) == normalized_entropy(np.array([0, 7, 0])) == 0.0
    assert kl_to_uniform(np.array([0, 7, 0])) == pytest.approx(math.log(3))
    assert gini(np.array([0, 0, 0, 7])) == pytest.approx(0.75)
    for nothing in (np.empty(0, dtype=np.int64), np.zeros(3, dtype=np.int64)):
        assert (entropy(nothing), normalized_entropy(nothing), gini(nothing)) == (0.0, 0.0, 0.0)
        assert (kl_to_uniform(nothing), effective_clusters(nothing)) == (0.0, 0.0)


def test_balance_by_level() -> None:
    tree = Tree((4, 3), (np.array([0, 0, 1, 1], np.int32),))
    fine, coarse = balance_by_level(tree, np.array([3, 1, 0, 4]))
    assert (fine, coarse) == (balance(np.array([3, 1, 0, 4])), balance(np.array([4, 4, 0])))
    assert (coarse.clusters, coarse.filled) == (3, 2)
    assert coarse.kl_to_uniform == pytest.approx(math.log(3 / 2))
    assert coarse.effective_clusters == pytest.approx(2)


@pytest.mark.parametrize("seed", range(5))
def test_shares_are_proportional(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(40):
        sizes = rng.integers(0, rng.integers(1, 60), rng.integers(1, 30)) * (rng.random() < 0.9)
        most = np.maximum(sizes, 1)
        target = int(rng.integers(len(sizes), most.sum() + 1))
        shares = proportional_shares(sizes, target)
        assert shares.sum() == target
        assert (shares >= 1).all() and (shares <= most).all()
        free = (shares > 1) & (shares < most)  # one rate for all, rounded by less than 1
        above, below = (shares[free] - 1) / sizes[free], (shares[free] + 1) / sizes[free]
        assert above.max(initial=0.0) < below.min(initial=np.inf)
        assert (np.diff(shares[np.argsort(sizes, kind="stable")]) >= -1).all()


def test_the_largest_remainders_get_what_is_left() -> None:
    assert proportional_shares(np.array([11, 13, 16]), 10).tolist() == [3, 3, 4]  # quotas 2.75, 3.25, 4
    assert proportional_shares(np.array([0, 1, 100]), 12).tolist() == [1, 1, 10]
