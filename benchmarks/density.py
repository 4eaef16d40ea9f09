"""Do hierarchical k-means' centroids, and balanced samples over its tree, spread evenly? On data of known density.

    python -m benchmarks.density [--points 30000] [--seeds 5] [--out docs/img/density.png]

Vo et al. (arXiv 2405.15613, section 3.2) argue that the centroids of level L tend to the uniform distribution over the
data's support as L grows. Two mixtures show it, each with all its hierarchies ending in TOP clusters of L2 k-means:

- plane: three Gaussians of weights 0.65, 0.2, 0.1 and 0.05 uniform background over a square. How far points are from
  uniform is the KL divergence, in nats, of a kernel density estimate (Gaussian, BANDWIDTH, each kernel scaled to weigh
  1 on a GRID x GRID raster of the square) from the uniform density. It compares equally many points only: few ones are
  uneven by chance.
- d=32: Gaussians of equal shape around COMPONENTS random means, weights rank ** -1.5. The support is a histogram whose
  cells are the components (nearest mean), equal in volume: KL of the counts in the cells from equal counts.

Columns: the coarsest centroids of a hierarchy fitted once a level, and of one fitted FITS times on resampled points;
samples balanced over the finest clusters alone (flat k-means with as many leaves) and over the resampled tree.
"""

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from benchmarks.measure import machine
from curation.balance_measures import kl_to_uniform
from curation.faiss_setup import require_faiss
from curation.hashing import keyed_hash
from curation.hierarchy import KMeans, Level, fit_level, stack_levels
from curation.sampling import Tree, draw_copies, tree_shares
from curation.scoring import Vectors

SIDE = 3.0
"""The square reaches from -SIDE to SIDE."""
GRID, BANDWIDTH = 60, 0.3
COMPONENTS, DIM = 50, 32
TOP = 100
STACKS = ((TOP,), (400, TOP), (1_600, 400, TOP), (1_600, 640, 250, TOP))
"""Clusters of hierarchies of 1 to 4 levels, finest first. Centroids of very few points each are little but a random
sample, and leave the levels above more to even out: so the finest clusters have about 20 of 30,000 points."""
FITS, ITERATIONS = 10, 10
SAMPLE = 1_000
COLUMNS = ("centroids", "centroids, resampled", "sample, flat", "sample, hierarchy")

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int32 = npt.NDArray[np.int32]
Measure = Callable[[Vectors], float]
Make = Callable[[int, int], tuple[Float32, Measure]]


def fit_l2(sample: Vectors, num_clusters: int, /, *, iterations: int, seed: int, threads: int) -> Float32:
    """Centroids of Euclidean k-means by FAISS, started by k-means++ as in the paper.

    Started from random points they would not spread: Lloyd's rounds do not carry centroids from where they are many to
    where they are missing.
    """
    faiss = require_faiss(threads)
    settings = {"min_points_per_centroid": 1, "max_points_per_centroid": len(sample), "niter": iterations}
    start = {"init_method": faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS, "seed": seed % 2**31}
    kmeans = faiss.Kmeans(sample.shape[1], num_clusters, **settings, **start)
    kmeans.train(sample)
    return np.array(kmeans.centroids, dtype=np.float32)


def assign_l2(x: Vectors, centroids: Float32, /) -> tuple[Int32, Float32]:
    """Nearest centroid of each point, and the squared distance."""
    squared, cluster = require_faiss().knn(x, centroids, 1)
    return cluster[:, 0].astype(np.int32), squared[:, 0]


def plane(num_points: int, seed: int) -> tuple[Float32, Measure]:
    """The mixture in the square, float32 [n, 2], and its measure."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(4, num_points, p=(0.65, 0.2, 0.1, 0.05))
    mean = np.array([(-1.2, -1.0), (1.4, 0.6), (-0.8, 1.8), (0, 0)])[kind]
    spread = np.array([0.35, 0.5, 0.4, 0])[kind]
    points = mean + spread[:, None] * rng.standard_normal((num_points, 2))
    background = kind == 3
    points[background] = rng.uniform(-SIDE, SIDE, (np.count_nonzero(background), 2))
    return points.clip(-SIDE, SIDE).astype(np.float32), kernel_kl


def kernel_kl(points: Vectors) -> float:
    """KL divergence, in nats, of the kernel density estimate of points [n, 2] from uniform density on the square."""
    at = (np.arange(GRID) + 0.5) * (2 * SIDE / GRID) - SIDE
    kernel = np.exp(-0.5 * ((points.T[:, :, None] - at) / BANDWIDTH) ** 2)  # [2, n, GRID]
    kernel /= kernel.sum(axis=2, keepdims=True)
    return kl_to_uniform((kernel[0].T @ kernel[1]).ravel())


def long_tail(num_points: int, seed: int) -> tuple[Float32, Measure]:
    """The mixture of COMPONENTS in DIM dimensions, float32 [n, DIM], and its measure."""
    rng = np.random.default_rng(seed)
    weight = (np.arange(COMPONENTS) + 1.0) ** -1.5
    means = rng.standard_normal((COMPONENTS, DIM)).astype(np.float32)
    kind = rng.choice(COMPONENTS, num_points, p=weight / weight.sum())
    points = means[kind] + rng.standard_normal((num_points, DIM), dtype=np.float32)
    return points, lambda x: kl_to_uniform(np.bincount(assign_l2(x, means)[0], minlength=COMPONENTS))


def levels_of(counts: tuple[int, ...], fits: int) -> list[Level]:
    """Levels of which the finest is not resampled, the others on half the mean cluster, rounded up, as in the paper."""
    above = [Level(k, -(-below // (2 * k)), fits) for below, k in itertools.pairwise(counts)]
    return [Level(counts[0], 1, 1), *above]


def found_by(points: Float32, counts: tuple[int, ...], kmeans: KMeans, sample: int) -> dict[str, Float32]:
    """What a hierarchy of these levels gives: its coarsest centroids, and samples of `sample` points; by COLUMNS."""
    finest, cluster, _ = fit_level(points, levels_of(counts, 1)[0], 1, kmeans)
    plain, resampled = (stack_levels(finest, levels_of(counts, fits)[1:], kmeans) for fits in (1, FITS))
    trees = Tree(counts[:1]), resampled.tree  # the finest clusters alone, and with what is above
    samples = [balanced(points, tree, cluster, sample, kmeans.seed) for tree in trees]
    return dict(zip(COLUMNS, (plain.centroids[-1], resampled.centroids[-1], *samples), strict=True))


def balanced(points: Float32, tree: Tree, cluster: Int32, target: int, seed: int) -> Float32:
    """A sample of `target` points balanced over the tree, random within its leaves."""
    shares = tree_shares(tree, np.bincount(cluster, minlength=tree.num_clusters[0]), target)
    return points[draw_copies(cluster, shares, draws(len(points), seed)) > 0]


def random_sample(points: Float32, target: int, seed: int) -> Float32:
    return points[np.argsort(draws(len(points), seed))[:target]]


def draws(count: int, seed: int) -> npt.NDArray[np.uint64]:
    """A keyed hash of each point."""
    words = np.zeros((count, 2), np.uint64)
    words[:, 1] = np.arange(count)
    return keyed_hash(seed, "density", words)


def scatter(panels: dict[str, Float32], path: Path, size: int = 180, columns: int = 5) -> None:
    """Draw each set of points in its square of the plane, one bit a pixel, under its title."""
    height = size + 16
    picture = Image.new("1", (columns * size, -(-len(panels) // columns) * height), 1)
    pen = ImageDraw.Draw(picture)
    for number, (title, points) in enumerate(panels.items()):
        left, top = number % columns * size, number // columns * height
        pen.text((left + 4, top + 2), title, fill=0)
        pen.rectangle((left + 2, top + 15, left + size - 3, top + 15 + size - 5), outline=0)
        corner = ((points / SIDE + 1) / 2 * (size - 9)).astype(int) + np.array([left + 4, top + 17])
        for shift in ((0, 0), (0, 1), (1, 0), (1, 1)):
            pen.point([(int(x), int(y)) for x, y in corner + np.array(shift)], fill=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, optimize=True)


def compare(name: str, make: Make, options: Any) -> list[dict[str, Float32]]:
    """Print the KL of a random sample, and a row for each of STACKS; what each of these gave with the first seed."""
    mixtures = [make(options.points, seed) for seed in range(options.seeds)]
    kl = [measure(random_sample(points, SAMPLE, seed)) for seed, (points, measure) in enumerate(mixtures)]
    print(f"| {name} | a random sample: {np.mean(kl):.3f} |{' |' * len(COLUMNS)}")
    first = []
    for counts in STACKS:
        figures = []
        for seed, (points, measure) in enumerate(mixtures):
            found = found_by(points, counts, KMeans(ITERATIONS, seed, options.threads, fit_l2, assign_l2), SAMPLE)
            figures.append([measure(found[column]) for column in COLUMNS])
            if seed == 0:
                first.append(found)
        cells = [f"{np.mean(column):.3f}" for column in zip(*figures, strict=True)]
        print(f"| {name} | {' / '.join(f'{count:,}' for count in counts)} | {' | '.join(cells)} |", flush=True)
    return first


def panels_of(first: list[dict[str, Float32]], points: Float32) -> dict[str, Float32]:
    """What the picture shows: samples in the first row, the two without a tree on the left; centroids below."""
    panels = {"random sample": random_sample(points, SAMPLE, 0)}
    panels |= {f"sample, L={level}": found["sample, hierarchy"] for level, found in enumerate(first, 1)}
    panels[f"sample, flat, {STACKS[-1][0]:,} clusters"] = first[-1]["sample, flat"]
    return panels | {f"{TOP} centroids, L={level}": found["centroids"] for level, found in enumerate(first, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=30_000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("docs/img/density.png"))
    options = parser.parse_args()
    print(f"{machine()}; {options.points:,} points, samples of {SAMPLE:,}, means of {options.seeds} seeds")
    print("KL to uniform, nats")
    print(f"| data | clusters | {' | '.join(COLUMNS)} |\n|---|---|{'---:|' * len(COLUMNS)}")
    first = compare("plane", plane, options)
    scatter(panels_of(first, plane(options.points, 0)[0]), options.out)
    compare("d=32", long_tail, options)
    print(f"{options.out}: {options.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
