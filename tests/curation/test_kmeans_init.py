"""Starts of k-means: points of the data, drawn by keyed hashes, spread as their rules say."""

import numpy as np
import pytest

from curation.clustering import assign
from curation.distances import Metric
from curation.kmeans_init import Init, draw_rows, first_centroids
from curation.scoring import to_unit

METRICS: tuple[Metric, ...] = ("cosine", "l2")
INITS: tuple[Init, ...] = ("subsample", "k-means++", "k-means||")


def start(x: np.ndarray, num_clusters: int, init: Init, metric: Metric, seed: int = 0) -> np.ndarray:
    return first_centroids(x, num_clusters, init, metric, seed, "cpu")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("dim", [6, 24])
def test_a_start_is_different_points(dim: int, init: Init, metric: Metric) -> None:
    x = np.random.default_rng(0).standard_normal((80, dim)).astype(np.float16)
    points = to_unit(x) if metric == "cosine" else x.astype(np.float32)
    rows = {row.tobytes(): at for at, row in enumerate(points)}
    for num_clusters in (1, 7, 80):
        found = [rows[row.tobytes()] for row in start(x, num_clusters, init, metric)]
        assert len(set(found)) == num_clusters
    np.testing.assert_array_equal(start(x, 7, init, metric), start(x, 7, init, metric))
    assert not np.array_equal(start(x, 7, init, metric), start(x, 7, init, metric, seed=1))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("init", INITS[1:])
def test_far_apart_groups_get_one_each(init: Init, metric: Metric) -> None:
    """Groups of 1 to 512 points: a subsample misses the small ones, a choice by distance does not."""
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(10), 2 ** np.arange(10))
    x = (20 * np.eye(10, 24)[group] + 0.01 * rng.standard_normal((len(group), 24))).astype(np.float16)
    for seed in range(4):
        cluster, _ = assign(x, start(x, 10, init, metric, seed), metric=metric)
        assert len({(g, c) for g, c in zip(group, cluster, strict=True)}) == 10
        assert len(np.unique(cluster)) == 10
        few, _ = assign(x, start(x, 10, "subsample", metric, seed), metric=metric)
        assert len({(g, c) for g, c in zip(group, few, strict=True) if (group == g).sum() < 9}) < 10


@pytest.mark.parametrize("init", INITS)
def test_few_different_points_still_give_k(init: Init) -> None:
    x = np.repeat(np.eye(3, 24, dtype=np.float16), 10, axis=0)
    for metric in METRICS:
        assert start(x, 12, init, metric).shape == (12, 24)
        assert sorted(start(x, 30, init, metric).tolist()) == sorted(x.tolist())  # each is taken once


def test_chances_follow_the_distance() -> None:
    """After one of three far groups is taken, the next is of either other group in proportion to its distances."""
    x = np.zeros((40, 24), dtype=np.float16)
    x[30:, 0] = 2  # ten points at squared distance 4 from thirty at the origin
    x[39] = 0
    x[39, 1] = 6  # and one at 36 from these: half of all that lies apart, were the first a zero
    firsts = [start(x, 2, "k-means++", "l2", seed) for seed in range(300)]
    from_zero = [found[1] for found in firsts if not found[0].any()]
    share = np.mean([row[1] == 6 for row in from_zero])
    assert len(from_zero) > 180
    assert share == pytest.approx(0.5, abs=0.12)


def test_rows_are_drawn_by_hash() -> None:
    rows = draw_rows(1_000, 100, 0, "test")
    assert len(np.unique(rows)) == 100 and (np.diff(rows) > 0).all() and rows.max() < 1_000
    assert not np.array_equal(rows, draw_rows(1_000, 100, 1, "test"))
    assert draw_rows(5, 9, 0, "test").tolist() == [0, 1, 2, 3, 4]
