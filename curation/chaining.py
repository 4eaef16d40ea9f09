"""Chaining, shown and bounded: what a spanning forest of near-copy edges tells about its components.

Components are transitive (DINOv2, appendix A.3): A resembles B, B resembles C, and A and C may have nothing in common.
`capped` cuts components at their weakest edges; `curve` gives what every higher
threshold would keep, without another join. All follow from the forest that `components.spanning_forest` leaves.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from curation.components import check_edges, kruskal_order
from curation.errors import ConfigError, LvdError
from curation.scoring import compiled

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]


@compiled
def _merge_loop(parent: npt.NDArray[Any], i: Int64, j: Int64, merged: Int64) -> bool:
    """merged[e] becomes the size of the component that edge e creates; False at an edge that closes a cycle.

    The smaller component goes below the larger; a root's parent is minus its component's size, so all start at -1.
    """
    for edge in range(i.shape[0]):
        a, b = i[edge], j[edge]
        while parent[a] >= 0:
            if parent[parent[a]] >= 0:
                parent[a] = parent[parent[a]]
            a = np.int64(parent[a])
        while parent[b] >= 0:
            if parent[parent[b]] >= 0:
                parent[b] = parent[parent[b]]
            b = np.int64(parent[b])
        if a == b:
            return False
        if parent[a] > parent[b]:
            a, b = b, a
        parent[a] += parent[b]
        parent[b] = a
        merged[edge] = -parent[a]
    return True


def _merges(i: npt.NDArray[Any], j: npt.NDArray[Any], sim: Float32, num_nodes: int) -> tuple[Int64, Int64]:
    """The forest's edges from strong to weak, and the size of the component that each creates, int64 [m] each.

    These are the inner nodes of the Kruskal reconstruction tree (the single-linkage dendrogram), leaves first.
    """
    check_edges(i, j, num_nodes)
    order = kruskal_order(i, j, sim)
    merged = np.empty(len(order), dtype=np.int64)
    parent = np.full(num_nodes, -1, dtype=np.int32 if num_nodes < 2**31 else np.int64)
    if not _merge_loop(parent, i[order].astype(np.int64, copy=False), j[order].astype(np.int64, copy=False), merged):
        raise LvdError("edges close a cycle: reduce them with spanning_forest first")
    return order, merged


def capped(
    i: npt.NDArray[Any], j: npt.NDArray[Any], sim: Float32, num_nodes: int, max_size: int
) -> npt.NDArray[np.bool_]:
    """Edges that stay when components above `max_size` are cut at their weakest edge, and their pieces again.

    The weakest edge is the last by (similarity descending, i, j). Components of at most `max_size` stay whole. Holds
    4 bytes a node and 50 an edge (8 a node from 2**31 nodes on); time is that of sorting the edges.

    Args:
        i, j, sim: a spanning forest, int [m], int [m] and float32 [m], in any order.
        num_nodes: nodes are 0 .. num_nodes-1.
        max_size: images that a component may have, at least 1.

    Returns:
        bool [m]; the components of the edges that stay have at most `max_size` nodes.

    Raises:
        ConfigError: max_size below 1; LvdError: unknown nodes, or edges that close a cycle.
    """
    if max_size < 1:
        raise ConfigError(f"the largest component must have at least 1 image, not {max_size}")
    order, merged = _merges(i, j, sim, num_nodes)
    # Let C(e) be the component that e creates when edges join from strong to weak; C(e) depends on the edges before e
    # alone. The edges of a component but for its weakest, w, all come before w: so the component is C(w), and without
    # w it falls into the two that w joined, each a C of its own weakest edge or a single node. So cutting meets
    # components C(e) only, and removes e if and only if |C(e)| > max_size: such an e is reached, since whatever
    # contains C(e) is above the cap too and was cut; and no other e is, since a C(e) within the cap stays whole.
    stays = np.empty(len(order), dtype=np.bool_)
    stays[order] = merged <= max_size
    return stays


def curve(
    i: npt.NDArray[Any], j: npt.NDArray[Any], sim: Float32, num_nodes: int, thresholds: npt.ArrayLike
) -> tuple[Int64, Int64]:
    """What higher thresholds would keep: one image of each component, edges being those with sim > threshold.

    A spanning forest that was computed at one threshold has the components of every higher one; below, edges are
    missing, and too many images would be counted. Holds what `capped` holds.

    Args:
        i, j, sim, num_nodes: a spanning forest as `capped` takes it.
        thresholds: float [t], compared as float32, in any order.

    Returns:
        images kept and size of the largest component, int64 [t] each. Raises LvdError as `capped` does.
    """
    order, merged = _merges(i, j, sim, num_nodes)
    num_edges = len(order) - np.searchsorted(sim[order][::-1], np.asarray(thresholds, dtype=np.float32), side="right")
    largest = np.maximum.accumulate(np.append(min(num_nodes, 1), merged))
    return num_nodes - num_edges, largest[num_edges]
