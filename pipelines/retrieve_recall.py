"""Measured recall of retrieval in partitions: sampled queries answered exactly, and what of that was found.

`near.CompareStep` compares the sampled queries with all that was kept of the pools. Here one row of figures: the share
of each sampled query's k nearest that the partitioned search gives too, averaged over queries. Holds the sample's
neighbors and one part of what was found.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from curation.errors import LvdError
from curation.recall import bootstrap, macro_average
from curation.shards import PartWriter, ShardSet
from pipelines.near import merged
from pipelines.unit import Step

RETRIEVAL_RECALL = pa.schema(
    [
        *((f"recall{end}", pa.float64()) for end in ("", "_low", "_high")),
        *((name, pa.int64()) for name in ("num_sampled", "num_neighbors", "num_found")),
        *((name, pa.int32()) for name in ("k", "quantizers", "lists_joined")),
    ]
)
"""Recall@k with its 95 % interval: the average share of a sampled query's neighbors that were found. `num_neighbors`
are those of all sampled queries."""


@dataclass
class RetrievalRecallStep(Step):
    """One row: what a search in partitions found of the sampled queries' true neighbors."""

    queries: str
    near: str
    truth: str
    k: int
    quantizers: int
    lists_joined: int
    target: float
    seed: int

    def schema(self) -> pa.Schema:
        return RETRIEVAL_RECALL

    def num_parts(self) -> int:
        return 1

    def check(self) -> None:
        check_retrieval_recall(self.out, self.target)

    def write_part(self, part: int, writer: PartWriter) -> None:
        pieces = [self._shares(slot) for slot in range(ShardSet(self.queries).num_parts)]
        true, found = (np.concatenate([np.zeros(0, np.int64), *column]) for column in zip(*pieces, strict=True))
        shares = found / true
        low, high = bootstrap(shares, self.seed)
        values = {"recall": macro_average(shares), "recall_low": low, "recall_high": high, "k": self.k}
        values |= {"num_sampled": len(true), "num_neighbors": int(true.sum()), "num_found": int(found.sum())}
        values |= {"quantizers": self.quantizers, "lists_joined": self.lists_joined}
        writer.write(pa.Table.from_pylist([values], RETRIEVAL_RECALL))

    def _shares(self, slot: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """True neighbors of each sampled query of a part, and how many of them were found; int64 [n] each."""
        truth, near = merged(self.truth, slot, self.k), merged(self.near, slot, self.k)
        names, true = np.unique(truth["query"].to_numpy(), return_counts=True)
        near = near.filter(pc.is_in(near["query"], value_set=pa.array(names)))
        known = set(zip(near["query"].to_pylist(), near["number"].to_pylist(), strict=True))
        pairs = zip(truth["query"].to_pylist(), truth["number"].to_pylist(), strict=True)
        hits = np.fromiter((pair in known for pair in pairs), np.bool_, truth.num_rows)
        found = np.bincount(np.searchsorted(names, truth["query"].to_numpy()[hits]), minlength=len(names))
        return true, found


def check_retrieval_recall(uri: str, target: float) -> None:
    """Raise LvdError, telling the figures and what to do, when the recall set at `uri` is below the target."""
    row = ShardSet(uri).read(0).to_pylist()[0]
    if row["recall"] >= target:
        return
    raise LvdError(
        f"recall@{row['k']} is below the target {target:g}: of the nearest of {row['num_sampled']:,} sampled query "
        f"images {told(row)} were found; raise retrieve.lists_joined above {row['lists_joined']} or "
        f"retrieve.quantizers above {row['quantizers']}, set retrieve.engine to exact, or lower retrieve.min_recall"
    )


def told(row: dict[str, Any]) -> str:
    """The recall of a row with its interval, rounded down: what is below the target must not read as the target."""
    value, low, high = (math.floor(row[f"recall{end}"] * 1e4 + 1e-6) / 1e4 for end in ("", "_low", "_high"))
    return f"{value:.4f} (95 % interval {low:.4f} to {high:.4f})"
