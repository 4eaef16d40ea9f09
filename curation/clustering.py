"""Spherical k-means: centroids fitted on a sample by FAISS, assignment of every vector decided by `scoring`."""

import numpy as np
import numpy.typing as npt

from curation.errors import ConfigError
from curation.faiss_setup import require_faiss
from curation.neighbors import top_k
from curation.scoring import Vectors, norms, to_unit

Float32 = npt.NDArray[np.float32]


def fit_kmeans(sample: Vectors, num_clusters: int, *, iterations: int, seed: int, threads: int) -> Float32:
    """Centroids of spherical k-means (cosine): the same for the same sample, seed, threads and matrix kernel.

    Starts from `num_clusters` points of the sample and uses all of it; empty clusters are refilled by splitting large
    ones. Vectors of length zero have no direction and are left out. Holds 4 d bytes a sampled vector and twice the
    centroids; time grows with n k d per iteration.

    Args:
        sample: stored vectors [n, d].
        num_clusters: k, at most the number of vectors with a direction.
        iterations: rounds of assignment and update.
        seed: of the starting points.
        threads: FAISS uses as many; part of the configuration, since float32 sums depend on it.

    Returns:
        float32 [k, d], unit length.

    Raises:
        ConfigError: fewer vectors than clusters.
    """
    points = to_unit(sample[norms(sample) > 0])
    if len(points) < num_clusters:
        raise ConfigError(
            f"k-means needs at least as many vectors as clusters, but {num_clusters:,} clusters are asked for and the "
            f"sample has {len(points):,} usable vectors: set fewer clusters or a larger sample"
        )
    # FAISS would draw a subsample above max_points_per_centroid and warn on stderr below min_points_per_centroid.
    kmeans = require_faiss(threads).Kmeans(
        sample.shape[1],
        num_clusters,
        niter=iterations,
        seed=seed % 2**31,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=len(points),
    )
    kmeans.train(points)
    centroids: Float32 = to_unit(kmeans.centroids)
    lost = np.flatnonzero(~centroids.any(axis=1))  # a mean of opposite points is zero
    centroids[lost] = points[lost]
    return centroids


def assign(x: Vectors, centroids: Float32) -> tuple[npt.NDArray[np.int32], Float32]:
    """Nearest centroid of each vector by the scoring rule, ties to the lowest cluster.

    Args:
        x: stored vectors [n, d].
        centroids: float32 [k, d], k > 0.

    Returns:
        cluster int32 [n] and distance float32 [n], 1 - cosine. Holds what `top_k` holds.
    """
    cluster_words = np.zeros((len(centroids), 2), dtype=np.uint64)
    cluster_words[:, 1] = np.arange(len(centroids))
    cluster, similarity = top_k(x, centroids, 1, cluster_words)
    return cluster[:, 0].astype(np.int32), np.float32(1) - similarity[:, 0]
