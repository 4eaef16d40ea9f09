"""What a join compares: vectors of pools, or of their representatives, and of references, numbered through."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from curation.shards import ShardSet
from pipelines.vectors import Vectors

Int64 = npt.NDArray[np.int64]


@dataclass
class Nodes:
    """Nodes 0 .. len-1: the pools' vectors in order, then the references'.

    Attributes:
        pools: embedding sets.
        references: embedding sets of reference images; none in a join of pools alone.
        components: set of components (`dedup.ComponentsStep`) of which only representatives take part; None for all.
    """

    pools: list[str]
    references: list[str]
    components: str | None = None

    @cached_property
    def vectors(self) -> Vectors:
        """All of them, those included that take no part."""
        return Vectors([*self.pools, *self.references])

    @cached_property
    def num_pool(self) -> int:
        """Vectors of the pools: nodes from here on are references."""
        return len(Vectors(self.pools))

    def __len__(self) -> int:
        return len(self.vectors)

    def chosen(self, start: int, stop: int) -> Int64:
        """Nodes of [start, stop) that take part, int64."""
        nodes = np.arange(start, stop)
        inside = min(stop, self.num_pool)
        if self.components is None or start >= inside:
            return nodes
        table = ShardSet(self.components).read_rows(0, start, inside, ["representative"])
        own = table["representative"].to_numpy() == nodes[: inside - start]
        return np.concatenate([nodes[: inside - start][own], nodes[inside - start :]])

    def read(self, start: int, stop: int) -> tuple[Int64, npt.NDArray[np.float16]]:
        """The nodes of [start, stop) that take part, int64 [n], and their vectors, float16 [n, dim]."""
        nodes = self.chosen(start, stop)
        vectors = self.vectors.read(start, stop)
        return nodes, vectors if len(nodes) == stop - start else vectors[nodes - start]

    def reference_ranks(self) -> Int64:
        """Places of the references by image_id, which breaks ties; int64 [references]. Holds 24 bytes each."""
        words = self.vectors.words(self.num_pool, len(self))
        rank = np.empty(len(words), np.int64)
        rank[np.lexsort((words[:, 1], words[:, 0]))] = np.arange(len(words))
        return rank
