"""Near-copy graphs: spanning forests, connected components by union-find, one representative each.

"Scalable disjoint set" of DINOv2 (section 3, appendix A.3): parts reduce their edges to a maximum spanning forest, and
one pass of union-find over the forests gives the components.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from curation.errors import LvdError
from curation.scoring import compiled

Int64 = npt.NDArray[np.int64]


@compiled
def _union_loop(
    parent: npt.NDArray[Any], i: npt.NDArray[Any], j: npt.NDArray[Any], joined: npt.NDArray[np.bool_] | None
) -> None:
    """Join i[e] and j[e] in order; joined[e], where asked for, tells whether the edge connected two components.

    Rem's algorithm with splicing (Patwary, Blair and Manne 2010): both paths are walked together, and each node left
    behind goes below the other path's parent. A parent is never larger than its child, so a root is its component's
    smallest node, whatever the order of the edges. All arrays are unsigned: signed indices cost numba half as much
    again, since they might count from the end.
    """
    for edge in range(i.shape[0]):
        a, b = i[edge], j[edge]
        above_a, above_b = parent[a], parent[b]
        while above_a != above_b:
            if above_a > above_b:
                parent[a] = above_b
                if a == above_a:
                    break
                a = above_a
                above_a = parent[a]
            else:
                parent[b] = above_a
                if b == above_b:
                    break
                b = above_b
                above_b = parent[b]
        if joined is not None:
            joined[edge] = above_a != above_b  # left by `break`: a root went below the other path


@compiled
def _flatten_loop(parent: npt.NDArray[Any]) -> None:
    """Point every node at its root, in one pass: a parent is never larger than its child."""
    for node in range(parent.shape[0]):
        parent[node] = parent[parent[node]]


@compiled
def _best_loop(labels: Int64, area: Int64, words: npt.NDArray[np.uint64], best: Int64) -> None:
    """best[label] becomes the label's node of largest area, then of smallest id; it starts at -1."""
    for node in range(labels.shape[0]):
        now = best[labels[node]]
        if now < 0 or area[node] > area[now]:
            best[labels[node]] = node
        elif area[node] == area[now]:
            high, low = words[node, 0], words[node, 1]
            if high < words[now, 0] or (high == words[now, 0] and low < words[now, 1]):
                best[labels[node]] = node


def _unsigned_for(count: int) -> type[np.uint32] | type[np.uint64]:
    """The smallest type that numbers `count` things."""
    return np.uint32 if count <= 2**32 else np.uint64


def _stable_argsort(keys: npt.NDArray[Any]) -> Int64:
    """Stable argsort of integers: where they fit, as numbers (key, position), whose sort is several times faster."""
    bits = len(keys).bit_length()
    if keys.min(initial=0) < 0 or int(keys.max(initial=0)).bit_length() + bits > 63:
        return np.argsort(keys, kind="stable")
    packed = keys.astype(np.int64)
    packed <<= bits
    packed |= np.arange(len(keys))
    packed.sort()
    packed &= (1 << bits) - 1
    return packed


def _ranks(values: Int64) -> tuple[npt.NDArray[Any], int]:
    """Place of each value among the distinct values, unsigned, and how many there are."""
    order = _stable_argsort(values)
    ranks = np.empty(len(values), dtype=_unsigned_for(len(values)))
    ordered = values[order]
    rank = np.cumsum(ordered[1:] != ordered[:-1], dtype=ranks.dtype)
    ranks[order[:1]] = 0
    ranks[order[1:]] = rank
    return ranks, int(rank[-1]) + 1 if len(rank) else len(values)


def kruskal_order(i: npt.NDArray[Any], j: npt.NDArray[Any], sim: npt.NDArray[np.float32]) -> Int64:
    """Positions of edges by (similarity descending, i, j, position), int64 [m].

    Holds 45 bytes an edge. Raises LvdError where the three differ in length.
    """
    if not len(i) == len(j) == len(sim):
        raise LvdError(f"edges have {len(i)} and {len(j)} ends and {len(sim)} similarities")
    bits = (sim.astype(np.float32) + np.float32(0)).view(np.uint32)  # + 0 makes -0 a 0
    ascending = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))  # compares as the floats do
    order = _stable_argsort(j)
    for keys in (i, ~ascending):
        order = order[_stable_argsort(keys[order])]
    return order


def spanning_forest(i: npt.NDArray[Any], j: npt.NDArray[Any], sim: npt.NDArray[np.float32]) -> Int64:
    """Edges of the maximum spanning forest (Kruskal): it connects the same nodes at every threshold as all edges do.

    It also keeps each node's strongest similarity. The forest of a union of forests is the forest of the union of
    their edges, so parts may reduce first. Holds about 80 bytes an edge; time is that of sorting.

    Args:
        i, j: ends of the edges, int64 [m] each, node numbers as they come; an edge from a node to itself is dropped.
        sim: similarity of each edge, float32 [m].

    Returns:
        int64 [f], positions of the forest's edges, by (similarity descending, i, j).

    Raises:
        LvdError: i, j and sim differ in length.
    """
    ends, num_nodes = _ranks(np.concatenate((i, j), dtype=np.int64))
    order = kruskal_order(ends[: len(i)], ends[len(i) :], sim)
    joined = np.empty(len(order), dtype=np.bool_)
    parent = np.arange(num_nodes, dtype=_unsigned_for(num_nodes))
    _union_loop(parent, ends[: len(i)][order], ends[len(i) :][order], joined)
    return order[joined]


def check_edges(i: npt.NDArray[Any], j: npt.NDArray[Any], num_nodes: int) -> None:
    """Raise LvdError unless i and j are equally many nodes, 0 .. num_nodes-1."""
    if len(i) != len(j):
        raise LvdError(f"edges have {len(i)} and {len(j)} ends")
    for nodes in (i, j):
        if len(nodes) and (nodes.min() < 0 or nodes.max() >= num_nodes):
            raise LvdError(f"edges name nodes {nodes.min()} to {nodes.max()}, but there are {num_nodes}")


def _as_unsigned(nodes: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Node numbers >= 0 as the compiled loops read them; int32 and int64 are not copied."""
    width = 32 if nodes.dtype == np.int32 else 64
    unsigned = np.ascontiguousarray(nodes, dtype=f"int{width}").view(f"uint{width}")
    unsigned.flags.writeable = False  # columns of a file are read-only: one compiled version serves all
    return unsigned


class UnionFind:
    """Connected components over nodes 0 .. num_nodes-1; edges come in any order and any number of calls.

    Holds 4 bytes a node (8 from 2**32 nodes on).
    """

    def __init__(self, num_nodes: int) -> None:
        self._parent = np.arange(num_nodes, dtype=_unsigned_for(num_nodes))

    def union(self, i: npt.NDArray[Any], j: npt.NDArray[Any]) -> None:
        """Join the components of i[e] and j[e] for each edge e, int32 or int64 [m] each. Holds nothing else.

        Raises LvdError for unknown nodes, and has joined none of this call's edges then.
        """
        check_edges(i, j, len(self._parent))
        _union_loop(self._parent, _as_unsigned(i), _as_unsigned(j), None)

    def labels(self) -> Int64:
        """Component of each node, int64 [num_nodes] (8 bytes a node): its smallest node, whatever the edges' order."""
        _flatten_loop(self._parent)
        return self._parent.astype(np.int64)


def component_sizes(labels: Int64) -> Int64:
    """Number of nodes in each node's component, int64 [n], from labels as `UnionFind.labels` gives them."""
    return np.bincount(labels, minlength=len(labels))[labels]


def representatives(labels: Int64, area: npt.NDArray[Any], words: npt.NDArray[np.uint64]) -> Int64:
    """The node that stands for each node's component: largest area, then smallest image id.

    Args:
        labels: component of each node as `UnionFind.labels` gives it, int64 [n].
        area: pixels of each image, int64 [n].
        words: ids as `hashing.id_words` gives them, uint64 [n, 2].

    Returns:
        int64 [n]. Holds 16 bytes a node.
    """
    best = np.full(len(labels), -1, dtype=np.int64)
    _best_loop(labels, np.ascontiguousarray(area, dtype=np.int64), words, best)
    return best[labels]
