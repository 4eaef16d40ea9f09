"""The pool images nearest to given ones: of those in the final set, and of those that are not, each for itself.

Exact (`curation.neighbors`), streamed over the pool's parts: a task reads the parts of one span in blocks of about
BLOCK_ROWS vectors. A worker holds the given vectors, one block and the best so far; nothing grows with the pool.
Time grows with given images times pool images, and does not grow for telling the two apart: a block is split.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from curation.errors import LvdError
from curation.neighbors import merge_top_k, top_k
from curation.shards import ShardSet
from pipelines.executor import Executor, Needs
from pipelines.nominations import Slots
from pipelines.progress import Progress
from pipelines.vectors import BLOCK_ROWS, Vectors

SPAN_BLOCKS = 16
"""Blocks of a task: one result travels for each, 28 bytes a given image and neighbor."""

Float32 = npt.NDArray[np.float32]
UInt64 = npt.NDArray[np.uint64]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Selected:
    """The final set as far as it is selected: `filtered` are the sets that number the selection's parts through."""

    selection: str
    filtered: tuple[str, ...]

    @cached_property
    def slots(self) -> Slots:
        return Slots(self.filtered)

    def __getstate__(self) -> dict[str, object]:
        return {"selection": self.selection, "filtered": self.filtered}

    def part(self, source: str, part: int, columns: list[str]) -> pa.Table | None:
        """What is selected of a part of a source's images; None for a source that gives none."""
        begin = self.slots.begins.get(source)
        return None if begin is None else ShardSet(self.selection).read(begin + part, columns)


@dataclass(frozen=True)
class Nearest:
    """The best neighbors of n given images, best first.

    Attributes:
        similarity: float32 [n, k].
        words: ids of the neighbors, uint64 [n, k, 2].
        numbers: of the neighbors among the pool's vectors, int64 [n, k].
    """

    similarity: Float32
    words: UInt64
    numbers: Int64

    def merged(self, other: "Nearest", k: int) -> "Nearest":
        """The k best of both; of equal ones, those of self come first."""
        both = ([self.similarity, other.similarity], [self.words, other.words], [self.numbers, other.numbers])
        return Nearest(*merge_top_k(*both, k))


def none_found(count: int) -> Nearest:
    """No neighbors for each of `count` images."""
    return Nearest(np.zeros((count, 0), np.float32), np.zeros((count, 0, 2), np.uint64), np.zeros((count, 0), np.int64))


@dataclass
class SpanSearch:
    """The neighbors within one span of the pool's parts. Holds places only, so it travels cheaply.

    Attributes:
        given: embeddings of the given images.
        pools: embeddings that are searched.
        selected: the final set, or None where there is none yet: then nothing is in it.
        k: neighbors kept of each kind.
        spans: where spans of parts begin, and the end of the last.
    """

    given: list[str]
    pools: list[str]
    selected: Selected | None
    k: int
    spans: list[int]

    @cached_property
    def queries(self) -> npt.NDArray[np.float16]:
        """All given vectors, float16 [n, d], read once a worker."""
        vectors = Vectors(self.given)
        return vectors.read(0, len(vectors))

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "queries"}

    def __call__(self, span: int) -> tuple[int, Nearest, Nearest]:
        """(rows looked at, the nearest in the set, the nearest of all others)."""
        best = [none_found(len(self.queries)), none_found(len(self.queries))]
        rows = 0
        for vectors, words, numbers, is_selected in self._blocks(span):
            rows += len(numbers)
            for kind, chosen in enumerate((is_selected, ~is_selected)):
                if chosen.any():
                    near, similarity = top_k(self.queries, vectors[chosen], self.k, words[chosen])
                    found = Nearest(similarity, words[chosen][near], numbers[chosen][near])
                    best[kind] = best[kind].merged(found, self.k)
        return rows, best[0], best[1]

    def _blocks(self, span: int) -> Iterator[tuple[npt.NDArray[np.float16], UInt64, Int64, npt.NDArray[np.bool_]]]:
        pool = Vectors(self.pools)
        first, last = self.spans[span], self.spans[span + 1]
        for begin, end in pairwise(_cuts(pool.offsets, first, last, BLOCK_ROWS)):
            start, stop = int(pool.offsets[begin]), int(pool.offsets[end])
            if stop > start:
                chosen = np.concatenate([self._is_selected(pool, slot) for slot in range(begin, end)])
                yield pool.read(start, stop), pool.words(start, stop), np.arange(start, stop), chosen

    def _is_selected(self, pool: Vectors, slot: int) -> npt.NDArray[np.bool_]:
        shard_set, part = pool.places[slot]
        chosen = None
        if self.selected is not None:
            chosen = self.selected.part(shard_set.source, part, ["image_id"])
        if chosen is None or not chosen.num_rows:
            return np.zeros(int(shard_set.rows_per_part[part]), np.bool_)
        ids = shard_set.read(part, ["image_id"])["image_id"]
        inside: npt.NDArray[np.bool_] = pc.is_in(ids, value_set=chosen["image_id"].combine_chunks()).to_numpy()
        return inside


def _cuts(offsets: Int64, first: int, last: int, rows: int) -> list[int]:
    """Parts at which pieces of about `rows` rows begin, from part `first`, and `last`."""
    cuts = [first]
    for part in range(first + 1, last):
        if offsets[part] - offsets[cuts[-1]] >= rows:
            cuts.append(part)
    return [*cuts, last] if last > first else cuts


def find_nearest(
    given: list[str],
    pools: list[str],
    selected: Selected | None,
    k: int,
    executor: Executor,
    progress: Progress,
    title: str,
) -> tuple[Nearest, Nearest]:
    """The k nearest in the final set, and the k nearest that are not in it, of every given image, in their order.

    Raises:
        LvdError: what a task failed with.
    """
    pool = Vectors(pools)
    spans = _cuts(pool.offsets, 0, len(pool.places), SPAN_BLOCKS * BLOCK_ROWS)
    search = SpanSearch(given, pools, selected, k, spans)
    num_given = len(Vectors(given))
    inside, outside = none_found(num_given), none_found(num_given)
    if not num_given:
        return inside, outside
    progress.begin(title, len(spans) - 1, 0)
    try:
        for found in _in_order(executor, search, len(spans) - 1):
            inside, outside = inside.merged(found[1], k), outside.merged(found[2], k)
            progress.advance(found[0])
    finally:
        progress.end()
    return inside, outside


def _in_order(executor: Executor, search: SpanSearch, count: int) -> Iterator[tuple[int, Nearest, Nearest]]:
    """Results in the spans' order: equal ids in two sources are then told apart the same way every time."""
    waiting: dict[int, tuple[int, Nearest, Nearest]] = {}
    expected = 0
    for span, outcome in executor.map(search, range(count), Needs(resident=True)):
        waiting[span] = result(outcome, "the search")
        while expected in waiting:
            yield waiting.pop(expected)
            expected += 1


def result(outcome: Any, what: str) -> Any:
    """What a task of the executor gave. Raises LvdError with its failure."""
    if isinstance(outcome, LvdError):
        raise outcome
    if isinstance(outcome, Exception):
        raise LvdError(f"{what} failed: {type(outcome).__name__}: {outcome}")
    return outcome
