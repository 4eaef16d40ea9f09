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
    parent: npt.NDArray[Any], i: npt.NDArray[Any], j: npt.NDArray[Any], joined: npt.NDArray[np.bool_]
) -> None:
    """Join i[e] and j[e] in order; joined[e] tells whether the edge connected two components.

    The larger root goes below the smaller one, so a root is always its component's smallest node; paths are halved.
    """
    for edge in range(i.shape[0]):
        a, b = i[edge], j[edge]
        while parent[a] != a:
            parent[a] = parent[parent[a]]
            a = parent[a]
        while parent[b] != b:
            parent[b] = parent[parent[b]]
            b = parent[b]
        joined[edge] = a != b
        parent[max(a, b)] = min(a, b)


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


def spanning_forest(i: npt.NDArray[Any], j: npt.NDArray[Any], sim: npt.NDArray[np.float32]) -> Int64:
    """Edges of the maximum spanning forest (Kruskal): it connects the same nodes at every threshold as all edges do.

    It also keeps each node's strongest similarity. The forest of a union of forests is the forest of the union of
    their edges, so parts may reduce first. Holds about 100 bytes an edge.

    Args:
        i, j: ends of the edges, int64 [m] each, node numbers as they come; an edge from a node to itself is dropped.
        sim: similarity of each edge, float32 [m].

    Returns:
        int64 [f], positions of the forest's edges, by (similarity descending, i, j).
    """
    order = np.lexsort((j, i, -sim))
    nodes, ends = np.unique(np.concatenate((i[order], j[order])), return_inverse=True)
    joined = np.empty(len(order), dtype=np.bool_)
    _union_loop(np.arange(len(nodes)), ends[: len(order)], ends[len(order) :], joined)
    return order[joined]


class UnionFind:
    """Connected components over nodes 0 .. num_nodes-1; edges come in any order and any number of calls.

    Holds 4 bytes a node (8 from 2**31 nodes on).
    """

    def __init__(self, num_nodes: int) -> None:
        self._parent = np.arange(num_nodes, dtype=np.int32 if num_nodes < 2**31 else np.int64)

    def union(self, i: npt.NDArray[Any], j: npt.NDArray[Any]) -> None:
        """Join the components of i[e] and j[e] for each edge e, int64 [m] each. Raises LvdError for unknown nodes."""
        i, j = (np.ascontiguousarray(nodes, dtype=np.int64) for nodes in (i, j))
        if len(i) != len(j):
            raise LvdError(f"edges have {len(i)} and {len(j)} ends")
        for nodes in (i, j):
            if len(nodes) and (nodes.min() < 0 or nodes.max() >= len(self._parent)):
                raise LvdError(f"edges name nodes {nodes.min()} to {nodes.max()}, but there are {len(self._parent)}")
        _union_loop(self._parent, i, j, np.empty(len(i), dtype=np.bool_))

    def labels(self) -> Int64:
        """Component of each node, int64 [num_nodes]: its smallest node, whatever the order of the edges."""
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
