"""Rounds of k-means: sums that no order changes, rounds over a stream, and where empty clusters go."""

import numpy as np
import pytest

from curation.clustering import fit_kmeans
from curation.distances import Metric, Space, encode_points
from curation.kmeans_init import first_centroids
from curation.kmeans_rounds import Partial, combine, has_converged, partial_sums, update
from curation.scoring import to_unit

METRICS: tuple[Metric, ...] = ("cosine", "l2")


def data(seed: int, count: int, dim: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((count, dim)) * rng.uniform(0.01, 20, (count, 1)) + 0.5).astype(np.float16)
    x[::31] = 0
    return x


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dim", [6, 40])
def test_partial_sums_against_the_definition(dim: int, metric: Metric) -> None:
    x, centroids = data(0, 200, dim), data(1, 9, dim)[1:].astype(np.float32)
    centroids = to_unit(centroids) if metric == "cosine" else centroids
    space = Space.around(metric, centroids)
    total = partial_sums([encode_points(x, space)], centroids, space)
    rows, others = x.astype(np.float64), centroids.astype(np.float64)
    if metric == "cosine":
        rows = rows[x.any(axis=1)]
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        apart = 1 - rows @ (others / np.linalg.norm(others, axis=1, keepdims=True)).T
    else:
        apart = ((rows[:, None, :] - others) ** 2).sum(axis=2)
    cluster = apart.argmin(axis=1)
    for c in range(len(centroids)):
        assert total.counts[c] == (cluster == c).sum()
        np.testing.assert_allclose(total.sums[c], rows[cluster == c].sum(axis=0), rtol=1e-5, atol=1e-4)
        expected = apart[cluster == c, c].sum() * (2 if metric == "cosine" else 1)
        assert total.spread(centroids, space)[c] == pytest.approx(expected, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dim", [6, 40])
def test_a_stream_of_any_pieces_gives_the_centroids_of_an_array(dim: int, metric: Metric) -> None:
    """Each round a map over pieces and a sum in any order; every piece is readied anew, as from a disk."""
    for seed in range(3):
        rng, x = np.random.default_rng(seed), data(seed, 700, dim)
        usable = x if metric == "l2" else x[x.any(axis=1)]
        expected = fit_kmeans(x, 20, iterations=6, seed=seed, threads=1, metric=metric, tolerance=-1.0)
        centroids = first_centroids(usable, 20, "subsample", metric, seed, "cpu")
        space = Space.around(metric, centroids)
        for turn in range(6):
            ends = np.sort(rng.integers(0, len(x) + 1, 8))
            pieces = [encode_points(piece, space) for piece in np.split(x, ends)]
            partials = [partial_sums([piece], centroids, space) for piece in pieces]
            total = combine(partials[i] for i in rng.permutation(len(partials)))
            whole = partial_sums([encode_points(x, space)], centroids, space)
            for name in ("sums", "counts", "squares"):
                np.testing.assert_array_equal(getattr(total, name), getattr(whole, name))
            centroids = update(centroids, total, space, seed=seed, turn=turn)
        np.testing.assert_array_equal(centroids, expected)


def test_combine_leaves_what_it_is_given() -> None:
    parts = [Partial(np.full((2, 3), i), np.full(2, i), np.full(2, 2.0 * i)) for i in (1, 2)]
    total = combine(parts)
    assert (total.sums.tolist(), total.counts.tolist(), total.squares.tolist()) == ([[3.0] * 3] * 2, [3, 3], [6.0] * 2)
    assert parts[0].counts.tolist() == [1, 1]


@pytest.mark.parametrize("metric", METRICS)
def test_an_empty_cluster_goes_to_the_largest_spread(metric: Metric) -> None:
    centroids = np.eye(6, 32, dtype=np.float32)
    counts, spread = np.array([5, 0, 9, 0, 0, 1]), np.array([0.3, 0.0, 0.8, 0.0, 0.0, 0.9])
    space = Space(metric, np.full(32, 0.1, np.float32) if metric == "l2" else None)
    if metric == "cosine":
        total = Partial((counts - spread / 2)[:, None] * centroids.astype(np.float64), counts, counts * 1.0)
    else:  # of points around their centroid: their spread, and its own distance from the center for each
        own = ((centroids - 0.1) ** 2).sum(axis=1)
        total = Partial(counts[:, None] * centroids.astype(np.float64), counts, counts * own + spread)
    np.testing.assert_allclose(total.spread(centroids, space), spread, atol=1e-5)
    moved = update(centroids, total, space, seed=0, turn=0)
    np.testing.assert_allclose(moved[counts > 0], centroids[counts > 0])
    near = ((moved[:, None] - centroids[None]) ** 2).sum(axis=2).argmin(axis=1)
    # One point cannot be divided. Of the others 0.8 is the most, then 0.8 / 2, then 0.3.
    assert near.tolist() == [0, 2, 2, 2, 0, 5]
    apart = np.linalg.norm(moved[[1, 3]] - centroids[2], axis=1)
    assert apart == pytest.approx(0.25 * np.sqrt(0.8 / 9), rel=0.05)
    assert len(np.unique(moved.round(6), axis=0)) == 6
    other = update(centroids, total, space, seed=0, turn=1)
    assert not np.array_equal(moved[1], other[1])
    np.testing.assert_array_equal(moved, update(centroids, total, space, seed=0, turn=0))


@pytest.mark.parametrize("metric", METRICS)
def test_where_nothing_can_be_divided_centroids_stay(metric: Metric) -> None:
    centroids = np.eye(3, 8, dtype=np.float32)
    total = Partial(np.zeros((3, 8)), np.array([2, 1, 0]), np.array([-2.0, 1.0, 0.0]))
    moved = update(centroids, total, Space.around(metric, centroids), seed=0, turn=0)
    np.testing.assert_array_equal(moved[2], centroids[2])
    if metric == "cosine":  # a mean of opposite points has no direction
        np.testing.assert_array_equal(moved, centroids)


def test_convergence() -> None:
    assert not has_converged(np.inf, 5.0, 0.5)
    assert has_converged(5.0, 5.0, 0.0) and has_converged(5.0, 4.9, 0.02 + 1e-9) and has_converged(5.0, 5.1, 0.0)
    assert not has_converged(5.0, 4.9, 0.0) and not has_converged(5.0, 5.0, -1.0)
