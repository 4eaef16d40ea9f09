"""Tables on the clusters of a run: the balance of each level, and what of them query sets touch."""

from typing import Any

import numpy as np

from curation.balance_measures import balance
from pipelines.asked import Asked
from pipelines.coverage import Int64, Spread
from pipelines.stats import Table


def cluster_tables(run: str) -> list[Table]:
    """Balance of each level and seed coverage; none for a run without clusters.

    Reads the clusters and the selection of all pools, and compares the query sets with the finest centroids.
    """
    asked = Asked(run)
    spread = asked.spread
    if spread is None:
        return []
    queries = {s.source: spread.query_counts(s) for s in asked.queries}
    return [_balance(spread), _coverage(spread, queries)]


def balance_tables(run: str) -> list[Table]:
    """The balance of each level alone."""
    spread = Asked(run).spread
    return [] if spread is None else [_balance(spread)]


def _balance(spread: Spread) -> Table:
    """How even images lie over the clusters of each level, empty ones counted; selected ones with their copies."""
    rows: list[list[Any]] = []
    for level, sizes in enumerate(spread.sizes):
        kinds = [("pool after dedup", sizes)]
        if spread.selected is not None:
            kinds.append(("selection", spread.taken[level]))
        for name, counts in kinds:
            found = balance(counts)
            figures = [found.normalized_entropy, found.gini, found.kl_to_uniform]
            rows.append([str(level + 1), name, int(counts.sum()), len(counts), found.filled])
            rows[-1] += [round(value, 3) for value in figures]
    columns = ["level", "images over clusters", "images", "clusters", "with images"]
    return Table("Balance by level", [*columns, "normalized entropy", "Gini", "KL to uniform (nats)"], rows)


def _coverage(spread: Spread, queries: dict[str, tuple[Int64, int]]) -> Table:
    """What each query set touches: a cluster is touched when it is the nearest of a query."""
    rows: list[list[Any]] = []
    for level, sizes in enumerate(spread.sizes if queries else []):
        touched = np.zeros(len(sizes), np.bool_)
        for name, (counts, compared) in queries.items():
            own = spread.lift(counts, level) > 0
            touched |= own
            rows.append([str(level + 1), name, compared, *_touched(own, sizes)])
        compared = sum(count for _, count in queries.values())
        rows.append([str(level + 1), "any of them", compared, *_touched(touched, sizes)])
        rows.append([str(level + 1), "none of them", None, *_touched(~touched, sizes)])
    columns = ["level", "query set", "queries", "clusters touched", "share", "share of the pool in them"]
    return Table("Seed coverage", columns, rows)


def _touched(chosen: Any, sizes: Int64) -> list[Any]:
    inside = int(sizes[chosen].sum())
    return [int(chosen.sum()), _share(int(chosen.sum()), len(sizes)), _share(inside, int(sizes.sum()))]


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else ""
