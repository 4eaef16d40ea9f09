"""Where k-means starts: a subsample, k-means++ or k-means||. Every draw is a keyed hash of (seed, purpose, row).

Points of a sample are known by their row. Distances are those of `assignment.Nearest`, in the space given.
"""

from typing import Literal

import numpy as np
import numpy.typing as npt

from curation.assignment import Nearest
from curation.distances import Metric, Points, Space, encode_points, squared_pairs
from curation.hashing import keyed_hash
from curation.scoring import Vectors, cosine_pairs, to_unit

Init = Literal["subsample", "k-means++", "k-means||"]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

OVERSAMPLING_ROUNDS = 5
"""Rounds of k-means||, each of which draws about k points (Bahmani et al., VLDB 2012: a factor of 1, five rounds)."""


def draw_rows(num_rows: int, wanted: int, seed: int, purpose: str) -> Int64:
    """`wanted` rows, or all, by lowest keyed hash; int64, increasing. Holds 32 bytes a row."""
    draws = keyed_hash(seed, purpose, _words(num_rows))
    return np.sort(np.argsort(draws, kind="stable")[:wanted])


def as_centroids(x: Vectors, metric: Metric) -> Float32:
    """Points as centroids, float32: of unit length for cosine."""
    return to_unit(x) if metric == "cosine" else x.astype(np.float32)


def first_centroids(x: Vectors, num_clusters: int, init: Init, metric: Metric, seed: int, device: str) -> Float32:
    """k centroids at rows of `x` [n, d], n >= k, which all have a direction if the distance is cosine.

    `subsample` takes k points at random. `k-means++` takes each next one with a chance in proportion to the distance
    to those before (Arthur and Vassilvitskii, 2007; cosine distances are half the squared ones of unit vectors): k
    passes over the points, for k up to a few thousand. `k-means||` draws about k in each of a few passes, and chooses
    among these by k-means++, each as often as it is nearest to a point (Bahmani et al., 2012).

    Returns:
        float32 [k, d]. Holds about 80 bytes a point, and its codes but for `subsample`.
    """
    rows = draw_rows(len(x), num_clusters, seed, "k-means subsample")
    if init == "subsample":
        return as_centroids(x[rows], metric)
    space, nearest = Space.around(metric, x[rows]), Nearest(device)
    points = encode_points(x, space)
    if init == "k-means++":
        weight = np.ones(len(points))
    else:
        drawn = _oversample(points, num_clusters, space, seed, nearest)
        candidates = encode_points(as_centroids(x[drawn], metric), space)
        owner = nearest.usual(points, candidates, space)
        points, weight = candidates, np.bincount(owner, minlength=len(drawn)).astype(np.float64)
    return as_centroids(points.x[_plus_plus(points, weight, num_clusters, space, seed, nearest)], metric)


def _words(num_rows: int) -> npt.NDArray[np.uint64]:
    words = np.zeros((num_rows, 2), dtype=np.uint64)
    words[:, 1] = np.arange(num_rows)
    return words


def _uniform(draws: npt.NDArray[np.uint64]) -> Float64:
    """Draws as numbers in [0, 1)."""
    return (draws >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _distance(points: Points, rows: Int64, space: Space, nearest: Nearest) -> Float64:
    """Distance of each point to the nearest of some of them, which have none to themselves."""
    others = as_centroids(points.x[rows], space.metric)
    if len(rows) == 1:
        distance = _distance_to_one(points, others, space.metric)
    else:
        distance = nearest.exact(points, encode_points(others, space), space)[1].astype(np.float64)
    distance[rows] = 0.0
    return distance


def _distance_to_one(points: Points, other: Float32, metric: Metric) -> Float64:
    """What `Nearest.exact` gives for one centroid [1, d]: k-means++ asks k times, and there is nothing to search."""
    every, same = np.arange(len(points)), np.zeros(len(points), np.int64)
    if metric == "cosine":
        found = np.float32(1) - cosine_pairs(other, same, points.x, every, None, points.length)
    else:
        found = squared_pairs(other, same, points.x, every)
    return found.astype(np.float64)


def _plus_plus(points: Points, weight: Float64, num_clusters: int, space: Space, seed: int, nearest: Nearest) -> Int64:
    """k different rows by k-means++ among weighted points."""
    draws = _uniform(keyed_hash(seed, "k-means++", _words(num_clusters)))
    chosen = np.zeros(num_clusters, dtype=np.int64)
    open_rows = np.ones(len(points))
    chance, distance = weight, np.full(len(points), np.inf)
    for turn in range(num_clusters):
        sums = np.cumsum(chance)
        if sums[-1] <= 0.0:  # all that is left lies on what is chosen
            sums = np.cumsum(open_rows)
        chosen[turn] = row = min(int(np.searchsorted(sums, draws[turn] * sums[-1], side="right")), len(points) - 1)
        open_rows[row] = 0.0
        np.minimum(distance, _distance(points, chosen[turn : turn + 1], space, nearest), out=distance)
        chance = weight * distance * open_rows
    return chosen


def _oversample(points: Points, num_clusters: int, space: Space, seed: int, nearest: Nearest) -> Int64:
    """Candidates of k-means||, int64, increasing: at least k rows."""
    words = _words(len(points))
    fresh = draw_rows(len(points), 1, seed, "k-means|| first")
    taken, distance = np.zeros(len(points), dtype=np.bool_), np.full(len(points), np.inf)
    for turn in range(OVERSAMPLING_ROUNDS + 1):
        taken[fresh] = True
        np.minimum(distance, _distance(points, fresh, space, nearest), out=distance)
        total = float(np.cumsum(distance)[-1])
        draws = _uniform(keyed_hash(seed, "k-means||", words, turn))
        fresh = np.flatnonzero(draws * total < num_clusters * distance)
        if turn == OVERSAMPLING_ROUNDS or not len(fresh):
            break
    others = np.flatnonzero(~taken)
    missing = max(num_clusters - int(taken.sum()), 0)
    taken[others[draw_rows(len(others), missing, seed, "k-means|| rest")]] = True
    return np.flatnonzero(taken)
