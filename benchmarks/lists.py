"""Which pairs lists would bring together, and at what cost, for many settings of the partitioned join, without joining.

    python -m benchmarks.lists --kind S --count 10000000 --quantizers 8 --folder /data/bench

Fits quantizers as the join does, finds all near-copies of the audit's sample as the audit does, and gives lists only to
those images, and to a sample by which costs are estimated. Of each number of quantizers and lists joined it tells the
share of true pairs that is compared, as the audit counts it, with the interval where most lists are joined. Of one
quantizer: the pairs that meet in lists, the products by which lists are ranked, and the partitions that a vector
travels to where it must. With `--folder` an interrupted run is resumed.
"""

import argparse
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from benchmarks.dedup import THRESHOLD
from benchmarks.measure import machine
from benchmarks.vectors import write_sets
from curation import storage
from curation.codes import encode
from curation.layout import destinations, plan_layout
from curation.manifest import Origin
from curation.quantizer import Quantizer, nearest_lists
from curation.recall import RecallTally
from curation.shards import ShardSet
from pipelines.engine import plan_join, resolve
from pipelines.executor import RayExecutor
from pipelines.join import HubsStep, SampleStep, read_sample
from pipelines.nodes import Nodes
from pipelines.partitioned import QuantizersStep, probes_of, read_quantizer
from pipelines.progress import Progress
from pipelines.recall import TruthStep, named_nodes, needed_lists, read_truth
from pipelines.recipe import JoinSettings
from pipelines.unit import Step, run_step
from pipelines.vectors import BLOCK_ROWS, Vectors

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
Float16 = npt.NDArray[np.float16]

JOINED = (1, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 64)
COST_SAMPLE = 100_000
PARTITION = JoinSettings().partition_rows


class Lists:
    """The lists of chosen images under each quantizer, and what ranking them takes."""

    def __init__(self, uri: str, depth: int, threads: int) -> None:
        self._quantizers = [read_quantizer(uri, number) for number in range(ShardSet(uri).num_parts)]
        self._depth, self._threads = depth, threads

    def of(self, values: Float16) -> Int32:
        """Lists of vectors [n, d], int32 [n, R, depth]."""
        codes = encode(values)

        def ranked(quantizer: Quantizer) -> Int32:
            return nearest_lists(codes, quantizer, self._depth, probes_of(quantizer, self._depth))

        with ThreadPoolExecutor(self._threads) as pool:
            return np.stack(list(pool.map(ranked, self._quantizers)), axis=1)

    def ranked(self) -> Int64:
        """Products that each quantizer takes a vector, about: of cells, and of lists in those that are searched."""
        shares = [(len(q.coarse), len(q.fine), probes_of(q, self._depth)) for q in self._quantizers]
        return np.array([cells + lists * probes // cells for cells, lists, probes in shares])

    def copies(self, lists: Int32, count: int) -> float:
        """Partitions that a vector would travel to, from lists of a sample under the first quantizer, int32 [n, m]."""
        stored = np.bincount(lists[:, 0], minlength=len(self._quantizers[0].fine)) * count // len(lists)
        layout = plan_layout(self._quantizers[0], stored, lists, count, PARTITION)
        return len(destinations(lists, layout)[0]) / len(lists)


def steps(options: argparse.Namespace, embeddings: str, place: str) -> Iterator[Step]:
    """The join's own sample, hubs and quantizers, the audit's sample and truth, and the sample that tells costs."""
    nodes = Nodes([embeddings], [])
    join = JoinSettings(engine="partitioned", quantizers=options.quantizers, lists_joined=options.depth)
    engine = resolve(join, len(nodes), nodes.vectors.dim)
    planned = plan_join(engine, nodes, THRESHOLD, "forest", 0, place, "join_")
    yield from (step for step in planned.steps if isinstance(step, SampleStep | HubsStep | QuantizersStep))
    for name, size in (("recall", join.recall_sample), ("cost", COST_SAMPLE)):
        yield SampleStep(storage.join(place, name), name, {}, False, nodes, size, 0, name)
    hubs, sample = (storage.join(place, name) for name in ("_join_hubs", "recall"))
    yield TruthStep(storage.join(place, "truth"), "truth", {}, False, [embeddings], sample, THRESHOLD, 0, hubs)


def picked(embeddings: str, rows: Int64) -> Float16:
    """Vectors of ascending rows; holds them and one block."""
    vectors = Vectors([embeddings])
    values = np.empty((len(rows), vectors.dim), np.float16)
    for block in range(vectors.num_blocks):
        low, high = np.searchsorted(rows, [block * BLOCK_ROWS, (block + 1) * BLOCK_ROWS])
        if low < high:
            values[low:high] = vectors.block(block)[rows[low:high] - block * BLOCK_ROWS]
    return values


def tell_recall(place: str, embeddings: str, lists: Lists, options: argparse.Namespace) -> None:
    """A table of the share compared: a line for each number of quantizers, a column for each of lists joined."""
    sampled = read_sample(storage.join(place, "recall"))[0]
    truth = storage.join(place, "truth")
    nodes = named_nodes(truth)
    known = lists.of(picked(embeddings, nodes))
    print(f"{len(sampled):,} sampled, {len(nodes):,} images in their pairs; share of true pairs compared")
    for count in range(1, options.quantizers + 1):
        tally = RecallTally(len(sampled), options.depth)
        for query, other, num_true in read_truth(truth):
            i, j = np.searchsorted(nodes, query), np.searchsorted(nodes, other)
            joined = needed_lists(known[:, :count], i, j)
            tally.add(np.searchsorted(sampled, query), num_true, np.zeros(len(query), np.bool_), joined)
        recall = tally.recall(options.depth, 0)
        shares = [f"{recall.joined_at[m - 1]:.4f}" for m in JOINED if m <= options.depth]
        assert recall.joined is not None
        print(f"| {count} | {' | '.join(shares)} | {recall.joined.low:.4f} to {recall.joined.high:.4f} |", flush=True)


def tell_cost(place: str, lists: Lists, options: argparse.Namespace) -> None:
    """What a quantizer costs, the mean of all: pairs that meet, by lists joined; products that rank lists; copies."""
    found = lists.of(read_sample(storage.join(place, "cost"))[1])
    # A sampled image's list holds those of the others that are stored there, as many times as images are sampled.
    scale, met = options.count / (len(found) - 1), np.zeros(options.depth)
    for own in np.moveaxis(found, 1, 0):
        stored = np.bincount(own[:, 0], minlength=own.max() + 1)[own]
        stored[:, 0] -= 1
        met += np.where(own >= 0, stored, 0).mean(axis=0) * scale * options.count / options.quantizers
    met[0] /= 2  # within a list each pair meets once
    shown = [m for m in JOINED if m <= options.depth]
    pairs = (np.cumsum(met) / 1e9).tolist()
    print(f"pairs that meet, 1e9 a quantizer: | {' | '.join(f'{pairs[m - 1]:.1f}' for m in shown)} |")
    print(f"products that rank lists, 1e9 a quantizer: {lists.ranked().mean() * options.count / 1e9:,.1f}")
    copies = [lists.copies(np.ascontiguousarray(found[:, 0, :m]), options.count) for m in shown]
    print(f"partitions of {PARTITION:,} that a vector travels to: | {' | '.join(f'{c:.1f}' for c in copies)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("S", "H"), default="S")
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--quantizers", type=int, default=8)
    parser.add_argument("--depth", type=int, default=48, help="lists joined at most")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", help="where everything lies; a temporary directory by default")
    options = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or scratch
        embeddings, _ = write_sets(folder, options.kind, options.count)
        place = storage.join(folder, f"lists-{options.kind}{options.count}-{options.quantizers}")
        executor = RayExecutor(options.workers)
        for step in steps(options, embeddings, place):
            run_step(step, Origin(step.kind, "benchmark", 1, {}, (), {}), "lists", executor, Progress())
        executor.close()
        import torch

        torch.set_num_threads(1)
        lists = Lists(storage.join(place, "_join_quantizers"), options.depth, options.workers)
        print(f"lists joined: | quantizers | {' | '.join(str(m) for m in JOINED if m <= options.depth)} | interval |")
        tell_recall(place, embeddings, lists, options)
        tell_cost(place, lists, options)


if __name__ == "__main__":
    main()
