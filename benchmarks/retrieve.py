"""Sample-based retrieval on synthetic descriptors: time, CPU, memory and recall of an engine, beside FAISS.

    python -m benchmarks.retrieve --kind S --queries 100000 --pool 1000000 --k 4
    python -m benchmarks.retrieve --kind H --queries 20000 --pool 1000000 --k 4 --engine exact

Queries and pool are one generated set, cut in two. Runs the stage as `lvd retrieve` does, on two Ray workers, and times
each of its steps; those that audit it are told apart. FAISS is timed in this process with as many threads, on some of
the queries, and scaled: `ivf` is an IndexIVFFlat at the number of probes that reaches the stage's recall@k (or RECALL,
where that is less), `flat` the exact IndexFlatIP. For the exact engine the share of the matmul limit is told: CPU
seconds that its products alone take.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from benchmarks.dedup import Recorder
from benchmarks.measure import PeakMemory, cpu_seconds, machine
from benchmarks.vectors import DIM, PART_ROWS, VECTOR_GROUP, vectors
from curation import schemas, storage
from curation.codes import encode
from curation.faiss_setup import require_faiss
from curation.manifest import Origin
from curation.neighbors import top_k
from curation.partwise import fixed_size_lists, ids_of
from curation.recall import macro_average
from curation.scoring import to_unit
from curation.shards import GROUP_ROWS, PartWriter, ShardSet
from pipelines.executor import RayExecutor
from pipelines.recipe import RetrieveSettings
from pipelines.retrieve import RetrieveUnit, recall_uri
from pipelines.unit import Unit, run_unit

AUDIT = ("recall sample", "truth")
TRUTH_QUERIES = 1_000
RECALL = 0.99
"""What FAISS need not exceed, where ours is higher."""

Float16 = npt.NDArray[np.float16]


def write_set(
    uri: str, kind: str, role: str, tables: Iterable[pa.Table], group: int, model: str = "made", dim: int = DIM
) -> None:
    """A set of embeddings or verdicts."""
    labels = {"source": role, "role": role, "embedder": "made"}
    origin = Origin(kind, "benchmark", 1, {"model": model}, (), labels)
    ShardSet(uri).begin(origin)
    parts = 0
    for part, table in enumerate(tables):
        with PartWriter(uri, part, table.schema, origin.fingerprint) as writer:
            writer.write(table, group)
        parts = part + 1
    ShardSet(uri).finish(origin, parts, {"model": model, "dim": dim, "copy_thresholds": None})


def write_sets(place: str, queries: Float16, pool: Float16) -> tuple[str, str, str]:
    """Embeddings of both sides, and verdicts by which dedup kept all of the pool; their URIs."""
    rng = np.random.default_rng(0)
    schema = schemas.embeddings(DIM)
    uris = storage.join(place, "queries"), storage.join(place, "pool"), storage.join(place, "duplicates")
    for uri, role, values in ((uris[0], "query", queries), (uris[1], "pool", pool)):
        tables, verdicts = [], []
        for start in range(0, len(values), PART_ROWS):
            some = values[start : start + PART_ROWS]
            ids = ids_of(rng.integers(0, 2**63, (len(some), 2)).astype(np.uint64))
            tables.append(pa.table([ids, fixed_size_lists(some, schema.field("embedding").type)], schema=schema))
            verdicts.append(kept_verdicts(ids))
        write_set(uri, "embeddings", role, tables, VECTOR_GROUP)
        if role == "pool":
            write_set(uris[2], "duplicates", role, verdicts, GROUP_ROWS)
    return uris


def kept_verdicts(ids: pa.StringArray) -> pa.Table:
    """Verdicts of which each image is alone in its component."""
    known = {"image_id": ids, "kept": pa.array(np.ones(len(ids), np.bool_))}
    known |= {name: pa.array(np.ones(len(ids), np.int64)) for name in ("component", "component_size")}
    columns = [known.get(field.name, pa.nulls(len(ids), field.type)) for field in schemas.DUPLICATES]
    return pa.table(columns, schema=schemas.DUPLICATES)


def run_stage(
    arguments: argparse.Namespace, uris: tuple[str, str, str], out: str, executor: RayExecutor
) -> tuple[float, float]:
    """The stage; returns its recall@k, and the CPU seconds of the search."""
    given = {key: getattr(arguments, key) for key in ("num_lists", "lists_joined", "quantizers", "partition_rows")}
    chosen = {key: value for key, value in given.items() if value is not None}
    settings = RetrieveSettings(engine=arguments.engine, min_recall=0, **chosen)
    queries, pool, duplicates = uris
    unit: Unit = RetrieveUnit(queries, [pool], [duplicates], [], "", arguments.k, None, 0, out, settings)
    with PeakMemory() as memory:
        recorder = Recorder(memory)
        run_unit(unit, executor, recorder)
    cpu = {}
    for audit, what in ((True, "audit"), (False, "search")):
        steps = [step for step in recorder.steps if (step[0] in AUDIT) == audit]
        cpu[what] = sum(step[3] for step in steps)
        print(f"{what} {sum(step[2] for step in steps):,.1f} s wall, {cpu[what]:,.1f} s CPU")
    print(f"peak anonymous memory of all processes {memory.peak / 2**30:.2f} GiB")
    source = ShardSet(queries).source
    print(f"{ShardSet(storage.join(out, source)).num_rows:,} rows retrieved")
    recall = ShardSet(recall_uri(out, source))
    if not recall.is_complete:
        return 1.0, cpu["search"]
    (row,) = recall.read(0).to_pylist()
    print("recall@{k} {recall:.4f} (95 % interval {recall_low:.4f} to {recall_high:.4f})".format(**row))
    return float(row["recall"]), cpu["search"]


def tell_limit(queries: Float16, pool: Float16, cpu: float) -> None:
    """CPU seconds that int8 products alone take, from some of them, and their share of those that the search took."""
    import torch

    left, right = (torch.from_numpy(encode(np.ascontiguousarray(x[:8_192])).values) for x in (queries, pool))
    out = torch.empty((1_024, 1_024), dtype=torch.int32)
    for _ in range(2):  # at first the library prepares its kernels
        began, pairs = time.process_time(), 0
        for top in range(0, len(left) - 1_023, 1_024):
            for start in range(0, len(right) - 1_023, 1_024):
                torch._int_mm(left[top : top + 1_024], right[start : start + 1_024].t(), out=out)
                pairs += out.numel()
        used = time.process_time() - began
    limit = used * len(queries) * len(pool) / pairs
    print(f"int8 products alone: {limit:,.1f} s CPU, {100 * limit / cpu:.0f} % of the search")


def time_faiss(arguments: argparse.Namespace, queries: Float16, pool: Float16, wanted: float) -> None:
    """FAISS's index of the peer asked for, built over the whole pool, and searched by some of the queries."""
    faiss = require_faiss(arguments.workers)
    began, cpu = time.perf_counter(), cpu_seconds()
    index: Any = faiss.IndexFlatIP(DIM)
    if arguments.peer == "ivf":
        index = faiss.index_factory(DIM, f"IVF{arguments.peer_lists},Flat", faiss.METRIC_INNER_PRODUCT)
        index.train(to_unit(pool[: 40 * arguments.peer_lists]))
    for start in range(0, len(pool), 1 << 16):
        index.add(to_unit(pool[start : start + (1 << 16)]))
    built = time.perf_counter() - began, cpu_seconds() - cpu
    print(f"{arguments.peer}: built in {built[0]:,.1f} s wall, {built[1]:,.1f} s CPU")
    if arguments.peer == "ivf":
        _reach(index, queries, pool, arguments.k, wanted, arguments.peer_lists)
    some = to_unit(queries[: arguments.peer_queries])
    began, cpu = time.perf_counter(), cpu_seconds()
    index.search(some, arguments.k)
    wall, used = time.perf_counter() - began, cpu_seconds() - cpu
    scale = len(queries) / len(some)
    print(f"{arguments.peer}: {len(some):,} queries searched in {wall:,.1f} s wall, {used:,.1f} s CPU")
    print(
        f"built and all {len(queries):,}: {built[0] + wall * scale:,.1f} s wall, {built[1] + used * scale:,.1f} s CPU"
    )


def _reach(index: Any, queries: Float16, pool: Float16, k: int, wanted: float, lists: int) -> None:
    """Raise `nprobe` until recall@k of some queries is as wanted."""
    every = np.linspace(0, len(queries) - 1, min(TRUTH_QUERIES, len(queries))).astype(np.int64)
    words = np.stack([np.zeros(len(pool)), np.arange(len(pool))], axis=1).astype(np.uint64)
    truth, _ = top_k(queries[every], pool, k, words)
    asked = to_unit(queries[every])
    index.nprobe = 8
    while True:
        _, found = index.search(asked, k)
        shares = [np.isin(own, its).mean() for own, its in zip(truth, found, strict=True)]
        print(f"  nprobe {index.nprobe}: recall@{k} {macro_average(np.asarray(shares)):.4f}")
        if macro_average(np.asarray(shares)) >= wanted or index.nprobe >= lists:
            return
        index.nprobe = min(lists, index.nprobe * 5 // 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("S", "H"), default="S")
    parser.add_argument("--queries", type=int, default=100_000)
    parser.add_argument("--pool", type=int, default=1_000_000)
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--engine", default="partitioned")
    for name in ("num-lists", "lists-joined", "quantizers", "partition-rows"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--peer", choices=("ivf", "flat", "none"), default="ivf")
    parser.add_argument("--peer-lists", type=int, default=2048)
    parser.add_argument("--peer-queries", type=int, default=5_000)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", help="where vectors and sets lie; a temporary directory by default")
    arguments = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        held = np.lib.format.open_memmap(
            os.path.join(scratch, "vectors.npy"), "w+", np.float16, (arguments.queries + arguments.pool, DIM)
        )
        vectors(arguments.kind, len(held), 0, held)
        queries, pool = held[: arguments.queries], held[arguments.queries :]
        uris = write_sets(scratch, queries, pool)
        print(
            f"{arguments.kind}, {len(queries):,} x {len(pool):,} vectors of {DIM}, k={arguments.k}, {arguments.engine}"
        )
        executor = RayExecutor(arguments.workers)
        reached, cpu = run_stage(arguments, uris, storage.join(scratch, "out"), executor)
        executor.close()
        if arguments.engine == "exact":
            tell_limit(queries, pool, cpu)
        if arguments.peer != "none":
            time_faiss(arguments, queries, pool, min(reached, RECALL))


if __name__ == "__main__":
    main()
