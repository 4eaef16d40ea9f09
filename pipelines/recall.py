"""Steps that audit a join: sampled vectors against all others, exactly, and what the join found of their pairs.

After a sample of the vectors was drawn (`pipelines.join.SampleStep`):

1. `truth`: parts of the vectors against the sample; all pairs above the threshold, counted, and stored up to a cap.
2. `recall`: one row of figures, from the lists that the join compared and the components that it led to.

Time grows with sampled vectors times all vectors. 1 holds the sample, one part's vectors (2 d bytes each) and the pairs
of QUERY_ROWS sampled vectors with a block, 2 one part of the truth and, for each node that the truth names, its label
and its lists.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation.errors import LvdError
from curation.hashing import keyed_hash
from curation.hubs import balls
from curation.neighbors import pairs_above
from curation.partwise import matrix
from curation.products import Multiplier
from curation.recall import Estimate, Recall, RecallTally, joined_with
from curation.sampling import draw_ranks
from curation.shards import GROUP_ROWS, PartWriter, ShardSet
from pipelines.join import read_sample
from pipelines.partitioned import lists_column
from pipelines.unit import Step
from pipelines.vectors import BLOCK_ROWS, Vectors

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
Float16 = npt.NDArray[np.float16]
Pairs = tuple[Int64, Int64, npt.NDArray[np.float32]]

PART_BLOCKS = 16
"""Blocks of vectors that one part of the truth covers."""

QUERY_ROWS = 4_096
"""Sampled vectors that are searched at once: were all copies, QUERY_ROWS * BLOCK_ROWS pairs would be held."""

MAX_PAIRS_PER_VECTOR = 2_000
"""Pairs stored of one sampled vector and part; the standard error of a share among so many is 0.011 at most."""

TRUTH = pa.schema([("query", pa.int64()), ("other", pa.int64()), ("similarity", pa.float32()), ("pairs", pa.int64())])
RECALL = pa.schema(
    [
        *((f"recall_joined{end}", pa.float64()) for end in ("", "_low", "_high")),
        *((f"recall_component{end}", pa.float64()) for end in ("", "_low", "_high")),
        *((name, pa.int64()) for name in ("num_sampled", "num_with_pairs", "num_pairs", "k_too_short")),
        *((name, pa.int32()) for name in ("quantizers", "lists_joined")),
        ("recall_joined_at", pa.list_(pa.float64())),
        ("note", pa.string()),
    ]
)
"""The figures of `curation.recall.Recall`: `recall_joined_at` is `recall_joined` with 1, 2, ... lists. Where nothing
was measured (`note`) the recalls are 1, from 0 to 1."""


@dataclass
class TruthStep(Step):
    """Part k: pairs of the sampled vectors with the vectors of blocks [k * PART_BLOCKS, ...), by (query, other).

    Of a hub's pairs MAX_PAIRS_PER_VECTOR are stored for each sampled vector and part: those whose other vectors have
    the lowest keyed hash of their number, so that all members of a hub name the same few nodes. `pairs` counts all
    that the vector has in the part, stored or not. Pairs within one of the `hubs` are left out, from all counts, too:
    they are certain, a join need not compare them, and there may be a square of them.
    """

    pools: list[str]
    sample: str
    threshold: float
    seed: int
    hubs: str | None = None

    def schema(self) -> pa.Schema:
        return TRUTH

    def num_parts(self) -> int:
        return -(-Vectors(self.pools).num_blocks // PART_BLOCKS)

    def write_part(self, part: int, writer: PartWriter) -> None:
        vectors = Vectors(self.pools)
        blocks = range(part * PART_BLOCKS, min((part + 1) * PART_BLOCKS, vectors.num_blocks))
        numbers, values = read_sample(self.sample)
        centers = values[:0] if self.hubs is None else read_sample(self.hubs)[1]
        multiplier = Multiplier()
        against = [(block * BLOCK_ROWS, vectors.block(block)) for block in blocks]
        others = [(first, block, balls(block, centers, multiplier)[0]) for first, block in against]
        ball, _ = balls(values, centers, multiplier)
        for start in range(0, len(numbers), QUERY_ROWS):
            rows = slice(start, start + QUERY_ROWS)
            writer.write(self._table(numbers[rows], values[rows], ball[rows], others), GROUP_ROWS)

    def _table(
        self, numbers: Int64, values: Float16, ball: Int32, against: list[tuple[int, Float16, Int32]]
    ) -> pa.Table:
        """The rows of some sampled vectors."""
        counts = np.zeros(len(numbers), np.int64)
        held: Pairs = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32)
        for (first, block, block_ball), hub in product(against, np.unique(ball)):
            own, across = np.flatnonzero(ball == hub), np.flatnonzero((block_ball != hub) | (hub < 0))
            i, j, similarity = pairs_above(values[own], block[across], self.threshold)
            query, other = own[i], across[j] + first
            proper = other != numbers[query]
            found = query[proper], other[proper], similarity[proper]
            counts += np.bincount(found[0], minlength=len(counts))
            held = self._capped(
                np.concatenate([held[0], found[0]]),
                np.concatenate([held[1], found[1]]),
                np.concatenate([held[2], found[2]]),
            )
        query, other, similarity = held
        order = np.lexsort((other, query))
        columns = numbers[query], other, similarity, counts[query]
        return pa.table([pa.array(column[order]) for column in columns], schema=TRUTH)

    def _capped(self, query: Int64, other: Int64, similarity: npt.NDArray[np.float32]) -> Pairs:
        """The pairs of each query with the lowest draws; what a later block adds can only push some of these out."""
        words = np.zeros((len(other), 2), np.uint64)
        words[:, 1] = other
        ranks = draw_ranks(query, keyed_hash(self.seed, "recall pairs", words), words)
        lowest = ranks < MAX_PAIRS_PER_VECTOR
        return query[lowest], other[lowest], similarity[lowest]


@dataclass
class RecallStep(Step):
    """One row: what the join found of the true pairs. `check_recall` turns one below the target into an error.

    A vector's share in a part is that of the pairs stored, its parts weigh by the pairs counted, and all sampled
    vectors that have pairs weigh the same. The component figure decides: it is what a pair that was not found costs,
    whatever the engine; and it is never below the share compared, so lists that bring that to the target suffice.

    `lists` is None for engines without lists.
    """

    sample: str
    truth: str
    components: str
    target: float
    seed: int
    lists: str | None = None
    quantizers: int = 0
    lists_joined: int = 0

    def schema(self) -> pa.Schema:
        return RECALL

    def num_parts(self) -> int:
        return 1

    def check(self) -> None:
        check_recall(self.out, self.target)

    def write_part(self, part: int, writer: PartWriter) -> None:
        values = _row(self._recall())
        if self.lists is not None:
            values |= {"quantizers": self.quantizers, "lists_joined": self.lists_joined}
        writer.write(pa.Table.from_pylist([values], RECALL))

    def _recall(self) -> Recall:
        sampled = ShardSet(self.sample).read(0, ["number"])["number"].to_numpy()
        nodes = named_nodes(self.truth)
        if not len(nodes):
            return RecallTally(len(sampled), self.lists_joined).recall(self.lists_joined, self.seed)
        labels = _picked(self.components, "component", nodes)
        lists = self._lists(nodes) if self.lists is not None else None
        tally = RecallTally(len(sampled), 0 if lists is None else lists.shape[2])
        for query, other, num_true in read_truth(self.truth):
            i, j = np.searchsorted(nodes, query), np.searchsorted(nodes, other)
            needed = None if lists is None else needed_lists(lists, i, j)
            tally.add(np.searchsorted(sampled, query), num_true, labels[i] == labels[j], needed)
        return tally.recall(self.lists_joined, self.seed)

    def _lists(self, nodes: Int64) -> Int32:
        """The lists of `nodes`, int32 [n, R, m]."""
        assert self.lists is not None
        found = [_picked(self.lists, lists_column(number), nodes) for number in range(self.quantizers)]
        depth = found[0].shape[1]
        if depth < self.lists_joined:
            raise LvdError(
                f"{self.lists} holds {depth} lists a vector, but the audit is of {self.lists_joined}: "
                "run dedup again with --overwrite"
            )
        return np.stack(found, axis=1)


def read_truth(uri: str) -> Iterator[tuple[Int64, Int64, Int64]]:
    """(query, other, pairs that the query has) of each part of a set that `TruthStep` made."""
    truth = ShardSet(uri)
    for part in range(truth.num_parts):
        table = truth.read(part, ["query", "other", "pairs"])
        yield table["query"].to_numpy(), table["other"].to_numpy(), table["pairs"].to_numpy()


def named_nodes(uri: str) -> Int64:
    """All nodes that a truth names, ascending."""
    named = np.zeros(0, np.int64)
    for query, other, _ in read_truth(uri):
        named = np.union1d(named, np.concatenate([query, other]))
    return named


def needed_lists(lists: Int32, i: Int64, j: Int64) -> Int32:
    """`joined_with` of pairs of rows of `lists`; gathers those of some pairs at a time."""
    slices = (slice(start, start + GROUP_ROWS) for start in range(0, len(i), GROUP_ROWS))
    return np.concatenate([np.zeros(0, np.int32), *(joined_with(lists[i[s]], lists[j[s]]) for s in slices)])


def _picked(uri: str, column: str, nodes: Int64) -> npt.NDArray[Any]:
    """Values of a column, or rows of a fixed-size list column, at ascending row numbers `nodes` (at least one)."""
    shard_set = ShardSet(uri)
    if nodes[-1] >= shard_set.num_rows:
        raise LvdError(f"{uri} has {shard_set.num_rows} rows, but row {nodes[-1]} is audited: run dedup again")
    found = []
    for part in range(shard_set.num_parts):
        start = int(shard_set.offsets[part])
        for table in shard_set.stream(part, [column], rows=GROUP_ROWS):
            low, high = np.searchsorted(nodes, [start, start + table.num_rows])
            is_list = pa.types.is_fixed_size_list(table.schema.field(column).type)
            values = matrix(table, column) if is_list else table[column].to_numpy()
            found.append(values[nodes[low:high] - start])
            start += table.num_rows
    return np.concatenate(found)


def _row(recall: Recall) -> dict[str, Any]:
    """The figures as a row of RECALL."""
    return {
        **_columns("recall_joined", recall.joined),
        **_columns("recall_component", recall.component),
        **{name: getattr(recall, name) for name in ("num_sampled", "num_with_pairs", "num_pairs", "k_too_short")},
        "recall_joined_at": list(recall.joined_at) or None,
        "note": None if recall.num_with_pairs else "no sampled vector has a pair above the threshold: nothing measured",
    }


def _columns(name: str, estimate: Estimate | None) -> dict[str, float]:
    if estimate is None:
        return {}
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def check_recall(uri: str, target: float) -> None:
    """Raise LvdError, telling the figures and what to do, when the recall set at `uri` is below the target."""
    row = ShardSet(uri).read(0).to_pylist()[0]
    if row["recall_component"] >= target:
        return
    figures = f"{_told(row, 'recall_component')} lie in one component"
    if row["recall_joined"] is not None:
        figures += f", {_told(row, 'recall_joined')} were compared"
    raise LvdError(
        f"recall is below the target {target:g}: of the true pairs of {row['num_with_pairs']:,} sampled "
        f"vectors {figures}; {_remedy(row, target)}"
    )


def _remedy(row: dict[str, Any], target: float) -> str:
    at = row["recall_joined_at"]
    if at is None:
        return "use another engine, or lower dedup.join.min_recall"
    needed = next((number for number, joined in enumerate(at, 1) if joined >= target), None)
    if needed is not None and needed <= row["lists_joined"]:
        return "enough pairs were compared, but the join has lost some: please report this"
    lists = f"above {len(at)}" if needed is None else f"to {needed} (compares {_digits(at[needed - 1])})"
    more = f"dedup.join.lists_joined {lists} or dedup.join.quantizers to {row['quantizers'] + 1}"
    return f"raise {more}, or lower dedup.join.min_recall"


def _told(row: dict[str, Any], name: str) -> str:
    value, low, high = (_digits(row[f"{name}{end}"]) for end in ("", "_low", "_high"))
    return f"{value} (95 % interval {low} to {high})"


def _digits(value: float) -> str:
    """Four digits, rounded down: what is below the target must not read as the target."""
    return f"{math.floor(value * 1e4 + 1e-6) / 1e4:.4f}"
