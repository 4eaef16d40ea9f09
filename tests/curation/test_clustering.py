import numpy as np
import pytest

from curation.clustering import assign, fit_kmeans
from curation.errors import ConfigError
from curation.scoring import cosine_pairs, to_unit


def blobs(seed: int, num_rows: int, num_blobs: int, dim: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of different length around well separated directions, and which direction each is from."""
    rng = np.random.default_rng(seed)
    centers = np.linalg.qr(rng.standard_normal((dim, dim)))[0][:num_blobs]
    blob = np.arange(num_rows) % num_blobs
    x = (centers[blob] + 0.05 * rng.standard_normal((num_rows, dim))) * rng.uniform(0.1, 10, (num_rows, 1))
    return x.astype(np.float16), blob


def slow_assign(x: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    i, j = np.divmod(np.arange(len(x) * len(centroids)), len(centroids))
    cosine = cosine_pairs(x, i, centroids, j).reshape(len(x), len(centroids))
    return cosine.argmax(axis=1), np.float32(1) - cosine.max(axis=1)  # argmax takes the lowest of ties


def fit(x: np.ndarray, num_clusters: int, seed: int = 0, iterations: int = 10, threads: int = 1) -> np.ndarray:
    return fit_kmeans(x, num_clusters, iterations=iterations, seed=seed, threads=threads)


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
