"""k-means, spherical and L2, fitted on a sample in memory; and the exact assignment of every vector.

`fit_kmeans` runs the rounds of `kmeans_rounds` over one array. A stream of parts that starts from the same centroids
and runs the same rounds ends at the same ones, bit for bit. Rounds assign by `assignment.Nearest.usual`; `assign` is
exact.
"""

from typing import TypedDict

import numpy as np
import numpy.typing as npt

from curation.assignment import Nearest, mapped
from curation.distances import BLOCK_ROWS, Metric, Space, encode_points
from curation.errors import ConfigError
from curation.kmeans_init import Init, draw_rows, first_centroids
from curation.kmeans_rounds import Partial, lloyd, partial_sums
from curation.sampling import equal_shares, proportional_shares
from curation.scoring import Vectors, norms

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]

TWO_LEVELS = 100_000
"""From so many clusters on, `fit_kmeans` starts from clusters within clusters."""
TWO_LEVELS_SPREAD = 20_000
"""The same for a start by k-means||, whose cost grows with k**2."""
POLISH = 5
"""Rounds over all clusters after such a start, at most: it is near the end already."""
POINTS_PER_COARSE = 64
"""Points that each coarse cluster of such a start is fitted on."""


class _Settings(TypedDict):
    """What the fits of a start of two levels take over from the whole."""

    iterations: int
    seed: int
    threads: int
    metric: Metric
    tolerance: float
    device: str


def fit_kmeans(
    sample: Vectors,
    num_clusters: int,
    *,
    iterations: int,
    seed: int,
    threads: int,
    metric: Metric = "cosine",
    init: Init | None = None,
    tolerance: float = 0.0,
    device: str = "cpu",
) -> Float32:
    """Centroids of k-means on a sample in memory: the same on any number of threads.

    Vectors of length zero have no direction and are left out for cosine. Holds d + 12 bytes a vector beside the
    sample, 8 d k bytes of sums and twice the centroids; time grows with n k d a round.

    Args:
        sample: stored vectors [n, d].
        num_clusters: k, at most the number of vectors with a direction (cosine) or of vectors.
        iterations: rounds of assignment and update, at most.
        seed: of every draw.
        threads: that assign blocks of points, each beside torch's own.
        metric: `cosine` (spherical k-means) or `l2`.
        init: how to start; by default a subsample, and from TWO_LEVELS clusters on clusters within clusters, which
            take as many iterations; at most POLISH over all clusters follow. k-means|| does so from TWO_LEVELS_SPREAD
            on, with equally many clusters in each, so that centroids do not follow the density.
        tolerance: rounds end once the objective falls by at most this share of it.
        device: that multiplies.

    Returns:
        float32 [k, d], unit length for cosine.

    Raises:
        ConfigError: fewer vectors than clusters. LvdError: a vector is not finite.
    """
    length = norms(sample)
    points: Vectors = sample if metric == "l2" or length.all() else sample[length > 0]
    if len(points) < num_clusters:
        raise ConfigError(
            f"k-means needs at least as many vectors as clusters, but {num_clusters:,} clusters are asked for and the "
            f"sample has {len(points):,} usable vectors: set fewer clusters or a larger sample"
        )
    most = {None: TWO_LEVELS, "k-means||": TWO_LEVELS_SPREAD}.get(init)
    if most is not None and num_clusters >= most:
        settings = _Settings(
            iterations=iterations, seed=seed, threads=threads, metric=metric, tolerance=tolerance, device=device
        )
        start, iterations = _clusters_within(points, num_clusters, init, settings), min(iterations, POLISH)
    else:
        start = first_centroids(points, num_clusters, init or "subsample", metric, seed, device)
    space = Space.around(metric, start)
    ready = encode_points(points, space)

    def sums(centroids: Float32) -> Partial:
        return partial_sums(ready.blocks(), centroids, space, threads=threads, device=device)

    return lloyd(start, sums, space, iterations=iterations, tolerance=tolerance, seed=seed)


def _clusters_within(points: Vectors, num_clusters: int, init: Init | None, settings: _Settings) -> Float32:
    """About sqrt(k) coarse clusters, fitted on a subsample, and clusters within the points of each.

    These are in proportion to its points, or as many in each where the start is to be spread (Vo et al.).
    """
    num_coarse = round(np.sqrt(num_clusters))
    some = draw_rows(len(points), POINTS_PER_COARSE * num_coarse, settings["seed"], "k-means coarse")
    coarse = fit_kmeans(points[some], num_coarse, init=init, **settings)
    cell, _ = assign(points, coarse, metric=settings["metric"], device=settings["device"], threads=settings["threads"])
    size = np.bincount(cell, minlength=num_coarse)
    rows = np.split(np.argsort(cell, kind="stable"), np.cumsum(size)[:-1])
    shares = proportional_shares(size, num_clusters) if init is None else equal_shares(size, num_clusters)
    within = [
        fit_kmeans(points[rows[c]], int(shares[c]), init=init, **settings) if size[c] else coarse[c : c + 1]
        for c in np.flatnonzero(shares)
    ]
    return np.concatenate(within)


def assign(
    x: Vectors, centroids: Float32, *, metric: Metric = "cosine", threads: int = 1, device: str = "cpu"
) -> tuple[Int32, Float32]:
    """Nearest centroid of each vector, exactly: as `cosine_pairs` or `squared_pairs` decides, ties to the lowest.

    Args:
        x: stored vectors [n, d].
        centroids: float32 [k, d], k > 0.
        metric: `cosine` or `l2`.
        threads: that assign blocks of BLOCK_ROWS, each beside torch's own.
        device: that multiplies.

    Returns:
        cluster int32 [n] and distance float32 [n], 1 - cosine or squared. Holds the codes of the centroids, d k bytes,
        and for each thread what `Nearest.exact` holds for two blocks.

    Raises:
        LvdError: vectors of different length, or not finite.
    """
    norms(x)  # refuses what is not finite by its row in x, not in a block
    space = Space.around(metric, centroids)
    cluster, distance = np.empty(len(x), np.int32), np.empty(len(x), np.float32)
    blocks = (encode_points(x[start : start + BLOCK_ROWS], space) for start in range(0, len(x), BLOCK_ROWS))
    done = 0
    for points, found in mapped(Nearest.exact, blocks, encode_points(centroids, space), space, threads, device):
        rows = slice(done, done + len(points))
        cluster[rows], distance[rows] = found
        done = rows.stop
    return cluster, distance
