"""Clusters of several levels (`curation.hierarchy`): what a recipe asks for, and how centroids are stored and read.

The set `centroids` has those of all levels, finest first, each with its parent. `pipelines.level_steps` makes them.
"""

import functools
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from curation import schemas
from curation.clustering import assign, fit_kmeans
from curation.hierarchy import PRESETS, KMeans, Level, scaled
from curation.kmeans_init import Init
from curation.partwise import fixed_size_lists, matrix
from curation.sampling import Tree
from curation.shards import ShardSet
from pipelines.recipe import ClusterSettings

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]


def num_levels(settings: ClusterSettings) -> int:
    """How many levels there will be, whatever the number of images."""
    return len(PRESETS[settings.preset].levels) if settings.preset else 1 + len(settings.levels)


def levels_of(settings: ClusterSettings, num_images: int) -> tuple[Level, ...]:
    """All levels, finest first.

    Where no preset says otherwise, a level is resampled with half its mean cluster, rounded up, as in Vo et al.; the
    first one with no more images than are fitted in memory.

    Raises:
        ConfigError: a preset is asked for, and there are no images.
    """
    if settings.preset:
        first, *above = scaled(PRESETS[settings.preset], num_images, settings.fraction)
    else:
        counts = (settings.num_clusters, *settings.levels)
        first, *above = (Level(k, _half_mean(n, k), 1) for n, k in zip((num_images, *counts), counts, strict=False))
    nearest = min(_half_mean(num_images, first.num_clusters), max(1, settings.memory_rows // first.num_clusters))
    finest = replace(first, nearest=nearest, fits=settings.finest_fits)
    return (finest, *(replace(level, fits=settings.fits) for level in above))


def _half_mean(num_points: int, num_clusters: int) -> int:
    return max(1, -(-num_points // (2 * num_clusters)))


def init_of(settings: ClusterSettings) -> Init | None:
    """Where k-means starts. More than one fit needs a start that is spread out, so it is the default there."""
    return settings.init or ("k-means||" if num_levels(settings) > 1 or settings.finest_fits > 1 else None)


def kmeans_of(settings: ClusterSettings, seed: int) -> KMeans:
    """The k-means of all levels."""
    fit = functools.partial(fit_kmeans, init=init_of(settings), tolerance=settings.tolerance)
    return KMeans(settings.iterations, seed, settings.threads, fit, functools.partial(assign, threads=settings.threads))


def centroid_table(centroids: Float32, level: int = 1, parent: Int32 | None = None) -> pa.Table:
    """Centroids of a level, float32 [k, d], as `schemas.centroids` has them; `parent` int32 [k], None at the top."""
    schema = schemas.centroids(centroids.shape[1])
    numbers = np.arange(len(centroids), dtype=np.int32)
    columns = [pa.array(np.full_like(numbers, level)), pa.array(numbers)]
    columns.append(fixed_size_lists(centroids, schema.field("centroid").type))
    columns.append(pa.nulls(len(numbers), pa.int32()) if parent is None else pa.array(parent, pa.int32()))
    return pa.table(columns, schema=schema)


def centroids_of(centroids: ShardSet, level: int = 1) -> Float32:
    """The centroids of a level in the order of their numbers, float32 [k, d]; none for a level that there is not."""
    numbers, found = [np.zeros(0, np.int32)], []
    for part in range(centroids.num_parts):
        table = centroids.read(part)
        table = table.filter(pc.equal(table["level"], level))
        if table.num_rows:
            numbers.append(table["cluster"].to_numpy())
            found.append(matrix(table, "centroid"))
    if not found:
        return np.zeros((0, 0), np.float32)
    ordered: Float32 = np.concatenate(found)[np.argsort(np.concatenate(numbers), kind="stable")]
    return ordered


def read_tree(centroids: ShardSet) -> Tree:
    """The tree that the levels are. Raises LvdError where a parent is missing."""
    columns = ["level", "cluster", "parent"]
    tables = [centroids.read(part, columns) for part in range(centroids.num_parts)]
    table = pa.concat_tables(tables).sort_by([("level", "ascending"), ("cluster", "ascending")])
    level = table["level"].to_numpy()
    parent = table["parent"].fill_null(-1).to_numpy()
    levels = [parent[level == number] for number in range(1, int(level.max(initial=0)) + 1)]
    return Tree(tuple(len(found) for found in levels), tuple(levels[:-1]))
