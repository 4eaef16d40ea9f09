"""Cluster-based retrieval (DINOv2, section 3 and appendix A.4); sample-based retrieval is `nearest.Nearest`.

The paper takes 10,000 images of each cluster with more than 3 query images, at most 1 million for a query set, and
does not say which. Here: of a cluster the lowest keyed hashes, or the closest to its centroid; a cluster with fewer
gives all that it has, and no other makes up for it; above the cap the lowest keyed hashes over all of them stay.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from curation.groups import distance_keys, take_lowest

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]
UInt64 = npt.NDArray[np.uint64]
Strategy = Literal["random", "closest"]

LEAST_PENDING = 1_000_000
"""Members that come in before what is held is reduced; as many as are held, where those are more."""


def clusters_hit(counts: npt.NDArray[Any], min_hits: int) -> Int64:
    """Clusters with at least `min_hits` query images (the paper's "more than 3" is 4), ascending, int64 [h].

    `counts` int64 [k] is the number of query images assigned to each cluster.
    """
    return np.flatnonzero(np.asarray(counts) >= min_hits)


@dataclass(frozen=True)
class Members:
    """Pool images in clusters.

    Attributes:
        cluster: of each, int32 [n].
        draw: keyed hash of each, uint64 [n].
        words: ids as `hashing.id_words` gives them, uint64 [n, 2]; they break ties.
        distance: of each to its centroid, float32 [n].
        place: where each is found, in whatever order is wanted back, int64 [n]; distinct.
    """

    cluster: Int32
    draw: UInt64
    words: UInt64
    distance: Float32
    place: Int64

    def __len__(self) -> int:
        return len(self.cluster)

    def take(self, chosen: npt.NDArray[Any] | slice) -> "Members":
        """Some of them, by a mask, by rows or by a slice."""
        return Members(*(column[chosen] for column in vars(self).values()))

    def joined(self, others: list["Members"]) -> "Members":
        """These and others."""
        every = [list(vars(members).values()) for members in (self, *others)]
        return Members(*(np.concatenate(column) for column in zip(*every, strict=True)))


def no_members() -> Members:
    """None."""
    kinds = (np.int32, np.uint64, np.uint64, np.float32, np.int64)
    shapes = (0, 0, (0, 2), 0, 0)
    return Members(*(np.zeros(shape, kind) for shape, kind in zip(shapes, kinds, strict=True)))


class ClusterDraw:
    """What a query set retrieves from clusters, of a stream of the pool's images.

    The lowest of a union are among the lowest of each of its parts, so what is held can be reduced at any time: at most
    `per_cluster` of each cluster hit, and `cap` in all where the draw alone decides. Holds 40 bytes for each of them,
    as much for what has come in since (LEAST_PENDING or more), and twice that while it reduces.
    """

    def __init__(self, hit: Int64, per_cluster: int, cap: int | None, strategy: Strategy = "random") -> None:
        """`hit` int64 [h] are the clusters to take from, ascending; of each `per_cluster`; `cap` in all, or None."""
        self._hit, self._per_cluster, self._cap, self._strategy = hit, per_cluster, cap, strategy
        self._held = no_members()
        self._fresh: list[Members] = []

    def add(self, members: Members) -> None:
        """Take in images, in clusters hit or not; each image once."""
        inside = members.take(np.isin(members.cluster, self._hit))
        if len(inside):
            self._fresh.append(inside)
        if sum(map(len, self._fresh)) > max(LEAST_PENDING, len(self._held)):
            self._reduce()

    def taken(self) -> Members:
        """The images retrieved, of all that came in, by place."""
        self._reduce()
        found = self._capped(self._held)
        return found.take(np.argsort(found.place))

    def _reduce(self) -> None:
        every = self._held.joined(self._fresh)
        self._fresh = []
        keys = distance_keys(every.distance, every.draw) if self._strategy == "closest" else every.draw
        want = np.full(len(self._hit), self._per_cluster)
        kept = every.take(take_lowest(np.searchsorted(self._hit, every.cluster), want, keys, every.words))
        # An image with `cap` lower draws before it keeps them: a lower one only ever gives way to one lower still. Not
        # so where distance decides within a cluster.
        self._held = self._capped(kept) if self._strategy == "random" else kept

    def _capped(self, members: Members) -> Members:
        if self._cap is None or len(members) <= self._cap:
            return members
        everything = np.zeros(len(members), dtype=np.int32)
        return members.take(take_lowest(everything, np.array([self._cap]), members.draw, members.words))
