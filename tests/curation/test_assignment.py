"""Nearest centroids against all scores, one by one: cosine and L2, codes and few dimensions, ties and zeros."""

import numpy as np
import pytest

from curation import candidates
from curation.assignment import Nearest
from curation.codes import encode
from curation.distances import FEW_DIMENSIONS, Metric, Space, encode_points, squared_pairs
from curation.errors import LvdError
from curation.scoring import cosine_pairs, to_unit

METRICS: tuple[Metric, ...] = ("cosine", "l2")
DIMS = (2, 5, FEW_DIMENSIONS, FEW_DIMENSIONS + 1, 24, 64, 120)


def slow_scores(x: np.ndarray, centroids: np.ndarray, metric: Metric) -> np.ndarray:
    i, j = np.divmod(np.arange(len(x) * len(centroids)), len(centroids))
    pairs = cosine_pairs(x, i, centroids, j) if metric == "cosine" else -squared_pairs(x, i, centroids, j)
    return pairs.reshape(len(x), len(centroids))


def slow_exact(x: np.ndarray, centroids: np.ndarray, metric: Metric) -> tuple[np.ndarray, np.ndarray]:
    score = slow_scores(x, centroids, metric)
    best = score.max(axis=1)
    return score.argmax(axis=1), np.float32(1) - best if metric == "cosine" else -best  # argmax: the lowest of ties


def exact(x: np.ndarray, centroids: np.ndarray, metric: Metric) -> tuple[np.ndarray, np.ndarray]:
    space = Space.around(metric, centroids)
    return Nearest().exact(encode_points(x, space), encode_points(centroids, space), space)


def usual(x: np.ndarray, centroids: np.ndarray, metric: Metric) -> np.ndarray:
    space = Space.around(metric, centroids)
    return Nearest().usual(encode_points(x, space), encode_points(centroids, space), space)


def hard_case(rng: np.random.Generator, n: int, k: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Points of unequal length, some zero, some on a centroid; centroids that repeat, nearly repeat, and are zero."""
    x = (rng.standard_normal((n, dim)) * rng.uniform(0.1, 10, (n, 1))).astype(np.float16)
    centroids = rng.standard_normal((k, dim)).astype(np.float32)
    x[::7] = 0
    x[1::7] = centroids[rng.integers(0, k, len(x[1::7]))].astype(np.float16)
    twins = rng.integers(0, k, (2, k // 3))
    centroids[twins[0]] = centroids[twins[1]]
    near = rng.integers(0, k, (2, k // 4))
    centroids[near[0]] = centroids[near[1]] * (1 + rng.normal(0, 1e-6, (k // 4, dim))).astype(np.float32)
    centroids[k // 2] = 0
    return x, centroids


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dim", DIMS)
def test_exact_is_what_all_scores_say(dim: int, metric: Metric) -> None:
    for seed in range(3):
        rng = np.random.default_rng(seed)
        x, centroids = hard_case(rng, 150, 60, dim)
        cluster, distance = exact(x, centroids, metric)
        expected = slow_exact(x, centroids, metric)
        assert cluster.dtype == np.int32 and distance.dtype == np.float32
        np.testing.assert_array_equal(cluster, expected[0])
        np.testing.assert_array_equal(distance, expected[1])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dim", [*DIMS, 256, 384])
def test_what_is_usual_is_hardly_ever_anything_else(dim: int, metric: Metric) -> None:
    """Of many centroids about as near as the nearest; what is found instead is no farther than codes can be off."""
    agreed = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        x, centroids = hard_case(rng, 400, 60, dim)
        centroids = (centroids[rng.integers(0, 60, 300)] + rng.normal(0, 0.2, (300, dim))).astype(np.float32)
        found, expected = usual(x, centroids, metric), slow_exact(x, centroids, metric)[0]
        agreed.append(found == expected)
        score, every = slow_scores(x, centroids, metric), np.arange(len(x))
        scale = 1.0 if metric == "cosine" else np.linalg.norm(x.astype(float), axis=1) * np.abs(centroids).max() * dim
        assert (score[every, expected] - score[every, found] <= 0.05 * scale).all()
    assert np.mean(agreed) >= (1.0 if dim <= FEW_DIMENSIONS else 0.998)


@pytest.mark.parametrize("metric", METRICS)
def test_over_many_tiles_and_little_room(metric: Metric, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    x, centroids = hard_case(rng, 1_100, 1_500, 24)
    expected = slow_exact(x, centroids, metric)
    for held in (candidates.MAX_HELD, 1_500, 5):
        monkeypatch.setattr(candidates, "MAX_HELD", held)
        cluster, distance = exact(x, centroids, metric)
        np.testing.assert_array_equal(cluster, expected[0])
        np.testing.assert_array_equal(distance, expected[1])


def test_l2_far_from_the_origin_and_among_unequal_centroids() -> None:
    rng = np.random.default_rng(2)
    for scale in (1.0, 1e-3):
        x = ((rng.standard_normal((200, 32)) + 300) * scale).astype(np.float32)
        centroids = ((rng.standard_normal((50, 32)) * rng.uniform(0, 3, (50, 1)) + 300) * scale).astype(np.float32)
        np.testing.assert_array_equal(exact(x, centroids, "l2")[0], slow_exact(x, centroids, "l2")[0])


def test_a_point_without_direction_goes_to_the_first() -> None:
    x, centroids = np.zeros((5, 64), np.float16), to_unit(np.eye(64, dtype=np.float32))
    cluster, distance = exact(x, centroids, "cosine")
    assert (cluster.tolist(), distance.tolist()) == ([0] * 5, [1.0] * 5)
    cluster, distance = exact(x, np.concatenate([centroids * 2, centroids]), "l2")
    assert (cluster.tolist(), distance.tolist()) == ([64] * 5, [1.0] * 5)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dim", [8, 40])
def test_of_little(dim: int, metric: Metric) -> None:
    one = np.full((1, dim), 0.5, dtype=np.float32)
    for found in exact(np.empty((0, dim), np.float16), one, metric):
        assert found.shape == (0,)
    cluster, distance = exact(np.full((1, dim), 0.5, np.float16), one, metric)
    assert (cluster.tolist(), distance.tolist()) == ([0], [0.0])
    zero = np.zeros((3, dim), dtype=np.float32)
    assert exact(zero, zero, metric)[0].tolist() == [0, 0, 0]


def test_vectors_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(LvdError, match="cannot be compared"):
        exact(np.ones((2, 24), np.float32), np.ones((2, 32), np.float32), "cosine")
    bad = np.ones((30_000, 24), np.float32)
    bad[20_000, 3] = np.nan
    for metric in METRICS:
        with pytest.raises(LvdError, match="row 20000 has NaN"):
            encode_points(bad, Space.around(metric, np.ones((1, 24), np.float32)))


@pytest.mark.parametrize("metric", METRICS)
def test_codes_that_are_far_off_are_known_to_be(metric: Metric) -> None:
    """Vectors of an odd dimension are not spread over it, so the codes of sparse ones are cut off."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((380, 25)) * (rng.random((380, 25)) < 0.15)
    x, centroids = rows[:300].astype(np.float16), rows[300:].astype(np.float32)
    assert encode(centroids).error.max() > 0.15
    np.testing.assert_array_equal(exact(x, centroids, metric)[0], slow_exact(x, centroids, metric)[0])


@pytest.mark.parametrize("dim", [8, 40])
def test_l2_measures_from_the_center(dim: int) -> None:
    x = np.random.default_rng(0).standard_normal((50, dim)).astype(np.float32) + 100
    points = encode_points(x, Space.around("l2", x))
    np.testing.assert_allclose(points.length, np.linalg.norm(x - x.mean(axis=0), axis=1), rtol=1e-4)


def test_squared_pairs() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((9, 7)).astype(np.float16), rng.standard_normal((5, 7)).astype(np.float32)
    i, j = rng.integers(0, 9, 40), rng.integers(0, 5, 40)
    expected = ((x[i].astype(np.float64) - y[j].astype(np.float64)) ** 2).sum(axis=1)
    found = squared_pairs(x, i, y, j)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    with pytest.raises(IndexError, match="rows 0 to 9 of 9"):
        squared_pairs(x, np.array([0, 9]), y, np.array([0, 0]))
