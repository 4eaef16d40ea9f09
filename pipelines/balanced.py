"""Parts of a recipe that are balanced over the clusters of the pools: how often each image is taken.

One task a part of the recipe. It reads the clusters twice, a part at a time: for the draws, then for the names of what
is drawn. It holds 24 bytes a pool image (cluster, draw, and what `sampling.draw_copies` holds), and some 60 bytes a
cluster. Time grows with the images.

Strategy `spread` also needs vectors: of the clusters that give some but not all of their images. They are read range of
clusters by range of clusters, as many as SPREAD_BYTES holds; each range reads all parts in which it has images, so that
the pool's vectors are read about as often as they are larger than that. `take_spread` holds 90 bytes a row of a range.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation.errors import LvdError
from curation.groups import distance_keys, group_sizes
from curation.hashing import keyed_hash
from curation.partwise import ids_of, matrix, positions_in, words_of
from curation.sampling import Tree, draw_copies, tree_shares
from curation.shards import GROUP_ROWS, PartWriter, ShardSet
from pipelines.nominations import NOMINATIONS, Slots, nominations
from pipelines.recipe import PartSettings
from pipelines.unit import Step
from pipelines.vectors import Vectors

SPREAD_BYTES = 2**31
"""Vectors of a range of clusters that are held at once; a cluster that is larger is held whole."""

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]


class _Seen:
    """The tree as far as images lie in it: nothing can be taken of other clusters. Holds at most 8 bytes a cluster."""

    def __init__(self, levels: int) -> None:
        self._parents = [np.zeros(0, np.int32) for _ in range(levels)]  # -1 where no image has been seen
        self._counts = [0] * levels

    def add(self, path: list[Int32], where: str) -> None:
        """Clusters of some images at every level, int32 [n] each. Raises LvdError for one cluster within two."""
        root = np.zeros_like(path[0])
        for level, (below, above) in enumerate(zip(path, [*path[1:], root], strict=True)):
            self._counts[level] = max(self._counts[level], int(below.max(initial=-1)) + 1)
            parent = self._parents[level]
            if self._counts[level] > len(parent):
                more = np.full(max(self._counts[level] - len(parent), len(parent)), -1, np.int32)
                parent = self._parents[level] = np.concatenate([parent, more])
            known = parent[below]
            parent[below] = above
            if ((known >= 0) & (known != above)).any() or (parent[below] != above).any():
                raise LvdError(f"{where}: a cluster of level {level + 1} lies in two of level {level + 2}")

    def tree(self) -> Tree:
        """What was seen; clusters without images lie in the first one of the next level."""
        parents = (np.maximum(parent[:count], 0) for parent, count in zip(self._parents, self._counts, strict=True))
        return Tree(tuple(self._counts), tuple(parents)[:-1])


@dataclass
class SharesStep(Step):
    """Part i: the nominations of the i-th balanced part of the recipe.

    Attributes:
        clusters: of the pools.
        embeddings: of the pools, by the model of the clusters; used by strategy `spread` alone.
        parts: that are balanced, with their numbers in the recipe.
        slots: where the pools' images lie.
    """

    clusters: list[str]
    embeddings: list[str]
    parts: list[tuple[int, PartSettings]]
    slots: Slots
    seed: int

    def schema(self) -> pa.Schema:
        return NOMINATIONS

    def num_parts(self) -> int:
        return len(self.parts)

    def write_part(self, part: int, writer: PartWriter) -> None:
        number, settings = self.parts[part]
        tree, cluster, draw = self._rows(number, settings)
        sizes = group_sizes(cluster, tree.num_clusters[0])
        orders = tuple(self._order(level, count, number) for level, count in enumerate(tree.num_clusters))
        shares = tree_shares(tree, sizes, settings.target or 0, settings.max_copies, orders)
        if settings.strategy == "spread":
            copies = self._spread(cluster, draw, sizes, shares)
        else:
            copies = draw_copies(cluster, shares, draw)
        self._write(number, copies, writer)

    def _order(self, level: int, num_clusters: int, number: int) -> UInt64:
        """Draws that say which clusters of a level give one image more when shares do not come out even."""
        words = np.full((num_clusters, 2), level, np.uint64)
        words[:, 1] = np.arange(num_clusters)
        return keyed_hash(self.seed, f"balance clusters {number}", words)

    def _places(self) -> Iterator[tuple[ShardSet, int, slice]]:
        """Every part of the clusters, and the rows that it has of all."""
        begin = 0
        for shard_set in map(ShardSet, self.clusters):
            for part, count in enumerate(shard_set.rows_per_part.tolist()):
                yield shard_set, part, slice(begin, begin + count)
                begin += count

    def _columns(self) -> list[str]:
        """The columns cluster_1 .. cluster_L, which all pools have."""
        for shard_set, part, _ in self._places():
            names = shard_set.read_rows(part, 0, 0).schema.names
            return [f"cluster_{level}" for level in range(1, 1 + sum(name.startswith("cluster_") for name in names))]
        return ["cluster_1"]

    def _rows(self, number: int, settings: PartSettings) -> tuple[Tree, Int32, UInt64]:
        """The tree, and the finest cluster and the draw of every image."""
        total = sum(ShardSet(uri).num_rows for uri in self.clusters)
        cluster, draw = np.empty(total, np.int32), np.empty(total, np.uint64)
        columns = self._columns() if settings.levels else ["cluster_1"]
        seen = _Seen(len(columns))
        for shard_set, part, rows in self._places():
            table = shard_set.read(part, ["image_id", "distance", *columns])
            path = [table[column].to_numpy() for column in columns]
            seen.add(path, shard_set.part_uri(part))
            cluster[rows] = path[0]
            draw[rows] = keyed_hash(self.seed, f"balance {number}", words_of(table["image_id"]))
            if settings.strategy == "closest":
                draw[rows] = distance_keys(table["distance"].to_numpy(), draw[rows])
        return seen.tree(), cluster, draw

    def _write(self, number: int, copies: Int32, writer: PartWriter) -> None:
        for shard_set, part, rows in self._places():
            mine = copies[rows]
            taken = np.flatnonzero(mine)
            words = words_of(shard_set.read(part, ["image_id"])["image_id"])[taken]
            slot = self.slots.begins[shard_set.source] + part
            table = nominations(ids_of(words), np.full(len(taken), slot), number, mine[taken])
            writer.write(table, GROUP_ROWS)

    def _spread(self, cluster: Int32, draw: UInt64, sizes: Int64, shares: Int64) -> Int32:
        """`draw_copies` with the vectors of the clusters that leave a choice, range by range of these."""
        chosen = np.flatnonzero(shares % np.maximum(sizes, 1))
        fixed = shares.copy()
        fixed[chosen] = 0
        copies = draw_copies(cluster, fixed, draw)
        begins = np.cumsum(sizes[chosen]) - sizes[chosen]
        row_bytes = 2 * Vectors(self.embeddings).dim
        bounds = np.searchsorted(begins, np.arange(0, sizes[chosen].sum(), max(1, SPREAD_BYTES // row_bytes)))
        for leaves in np.split(chosen, bounds[1:]):
            local = np.full(len(shares), -1, np.int32)
            local[leaves] = np.arange(len(leaves))
            rows = np.flatnonzero(local[cluster] >= 0)
            vectors = self._vectors(rows)
            copies[rows] = draw_copies(local[cluster[rows]], shares[leaves], draw[rows], vectors=vectors)
        return copies

    def _vectors(self, wanted: Int64) -> npt.NDArray[np.float16]:
        """Vectors of some images by their rows, ascending, float16 [n, d]."""
        by_source = {shard_set.source: shard_set for shard_set in map(ShardSet, self.embeddings)}
        found = np.empty((len(wanted), Vectors(self.embeddings).dim), np.float16)
        for shard_set, part, rows in self._places():
            low, high = np.searchsorted(wanted, [rows.start, rows.stop])
            if high > low:
                ids = shard_set.read(part, ["image_id"])["image_id"].take(pa.array(wanted[low:high] - rows.start))
                table, where = by_source[shard_set.source].read(part), by_source[shard_set.source].part_uri(part)
                at = positions_in(ids.to_pylist(), table["image_id"].to_pylist(), where)
                found[low:high] = matrix(table)[at]
        return found
