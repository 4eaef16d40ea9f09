"""k-means of ours and of FAISS: the same points, the same start, the same rounds; CPU and wall time, and the objective.

    python -m benchmarks.cluster [--count 500000] [--dim 256] [--k 1000 10000] [--kind clustered] [--metric cosine]

Points are random directions, or (`clustered`) lie around 2,000 of them. Each side runs in a fresh process, in turn, on
as many threads; compilation, imports and the readying of points are not in an iteration, and readying is told apart.
Both objectives are those of exact assignment to the centroids. A limit is the CPU time
that the products of an iteration take at the rate measured just before, in int8 (torch._int_mm) and float32. FAISS runs
with the matrix kernel that OPENBLAS_CORETYPE names.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from benchmarks.components import in_fresh_process
from benchmarks.measure import machine
from curation.clustering import assign
from curation.distances import Metric, Points, Space, encode_points
from curation.faiss_setup import require_faiss
from curation.kmeans_init import first_centroids
from curation.kmeans_rounds import Partial, lloyd, partial_sums
from curation.scoring import to_unit

TOPICS = 2_000
CHUNK = 65_536
Float32 = npt.NDArray[np.float32]
Float16 = npt.NDArray[np.float16]
Result = dict[str, float]


def points(kind: str, count: int, dim: int, seed: int = 0) -> Float16:
    """The data, float16 [count, dim]: around the same topics for every seed."""
    topics = np.random.default_rng(0).standard_normal((TOPICS, dim), dtype=np.float32)
    rng = np.random.default_rng([1, seed])
    out = np.empty((count, dim), dtype=np.float16)
    for start in range(0, count, CHUNK):
        rows = out[start : start + CHUNK]
        drawn = rng.standard_normal(rows.shape, dtype=np.float32)
        rows[:] = drawn if kind == "random" else drawn + topics[rng.integers(0, TOPICS, len(rows))]
    return out


class Clock:
    """CPU and wall seconds since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        return time.process_time() - self._cpu, time.perf_counter() - self._wall


def ours(options: argparse.Namespace, k: int) -> Result:
    """Seconds to ready the points and of an iteration, and the objective."""
    import torch

    torch.set_num_threads(1)
    x, metric = points(options.kind, options.count, options.dim), options.metric
    start = first_centroids(x, k, "subsample", metric, 0, "cpu")
    space = Space.around(metric, start)

    def fitted(ready: Points, iterations: int) -> Float32:
        def sums(centroids: Float32) -> Partial:
            return partial_sums(ready.blocks(), centroids, space, threads=options.threads)

        return lloyd(start, sums, space, iterations=iterations, tolerance=-1.0, seed=0)

    fitted(encode_points(x[: 2 * k], space), 1)  # compiles
    clock = Clock()
    ready = encode_points(x, space)
    readied, clock = clock.read(), Clock()
    found = fitted(ready, options.iterations)
    cpu, wall = (seconds / options.iterations for seconds in clock.read())
    return {"cpu": cpu, "wall": wall, "ready": readied[0], "objective": objective(x, found, metric)}


def peer(options: argparse.Namespace, k: int) -> Result:
    """The same with faiss.Kmeans."""
    x, metric = points(options.kind, options.count, options.dim), options.metric
    start = first_centroids(x, k, "subsample", metric, 0, "cpu")
    rows = to_unit(x) if metric == "cosine" else x.astype(np.float32)
    kmeans = require_faiss(options.threads).Kmeans(
        options.dim,
        k,
        niter=options.iterations,
        spherical=metric == "cosine",
        min_points_per_centroid=1,
        max_points_per_centroid=len(x),
    )
    clock = Clock()
    kmeans.train(rows, init_centroids=start)
    cpu, wall = (seconds / options.iterations for seconds in clock.read())
    return {"cpu": cpu, "wall": wall, "objective": objective(x, kmeans.centroids, metric)}


def objective(x: Float16, centroids: Float32, metric: Metric) -> float:
    """Mean distance of exact assignment: 1 - cosine, or squared."""
    return float(assign(x, centroids, metric=metric)[1].mean(dtype=np.float64))


def rate(multiply: Callable[[], object], operations: float) -> float:
    """Multiplications and additions a CPU second, the best of some."""
    multiply()
    best = np.inf
    for _ in range(5):
        clock = Clock()
        for _ in range(20):
            multiply()
        best = min(best, clock.read()[0] / 20)
    return operations / best


def limits(dim: int) -> Result:
    """Rates of products of `dim` numbers here, by CPU time: in int8 by torch, in float32 by numpy."""
    import torch

    torch.set_num_threads(1)
    ones, side = torch.ones((1024, dim), dtype=torch.int8), 1024
    whole = torch.empty((side, side), dtype=torch.int32)
    (wide, other), room = np.ones((2, side, dim), np.float32), np.empty((side, side), np.float32)
    operations = 2.0 * side * side * dim
    return {
        "int8": rate(lambda: torch._int_mm(ones, ones.t(), out=whole), operations),
        "float32": rate(lambda: np.matmul(wide, other.T, out=room), operations),
    }


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Processes that start meanwhile multiply float32 by one thread."""
    before = os.environ.get("OPENBLAS_NUM_THREADS")
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    yield
    del os.environ["OPENBLAS_NUM_THREADS"]
    if before is not None:
        os.environ["OPENBLAS_NUM_THREADS"] = before


def compare(options: argparse.Namespace, k: int) -> None:
    """One line for each side, then what follows from them."""
    with one_blas_thread():
        most = in_fresh_process(limits, options.dim)
    own, other = in_fresh_process(ours, options, k), in_fresh_process(peer, options, k)
    for name, found in (("ours", own), ("faiss", other)):
        print(f"| {k:,} | {name} | {found['cpu']:.3f} | {found['wall']:.3f} | {found['objective']:.5f} |")
    work = 2.0 * options.count * k * options.dim
    cpu, wall = other["cpu"] / own["cpu"], other["wall"] / own["wall"]
    apart = own["objective"] / other["objective"] - 1
    print(f"k={k:,}: FAISS takes {cpu:.2f} times our CPU and {wall:.2f} times our wall time; our objective is")
    print(f"{apart:+.3%} from its; to ready the points takes {own['ready']:.2f} CPU-s once; our CPU is", end=" ")
    shares = (f"{own['cpu'] * most[kind] / work:.2f} of the {kind} limit" for kind in ("int8", "float32"))
    rates = " and ".join(f"{most[kind] / 1e9:.0f} G a second in {kind}" for kind in ("int8", "float32"))
    print(f"{' and '.join(shares)} ({rates})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--k", type=int, nargs="+", default=[1_000, 10_000])
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--kind", choices=("random", "clustered"), default="clustered")
    parser.add_argument("--metric", choices=("cosine", "l2"), default="cosine")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    print(f"{machine()}; {options.count:,} x {options.dim} {options.kind}, {options.metric}, {options.threads} threads")
    print("| k | | CPU-s an iteration | wall s | objective |\n|---|---|---:|---:|---:|")
    for k in options.k:
        compare(options, k)


if __name__ == "__main__":
    main()
