"""What clustering would cost: fits, rounds over a sample that is streamed, refits, levels, the assignment of all.

Products are counted as `curation.clustering`, `pipelines.cluster` and `curation.hierarchy` make them. Rounds that end
early, clusters too small to give all the images of a refit, and images that dedup drops make it less. The assignment
of all is exact and costs more than the round whose rate stands for it; how much more was not measured.
"""

import math
from itertools import pairwise

from curation.clustering import POINTS_PER_COARSE, POLISH, TWO_LEVELS, TWO_LEVELS_SPREAD
from curation.hierarchy import Level
from curation.kmeans_init import OVERSAMPLING_ROUNDS, Init
from pipelines.cluster import STREAMED_ROUNDS
from pipelines.cluster_rounds import GROUPS
from pipelines.levels import init_of, levels_of
from pipelines.price import (
    COST_COLUMNS,
    KMEANS_OPERATIONS_PER_SECOND,
    REST_COLUMNS,
    Cost,
    cost_cells,
    rate_rows,
    vector_rows,
)
from pipelines.recipe import ClusterSettings
from pipelines.stats import Table

SUM_BYTES = 8
"""A number of a cluster's sum, which each group of parts writes in each round."""
DRAW_BYTES = 16
"""A pool image, in the one task that draws the sample."""
CLOSEST_BYTES = 16
"""An image that a group of parts gives to a refit."""


def cluster_costs(settings: ClusterSettings, num_images: int, dim: int, rows_per_part: int) -> list[Cost]:
    """Each step of clustering so many images, more than none, in vectors of `dim` numbers; `of` is the level."""
    first, *above = levels_of(settings, num_images)
    num_groups = min(GROUPS, -(-num_images // rows_per_part))
    init, iterations, k = init_of(settings), settings.iterations, first.num_clusters
    costs = _fit_costs(settings, num_images, k, dim, num_groups)
    if settings.finest_fits > 1:
        taken = min(num_images, first.nearest * k)
        again = num_images * k + (fit_products(taken, k, iterations, init) if taken > k else 0)
        moved = min(num_images, num_groups * first.nearest * k) * CLOSEST_BYTES
        held = max(_assign_bytes(k, dim, rows_per_part), _fit_bytes(taken, k, dim))
        turns = settings.finest_fits - 1
        costs.append(Cost("1", f"{turns:,} refits", turns * again * 2 * dim, turns * moved, held))
    for number, (below, level) in enumerate(pairwise([first, *above]), 2):
        products = level_products(below.num_clusters, level, iterations, init)
        held = 4 * dim * k + _fit_bytes(below.num_clusters, level.num_clusters, dim)
        costs.append(Cost(str(number), f"{level.fits:,} fits", products * 2 * dim, 0, held))
    every = Cost("all", "assignment", num_images * k * 2 * dim, 0, _assign_bytes(k, dim, rows_per_part))
    return [*costs, every]


def _fit_costs(settings: ClusterSettings, num_images: int, k: int, dim: int, num_groups: int) -> list[Cost]:
    """The fit on the sample: in memory, and where it is larger than that the rounds over all of it."""
    sample = min(settings.sample, num_images)
    fitted = min(sample, settings.memory_rows)
    products = fit_products(fitted, k, settings.iterations, init_of(settings))
    held = max(DRAW_BYTES * num_images, _fit_bytes(fitted, k, dim))
    costs = [Cost("1", f"fit on {fitted:,}", products * 2 * dim, 0, held)]
    if sample > fitted:
        rounds = min(settings.iterations, STREAMED_ROUNDS)
        step, sums = f"{rounds} rounds on {sample:,}, streamed", SUM_BYTES * dim * k
        costs.append(Cost("1", step, rounds * sample * k * 2 * dim, rounds * num_groups * sums, 3 * sums))
    return costs


def fit_products(num_points: float, num_clusters: float, iterations: int, init: Init | None) -> float:
    """Points compared with centroids by `clustering.fit_kmeans`, if no round ends early."""
    least = {None: TWO_LEVELS, "k-means||": TWO_LEVELS_SPREAD}.get(init)
    if least is None or num_clusters < least:
        return _start_products(num_points, num_clusters, init) + iterations * num_points * num_clusters
    coarse = round(math.sqrt(num_clusters))
    some = min(num_points, POINTS_PER_COARSE * coarse)
    within = coarse * fit_products(num_points / coarse, num_clusters / coarse, iterations, init)
    start = fit_products(some, coarse, iterations, init) + num_points * coarse + within
    return start + min(iterations, POLISH) * num_points * num_clusters


def _start_products(num_points: float, num_clusters: float, init: Init | None) -> float:
    """Those that `kmeans_init.first_centroids` takes."""
    if init == "k-means++":
        return num_points * num_clusters
    if init != "k-means||":
        return 0
    drawn = min(num_points, OVERSAMPLING_ROUNDS * num_clusters)
    return 2 * num_points * drawn + drawn * num_clusters


def level_products(num_below: int, level: Level, iterations: int, init: Init | None) -> float:
    """Those that `hierarchy.fit_level` takes over the centroids of the level below."""
    k = level.num_clusters
    taken = min(num_below, level.nearest * k)
    refits = level.fits - 1 if taken > k else 0
    fits = fit_products(num_below, k, iterations, init) + refits * fit_products(taken, k, iterations, init)
    return fits + (1 + refits) * num_below * k


def _fit_bytes(num_points: int, num_clusters: int, dim: int) -> int:
    """The points twice, as they are gathered; centroids, their codes and sums."""
    return 4 * dim * num_points + 20 * dim * num_clusters


def _assign_bytes(num_clusters: int, dim: int, rows: int) -> int:
    """The centroids with their codes, and one part twice, as what was kept is taken from it."""
    return 5 * dim * num_clusters + 4 * dim * rows


def cluster_price_tables(settings: ClusterSettings, num_images: int, dim: int, rows_per_part: int) -> list[Table]:
    """`cluster_costs` as a table, and what the figures rest on."""
    costs = cluster_costs(settings, num_images, dim, rows_per_part)
    rows = [[cost.of, *cost_cells(cost, KMEANS_OPERATIONS_PER_SECOND)] for cost in costs]
    levels = " / ".join(f"{level.num_clusters:,}" for level in levels_of(settings, num_images))
    known = [*vector_rows(num_images, dim), ["clusters", levels, "the recipe, finest first"]]
    known += rate_rows(KMEANS_OPERATIONS_PER_SECOND, "a round of k-means")
    return [
        Table("Cost of clustering", ["level", *COST_COLUMNS], rows),
        Table("What the cost of clustering rests on", REST_COLUMNS, known),
    ]
