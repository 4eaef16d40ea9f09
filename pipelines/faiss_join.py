"""Steps of the join through a FAISS index, the paper's way (DINOv2, section 3), to be run and compared.

1. `index`: one task trains the index on the sample, adds every node that takes part, and stores it.
2. `pairs`: part i asks the index for the k nearest of each node of block i, scores them, and reduces the pairs.

A worker holds the index (for `IVF4096,PQ64` about 80 bytes a node), one block, and 128 bytes a node for the forest.
Copies beyond the k nearest are not found, and those that the index's codes hide are not, either.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation import faiss_engine
from curation.shards import PartWriter, ShardSet
from pipelines.executor import Needs
from pipelines.join import JOIN_ROWS, Keep, PairsStep, edge_table, read_sample
from pipelines.nodes import Nodes
from pipelines.unit import Step

Int64 = npt.NDArray[np.int64]
PIECE_BYTES = 1 << 26


@dataclass(frozen=True)
class IndexSettings:
    """An index by FAISS's factory string, and how it is searched; `slack` is what its codes may under-estimate."""

    factory: str
    nprobe: int | None
    k: int
    slack: float


@dataclass
class IndexStep(Step):
    """The index over all nodes that take part (references alone with keep `best`), serialized in pieces."""

    nodes: Nodes
    sample: str
    settings: IndexSettings
    keep_of: Keep

    def schema(self) -> pa.Schema:
        return pa.schema([("piece", pa.large_binary())])

    def num_parts(self) -> int:
        return 1

    def write_part(self, part: int, writer: PartWriter) -> None:
        _, sample = read_sample(self.sample)
        index = faiss_engine.build_index(sample, self.settings.factory, threads=1, nprobe=self.settings.nprobe)
        for start, stop in spans(self.nodes, self.keep_of):
            faiss_engine.add(index, self.nodes.read(start, stop)[1])
        data = faiss_engine.serialize(index)
        for start in range(0, len(data), PIECE_BYTES):
            piece = data[start : start + PIECE_BYTES].tobytes()
            writer.write(pa.table([pa.array([piece], pa.large_binary())], schema=self.schema()))


def spans(nodes: Nodes, keep: Keep) -> list[tuple[int, int]]:
    """Blocks of the nodes that the index holds."""
    first = nodes.num_pool if keep == "best" else 0
    return [(start, min(start + JOIN_ROWS, len(nodes))) for start in range(first, len(nodes), JOIN_ROWS)]


@dataclass
class FaissStep(PairsStep):
    """Part i: what the index proposes for block i (of the pools alone with keep `best`), scored and reduced."""

    index: str
    settings: IndexSettings

    @property
    def needs(self) -> Needs:
        return Needs(resident=True)

    def num_parts(self) -> int:
        stop = self.nodes.num_pool if self.keep_of == "best" else len(self.nodes)
        return -(-stop // JOIN_ROWS)

    @cached_property
    def _loaded(self) -> Any:
        pieces = ShardSet(self.index).read(0)["piece"].to_pylist()
        return faiss_engine.to_gpu(faiss_engine.deserialize(b"".join(pieces)))

    def write_part(self, part: int, writer: PartWriter) -> None:
        stop = self.nodes.num_pool if self.keep_of == "best" else len(self.nodes)
        numbers, queries = self.nodes.read(part * JOIN_ROWS, min((part + 1) * JOIN_ROWS, stop))
        settings = self.settings
        proposals = faiss_engine.pairs_from_index(
            self._loaded, queries, self.threshold, settings.k, slack=settings.slack
        )
        reducer = self.reducer(np.arange(len(self.nodes)))
        row = 0
        for start, end in spans(self.nodes, self.keep_of):
            others, values = self.nodes.read(start, end)
            i, j = proposals.within(row, row + len(others))
            row += len(others)
            i, j, similarity = faiss_engine.rerank(queries, i, values, j, self.threshold)
            a, b = numbers[i], others[j]
            apart = a != b
            for reduction in reducer.all:
                reduction.add(a[apart], b[apart], similarity[apart])
        writer.write(edge_table(reducer.edges()))
