"""The maximum spanning forest of a stream of candidate pairs, most of which it never has scored.

A pair matters only if it is the strongest connection of two sets of nodes at some threshold. The forest knows, for a
row of levels, which nodes the edges so far connect above each level. A candidate whose score is at most a level above
which its ends are connected can be left out: the path that connects them has stronger edges only (cycle property of
maximum spanning trees). In a clique of n near-copies about n of the n**2 / 2 pairs are scored.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from curation.components import spanning_forest
from curation.scoring import compiled, inlined

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Edges = tuple[Int64, Int64, Float32]

NUM_LEVELS = 32
HELD_EDGES = 1 << 21
"""Edges are reduced to a forest whenever this many have come in since, or as many as there are nodes."""


@inlined
def _root(parent: npt.NDArray[np.int32], level: int, node: int) -> int:
    while parent[node, level] != node:
        parent[node, level] = parent[parent[node, level], level]
        node = parent[node, level]
    return node


@inlined
def is_decided(parent: npt.NDArray[np.int32], levels: Float32, i: int, j: int, bound: np.float32) -> bool:
    """Whether a pair that scores at most `bound` can be no edge of a forest with such state. For compiled loops."""
    level = max(0, int((bound - levels[0]) / (levels[1] - levels[0])))
    while level < levels.shape[0] and levels[level] < bound:
        level += 1
    return level < levels.shape[0] and _root(parent, level, i) == _root(parent, level, j)


@compiled
def _undecided_loop(
    parent: npt.NDArray[np.int32],
    levels: Float32,
    i: npt.NDArray[Any],
    j: npt.NDArray[Any],
    bound: Float32,
    undecided: npt.NDArray[np.bool_],
) -> None:
    for pair in range(i.shape[0]):
        undecided[pair] = not is_decided(parent, levels, i[pair], j[pair], bound[pair])


@compiled
def _join_loop(
    parent: npt.NDArray[np.int32], levels: Float32, i: npt.NDArray[Any], j: npt.NDArray[Any], similarity: Float32
) -> None:
    for pair in range(i.shape[0]):
        level = levels.shape[0] - 1
        while level >= 0 and levels[level] >= similarity[pair]:
            level -= 1
        while level >= 0:
            a, b = _root(parent, level, i[pair]), _root(parent, level, j[pair])
            if a == b:  # connected above this level, so above every lower one
                break
            parent[max(a, b), level] = min(a, b)
            level -= 1


class Forest:
    """Maximum spanning forest over nodes 0 .. num_nodes-1 of the pairs above `base`; exact, in any order of pairs.

    Holds 4 * NUM_LEVELS bytes a node, and about 30 bytes for each of HELD_EDGES or twice num_nodes edges.

    Attributes:
        levels: similarities, float32 [NUM_LEVELS], ascending from `base`.
        parent: of each node in a union-find of the pairs above each level, int32 [num_nodes, NUM_LEVELS].
    """

    def __init__(self, num_nodes: int, base: float, numbers: Int64 | None = None) -> None:
        """`numbers` int64 [num_nodes] are the nodes' names outside, which order edges of equal similarity."""
        top = max(1.0, base + 1e-3)
        self.levels = np.linspace(base, top, NUM_LEVELS, endpoint=False, dtype=np.float32)
        self.levels[0] = np.float32(base)
        self.parent = np.repeat(np.arange(num_nodes, dtype=np.int32), NUM_LEVELS).reshape(num_nodes, NUM_LEVELS)
        self._numbers = numbers
        self._room = max(HELD_EDGES, num_nodes)
        self._reduced: Edges = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32)
        self._fresh: list[Edges] = []
        self._num_fresh = 0

    def undecided(self, i: npt.NDArray[Any], j: npt.NDArray[Any], bound: Float32) -> npt.NDArray[np.bool_]:
        """Which pairs could be in the forest if they score at most `bound` float32 [m]; bool [m]."""
        mask = np.empty(len(i), dtype=np.bool_)
        _undecided_loop(self.parent, self.levels, i, j, bound, mask)
        return mask

    def add(self, i: npt.NDArray[Any], j: npt.NDArray[Any], similarity: Float32) -> None:
        """Edges with their scores, all above the base."""
        left = self.undecided(i, j, similarity)
        i, j, similarity = i[left], j[left], similarity[left]
        if not len(i):
            return
        _join_loop(self.parent, self.levels, i, j, similarity)
        if self._numbers is not None:
            i, j = self._numbers[i], self._numbers[j]
        self._fresh.append((np.minimum(i, j).astype(np.int64), np.maximum(i, j).astype(np.int64), similarity))
        self._num_fresh += len(i)
        if self._num_fresh >= self._room:
            self._reduce()

    def edges(self) -> Edges:
        """The forest: numbers a < b, int64 [f] each, and similarity float32 [f]; strongest first, then a, b."""
        self._reduce()
        return self._reduced

    def _reduce(self) -> None:
        a, b, similarity = (np.concatenate(c) for c in zip(self._reduced, *self._fresh, strict=True))
        kept = spanning_forest(a, b, similarity)
        self._reduced, self._fresh, self._num_fresh = (a[kept], b[kept], similarity[kept]), [], 0
