import itertools
from typing import Any

import numpy as np
import pytest

from benchmarks import density
from curation import clustering
from curation.errors import ConfigError
from curation.hierarchy import (
    DINOV3,
    PRESETS,
    VO4,
    KMeans,
    Level,
    closest_points,
    fit_level,
    merge_closest,
    reduce_closest,
    scaled,
    stack_levels,
)
from curation.sampling import tree_shares


def kmeans(seed: int = 0) -> KMeans:
    return KMeans(10, seed, 1, density.fit_l2, density.assign_l2)


class Recorder:
    """Takes the first points of a sample as centroids, and remembers what it was given."""

    def __init__(self) -> None:
        self.samples: list[np.ndarray] = []
        self.seeds: list[int] = []

    def __call__(self, sample: np.ndarray, count: int, /, *, iterations: int, seed: int, threads: int) -> np.ndarray:
        self.samples.append(sample.copy())
        self.seeds.append(seed)
        return sample[:count].copy()

    def settings(self) -> KMeans:
        return KMeans(1, 0, 1, self, density.assign_l2)


def numbers(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)[:, None]


def test_presets_scale_to_themselves() -> None:
    assert scaled(VO4, VO4.pool) == VO4.levels
    assert scaled(DINOV3, DINOV3.pool) == DINOV3.levels
    assert scaled(VO4, 1_000_000, 0.1) == (
        Level(100_000, 1, 1),
        Level(5_000, 10, 10),
        Level(500, 5, 10),
        Level(100, 3, 10),
    )


@pytest.mark.parametrize(
    ("num_images", "fraction", "counts"),
    [
        (1, 1.0, [1, 1, 1, 1]),
        (3, 1.0, [3, 2, 1, 1]),
        (4, 1.0, [4, 3, 2, 1]),
        (10, 0.5, [5, 3, 2, 1]),
        (100, 1.0, [100, 5, 2, 1]),
        (10_000, None, [135, 7, 2, 1]),
    ],
)
def test_small_pools_have_levels_too(num_images: int, fraction: float | None, counts: list[int]) -> None:
    assert [level.num_clusters for level in scaled(VO4, num_images, fraction)] == counts


@pytest.mark.parametrize("name", PRESETS)
def test_levels_fall_wherever_they_can(name: str) -> None:
    for num_images in (*range(1, 60), 1_000, 123_457, 10**9):
        for fraction in (1e-9, 0.013, 0.3, 1.0):
            counts = [level.num_clusters for level in scaled(PRESETS[name], num_images, fraction)]
            assert counts[0] == max(1, round(num_images * fraction))
            for below, above in itertools.pairwise(counts):
                assert 1 <= above < below or above == below == 1


@pytest.mark.parametrize(("num_images", "fraction"), [(0, None), (5, 0.0), (5, 1.5)])
def test_no_hierarchy_over_nothing(num_images: int, fraction: float | None) -> None:
    with pytest.raises(ConfigError, match="at least 1 image"):
        scaled(VO4, num_images, fraction)


@pytest.mark.parametrize("seed", range(10))
def test_closest_points_of_parts_merge(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cluster = rng.choice([0, 2, 3, 5], 200).astype(np.int32)  # 1 and 4 are empty
    distance = rng.integers(0, 30, 200).astype(np.float32)
    draw = rng.integers(0, 3, 200).astype(np.uint64) << np.uint64(40)
    cuts = [0, *sorted(rng.integers(0, 201, 4).tolist()), 200]
    for count in (1, 3, 90):
        expected = []
        for c in range(6):
            members = np.flatnonzero(cluster == c).tolist()
            expected += sorted(members, key=lambda r: (distance[r], draw[r], r))[:count]
        whole = closest_points(cluster, distance, count, 6, draw=draw)
        parts = [
            closest_points(cluster[a:b], distance[a:b], count, 6, a, draw[a:b]) for a, b in itertools.pairwise(cuts)
        ]
        merged = merge_closest([merge_closest(parts[:2], count, 6), *parts[2:]], count, 6)
        for found in (whole, merged):
            assert found.row.tolist() == sorted(expected)
            np.testing.assert_array_equal(found.cluster, cluster[found.row])


def test_each_fit_is_on_the_points_nearest_to_the_last_centroids() -> None:
    recorder = Recorder()
    points = numbers(0, 10, 1, 2, 11, 13, 3, 5)
    centroids, cluster, distance = fit_level(points, Level(2, 2, 3), 4, recorder.settings())
    assert [sample.ravel().tolist() for sample in recorder.samples] == [
        [0, 10, 1, 2, 11, 13, 3, 5],  # all; clusters of 0 and of 10; 5 is nearer to 0 by the tie
        [0, 10, 1, 11],
        [0, 10, 1, 11],
    ]
    assert len(set(recorder.seeds)) == 3
    assert centroids.ravel().tolist() == [0, 10]
    assert cluster.tolist() == [0, 1, 0, 0, 1, 1, 0, 0]
    assert distance.tolist() == [0, 0, 1, 4, 1, 9, 9, 25]


def test_a_sample_without_more_points_than_clusters_changes_nothing() -> None:
    recorder = Recorder()
    points = numbers(0, 0, 0, 0, 7)  # of three clusters two are empty or have one point
    centroids, cluster, _ = fit_level(points, Level(3, 2, 5), 1, recorder.settings())
    assert len(recorder.samples) == 1
    assert (centroids.ravel().tolist(), cluster.tolist()) == ([0, 0, 0], [0, 0, 0, 0, 0])
    fit_level(numbers(0, 10, 1, 11), Level(2, 1, 5), 1, recorder.settings())  # a sample of one point a cluster
    assert len(recorder.samples) == 2


@pytest.mark.parametrize("seed", range(4))
def test_levels_cluster_the_unweighted_centroids_below(seed: int) -> None:
    points = np.random.default_rng(seed).standard_normal((300, 3)).astype(np.float32)
    finest, _, _ = fit_level(points, Level(60, 1, 1), 1, kmeans(seed))
    levels = [Level(20, 2, 4), Level(5, 2, 4), Level(1, 3, 1)]
    found = stack_levels(finest, levels, kmeans(seed))
    assert found.tree.num_clusters == (60, 20, 5, 1)
    assert found.centroids[0] is finest
    for number, (below, above, parent) in enumerate(
        zip(found.centroids, found.centroids[1:], found.tree.parents, strict=False), 2
    ):
        centroids, cluster, _ = fit_level(below, levels[number - 2], number, kmeans(seed))
        np.testing.assert_array_equal(above, centroids)
        np.testing.assert_array_equal(parent, cluster)
        assert parent.dtype == np.int32
        squared = ((below[:, None].astype(np.float64) - above[None]) ** 2).sum(axis=2)
        np.testing.assert_allclose(squared[np.arange(len(below)), parent], squared.min(axis=1), atol=1e-5)
    np.testing.assert_allclose(found.centroids[-1][0], found.centroids[-2].mean(axis=0), atol=1e-5)
    again = stack_levels(finest, levels, kmeans(seed))
    other = stack_levels(finest, levels, kmeans(seed + 100))
    assert all(np.array_equal(a, b) for a, b in zip(found.centroids, again.centroids, strict=True))
    assert not np.array_equal(found.centroids[1], other.centroids[1])


def test_degenerate_pools_give_trees_that_can_be_sampled() -> None:
    """Equal points leave clusters empty; clusters of one point, and of equal size, are clusters like others."""
    rng = np.random.default_rng(0)
    same = np.ones((40, 2), np.float32)
    single = rng.standard_normal((8, 2)).astype(np.float32)
    equal = np.repeat(single, 5, axis=0)
    for points, counts in ((same, (8, 4, 2)), (single, (8, 8, 8)), (equal, (8, 4, 2)), (single[:1], (1, 1, 1))):
        levels = [Level(k, 1, 3) for k in counts]
        finest, cluster, _ = fit_level(points, levels[0], 1, kmeans())
        tree = stack_levels(finest, levels[1:], kmeans()).tree
        sizes = np.bincount(cluster, minlength=counts[0])
        assert tree_shares(tree, sizes, len(points)).tolist() == sizes.tolist()
        assert tree_shares(tree, sizes, 3 * len(points) // 2, max_copies=2).sum() == 3 * len(points) // 2


def test_a_level_larger_than_the_one_below_is_refused() -> None:
    with pytest.raises(ConfigError, match="level 3 cannot have 3 clusters: the level below has 2"):
        stack_levels(numbers(1, 2, 3, 4), [Level(2, 1, 1), Level(3, 1, 1)], kmeans())


@pytest.mark.parametrize("seed", range(2))
def test_a_spread_start_of_two_levels_is_spread(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Clusters within clusters, equally many in each: at least as even as k-means||, the objective not much worse."""
    points, measure = density.plane(10_000, seed)
    settings: dict[str, Any] = {"iterations": 10, "seed": seed, "threads": 1, "metric": "l2"}
    whole = clustering.fit_kmeans(points, 400, init="k-means||", **settings)
    monkeypatch.setattr(clustering, "TWO_LEVELS_SPREAD", 400)
    monkeypatch.setattr(clustering, "TWO_LEVELS", 400)
    within = clustering.fit_kmeans(points, 400, init="k-means||", **settings)
    in_proportion = clustering.fit_kmeans(points, 400, **settings)
    assert within.shape == whole.shape == (400, 2) and not np.array_equal(within, whole)
    assert measure(within) < 1.1 * measure(whole) < 0.6 * measure(in_proportion)
    objective = [float(clustering.assign(points, c, metric="l2")[1].sum()) for c in (within, whole)]
    assert objective[0] < 1.15 * objective[1]
    np.testing.assert_array_equal(
        within, clustering.fit_kmeans(points, 400, init="k-means||", **{**settings, "threads": 2})
    )


@pytest.mark.parametrize("seed", range(5))
def test_a_stream_of_parts_is_reduced_as_they_are_merged(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cluster, distance = rng.integers(0, 9, 3_000).astype(np.int32), rng.integers(0, 50, 3_000).astype(np.float32)
    cuts = [0, *sorted(rng.integers(0, 3_001, 40).tolist()), 3_000]
    parts = [closest_points(cluster[a:b], distance[a:b], 7, 9, a) for a, b in itertools.pairwise(cuts)]
    found, whole = reduce_closest(iter(parts), 7, 9), closest_points(cluster, distance, 7, 9)
    for name in ("cluster", "keys", "row"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))


def test_spherical_by_default() -> None:
    points = np.random.default_rng(0).standard_normal((120, 6)).astype(np.float16)
    spherical = KMeans(5, 0, 1)
    finest, cluster, distance = fit_level(points, Level(20, 2, 3), 1, spherical)
    found = stack_levels(finest, [Level(4, 3, 3)], spherical)
    for centroids in found.centroids:
        np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-5)
    cosine = (points @ finest.T) / np.linalg.norm(points.astype(np.float32), axis=1, keepdims=True)
    np.testing.assert_array_equal(cluster, cosine.argmax(axis=1))
    np.testing.assert_allclose(distance, 1 - cosine.max(axis=1), atol=1e-5)


PLANE = density.plane, 6_000, ((100,), (700, 100), (1_600, 400, 100))
LONG_TAIL = density.long_tail, 8_000, ((200,), (600, 200), (1_800, 600, 200))


@pytest.mark.parametrize(("make", "num_points", "stacks"), [PLANE, LONG_TAIL])
def test_more_levels_are_nearer_to_uniform(
    make: density.Make, num_points: int, stacks: tuple[tuple[int, ...], ...]
) -> None:
    """Vo et al., section 3.2, on data of known density: centroids, and samples balanced over the tree."""
    kl = np.zeros((3, 4))
    by_chance = 0.0
    for seed in range(3):
        points, measure = make(num_points, seed)
        for row, counts in zip(kl, stacks, strict=True):
            found = density.found_by(points, counts, kmeans(seed), 400)
            row += [measure(found[column]) for column in density.COLUMNS]
        by_chance += measure(density.random_sample(points, 400, seed))
    centroids, resampled, flat, tree = kl.T
    assert centroids[0] > 1.1 * centroids[1] > 1.1**2 * centroids[2]
    assert (resampled[1:] < 0.9 * centroids[1:]).all()
    assert by_chance > 1.05 * flat[0]
    assert (tree[1:] < 0.75 * flat[1:]).all() and tree[2] < 0.5 * flat[0]
