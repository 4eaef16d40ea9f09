"""Does curation pay? One network, trained as long on selections of equal size from a long-tailed pool. CIFAR-10.

    python -m benchmarks.selections --data DIR --out RUNS [--seeds 0 1 2] [--steps 500] [--target 2000] [--embedder dct]

The pool, its query sets and the ways to select are those of benchmarks.mixtures, made of the first 45,000 rows of
`cifar10_train.parquet` in DIR; network and settings are those of benchmarks.learning, and so is its examination in
brief: the other 5,000 rows, 500 or so of each class, ask among 10,000. A seed is of the curation and of the training.
Runs go on where they were interrupted.

Printed, once a seed and in the mean: entropy of the ten classes in each selection, and k-NN of the network.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.learning import BANK_ROWS, IMAGES, Exam, K, curve, fit, settings_of, show, write_rows
from benchmarks.measure import machine
from benchmarks.mixtures import World, recipe, write_sources
from curation.shards import ShardSet
from pipelines.run import Plan
from trainer.build import make_pair


def selections(world: World, target: int) -> dict[str, list[str]]:
    """Images of each way to select so many of them."""
    found = {
        "random": world.balanced(target, world.flat(1)),
        "balanced over the tree": world.balanced(target),
        "retrieved by samples": list(world.retrieved("sample", target)),
    }
    short = {name: len(images) for name, images in found.items() if len(images) != target}
    assert not short, f"not {target} images: {short}"
    return found


def write_selections(folder: Path, photos: pa.Table, embedder: str, seed: int, target: int) -> dict[str, float]:
    """A file of images for each selection, made once; entropy of the classes of each, in nats."""
    note = folder / "selections.parquet"
    if not note.exists():
        folder.mkdir(parents=True, exist_ok=True)
        world = World(Plan(recipe(folder, write_sources(photos, folder), embedder, seed), str(folder / "run")))
        pool = ShardSet(world.plan.place("images", "web"))
        parts = (pool.read(part, ["image_id", "image"]) for part in range(pool.num_parts))
        images = pa.concat_tables(parts)
        entropies = {}
        for name, chosen in selections(world, target).items():
            mask = np.isin(np.asarray(images["image_id"].to_pylist()), chosen)
            pq.write_table(images.filter(pa.array(mask)), folder / f"{name}.parquet", row_group_size=500)
            entropies[name] = world.figures(chosen)[1]
        pq.write_table(pa.table({"selection": list(entropies), "entropy": list(entropies.values())}), note)
    return {row["selection"]: row["entropy"] for row in pq.read_table(note).to_pylist()}


def main() -> None:
    """Curate, train, examine, and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with cifar10_train.parquet")
    parser.add_argument("--out", required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--target", type=int, default=2000, help="images of each selection")
    parser.add_argument("--embedder", default="dct", help="what the curation sees with")
    parser.add_argument("--set", nargs="*", default=[], help="settings to change, such as optimizer.base_lr=2e-3")
    given = parser.parse_args()
    torch.set_num_threads(1)
    out, data = Path(given.out), Path(given.data) / IMAGES
    given.rows = write_rows(data, out)
    exam = Exam(data, settings_of(given, 0, 1))
    photos = pq.read_table(data).slice(0, BANK_ROWS)
    print(
        f"{machine()}, torch {torch.__version__}, 1 thread; {given.target:,} images, {given.steps:,} steps\n",
        flush=True,
    )
    numbers: dict[str, list[tuple[float, float]]] = {}
    for seed in given.seeds:
        folder = out / f"selections-{given.embedder.replace('/', '_')}-{given.target}-seed{seed}"
        beginning = exam.brief(make_pair(settings_of(given, seed, 1))[0].ema.backbone, None)
        numbers.setdefault("untrained", []).append((np.nan, beginning[f"knn_{K}"]))
        for name, entropy in write_selections(folder, photos, given.embedder, seed, given.target).items():
            given.rows = folder / f"{name}.parquet"
            settings = settings_of(given, seed, given.steps, f"eval_every={given.steps}")
            run = folder / f"{name}-{given.steps}"
            fit(settings, run, exam)
            numbers.setdefault(name, []).append((entropy, curve(run)[-1][f"knn_{K}"]))
    rows: list[list[Any]] = []
    for name, pairs in numbers.items():
        entropies, accuracies = np.array(pairs).T
        spread = "" if np.isnan(entropies).any() else f"{entropies.mean():.3f}"
        rows.append([name, spread, *(f"{one:.1%}" for one in accuracies), f"{accuracies.mean():.1%}"])
    show("Selections", ["selection", "entropy", *(f"seed {seed}" for seed in given.seeds), "mean"], rows)


if __name__ == "__main__":
    main()
