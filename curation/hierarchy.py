"""Hierarchical k-means (Vo et al., arXiv 2405.15613): levels of clusters from the bottom up, each resampled.

k-means puts centroids at a density of p ** (d / (d + 2)), so in many dimensions clusters are as unbalanced as the data.
The clusters of the clusters' unweighted centroids are less so, and so on upwards. Within a level, the points nearest to
each centroid are a flatter sample than all points: the level is fitted again on them, several times.

This needs fits that start spread out, by k-means++ or k-means||: from random points, Lloyd's rounds do not carry
centroids from where they are many to where they are missing, and no number of levels evens them out.

Level 1 is the finest and the only one over vectors. Where these do not fit in memory, callers fit, assign and reduce
(`closest_points`, `merge_closest`) over parts, and begin here with `stack_levels`.
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from curation import clustering
from curation.errors import ConfigError
from curation.groups import distance_keys, take_lowest
from curation.hashing import keyed_hash
from curation.sampling import Tree
from curation.scoring import Vectors

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Level:
    """How one level is made.

    Attributes:
        num_clusters: clusters of the level.
        nearest: points nearest to each centroid on which the level is fitted again.
        fits: times it is fitted, the first on all points; 1 is without resampling.
    """

    num_clusters: int
    nearest: int
    fits: int


@dataclass(frozen=True)
class Preset:
    """Levels as published, finest first, and the number of images that they were made for."""

    levels: tuple[Level, ...]
    pool: int


VO4 = Preset((Level(10_000_000, 1, 1), Level(500_000, 10, 10), Level(50_000, 5, 10), Level(10_000, 3, 10)), 743_000_000)
"""Vo et al., web images. The points resampled are half the mean cluster, rounded up."""

DINOV3 = Preset(
    (
        Level(200_000_000, 1, 1),
        Level(8_000_000, 13, 10),
        Level(800_000, 5, 10),
        Level(100_000, 4, 10),
        Level(25_000, 2, 10),
    ),
    17_000_000_000,
)
"""DINOv3, section 3.1: numbers of clusters; how they were resampled is not published, so it is as in `VO4`."""

PRESETS = {"vo4": VO4, "dinov3": DINOV3}


def scaled(preset: Preset, num_images: int, fraction: float | None = None) -> tuple[Level, ...]:
    """The levels of a preset for a pool of another size.

    Args:
        preset: whose proportions between levels are kept.
        num_images: in the pool.
        fraction: finest clusters per image; by default the preset's own (0.013 for `VO4`, 0.012 for `DINOV3`).

    Returns:
        the levels, finest first: never below 1 cluster, and each with fewer than the one before where there is room.

    Raises:
        ConfigError: no images, or a fraction that is not in (0, 1].
    """
    finest = preset.levels[0].num_clusters
    fraction = finest / preset.pool if fraction is None else fraction
    if not 0 < fraction <= 1 or num_images < 1:
        raise ConfigError(
            f"a hierarchy over {num_images:,} images with {fraction:g} finest clusters per image cannot be made: it "
            "needs at least 1 image, and more than 0 and at most 1 clusters per image"
        )
    counts = [max(1, round(num_images * fraction))]
    for above, level in enumerate(preset.levels[1:], 1):
        least = len(preset.levels) - above  # room for one cluster less in each level above
        wanted = max(round(counts[0] * level.num_clusters / finest), least)
        counts.append(max(1, min(wanted, counts[-1] - 1)))
    return tuple(Level(k, level.nearest, level.fits) for k, level in zip(counts, preset.levels, strict=True))


class Fit(Protocol):
    """Centroids float32 [k, d] of points [n, d], n at least k, such as `clustering.fit_kmeans`."""

    def __call__(
        self, sample: Vectors, num_clusters: int, /, *, iterations: int, seed: int, threads: int
    ) -> Float32: ...


class Assign(Protocol):
    """Nearest centroid int32 [n] of each point, and the distance float32 [n], such as `clustering.assign`."""

    def __call__(self, x: Vectors, centroids: Float32, /) -> tuple[Int32, Float32]: ...


FIT_SPREAD: Fit = functools.partial(clustering.fit_kmeans, init="k-means||")
"""Spherical k-means that starts spread out."""


@dataclass(frozen=True)
class KMeans:
    """The k-means of all levels: its settings, and what fits and assigns; by default spherical."""

    iterations: int
    seed: int
    threads: int
    fit: Fit = FIT_SPREAD
    assign: Assign = clustering.assign

    def centroids(self, points: Vectors, num_clusters: int, number: int, step: int) -> Float32:
        """Fit number `step` of level `number`: each has a seed of its own."""
        seed = int(keyed_hash(self.seed, f"hierarchy {number} {step}", np.zeros((1, 2), np.uint64))[0])
        return self.fit(points, num_clusters, iterations=self.iterations, seed=seed, threads=self.threads)


@dataclass(frozen=True)
class Closest:
    """Points nearest to their centroids among those looked at so far; partial results merge.

    Attributes:
        cluster: of each point, int32 [m].
        keys: whose order is that of closeness, uint32 or uint64 [m].
        row: number of each point in the whole, int64 [m], ascending.
    """

    cluster: Int32
    keys: npt.NDArray[np.uint32] | UInt64
    row: Int64


def closest_points(
    cluster: Int32, distance: Float32, count: int, num_clusters: int, first_row: int = 0, draw: UInt64 | None = None
) -> Closest:
    """The `count` points nearest to each centroid, or all of a smaller cluster.

    Args:
        cluster, distance: as `clustering.assign` gives them, int32 and float32 [n].
        count: points of each cluster.
        num_clusters: k.
        first_row: number in the whole of the first of these points.
        draw: keyed hash of each point, uint64 [n], for points at the same distance; without it the first row is nearer.

    Returns:
        at most count * k points. Holds 16 bytes a point beside the arguments.
    """
    keys = distance_keys(distance, draw)
    rows = np.flatnonzero(take_lowest(cluster, np.full(num_clusters, count), keys))
    return Closest(cluster[rows], keys[rows], rows + first_row)


def merge_closest(parts: Sequence[Closest], count: int, num_clusters: int) -> Closest:
    """`closest_points` of the whole from that of its parts, given in the order of their rows; same `count` and k."""
    cluster: Int32 = np.concatenate([part.cluster for part in parts])
    keys: UInt64 = np.concatenate([part.keys for part in parts])
    row: Int64 = np.concatenate([part.row for part in parts])
    taken = np.flatnonzero(take_lowest(cluster, np.full(num_clusters, count), keys))
    return Closest(cluster[taken], keys[taken], row[taken])


def reduce_closest(parts: Iterable[Closest], count: int, num_clusters: int) -> Closest:
    """`merge_closest` of a stream of at least one part. Holds about twice what comes out, and what a merge holds."""
    held: list[Closest] = []
    for part in parts:
        held.append(part)
        # Merging costs as much as is held: only once it is due is time in proportion to what comes in.
        if sum(len(other.row) for other in held[1:]) > max(len(held[0].row), num_clusters):
            held = [merge_closest(held, count, num_clusters)]
    return merge_closest(held, count, num_clusters)


def fit_level(points: Vectors, level: Level, number: int, kmeans: KMeans) -> tuple[Float32, Int32, Float32]:
    """One level over points in memory: fitted, then again and again on the points nearest to its centroids.

    As in the published code each fit starts afresh, with points of its own sample: centroids that went on from where
    they are would keep the density of the points before. A sample without more points than clusters has nothing to be
    fitted to: the level then stays as it is. Holds what a fit holds and 30 bytes a point.

    Args:
        points: vectors [n, d], n at least the number of clusters: of images, or the centroids of the level below.
        level: how it is made.
        number: of the level, 1 the finest; part of its seeds.
        kmeans: that fits and assigns.

    Returns:
        centroids float32 [k, d]; cluster of each point int32 [n]; its distance float32 [n].
    """
    centroids = kmeans.centroids(points, level.num_clusters, number, 0)
    cluster, distance = kmeans.assign(points, centroids)
    for step in range(1, level.fits):
        sample = closest_points(cluster, distance, level.nearest, level.num_clusters).row
        if len(sample) <= level.num_clusters:
            break
        centroids = kmeans.centroids(points[sample], level.num_clusters, number, step)
        cluster, distance = kmeans.assign(points, centroids)
    return centroids, cluster, distance


@dataclass(frozen=True)
class Hierarchy:
    """Centroids of each level, finest first, float32 [K_l, d], and the tree that their clusters are."""

    centroids: tuple[Float32, ...]
    tree: Tree


def stack_levels(finest: Float32, levels: Sequence[Level], kmeans: KMeans) -> Hierarchy:
    """The levels above the finest: each clusters the centroids of the one below, every centroid counting once.

    Centroids without images count as the others do. Holds all centroids, and what `fit_level` holds for level 2.

    Args:
        finest: centroids of level 1, float32 [K_1, d].
        levels: 2 and up, each with at most as many clusters as the one below.
        kmeans: that fits and assigns.

    Raises:
        ConfigError: a level has more clusters than the one below.
    """
    centroids, parents = [finest], []
    for number, level in enumerate(levels, 2):
        if level.num_clusters > len(centroids[-1]):
            raise ConfigError(
                f"level {number} cannot have {level.num_clusters:,} clusters: the level below has "
                f"{len(centroids[-1]):,}, and each level clusters the centroids of the one below"
            )
        above, parent, _ = fit_level(centroids[-1], level, number, kmeans)
        centroids.append(above)
        parents.append(parent)
    return Hierarchy(tuple(centroids), Tree(tuple(len(level) for level in centroids), tuple(parents)))
