"""The dedup join on synthetic descriptors: time, CPU, memory and recall of an engine, beside FAISS on the same vectors.

    python -m benchmarks.dedup --kind S --count 200000 --engine exact --peer flat
    python -m benchmarks.dedup --kind H --count 1000000 --engine partitioned --peer ivf
    python -m benchmarks.dedup --kind S --count 10000000 --engine partitioned --folder /data/bench
    python -m benchmarks.dedup --kind photos --data DIR --count 200000 --engine partitioned

Runs the dedup stage as `lvd dedup` does, on two Ray workers, and times each of its steps. FAISS is timed in this
process with as many threads, on some of the queries, and scaled: `flat` is IndexFlatIP's range search, `ivf` an
IndexIVFFlat at the number of probes that reaches the stage's share of true pairs. Set OPENBLAS_CORETYPE=SKYLAKEX where
FAISS is to be at its fastest on a CPU with AVX-512. `--hub N` replaces that many vectors by near-copies (cosine 0.99
and above) of one. `photos` are real photographs and near-copies of them, through `dct` and above its own threshold.
"""

import argparse
import os
import tempfile
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.measure import PeakMemory, cpu_seconds, machine
from benchmarks.photos import write_photos
from benchmarks.vectors import DIM, write_sets
from curation import storage
from curation.faiss_setup import require_faiss
from curation.recall import macro_average
from curation.scoring import to_unit
from curation.shards import ShardSet
from embedders.dct import THRESHOLDS
from pipelines.dedup import DedupUnit
from pipelines.executor import Executor, RayExecutor
from pipelines.join import SampleStep
from pipelines.nodes import Nodes
from pipelines.progress import Progress
from pipelines.recall import TruthStep
from pipelines.recipe import DedupSettings, JoinSettings
from pipelines.unit import Unit, run_unit
from pipelines.vectors import Vectors

THRESHOLD = 0.6
JOIN = ("sample", "hubs", "quantizers", "lists", "flat", "leads", "layout", "scatter", "pairs", "index")


class Recorder(Progress):
    """Times steps instead of drawing them: (name, parts, wall seconds, CPU seconds) each.

    Told is also the highest memory so far, so that a run that is interrupted has told it.
    """

    def __init__(self, watch: PeakMemory) -> None:
        super().__init__()
        self._watch = watch
        self.steps: list[tuple[str, int, float, float]] = []

    def begin(self, title: str, parts: int, done: int) -> None:
        super().begin(title, parts, done)
        self._at = time.perf_counter(), self._watch.cpu_seconds()
        self._step = title.partition(": ")[2] or title, parts

    def end(self) -> None:
        super().end()
        wall, cpu = time.perf_counter() - self._at[0], self._watch.cpu_seconds() - self._at[1]
        self.steps.append((*self._step, wall, cpu))
        spent = f"{wall:>9.1f} s wall {cpu:>9.1f} s CPU {self._watch.peak / 2**30:>6.2f} GiB at most so far"
        print(f"  {self._step[0]:<18} {self._step[1]:>4} parts {spent}", flush=True)


def run_stage(arguments: argparse.Namespace, embeddings: str, images: str, out: str, executor: Executor) -> Recorder:
    """Dedup of the pool alone; returns what each step took."""
    join = {key: getattr(arguments, key) for key in ("num_lists", "lists_joined", "quantizers", "partition_rows")}
    chosen = {key: value for key, value in join.items() if value is not None}
    settings = DedupSettings(
        threshold=arguments.threshold,
        join=JoinSettings(engine=arguments.engine, min_recall=0, index=arguments.index, **chosen),
    )
    unit: Unit = DedupUnit([embeddings], [images], [], settings, 0, out, f"{out}-forest", f"{out}-recall")
    with PeakMemory() as memory:
        recorder = Recorder(memory)
        run_unit(unit, executor, recorder)
    join_steps = [step for step in recorder.steps if step[0].split()[0] in JOIN]
    wall, cpu = sum(step[2] for step in join_steps), sum(step[3] for step in join_steps)
    print(f"join {wall:,.1f} s wall, {cpu:,.1f} s CPU; stage {sum(s[2] for s in recorder.steps):,.1f} s wall")
    print(f"peak anonymous memory of all processes {memory.peak / 2**30:.2f} GiB")
    forest = ShardSet(f"{out}-forest")
    print(f"{forest.num_rows:,} edges in the forest: {len(Vectors([embeddings])) - forest.num_rows:,} images stay")
    return recorder


def tell_recall(uri: str) -> float:
    """Print the measured recall of a set; returns the share compared."""
    row = ShardSet(uri).read(0).to_pylist()[0]
    for name, what in (("joined", "compared"), ("component", "in one component")):
        value, low, high = (row[f"recall_{name}{end}"] for end in ("", "_low", "_high"))
        if value is not None:
            print(f"recall, {what}: {value:.4f} (95 % interval {low:.4f} to {high:.4f})")
    few, at = row["num_with_pairs"], row["recall_joined_at"] or []
    print(f"{few:,} of {row['num_sampled']:,} sampled have near-copies, {row['k_too_short']:,} more than 64 of them")
    told = [f"{m}: {at[m - 1]:.4f}" for m in (1, 2, 4, 8, 16, 32, 64, 128) if m <= len(at)]
    print(f"compared with fewer lists: {', '.join(told)}")
    return float(row["recall_joined"] or 1.0)


def time_flat(embeddings: str, queries: int, threads: int) -> None:
    """FAISS's exact range search."""
    faiss = require_faiss(threads)
    vectors = Vectors([embeddings])
    index = faiss.IndexFlatIP(DIM)
    for start in range(0, len(vectors), 1 << 16):
        index.add(to_unit(vectors.read(start, min(start + (1 << 16), len(vectors)))))
    some = to_unit(vectors.read(0, min(queries, len(vectors))))
    _time_search("IndexFlatIP.range_search", index, some, len(vectors))


def time_ivf(embeddings: str, queries: int, threads: int, wanted: float, lists: int, out: str, run: Executor) -> None:
    """FAISS's inverted lists, with the probes that reach the wanted share of true pairs."""
    faiss = require_faiss(threads)
    vectors = Vectors([embeddings])
    query, truth = _truth(embeddings, out, run)
    index = faiss.index_factory(DIM, f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
    began, cpu = time.perf_counter(), cpu_seconds()
    index.train(to_unit(vectors.read(0, min(40 * lists, len(vectors)))))
    for start in range(0, len(vectors), 1 << 16):
        index.add(to_unit(vectors.read(start, min(start + (1 << 16), len(vectors)))))
    print(f"IVF{lists},Flat: built in {time.perf_counter() - began:,.1f} s wall, {cpu_seconds() - cpu:,.1f} s CPU")
    asked = to_unit(query)
    index.nprobe = 8
    while True:
        reached = _share_found(index, asked, truth)
        print(f"  nprobe {index.nprobe}: {reached:.4f} of the true pairs")
        if reached >= wanted or index.nprobe >= lists:
            break
        index.nprobe = min(lists, index.nprobe * 6 // 5)
    some = to_unit(vectors.read(0, min(queries, len(vectors))))
    _time_search(f"IVF{lists},Flat range_search, nprobe {index.nprobe}", index, some, len(vectors))


def _truth(embeddings: str, out: str, run: Executor) -> tuple[npt.NDArray[np.float16], list[npt.NDArray[np.int64]]]:
    """2,000 vectors, and the numbers of the near-copies of each."""
    from curation.manifest import Origin
    from pipelines.unit import run_step

    sample = SampleStep(f"{out}-peer-sample", "sample", {}, False, Nodes([embeddings], []), 2_000, 1, "peer")
    truth = TruthStep(f"{out}-peer-truth", "truth", {}, False, [embeddings], sample.out, THRESHOLD, 1)
    for step in (sample, truth):
        run_step(step, Origin(step.kind, "benchmark", 1, {}, (), {}), "peer", run, Progress())
    table = ShardSet(sample.out).read(0)
    numbers = table["number"].to_numpy()
    found: list[list[npt.NDArray[np.int64]]] = [[] for _ in numbers]
    for part in range(ShardSet(truth.out).num_parts):
        rows = ShardSet(truth.out).read(part)
        at = np.searchsorted(numbers, rows["query"].to_numpy())
        for row in np.unique(at):
            found[row].append(rows["other"].to_numpy()[at == row])
    from curation.partwise import matrix

    return matrix(table), [np.concatenate([np.zeros(0, np.int64), *pieces]) for pieces in found]


def _share_found(index: Any, queries: npt.NDArray[np.float32], truth: list[npt.NDArray[np.int64]]) -> float:
    limits, _, row = index.range_search(queries, THRESHOLD)
    shares = [
        np.isin(others, row[int(limits[q]) : int(limits[q + 1])]).mean()
        for q, others in enumerate(truth)
        if len(others)
    ]
    return macro_average(np.asarray(shares))


def _time_search(name: str, index: Any, queries: npt.NDArray[np.float32], count: int) -> None:
    began, cpu = time.perf_counter(), cpu_seconds()
    index.range_search(queries, THRESHOLD)
    wall, used = time.perf_counter() - began, cpu_seconds() - cpu
    scale = count / len(queries)
    print(f"{name}: {wall:,.1f} s wall, {used:,.1f} s CPU for {len(queries):,} queries; ", end="")
    print(f"for all {count:,}: {wall * scale:,.1f} s wall, {used * scale:,.1f} s CPU")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("S", "H", "photos"), default="S")
    parser.add_argument("--data", help="where cifar10_train.parquet lies, for photos")
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--hub", type=int, default=0)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--index", default="IVF4096,PQ64")
    for name in ("num-lists", "lists-joined", "quantizers", "partition-rows"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--peer", choices=("flat", "ivf"))
    parser.add_argument("--peer-lists", type=int, default=2048)
    parser.add_argument("--queries", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", help="where vectors are kept between runs")
    arguments = parser.parse_args()
    if arguments.kind == "photos" and (arguments.peer or not arguments.data):
        parser.error("--kind photos needs --data, and has no --peer")
    print(machine())
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or scratch
        if arguments.kind == "photos":
            arguments.threshold = THRESHOLDS.self_dedup
            embeddings, images = write_photos(folder, arguments.data, arguments.count)
        else:
            arguments.threshold = THRESHOLD
            embeddings, images = write_sets(folder, arguments.kind, arguments.count, arguments.hub)
        executor = RayExecutor(arguments.workers)
        out, vectors = storage.join(folder, f"out-{os.getpid()}"), Vectors([embeddings])
        print(f"{arguments.kind}, {len(vectors):,} vectors of {vectors.dim}", end=", ")
        print(f"{arguments.hub:,} in a hub, {arguments.engine}, above {arguments.threshold}")
        run_stage(arguments, embeddings, images, out, executor)
        reached = tell_recall(f"{out}-recall") if ShardSet(f"{out}-recall").is_complete else 1.0
        if arguments.peer == "flat":
            time_flat(embeddings, arguments.queries, arguments.workers)
        elif arguments.peer == "ivf":
            peer = (reached, arguments.peer_lists, out, executor)
            time_ivf(embeddings, arguments.queries, arguments.workers, *peer)
        executor.close()
        for place in ("", "-forest", "-recall", "-peer-sample", "-peer-truth"):
            storage.remove_tree(out + place)


if __name__ == "__main__":
    main()
