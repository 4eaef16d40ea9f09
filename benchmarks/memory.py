"""Peak anonymous memory of every stage at N and 8 N images, and of the driver at 100 and 10,000 parts.

    python -m benchmarks.memory [--rows 4000] [--parts 10000]

Stages must grow by no more than the bytes an image that their docstrings declare. Each runs in a fresh process, in one
worker, over parts of PART_ROWS images of 32 x 32 pixels; what is bounded by a constant (vectors of a block, ids of a
bucket, rows of a group) has that bound lowered, so that both sizes are above it. The sample that k-means is fitted on
stays the same, and so do the query set and the size of a shard. The driver is measured on Ray, alone, taking images of
one row each.
"""

import argparse
import io
import multiprocessing
import os
import tempfile
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.measure import PeakMemory, anonymous_bytes, machine
from pipelines.executor import LocalExecutor, RayExecutor
from pipelines.progress import quiet
from pipelines.recipe import EmbedderSettings, Recipe
from pipelines.run import STAGES, Plan
from pipelines.unit import run_unit

DECLARED = {"dedup": 110, "cluster": 16, "retrieve": 140, "rebalance": 90}
"""Bytes an image that the stages' docstrings declare; the others hold nothing that grows with the images."""

BOUNDS = {"BLOCK_ROWS": 1024, "BUCKET_ROWS": 2048, "VECTOR_ROWS": 512, "GROUP_ROWS": 2048}
"""Bounds on what one task holds, for this benchmark."""

PART_ROWS, FACTOR, QUERIES = 500, 8, 200


def draw(number: int) -> bytes:
    """A JPEG of 32 x 32 pixels that resembles no other."""
    coarse = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC).save(file, "JPEG", quality=80)
    return file.getvalue()


def write_images(path: Path, numbers: Iterable[int]) -> str:
    """A Parquet file with those images in its column image."""
    schema = pa.schema([("image", pa.binary())])
    with pq.ParquetWriter(path, schema) as writer:
        images: list[bytes] = []
        for number in numbers:
            images.append(draw(number))
            if len(images) == PART_ROWS:
                writer.write_table(pa.table({"image": images}, schema=schema))
                images = []
        if images:
            writer.write_table(pa.table({"image": images}, schema=schema))
    return str(path)


def recipe(pool: str, queries: str, rows: int) -> Recipe:
    """A recipe that has every stage do its work; `rows` is N, whatever the size of the pool."""
    values: dict[str, Any] = {
        "rows_per_part": PART_ROWS,
        "sources": {"pool": {"role": "pool", "images": pool}, "queries": {"role": "query", "images": queries}},
        "filter": {"min_side": 16},
        "cluster": {"num_clusters": 50, "iterations": 5, "sample": rows // 2},
        "parts": [
            {"retrieved": "queries", "mode": "sample", "k": 4},
            {"retrieved": "queries", "mode": "cluster", "images_per_cluster": 10, "min_hits": 1},
            {"balanced": "pool", "target": rows},
        ],
        "shard": {"shard_bytes": rows * 200, "max_fan_out": 8},
    }
    return Recipe.model_validate(values)


def lower_bounds() -> None:
    """Set BOUNDS in every module that knows them."""
    from pipelines import cluster, dedup, embed, filter, rebalance, retrieve, vectors

    for module in (cluster, dedup, embed, filter, rebalance, retrieve, vectors):
        for name, value in BOUNDS.items():
            if hasattr(module, name):
                setattr(module, name, value)


def run_stage(stage: str, made: Recipe, out: str) -> int:
    """Peak anonymous memory of one stage, in bytes."""
    lower_bounds()
    with PeakMemory(0.01) as memory:
        for unit in Plan(made, out).units():
            if unit.stage == stage:
                run_unit(unit, LocalExecutor(), quiet())
    return memory.peak


def in_fresh_process(work: Callable[..., int], *arguments: object) -> int:
    """The result of `work` in a process that has done nothing before."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def stages(folder: Path, rows: int) -> None:
    """Print the table of stages."""
    queries = write_images(folder / "queries.parquet", range(2**31 - QUERIES, 2**31))
    sizes = (rows, FACTOR * rows)
    made = [recipe(write_images(folder / f"{n}.parquet", range(n)), queries, rows) for n in sizes]
    print(f"\n| stage | MB at {sizes[0]:,} | MB at {sizes[1]:,} | growth, bytes an image | declared |")
    print("|---|---:|---:|---:|---:|")
    model = write_model(folder / "model.safetensors")
    for stage in STAGES:
        print_row(stage, stage, made, folder, sizes)
        if stage == "embed":
            print_row(stage, "embed, ViT", [with_network(values, model) for values in made], folder, sizes)


def print_row(stage: str, title: str, recipes: list[Recipe], folder: Path, sizes: tuple[int, int]) -> None:
    """Run a stage at both sizes and print its row of the table."""
    runs = zip(recipes, (str(folder / f"run{n}") for n in sizes), strict=True)
    peaks = [in_fresh_process(run_stage, stage, *run) for run in runs]
    growth = (peaks[1] - peaks[0]) / (sizes[1] - sizes[0])
    declared = DECLARED.get(stage, 0)
    print(f"| {title} | {peaks[0] / 1e6:.1f} | {peaks[1] / 1e6:.1f} | {growth:.0f} | {declared} |", flush=True)


def write_model(file: Path) -> str:
    """A small vision transformer of random weights; returns its specification."""
    from embedders.checkpoints import save_vit
    from embedders.dinov2 import standard_preprocessing
    from embedders.vit import VARIANTS, VisionTransformer

    save_vit(VisionTransformer(VARIANTS["test"]), file, standard_preprocessing(56))
    return f"vit:{file}"


def with_network(made: Recipe, model: str) -> Recipe:
    """The recipe with a network as its second embedder, for the clusters."""
    embedders = {**made.embedders, "network": EmbedderSettings(model=model)}
    cluster = made.cluster.model_copy(update={"embedder": "network"})
    return made.model_copy(update={"embedders": embedders, "cluster": cluster})


def drive(path: str, out: str) -> int:
    """Peak anonymous memory of the driver alone, in bytes, over a download of one part a row."""
    made = recipe(path, path, 100).model_copy(update={"rows_per_part": 1})
    executor = RayExecutor(2)
    peak, stop = [0], threading.Event()

    def sample() -> None:
        while not stop.wait(0.02):
            peak[0] = max(peak[0], anonymous_bytes(os.getpid()))

    thread = threading.Thread(target=sample)
    thread.start()
    run_unit(next(Plan(made, out).download()), executor, quiet())
    stop.set()
    thread.join()
    executor.close()
    return peak[0]


def driver(folder: Path, parts: int) -> None:
    """Print the table of the driver."""
    print("\n| parts | MB of the driver |\n|---:|---:|")
    for count in (100, parts):
        path = write_images(folder / f"tiny{count}.parquet", range(count))
        print(f"| {count:,} | {in_fresh_process(drive, path, str(folder / f'driver{count}')) / 1e6:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4000, help="N: images of the smaller pool")
    parser.add_argument("--parts", type=int, default=10_000, help="parts of the driver's larger download")
    options = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory(prefix="lvd-memory-") as folder:
        stages(Path(folder), options.rows)
        driver(Path(folder), options.parts)


if __name__ == "__main__":
    main()
