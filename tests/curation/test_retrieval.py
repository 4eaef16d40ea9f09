import numpy as np
import pytest

from curation.retrieval import clusters_hit, take_from_clusters


def slow_take(
    cluster: np.ndarray, draw: np.ndarray, words: np.ndarray, hit: np.ndarray, per_cluster: int, cap: int | None
) -> list[int]:
    def by_draw(row: int) -> tuple[int, int, int]:
        return int(draw[row]), int(words[row, 0]), int(words[row, 1])

    taken: list[int] = []
    for c in hit.tolist():
        taken += sorted((r for r in range(len(cluster)) if cluster[r] == c), key=by_draw)[:per_cluster]
    return sorted(sorted(taken, key=by_draw)[:cap])


def pool(seed: int, num_rows: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    words = np.stack((rng.integers(0, 2, num_rows), rng.permutation(num_rows)), axis=1).astype(np.uint64)
    return rng.integers(0, 7, num_rows).astype(np.int32), rng.integers(0, 12, num_rows).astype(np.uint64), words


@pytest.mark.parametrize("seed", range(8))
def test_takes_the_lowest_draws_of_each_cluster_hit(seed: int) -> None:
    cluster, draw, words = pool(seed)
    for hit in (np.array([], dtype=np.int64), np.array([3]), np.array([0, 2, 6, 99]), np.arange(7)):
        for per_cluster in (0, 1, 5, 100):
            for cap in (None, 0, 1, 7, 1000):
                taken = take_from_clusters(cluster, draw, words, hit, per_cluster, cap)
                assert taken.dtype == np.int64
                assert taken.tolist() == slow_take(cluster, draw, words, hit, per_cluster, cap)


def test_the_same_images_whatever_the_order_of_rows() -> None:
    cluster, draw, words = pool(1)
    hit = np.array([1, 4])
    expected = words[take_from_clusters(cluster, draw, words, hit, 4, 6)]
    order = np.random.default_rng(0).permutation(len(cluster))
    taken = take_from_clusters(cluster[order], draw[order], words[order], hit, 4, 6)
    assert sorted(words[order][taken].tolist()) == sorted(expected.tolist())


def test_an_empty_pool_gives_nothing() -> None:
    cluster, draw, words = pool(0, num_rows=0)
    assert take_from_clusters(cluster, draw, words, np.array([0]), 5, 5).shape == (0,)


def test_more_than_three_is_at_least_four() -> None:
    assert clusters_hit(np.array([3, 4, 0, 5, 4]), 4).tolist() == [1, 3, 4]
    assert clusters_hit(np.zeros(3, dtype=np.int64), 1).tolist() == []
    assert clusters_hit(np.empty(0, dtype=np.int64), 1).dtype == np.int64
