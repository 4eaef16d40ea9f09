"""k-means against FAISS and a slow version of it, and what it does with few points, duplicates and zeros."""

from typing import Any

import numpy as np
import pytest

from curation import clustering
from curation.clustering import assign, fit_kmeans
from curation.distances import Metric
from curation.errors import ConfigError, LvdError
from curation.faiss_setup import require_faiss
from curation.kmeans_init import Init, first_centroids
from curation.scoring import to_unit
from tests.vectors import all_cosines

METRICS: tuple[Metric, ...] = ("cosine", "l2")


def blobs(seed: int, num_rows: int, num_blobs: int, dim: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of different length around well separated directions, and which direction each is from."""
    rng = np.random.default_rng(seed)
    centers = np.linalg.qr(rng.standard_normal((dim, dim)))[0][:num_blobs]
    blob = np.arange(num_rows) % num_blobs
    x = (centers[blob] + 0.05 * rng.standard_normal((num_rows, dim))) * rng.uniform(0.1, 10, (num_rows, 1))
    return x.astype(np.float16), blob


def slow_assign(x: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    cosine = all_cosines(x, centroids)
    return cosine.argmax(axis=1), np.float32(1) - cosine.max(axis=1)  # argmax takes the lowest of ties


def fit(x: np.ndarray, num_clusters: int, seed: int = 0, iterations: int = 10, threads: int = 1) -> np.ndarray:
    return fit_kmeans(x, num_clusters, iterations=iterations, seed=seed, threads=threads)


def objective(x: np.ndarray, centroids: np.ndarray, metric: Metric = "cosine") -> float:
    return float(assign(x, centroids, metric=metric)[1].mean(dtype=np.float64))


def assert_unit(centroids: np.ndarray, num_clusters: int, dim: int) -> None:
    assert centroids.shape == (num_clusters, dim)
    assert centroids.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(centroids.astype(np.float64), axis=1), 1.0, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_assign_takes_the_nearest_centroid(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((300, 24)).astype(np.float16)
    x[::50] = 0
    centroids = to_unit(rng.standard_normal((40, 24)).astype(np.float32))
    centroids[30:] = centroids[10:20]  # ties
    x[:10] = centroids[:10].astype(np.float16)
    cluster, distance = assign(x, centroids)
    expected_cluster, expected_distance = slow_assign(x, centroids)
    assert cluster.dtype == np.int32
    assert distance.dtype == np.float32
    np.testing.assert_array_equal(cluster, expected_cluster)
    np.testing.assert_array_equal(distance, expected_distance)
    assert cluster.max() < 30
    assert (cluster[::50] == 0).all()  # a zero vector is equally far from all


def test_assign_among_nearly_equal_centroids() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((20, 64)).astype(np.float16)
    centroids = to_unit(np.repeat(x[:1], 100, axis=0).astype(np.float32) + rng.normal(0, 1e-6, (100, 64)).astype("f4"))
    np.testing.assert_array_equal(assign(x, centroids)[0], slow_assign(x, centroids)[0])


def test_assign_of_little() -> None:
    one = np.full((1, 4), 0.5, dtype=np.float32)
    cluster, distance = assign(np.empty((0, 4), dtype=np.float16), one)
    assert cluster.shape == distance.shape == (0,)
    cluster, distance = assign(np.ones((1, 4), dtype=np.float16), one)
    assert (cluster.tolist(), distance.tolist()) == ([0], [0.0])


@pytest.mark.parametrize("seed", range(3))
def test_fit_improves_with_iterations_and_assigns_whole_blobs(seed: int) -> None:
    x, blob = blobs(seed, 600, 6)
    start, end = (assign(x, fit(x, 6, seed, iterations))[1].mean() for iterations in (0, 15))
    assert end <= start
    cluster, _ = assign(x, fit(x, 24, seed))
    for c in np.unique(cluster):
        assert len(np.unique(blob[cluster == c])) == 1


@pytest.mark.parametrize("seed", range(3))
def test_a_centroid_is_the_mean_direction_of_its_cluster(seed: int) -> None:
    """The fixed point of spherical k-means; on vectors without blobs, Euclidean k-means ends at another."""
    x = np.random.default_rng(seed).standard_normal((400, 8)).astype(np.float16)
    centroids = fit(x, 12, seed, iterations=100)
    cluster, _ = assign(x, centroids)
    for c in np.unique(cluster):
        mean = to_unit(x)[cluster == c].astype(np.float64).mean(axis=0)
        np.testing.assert_allclose(centroids[c], mean / np.linalg.norm(mean), atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_fit_repeats_itself_and_follows_the_seed(threads: int) -> None:
    x = np.random.default_rng(0).standard_normal((500, 32)).astype(np.float16)
    first = fit(x, 20, seed=1, threads=threads)
    np.testing.assert_array_equal(first, fit(x, 20, seed=1, threads=threads))
    assert not np.array_equal(first, fit(x, 20, seed=2, threads=threads))
    assert_unit(fit(x, 20, seed=2**63, threads=threads), 20, 32)


def test_fit_uses_the_whole_sample() -> None:
    x = np.random.default_rng(0).standard_normal((600, 8)).astype(np.float16)
    mean = to_unit(x).astype(np.float64).mean(axis=0)  # one cluster of more points than FAISS samples by itself
    np.testing.assert_allclose(fit(x, 1)[0], mean / np.linalg.norm(mean), atol=1e-5)


def test_few_points_duplicates_and_zeros(capfd: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((12, 8)).astype(np.float16)
    same = np.ones((30, 8), dtype=np.float16)
    mixed = np.concatenate((np.zeros((5, 8), dtype=np.float16), x))
    opposite = np.concatenate((x[:1], -x[:1]))
    for sample, num_clusters in ((x, 12), (x, 11), (same, 7), (mixed, 12), (opposite, 1), (x[:1], 1)):
        assert_unit(fit(sample, num_clusters), num_clusters, 8)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("num_zeros", [0, 10])
def test_fewer_points_than_clusters_are_refused(num_zeros: int) -> None:
    x = np.concatenate((np.eye(8), np.zeros((num_zeros, 8)))).astype(np.float16)
    with pytest.raises(ConfigError, match="9 clusters are asked for and the sample has 8 usable vectors: set fewer"):
        fit(x, 9)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("apart", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("dim", [8, 64])
def test_the_objective_is_that_of_faiss(dim: int, apart: float, metric: Metric) -> None:
    """Or lower: where clusters are far apart some go empty, and we put those where the spread is largest."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        around = apart * rng.standard_normal((40, dim))[rng.integers(0, 40, 3_000)]
        x = (rng.standard_normal((3_000, dim)) + around).astype(np.float16)
        ours = fit_kmeans(x, 60, iterations=8, seed=seed, threads=1, metric=metric, tolerance=-1.0)
        peer = require_faiss(1).Kmeans(
            dim, 60, niter=8, spherical=metric == "cosine", min_points_per_centroid=1, max_points_per_centroid=len(x)
        )
        start = first_centroids(x, 60, "subsample", metric, seed, "cpu")
        peer.train(to_unit(x) if metric == "cosine" else x.astype(np.float32), init_centroids=start)
        share = objective(x, ours, metric) / objective(x, peer.centroids, metric)
        assert 0.999 < share < 1.001 if apart <= 1 else share < 1.01
        assert objective(x, ours, metric) < 0.999 * objective(x, start, metric)


def slow_kmeans(x: np.ndarray, centroids: np.ndarray, iterations: int, metric: Metric) -> np.ndarray:
    rows = x.astype(np.float64)
    if metric == "cosine":
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    for _ in range(iterations):
        apart = ((rows[:, None, :] - centroids.astype(np.float64)) ** 2).sum(axis=2)
        cluster = apart.argmin(axis=1)
        means = np.stack([rows[cluster == c].mean(axis=0) for c in range(len(centroids))])
        centroids = means / np.linalg.norm(means, axis=1, keepdims=True) if metric == "cosine" else means
    return centroids


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dim", [3, 24])
def test_it_is_k_means(dim: int, metric: Metric) -> None:
    for seed in range(3):
        rng = np.random.default_rng(seed)
        x = (rng.standard_normal((300, dim)) * rng.uniform(1, 3, (300, 1)) + 1).astype(np.float16)
        start = first_centroids(x, 7, "subsample", metric, seed, "cpu")
        found = fit_kmeans(x, 7, iterations=6, seed=seed, threads=1, metric=metric, tolerance=-1.0)
        np.testing.assert_allclose(found, slow_kmeans(x, start, 6, metric), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("init", ["subsample", "k-means++", "k-means||"])
def test_threads_and_blocks_change_no_bit(init: Init, metric: Metric, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).standard_normal((900, 24)).astype(np.float16)
    settings: dict[str, Any] = {"iterations": 5, "seed": 3, "metric": metric, "init": init}
    expected = fit_kmeans(x, 30, threads=1, **settings)
    assigned = assign(x, expected, metric=metric)
    monkeypatch.setattr("curation.distances.BLOCK_ROWS", 64)
    monkeypatch.setattr(clustering, "BLOCK_ROWS", 50)
    np.testing.assert_array_equal(fit_kmeans(x, 30, threads=3, **settings), expected)
    for found, known in zip(assign(x, expected, metric=metric, threads=3), assigned, strict=True):
        np.testing.assert_array_equal(found, known)


def test_l2_of_few_points_duplicates_and_zeros() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((12, 24)).astype(np.float16)
    zeros = np.zeros((5, 24), dtype=np.float16)
    for sample, num_clusters in ((x, 12), (x, 1), (zeros, 3), (np.concatenate((zeros, x)), 13), (zeros[:1], 1)):
        centroids = fit_kmeans(sample, num_clusters, iterations=10, seed=0, threads=1, metric="l2")
        assert centroids.shape == (num_clusters, 24) and np.isfinite(centroids).all()
    ended = fit_kmeans(x, 12, iterations=10, seed=0, threads=1, metric="l2")
    assert objective(x, ended, "l2") == pytest.approx(0, abs=1e-9)
    with pytest.raises(ConfigError, match="18 clusters are asked for and the sample has 17 usable"):
        fit_kmeans(np.concatenate((zeros, x)), 18, iterations=1, seed=0, threads=1, metric="l2")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dim", [8, 40])
def test_as_many_clusters_as_points_take_one_each(dim: int, metric: Metric) -> None:
    x = np.random.default_rng(1).standard_normal((60, dim)).astype(np.float32)
    centroids = fit_kmeans(x, 60, iterations=3, seed=0, threads=1, metric=metric)
    assert sorted(assign(x, centroids, metric=metric)[0].tolist()) == list(range(60))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dim", [8, 40])
def test_no_cluster_stays_empty(dim: int, metric: Metric) -> None:
    """Most points are one and the same, so that most of a subsample is too: only one of such centroids has points."""
    rng = np.random.default_rng(2)
    same = np.repeat(rng.standard_normal((1, dim)), 900, axis=0)
    x = np.concatenate((same, rng.standard_normal((300, dim)))).astype(np.float16)
    start = fit_kmeans(x, 40, iterations=0, seed=0, threads=1, metric=metric)
    assert len(np.unique(assign(x, start, metric=metric)[0])) < 20
    centroids = fit_kmeans(x, 40, iterations=20, seed=0, threads=1, metric=metric)
    assert len(np.unique(assign(x, centroids, metric=metric)[0])) >= 38


def test_rounds_end_where_the_objective_stays() -> None:
    x, _ = blobs(0, 400, 8)
    settings: dict[str, Any] = {"seed": 0, "threads": 1}
    ended = fit_kmeans(x, 8, iterations=1_000_000, **settings)  # which would take hours
    np.testing.assert_array_equal(ended, fit_kmeans(x, 8, iterations=100, **settings))
    random = np.random.default_rng(0).standard_normal((2_000, 8)).astype(np.float16)
    early = fit_kmeans(random, 50, iterations=100, tolerance=0.05, **settings)
    late = fit_kmeans(random, 50, iterations=100, **settings)
    assert objective(random, late) < objective(random, early)
    np.testing.assert_array_equal(early, fit_kmeans(random, 50, iterations=3, **settings))


@pytest.mark.parametrize("metric", METRICS)
def test_a_start_of_two_levels(metric: Metric, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).standard_normal((3_000, 24)).astype(np.float16)
    x[:5] = 0
    flat = fit_kmeans(x, 200, iterations=8, seed=0, threads=1, metric=metric)
    monkeypatch.setattr(clustering, "TWO_LEVELS", 200)
    monkeypatch.setattr(clustering, "POLISH", 2)
    found = fit_kmeans(x, 200, iterations=8, seed=0, threads=1, metric=metric)
    assert found.shape == (200, 24)
    assert not np.array_equal(found, flat)
    assert objective(x, found, metric) < 1.03 * objective(x, flat, metric)
    np.testing.assert_array_equal(found, fit_kmeans(x, 200, iterations=8, seed=0, threads=2, metric=metric))


def test_what_is_not_finite_is_named_by_its_row() -> None:
    x = np.ones((20_000, 24), np.float16)
    x[17_000, 3] = np.inf
    for work in (lambda: assign(x, np.ones((1, 24), np.float32)), lambda: fit(x, 1)):
        with pytest.raises(LvdError, match="row 17000 has NaN"):
            work()
