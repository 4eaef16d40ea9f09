"""Cluster-based retrieval against a direct transcription of the rule, in streams of any cut and order."""

from typing import Any

import numpy as np
import pytest

from curation import retrieval
from curation.retrieval import ClusterDraw, Members, Strategy, clusters_hit, no_members

NUM = 60


def slow_take(pool: Members, hit: list[int], per_cluster: int, cap: int | None, strategy: Strategy) -> list[int]:
    """The paper's rule (appendix A.4) with our order where it gives none."""

    def by_draw(row: int) -> tuple[Any, ...]:
        return int(pool.draw[row]), int(pool.words[row, 0]), int(pool.words[row, 1])

    def within(row: int) -> tuple[Any, ...]:
        if strategy == "random":
            return by_draw(row)
        return (float(pool.distance[row]), int(pool.draw[row]) >> 32, *map(int, pool.words[row]))

    taken: list[int] = []
    for c in hit:
        taken += sorted((row for row in range(len(pool)) if pool.cluster[row] == c), key=within)[:per_cluster]
    return sorted(int(pool.place[row]) for row in sorted(taken, key=by_draw)[:cap])


def make_pool(seed: int) -> Members:
    """Many ties: few draws, few distances, few first words."""
    rng = np.random.default_rng(seed)
    words = np.stack((rng.integers(0, 2, NUM), rng.permutation(NUM)), axis=1).astype(np.uint64)
    draw = rng.integers(0, 12, NUM).astype(np.uint64) << np.uint64(int(rng.integers(0, 40)))
    distance = rng.choice([-0.0, 0.0, 0.25, 0.5, 1.5], NUM).astype(np.float32)
    return Members(rng.integers(0, 7, NUM).astype(np.int32), draw, words, distance, rng.permutation(NUM) * 3)


def drawn(pool: Members, pieces: list[np.ndarray], *rule: Any) -> Members:
    draw = ClusterDraw(*rule)
    for rows in pieces:
        draw.add(pool.take(rows))
    return draw.taken()


@pytest.mark.parametrize("strategy", ["random", "closest"])
@pytest.mark.parametrize("seed", range(6))
def test_equals_the_rule_however_the_pool_streams(
    seed: int, strategy: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make_pool(seed)
    rng = np.random.default_rng(seed)
    for hit in ([], [3], [0, 2, 6, 99], list(range(7))):
        for per_cluster in (0, 1, 5, 100):
            for cap in (None, 0, 1, 7, 1000):
                expected = slow_take(pool, hit, per_cluster, cap, strategy)
                for pending in (1, 9, 1000):
                    monkeypatch.setattr(retrieval, "LEAST_PENDING", pending)
                    cuts = np.sort(rng.integers(0, NUM, 5))
                    pieces = np.split(rng.permutation(NUM), cuts)
                    taken = drawn(pool, pieces, np.array(hit, dtype=np.int64), per_cluster, cap, strategy)
                    assert taken.place.tolist() == expected


def test_what_is_held_does_not_grow_with_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "LEAST_PENDING", 10)
    for cap, limit in ((None, 2 * 5), (4, 4)):
        draw = ClusterDraw(np.array([1, 2]), 5, cap)
        for seed in range(30):
            draw.add(make_pool(seed))
            assert len(draw._held) <= limit
            assert sum(map(len, draw._fresh)) <= 10


def test_all_columns_come_back_with_their_image() -> None:
    pool = make_pool(0)
    taken = drawn(pool, [np.arange(NUM)], np.arange(7), 100, None)
    order = np.argsort(pool.place)
    for name, column in vars(taken).items():
        np.testing.assert_array_equal(column, getattr(pool, name)[order])


def test_an_empty_pool_gives_nothing() -> None:
    assert len(ClusterDraw(np.array([0]), 5, 5).taken()) == 0
    assert len(drawn(no_members(), [np.arange(0)], np.array([0]), 5, 5)) == 0


def test_more_than_three_is_at_least_four() -> None:
    assert clusters_hit(np.array([3, 4, 0, 5, 4]), 4).tolist() == [1, 3, 4]
    assert clusters_hit(np.zeros(3, dtype=np.int64), 1).tolist() == []
    assert clusters_hit(np.empty(0, dtype=np.int64), 1).dtype == np.int64
