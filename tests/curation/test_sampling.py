import math

import numpy as np
import pytest

from curation.errors import ConfigError, LvdError
from curation.sampling import draw_copies, draw_ranks, entropy, equal_shares, gini, normalized_entropy


def slow_shares(sizes: list[int], target: int, max_copies: int, order: list[int]) -> list[int]:
    """Rounds of one image each over the clusters with images to spare; the last round by `order`."""
    shares = [0] * len(sizes)
    while sum(shares) < target:
        spare = [c for c, size in enumerate(sizes) if shares[c] < max_copies * size]
        for c in sorted(spare, key=lambda c: order[c])[: target - sum(shares)]:
            shares[c] += 1
    return shares


@pytest.mark.parametrize("seed", range(30))
def test_equal_shares_are_rounds_of_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 20, rng.integers(1, 12)) * rng.integers(0, 2, 1)
    max_copies = int(rng.integers(1, 4))
    order = rng.integers(0, 5, len(sizes)).astype(np.uint64)
    reachable = int(sizes.sum()) * max_copies
    for target in {0, 1, reachable // 3, reachable // 2, reachable - 1, reachable} & set(range(reachable + 1)):
        shares = equal_shares(sizes, target, max_copies, order)
        assert shares.dtype == np.int64
        assert shares.sum() == target
        assert shares.tolist() == slow_shares(sizes.tolist(), target, max_copies, order.tolist())
        by_number = slow_shares(sizes.tolist(), target, max_copies, list(range(len(sizes))))
        assert equal_shares(sizes, target, max_copies).tolist() == by_number


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


def test_draw_copies_of_little() -> None:
    none = np.empty(0, dtype=np.int32), np.zeros(3, dtype=np.int64), np.empty(0, np.uint64), np.empty((0, 2), np.uint64)
    assert draw_copies(*none).shape == (0,)
    draw, words = np.zeros(1, np.uint64), np.zeros((1, 2), np.uint64)
    assert draw_copies(np.array([0]), np.array([5]), draw, words).tolist() == [5]
    with pytest.raises(LvdError, match="cluster 1 has a share but no images"):
        draw_copies(np.array([0]), np.array([1, 1]), draw, words)
    for cluster in (-1, 2):
        with pytest.raises(LvdError, match="there are 2 shares"):
            draw_copies(np.array([cluster]), np.array([1, 1]), draw, words)


@pytest.mark.parametrize("seed", range(5))
def test_entropy_and_gini_by_definition(seed: int) -> None:
    counts = np.random.default_rng(seed).integers(0, 9, 12)
    total = counts.sum()
    by_definition = -sum(c / total * math.log(c / total) for c in counts if c)
    assert entropy(counts) == pytest.approx(by_definition)
    assert normalized_entropy(counts) == pytest.approx(by_definition / math.log(12))
    differences = sum(abs(int(a) - int(b)) for a in counts for b in counts)
    assert gini(counts) == pytest.approx(differences / (2 * 12 * total))


def test_entropy_and_gini_at_the_ends() -> None:
    for equal in (np.array([4]), np.array([4, 4, 4])):
        assert normalized_entropy(equal) == pytest.approx(1.0)
        assert gini(equal) == 0.0
    assert entropy(np.array([0, 7, 0])) == normalized_entropy(np.array([0, 7, 0])) == 0.0
    assert gini(np.array([0, 0, 0, 7])) == pytest.approx(0.75)
    for nothing in (np.empty(0, dtype=np.int64), np.zeros(3, dtype=np.int64)):
        assert (entropy(nothing), normalized_entropy(nothing), gini(nothing)) == (0.0, 0.0, 0.0)
