"""The whole middle of a build on synthetic vectors: dedup, clusters in levels, both retrievals, the selection.

    python -m benchmarks.middle --count 10000000 --folder /data/bench
    python -m benchmarks.middle --count 200000

Takes up where images are embedded and stops where bytes would be read again: S vectors of the dedup benchmark serve as
descriptors and as meaning, and the filter kept all of them. Runs each stage as its command does, on two Ray workers,
and tells wall and CPU seconds of every step, and the peak anonymous memory of all processes for each stage. With
`--folder` an interrupted run is resumed; its times are then those of what was left.
"""

import argparse
import os
import tempfile
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from benchmarks.dedup import THRESHOLD, Recorder, tell_recall
from benchmarks.measure import PeakMemory, machine
from benchmarks.retrieve import write_set
from benchmarks.vectors import DIM, VECTOR_GROUP, write_sets
from curation import schemas, storage
from curation.manifest import Origin
from curation.partwise import fixed_size_lists, ids_of, matrix
from curation.scoring import to_unit
from curation.shards import GROUP_ROWS, PartWriter, ShardSet
from pipelines.cluster import ClusterUnit
from pipelines.dedup import DedupUnit
from pipelines.executor import RayExecutor
from pipelines.rebalance import RebalanceUnit, parts_from_sets
from pipelines.recipe import ClusterSettings, DedupSettings, JoinSettings, RetrieveSettings
from pipelines.retrieve import RetrieveUnit
from pipelines.retrieve_clusters import ClusterRule
from pipelines.unit import Unit, run_unit

SOURCE = "S"


def write_filtered(place: str, embeddings: str) -> str:
    """Verdicts by which the filter kept every image; made if they are not there."""
    filtered, made = ShardSet(storage.join(place, "filtered")), ShardSet(embeddings)
    if filtered.is_complete:
        return filtered.uri
    origin = Origin("filtered", "benchmark", 1, {}, (), {"source": SOURCE, "role": "pool"})
    filtered.begin(origin)
    for part in range(made.num_parts):
        ids = made.read(part, ["image_id"])["image_id"]
        known = {"row": np.arange(len(ids)), "image_id": ids, "kept": np.ones(len(ids), np.bool_)}
        columns = [known.get(field.name, pa.nulls(len(ids), field.type)) for field in schemas.FILTERED]
        with PartWriter(filtered.uri, part, schemas.FILTERED, origin.fingerprint) as writer:
            writer.write(pa.table(columns, schema=schemas.FILTERED), GROUP_ROWS)
    filtered.finish(origin, made.num_parts, {})
    return filtered.uri


def write_queries(place: str, embeddings: str, count: int) -> str:
    """A query set whose images resemble images of the pool, at cosines of about 0.5 to 0.9; made if not there."""
    uri = storage.join(place, "queries")
    if ShardSet(uri).is_complete:
        return uri
    rng = np.random.default_rng(1)
    some = to_unit(matrix(ShardSet(embeddings).read_rows(0, 0, count, ["embedding"])))
    noise = to_unit(rng.standard_normal(some.shape, dtype=np.float32).astype(np.float16))
    weight = rng.uniform(0.5, 0.9, (len(some), 1)).astype(np.float32)
    mixed = (weight * some + np.sqrt(1 - weight**2) * noise).astype(np.float16)
    schema = schemas.embeddings(DIM)
    ids = ids_of(rng.integers(0, 2**63, (len(some), 2)).astype(np.uint64))
    table = pa.table([ids, fixed_size_lists(mixed, schema.field("embedding").type)], schema=schema)
    model = ShardSet(embeddings).manifest["info"]["model"]
    write_set(uri, "embeddings", "query", [table], VECTOR_GROUP, model)
    return uri


def units(options: argparse.Namespace, place: str, embeddings: str, images: str) -> Iterator[Unit]:
    """The stages in order; each is asked for once those before it are complete."""
    filtered, queries = write_filtered(place, embeddings), write_queries(place, embeddings, options.queries)

    def at(*names: str) -> str:
        return storage.join(place, "run", *names)

    chosen = {} if options.quantizers is None else {"quantizers": options.quantizers}
    settings = DedupSettings(threshold=THRESHOLD, join=JoinSettings(min_recall=0, **chosen))
    out = at("duplicates")
    yield DedupUnit([embeddings], [images], [], settings, 0, out, at("forest"), at("recall"))
    duplicates, clusters = [at("duplicates", SOURCE)], [at("clusters", SOURCE)]
    k = options.clusters
    levels = ClusterSettings(
        num_clusters=k, levels=[max(1, k // 10), max(1, k // 100)], init="subsample", threads=options.workers
    )
    yield ClusterUnit([embeddings], duplicates, levels, 0, at("centroids"), at("clusters"))
    rule = ClusterRule(1_000, 3, options.count // 20, "random")
    where = ([embeddings], duplicates, clusters, at("centroids"))
    yield RetrieveUnit(queries, *where, 4, rule, 0, at("retrieved"), RetrieveSettings())
    found = at("retrieved", ShardSet(queries).source)
    parts = parts_from_sets([], [found], options.count // 10, 1)
    yield RebalanceUnit(parts, [filtered], {ShardSet(found).source: found}, clusters, 0, at("selection"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000_000)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--clusters", type=int, default=10_000)
    parser.add_argument("--quantizers", type=int)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", help="where everything lies; a temporary directory by default")
    options = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or scratch
        embeddings, images = write_sets(folder, SOURCE, options.count)
        place = storage.join(folder, f"middle{options.count}")
        executor = RayExecutor(options.workers)
        table = []
        for unit in units(options, place, embeddings, images):
            with PeakMemory(1.0) as memory:
                recorder = Recorder(memory)
                run_unit(unit, executor, recorder)
            wall, cpu = sum(step[2] for step in recorder.steps), sum(step[3] for step in recorder.steps)
            table.append(f"| {unit.stage} | {wall:,.1f} | {cpu:,.1f} | {memory.peak / 2**30:.2f} |")
            print(table[-1], flush=True)
        executor.close()
        if ShardSet(storage.join(place, "run", "recall")).is_complete:
            tell_recall(storage.join(place, "run", "recall"))
        print("\n| stage | wall s | CPU s | peak memory, GiB |\n|---|---:|---:|---:|", *table, sep="\n")
        print(f"{ShardSet(storage.join(place, 'run', 'selection')).num_rows:,} images selected of {options.count:,}")


if __name__ == "__main__":
    main()
