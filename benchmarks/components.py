"""Union-find over random edges streamed from Parquet, and scipy's connected components on the same edges.

    python -m benchmarks.components [--edges 100000000] [--nodes 50000000] [--peer] [--rounds 1]

Edges are drawn uniformly: the worst order for memory, since each one visits two nodes anywhere. They are written first,
as int32 columns in an uncompressed file, and so are read from the page cache; reading, union and labels run in one
thread. Each side runs in a fresh process, in turn; compilation and imports are not timed. The peer gets the edges as
the matrix that it takes, whose making is timed and told apart.
"""

import argparse
import importlib.util
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.measure import PeakMemory, machine
from curation.components import UnionFind

BATCH = 1 << 20
PEER_BYTES_AN_EDGE, PEER_BYTES_A_NODE = 40, 40
"""What scipy's side needs, generously: int32 coordinates and values, twice while they become CSR rows."""

SCHEMA = pa.schema([("a", pa.int32()), ("b", pa.int32())])
Result = dict[str, float]
Column = npt.NDArray[np.int32]


def write_edges(path: str, num_edges: int, num_nodes: int) -> None:
    """Random edges, in row groups of BATCH."""
    rng = np.random.default_rng(0)
    with pq.ParquetWriter(path, SCHEMA, compression="none", use_dictionary=False, write_statistics=False) as writer:
        for start in range(0, num_edges, BATCH):
            ends = rng.integers(0, num_nodes, (2, min(BATCH, num_edges - start)), dtype=np.int32)
            writer.write_table(pa.table(list(ends), schema=SCHEMA))


def stream_edges(path: str) -> Iterator[tuple[Column, Column]]:
    """The columns in batches, without a copy, in this thread."""
    with pq.ParquetFile(path, pre_buffer=False) as file:
        for batch in file.iter_batches(batch_size=BATCH, use_threads=False):
            yield batch.column(0).to_numpy(), batch.column(1).to_numpy()


def ours(path: str, num_nodes: int) -> Result:
    """Seconds of each step, peak memory and the number of components with our union-find."""
    warm = UnionFind(2)
    warm.union(np.zeros(1, np.int32), np.ones(1, np.int32))
    warm.labels()
    with PeakMemory(0.01) as memory:
        begin = time.perf_counter()
        union = 0.0
        found = UnionFind(num_nodes)
        for a, b in stream_edges(path):
            start = time.perf_counter()
            found.union(a, b)
            union += time.perf_counter() - start
        joined = time.perf_counter()
        labels = found.labels()
        end = time.perf_counter()
    count = int(np.count_nonzero(labels == np.arange(num_nodes)))
    steps = {"reading": joined - begin - union, "union": union, "labels": end - joined}
    return {**steps, "all": end - begin, "peak": memory.peak, "components": count}


def peer(path: str, num_nodes: int) -> Result:
    """The same with scipy: all edges in one matrix, and its connected_components."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    with PeakMemory(0.01) as memory:
        begin = time.perf_counter()
        a, b = (np.concatenate(column) for column in zip(*stream_edges(path), strict=True))
        read = time.perf_counter()
        matrix = coo_array((np.ones(len(a), dtype=np.int8), (a, b)), shape=(num_nodes, num_nodes)).tocsr()
        del a, b
        made = time.perf_counter()
        count, _ = connected_components(matrix, directed=False)
        end = time.perf_counter()
    steps = {"reading": read - begin, "matrix": made - read, "components of it": end - made}
    return {**steps, "all": end - begin, "peak": memory.peak, "components": int(count)}


def in_fresh_process(work: Callable[..., Result], *arguments: object) -> Result:
    """The result of `work` in a process that has done nothing before."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def reason_against_peer(num_edges: int, num_nodes: int) -> str | None:
    """Why the peer cannot run here, if it cannot."""
    if importlib.util.find_spec("scipy") is None:
        return "scipy is not installed"
    needed = PEER_BYTES_AN_EDGE * num_edges + PEER_BYTES_A_NODE * num_nodes
    if (free := psutil.virtual_memory().available) < needed:
        return f"it may need {needed / 1e9:.0f} GB and {free / 1e9:.0f} GB are free"
    return None


def print_result(name: str, result: Result, num_edges: int) -> None:
    """One line for each step, then memory."""
    for step in (key for key in result if key not in ("peak", "components")):
        print(f"| {name} | {step} | {result[step]:.2f} | {1e9 * result[step] / num_edges:.1f} |")
    print(f"| {name} | peak of anonymous memory, MB | {result['peak'] / 1e6:.0f} | |", flush=True)


def compare(path: str, options: Any) -> None:
    """One round: both sides, and their ratio."""
    own = in_fresh_process(ours, path, options.nodes)
    print_result("ours", own, options.edges)
    if not options.peer:
        return
    if reason := reason_against_peer(options.edges, options.nodes):
        print(f"no peer: {reason}")
        return
    other = in_fresh_process(peer, path, options.nodes)
    print_result("scipy", other, options.edges)
    if own["components"] != other["components"]:
        raise SystemExit(f"we find {own['components']:,} components, scipy {other['components']:,}")
    print(f"both find {own['components']:,} components; ours takes {own['all'] / other['all']:.2f} of scipy's time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edges", type=int, default=100_000_000)
    parser.add_argument("--nodes", type=int, default=50_000_000)
    parser.add_argument("--peer", action="store_true", help="run scipy's connected_components on the same edges")
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    print(f"{machine()}; {options.edges:,} edges, {options.nodes:,} nodes")
    with tempfile.TemporaryDirectory(prefix="lvd-components-") as folder:
        path = str(Path(folder) / "edges.parquet")
        write_edges(path, options.edges, options.nodes)
        print("| | step | seconds | ns per edge |\n|---|---|---:|---:|")
        for _ in range(options.rounds):
            compare(path, options)


if __name__ == "__main__":
    main()
