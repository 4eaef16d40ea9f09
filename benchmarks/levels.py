"""The cluster stage at scale: streamed from disk against arrays in memory, and levels against flat clusters.

    python -m benchmarks.levels streamed --count 10000000 --k 10000 --sample 2560000 --folder /data/bench
    python -m benchmarks.levels hierarchy --count 1000000 --k 10000 1000 100

Vectors are those of benchmarks.cluster, `clustered`, in shard sets of float16; dedup kept all. The stage runs as
`lvd cluster` does, on Ray workers. `streamed` fits more vectors than it holds and assigns all; what a vector costs in a
round and in assignment is set beside the same work on vectors that lie in memory, in one thread each, by CPU time.
`hierarchy` fits levels, each resampled and fitted again, then as many finest clusters flat.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import torch

from benchmarks.cluster import points
from benchmarks.dedup import Recorder
from benchmarks.measure import PeakMemory, machine
from benchmarks.retrieve import kept_verdicts, write_set
from benchmarks.vectors import PART_ROWS, VECTOR_GROUP
from curation import schemas, storage
from curation.clustering import assign
from curation.distances import Space, encode_points
from curation.kmeans_rounds import partial_sums
from curation.partwise import fixed_size_lists, ids_of
from curation.shards import GROUP_ROWS, ShardSet
from pipelines.cluster import ClusterUnit, read_centroids
from pipelines.executor import RayExecutor
from pipelines.recipe import ClusterSettings
from pipelines.unit import run_unit

DIM = 256
ALIKE = 200_000
"""Vectors in memory that the streamed work is set beside."""
ROUNDS = 10


def write_vectors(place: str, count: int) -> tuple[str, str]:
    """Embeddings and verdicts below `place`, made if they are not there; their URIs."""
    uris = storage.join(place, "embeddings"), storage.join(place, "duplicates")
    if ShardSet(uris[1]).is_complete:
        return uris
    rng, schema = np.random.default_rng(0), schemas.embeddings(DIM)
    names = [ids_of(rng.integers(0, 2**63, (len(part), 2)).astype(np.uint64)) for part in _parts(count)]
    vectors = (
        pa.table([ids, fixed_size_lists(points("clustered", len(ids), DIM, part), schema.field(1).type)], schema=schema)
        for part, ids in enumerate(names)
    )
    write_set(uris[0], "embeddings", "pool", vectors, VECTOR_GROUP, dim=DIM)
    write_set(uris[1], "duplicates", "pool", map(kept_verdicts, names), GROUP_ROWS)
    return uris


def _parts(count: int) -> list[range]:
    return [range(start, min(start + PART_ROWS, count)) for start in range(0, count, PART_ROWS)]


def run_stage(place: str, uris: tuple[str, str], settings: ClusterSettings, workers: int, out: str) -> Recorder:
    """The stage, told step by step."""
    executor = RayExecutor(workers)
    unit = ClusterUnit(
        [uris[0]], [uris[1]], settings, 0, storage.join(place, out, "centroids"), storage.join(place, out)
    )
    with PeakMemory(0.1) as memory:
        recorder = Recorder(memory)
        run_unit(unit, executor, recorder)
    executor.close()
    wall, cpu = sum(step[2] for step in recorder.steps), sum(step[3] for step in recorder.steps)
    print(
        f"{out}: {wall:,.1f} s wall, {cpu:,.1f} s CPU, peak anonymous memory {memory.peak / 2**30:.2f} GiB", flush=True
    )
    return recorder


def cpu_of(work: Callable[[], object]) -> float:
    """CPU seconds of a call, the second of two: the first compiles."""
    work()
    began = time.process_time()
    work()
    return time.process_time() - began


def streamed(options: argparse.Namespace, place: str) -> None:
    """A sample larger than what is held, and the assignment of all."""
    torch.set_num_threads(1)
    uris = write_vectors(place, options.count)
    sample, (k,) = options.sample, options.k
    settings = ClusterSettings(
        num_clusters=k, iterations=ROUNDS, sample=sample, memory_rows=sample // 4, threads=options.workers
    )
    steps = run_stage(place, uris, settings, options.workers, "streamed").steps
    rounds = [cpu for name, _, _, cpu in steps if name.startswith("sums")]
    every = steps[-1][3]
    centroids = read_centroids(storage.join(place, "streamed", "centroids"))
    x, space = points("clustered", ALIKE, DIM), Space()
    ready = encode_points(x, space)
    told = (
        ("round", float(np.median(rounds)) / sample, lambda: partial_sums(ready.blocks(), centroids, space)),
        ("assignment", every / options.count, lambda: assign(x, centroids)),
    )
    print("| | streamed, us CPU a vector | in memory | ratio |\n|---|---:|---:|---:|")
    for name, own, work in told:
        held = cpu_of(work) / ALIKE
        print(f"| {name} | {1e6 * own:.2f} | {1e6 * held:.2f} | {own / held:.2f} |", flush=True)


def hierarchy(options: argparse.Namespace, place: str) -> None:
    """Levels, then the finest number of clusters alone."""
    uris = write_vectors(place, options.count)
    finest, *above = options.k
    settings = ClusterSettings(num_clusters=finest, levels=above, sample=options.count, threads=options.workers)
    for out, chosen in (("levels", settings), ("flat", settings.model_copy(update={"levels": []}))):
        run_stage(place, uris, chosen, options.workers, out)
        print(f"{out}: mean cosine distance {mean_distance(storage.join(place, out, 'pool')):.5f}")


def mean_distance(uri: str) -> float:
    """Of images to their finest centroid."""
    clusters = ShardSet(uri)
    total = sum(
        float(clusters.read(p, ["distance"])["distance"].to_numpy().sum(dtype=np.float64))
        for p in range(clusters.num_parts)
    )
    return total / clusters.num_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("streamed", "hierarchy"))
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--k", type=int, nargs="+", default=[10_000])
    parser.add_argument("--sample", type=int, default=2_560_000)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", help="where vectors and sets lie; a temporary directory by default")
    options = parser.parse_args()
    print(f"{machine()}; {options.what}, {options.count:,} x {DIM}, k={options.k}")
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        {"streamed": streamed, "hierarchy": hierarchy}[options.what](options, scratch)


if __name__ == "__main__":
    main()
