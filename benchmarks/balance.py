"""Balanced sampling over a tree of clusters, for many members: seconds of each step, and memory.

    python -m benchmarks.balance [--members 100000000] [--levels 1000000 50000 5000] [--target N] [--max-copies 2]

Members lie in the finest clusters with a long tail (size proportional to rank ** -0.75), every cluster in a random one
of the next level, and a twentieth of the finest clusters are empty. The target is a tenth of the members. What is timed
begins with the cluster of each member (int32) and ends with its copies (int32); its draw, a keyed hash, is made within.
Compilation and imports are not timed. One thread.
"""

import argparse
import itertools
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.measure import PeakMemory, cpu_seconds, machine
from curation.groups import distance_keys, group_sizes
from curation.hashing import keyed_hash
from curation.sampling import Tree, draw_copies, tree_shares

CHUNK = 1 << 20
TAIL = 0.75
Int32 = npt.NDArray[np.int32]
UInt64 = npt.NDArray[np.uint64]


def made(members: int, levels: list[int]) -> tuple[Tree, Int32]:
    """A tree, and the finest cluster of each member."""
    rng = np.random.default_rng(0)
    parents = [rng.integers(0, above, below, dtype=np.int32) for below, above in itertools.pairwise(levels)]
    filled = rng.permutation(levels[0])[: max(1, levels[0] * 19 // 20)].astype(np.int32)
    cluster = np.empty(members, dtype=np.int32)
    for start in range(0, members, CHUNK):
        part = cluster[start : start + CHUNK]
        part[:] = filled[(len(filled) * rng.random(len(part)) ** (1 / (1 - TAIL))).astype(np.int64)]
    return Tree(tuple(levels), tuple(parents)), cluster


def draws(purpose: str, count: int) -> UInt64:
    """A keyed hash of each of `count` things, made chunk by chunk."""
    found = np.empty(count, dtype=np.uint64)
    for start in range(0, count, CHUNK):
        part = found[start : start + CHUNK]
        words = np.zeros((len(part), 2), dtype=np.uint64)
        words[:, 1] = np.arange(start, start + len(part))
        part[:] = keyed_hash(0, purpose, words)
    return found


def keys_of(strategy: str, members: int) -> UInt64:
    """Draws, or distances (also drawn here) with draws for their ties, as one key."""
    keys = draws("member", members)
    if strategy == "closest":
        for start in range(0, members, CHUNK):
            part = keys[start : start + CHUNK]
            part[:] = distance_keys((part & np.uint64(0xFFFFFF)).astype(np.float32), part)
    return keys


def select(tree: Tree, cluster: Int32, options: Any, strategy: str) -> dict[str, float]:
    """Seconds of each step; fails unless exactly the target is taken, each image within bounds."""
    times = [time.perf_counter()]
    sizes = group_sizes(cluster, tree.num_clusters[0])
    orders = tuple(draws(f"level {level}", count) for level, count in enumerate(tree.num_clusters))
    shares = tree_shares(tree, sizes, options.target, options.max_copies, orders)
    times.append(time.perf_counter())
    keys = keys_of(strategy, len(cluster))
    times.append(time.perf_counter())
    copies = draw_copies(cluster, shares, keys)
    times.append(time.perf_counter())
    if copies.sum() != options.target or copies.max() > options.max_copies or copies.min() < 0:
        raise SystemExit(f"{copies.sum():,} images are taken, up to {copies.max()} times, for {options.target:,}")
    steps = ("shares", "keys", "draw")
    return dict(zip((*steps, "all"), (*np.diff(times), times[-1] - times[0]), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=100_000_000)
    parser.add_argument("--levels", type=int, nargs="+", default=[1_000_000, 50_000, 5_000], help="finest first")
    parser.add_argument("--target", type=int, help="default: a tenth of the members")
    parser.add_argument("--max-copies", type=int, default=2)
    options = parser.parse_args()
    options.target = options.members // 10 if options.target is None else options.target
    print(f"{machine()}; {options.members:,} members, levels of {options.levels} clusters, {options.target:,} taken")
    warm = argparse.Namespace(target=3, max_copies=2)
    select(*made(10, [3, 2]), warm, "random")
    tree, cluster = made(options.members, options.levels)
    print("| strategy | step | seconds | ns per member |\n|---|---|---:|---:|")
    for strategy in ("random", "closest"):
        cpu = cpu_seconds()
        with PeakMemory(0.01) as memory:
            seconds = select(tree, cluster, options, strategy)
        cpu = cpu_seconds() - cpu
        for step, value in (*seconds.items(), ("all, CPU", cpu)):
            print(f"| {strategy} | {step} | {value:.2f} | {1e9 * value / options.members:.1f} |")
        print(f"| {strategy} | peak of anonymous memory, MB | {memory.peak / 1e6:.0f} | |", flush=True)


if __name__ == "__main__":
    main()
