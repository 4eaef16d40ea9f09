"""Steps of SemDeDup (Abbas et al., arXiv 2303.09540): k-means clusters, and near-copies within each cluster alone.

The clusters are the lists of one quantizer (`pipelines.partitioned`), every image in the nearest alone. A task holds
one partition; its time grows with the square of a cluster. Edges lead from the image that stays to the one dropped.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation import storage
from curation.scoring import cosine_pairs
from curation.semdedup import semdedup
from curation.shards import GROUP_ROWS, PartWriter
from pipelines.engine import Engine, Planned
from pipelines.join import EDGES, HUB_SAMPLE, Keep, SampleStep, edge_table
from pipelines.nodes import Nodes
from pipelines.partition import gather_partition
from pipelines.partitioned import LayoutStep, ListsStep, QuantizersStep, ScatterStep, read_layout, read_quantizer
from pipelines.recipe import JoinSettings
from pipelines.unit import Step

SEMDEDUP_ENGINE = "semdedup"
VECTORS_PER_CLUSTER = 8_800
"""LAION-440M in the paper's 50,000 clusters."""
POINTS_PER_CLUSTER = 40


def semdedup_engine(settings: JoinSettings, num_nodes: int) -> Engine:
    """SemDeDup's clusters for so many vectors."""
    clusters = settings.num_lists or max(1, round(num_nodes / VECTORS_PER_CLUSTER))
    values = {"num_lists": clusters, "partition_rows": settings.partition_rows}
    return Engine(SEMDEDUP_ENGINE, values, f"SemDeDup within {clusters:,} clusters of {num_nodes:,} vectors")


def plan_semdedup(
    engine: Engine, nodes: Nodes, threshold: float, keep: Keep, seed: int, out: str, prefix: str
) -> Planned:
    """The steps of SemDeDup, in the place of `engine.plan_join`."""

    def at(name: str) -> tuple[str, str, dict[str, object], bool]:
        return storage.join(out, f"_{prefix}{name}"), f"{prefix}{name}", {}, False

    clusters = engine.values["num_lists"]
    sample = SampleStep(*at("sample"), nodes, max(HUB_SAMPLE, POINTS_PER_CLUSTER * clusters), seed, "semdedup")
    quantizers = QuantizersStep(*at("quantizers"), sample.out, clusters, 1, seed)
    lists = ListsStep(*at("lists"), nodes, quantizers.out, 1)
    layout = LayoutStep(*at("layout"), nodes, quantizers.out, lists.out, engine.values["partition_rows"])
    scatter = ScatterStep(*at("scatter"), nodes, lists.out, layout.out, 0, 1, keep)
    pairs = SemDedupStep(*at("pairs"), nodes, threshold, quantizers.out, layout.out, scatter.out)
    return Planned([sample, quantizers, lists, layout, scatter, pairs], [pairs.out], None)


@dataclass
class SemDedupStep(Step):
    """Part p: of the clusters of partition p, each image dropped and the one before it that it is most like."""

    nodes: Nodes
    threshold: float
    quantizers: str
    layout: str
    scattered: str

    def schema(self) -> pa.Schema:
        return EDGES

    def num_parts(self) -> int:
        return read_layout(self.layout, 0).num_partitions

    def frees(self) -> list[str]:
        return [self.scattered]

    def write_part(self, part: int, writer: PartWriter) -> None:
        held = gather_partition(self.scattered, part, self.nodes.vectors.dim, 1)
        numbers, values, lists = held.numbers, held.values, held.lists
        centroids = read_quantizer(self.quantizers, 0).fine
        order = np.argsort(lists[:, 0], kind="stable")
        cluster = lists[order, 0]
        starts = np.flatnonzero(np.concatenate([[True], cluster[1:] != cluster[:-1]])[: len(cluster)])
        for start, stop in zip(starts, np.append(starts[1:], len(cluster)), strict=True):
            rows = order[start:stop]
            near = cosine_pairs(values[rows], np.arange(len(rows)), centroids, lists[rows, 0])
            words = self._words(numbers[rows])
            kept, original, similarity = semdedup(values[rows], np.float32(1) - near, words, self.threshold)
            dropped = ~kept
            edges = numbers[rows[original[dropped]]], numbers[rows[dropped]], similarity[dropped]
            writer.write(edge_table(edges), GROUP_ROWS)

    def _words(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        """In the place of image ids, which break ties: the nodes' numbers."""
        words = np.zeros((len(numbers), 2), np.uint64)
        words[:, 1] = numbers
        return words
