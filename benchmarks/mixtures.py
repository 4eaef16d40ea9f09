"""How balanced are sets of equal size, curated in different ways from a long-tailed pool? CIFAR-10, by the stages.

    python -m benchmarks.mixtures --photos cifar10_train.parquet [--embedder dct] [--target 500] [--seeds 3] [--out RUN]

The pool has the ten classes in sizes that fall by a power law from LARGEST to SMALLEST; for some classes, most of them
rare, there is a query set of images that are not in the pool. The stages run up to clusters once a seed, and then
select the same number of images

- at random (balanced over one cluster, which is a random draw);
- balanced over flat clusters, as many as the hierarchy has at its top, and as many as it has leaves;
- balanced over the whole tree;
- retrieved for the query sets, sample-based (every query's nearest, then every query's second nearest, and so on) and
  cluster-based;
- mixed: half retrieved by samples, the rest balanced over the tree.

Printed: entropy and Gini coefficient of the ten classes, how many images the smallest class has, and the precision:
images retrieved for a query set that are of its class, over all that were retrieved; for the pool, that of a random
draw for every query set. Means over the seeds.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.measure import machine
from curation.balance_measures import entropy, gini
from curation.shards import ShardSet
from pipelines.cluster import ClusterUnit
from pipelines.executor import LocalExecutor
from pipelines.progress import quiet
from pipelines.rebalance import RebalanceUnit
from pipelines.recipe import ClusterSettings, PartSettings, Recipe
from pipelines.run import Plan
from pipelines.stats import Table, markdown
from pipelines.unit import Unit, run_unit

LARGEST, SMALLEST = 5_000, 50
QUERIED = (3, 5, 7, 9)
"""Classes, by rank of their size in the pool, that have a query set."""
NUM_QUERIES = 100
LEAVES, LEVELS = 1_000, (250, 60, 15)
NEIGHBORS, MIN_HITS = 64, 2


def class_sizes(num_classes: int) -> list[int]:
    """LARGEST * rank ** -a, ending at SMALLEST."""
    exponent = np.log(LARGEST / SMALLEST) / np.log(num_classes)
    return [round(LARGEST * rank**-exponent) for rank in range(1, num_classes + 1)]


def write_sources(photos: pa.Table, folder: Path) -> list[str]:
    """The pool and the query sets as Parquet files; the names of the query sets, which are their classes."""
    labels = np.asarray(photos["label"].to_pylist())
    rng = np.random.default_rng(0)
    classes = rng.permutation(np.unique(labels)).tolist()
    pool: list[npt.NDArray[np.int64]] = []
    queried = []
    for rank, (name, size) in enumerate(zip(classes, class_sizes(len(classes)), strict=True)):
        rows = rng.permutation(np.flatnonzero(labels == name))
        pool.append(rows[:size])
        if rank in QUERIED:
            queried.append(name)
            pq.write_table(photos.take(pa.array(rows[size : size + NUM_QUERIES])), folder / f"{name}.parquet")
    pq.write_table(photos.take(pa.array(rng.permutation(np.concatenate(pool)))), folder / "pool.parquet")
    return queried


def recipe(folder: Path, queried: list[str], embedder: str, seed: int) -> Recipe:
    """Everything up to what is retrieved."""
    places = {name: {"role": "query", "images": str(folder / f"{name}.parquet")} for name in queried}
    by_sample = [{"retrieved": name, "mode": "sample", "k": NEIGHBORS} for name in queried]
    clusters = {"mode": "cluster", "images_per_cluster": 1_000_000, "min_hits": MIN_HITS}
    return Recipe.model_validate(
        {
            "seed": seed,
            "sources": {"web": {"role": "pool", "images": str(folder / "pool.parquet"), "label_column": "label"}}
            | {name: place | {"label_column": "label"} for name, place in places.items()},
            "embedders": {"default": {"model": embedder}},
            "filter": {"min_side": 16},
            "cluster": {"num_clusters": LEAVES, "levels": LEVELS},
            "parts": [*by_sample, *({"retrieved": name, **clusters} for name in queried)],
        }
    )


class World:
    """A run of the recipe as far as what is retrieved, and what is selected from it."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        for unit in plan.units():
            if unit.stage not in ("rebalance", "shard"):
                _do(unit)
        rows = _rows(plan.place("images", "web"), ["image_id", "label"])
        self.label = {row["image_id"]: str(row["label"]) for row in rows}
        self.classes = sorted(set(self.label.values()))

    def flat(self, num_clusters: int) -> str:
        """Clusters of one level by the k-means of the hierarchy; where they lie."""
        plan, name = self.plan, f"flat_{num_clusters}"
        settings = ClusterSettings(num_clusters=num_clusters, init="k-means||")
        sets = [plan.place("embeddings", "default", "web")], [plan.place("duplicates", "web")]
        places = plan.place(name, "centroids"), plan.place(name, "clusters")
        _do(ClusterUnit(*sets, settings, plan.recipe.seed, *places))
        return plan.place(name, "clusters", "web")

    def balanced(self, target: int, clusters: str | None = None, **settings: Any) -> list[str]:
        """The images of a balanced part alone, over the tree or over other clusters."""
        plan, out = self.plan, self.plan.place("balanced")
        part = PartSettings(balanced="pool", target=target, **settings)
        where = clusters or plan.place("clusters", "web")
        _do(RebalanceUnit([part], [plan.place("filtered", "web")], {}, [where], plan.recipe.seed, out))
        found = [row["image_id"] for row in _rows(out, ["image_id"])]
        ShardSet(out).delete()
        return found

    def retrieved(self, mode: str, count: int) -> dict[str, set[str]]:
        """The first `count` images that were retrieved, with the query sets they were retrieved for.

        By samples the nearest of every query come first; by clusters each query set gives one in turn.
        """
        ranked = []
        for name in self.plan.retrieved_for:
            rows = _rows(self.plan.place("retrieved", name), ["image_id", "mode", "rank", "similarity"])
            for place, row in enumerate(row for row in rows if row["mode"] == mode):
                order = (row["rank"], -row["similarity"]) if mode == "sample" else (place, 0.0)
                ranked.append((*order, row["image_id"], name))
        found: dict[str, set[str]] = {}
        for *_, image, name in sorted(ranked):
            if image in found or len(found) < count:
                found.setdefault(image, set()).add(name)
        return found

    def mixed(self, count: int) -> list[str]:
        """Half by samples, and over the tree as many as it takes."""
        by_sample = self.retrieved("sample", count // 2)
        target, found = count - len(by_sample), list(by_sample)
        while len(found) < count:
            found = list(dict.fromkeys([*by_sample, *self.balanced(target)]))
            target += count - len(found)
        return found[:count]

    def figures(self, images: list[str], queries: dict[str, set[str]] | None = None) -> list[float]:
        """Images, entropy, Gini, images of the smallest class, and the precision of what was retrieved."""
        counts = np.array([sum(self.label[image] == name for image in images) for name in self.classes])
        asked = [self.label[image] == name for image, names in (queries or {}).items() for name in names]
        precision = float(np.mean(asked)) if asked else np.nan
        return [len(images), entropy(counts), gini(counts), float(counts.min()), precision]


def _do(unit: Unit) -> None:
    run_unit(unit, LocalExecutor(), quiet())


def _rows(uri: str, columns: list[str]) -> list[dict[str, Any]]:
    shard_set = ShardSet(uri)
    return [row for part in range(shard_set.num_parts) for row in shard_set.read(part, columns).to_pylist()]


def compare(world: World, target: int) -> dict[str, list[float]]:
    """The figures of every way to select `target` images."""
    pool = [row["image_id"] for row in _rows(world.plan.place("clusters", "web"), ["image_id"])]
    asked = set(world.plan.retrieved_for)
    sample, cluster = (world.retrieved(mode, target) for mode in ("sample", "cluster"))
    half = world.retrieved("sample", target // 2)
    return {
        "the pool after dedup": world.figures(pool, dict.fromkeys(pool, asked)),
        "random": world.figures(world.balanced(target, world.flat(1))),
        f"balanced, flat, {LEVELS[-1]:,} clusters": world.figures(world.balanced(target, world.flat(LEVELS[-1]))),
        f"balanced, flat, {LEAVES:,} clusters": world.figures(world.balanced(target, world.flat(LEAVES))),
        "balanced over the tree": world.figures(world.balanced(target)),
        "balanced over the tree, closest": world.figures(world.balanced(target, strategy="closest")),
        "retrieved by samples": world.figures(list(sample), sample),
        "retrieved by clusters": world.figures(list(cluster), cluster),
        "mixed: half by samples, half over the tree": world.figures(world.mixed(target), half),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="Parquet file with columns image and label")
    parser.add_argument("--embedder", default="dct")
    parser.add_argument("--target", type=int, default=500, help="images of each selection")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", help="where the runs go; default: a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        queried = write_sources(pq.read_table(options.photos), folder)
        found = []
        for seed in range(options.seeds):
            plan = Plan(recipe(folder, queried, options.embedder, seed), f"{options.out or temporary}/run_{seed}")
            found.append(compare(World(plan), options.target))
    means = {name: np.mean([one[name] for one in found], axis=0).tolist() for name in found[0]}
    rows: list[list[Any]] = [
        [name, round(size), round(h, 3), round(g, 3), round(least, 1), "" if np.isnan(p) else round(p, 3)]
        for name, (size, h, g, least, p) in means.items()
    ]
    columns = ["selection", "images", f"entropy (nats, of {np.log(10):.3f})", "Gini", "smallest class", "precision"]
    print(f"{machine()}; {options.embedder}; pool of ten classes, {LARGEST:,} to {SMALLEST}; means of {options.seeds}")
    print(f"query sets of {NUM_QUERIES}: {', '.join(queried)}; hierarchy {LEAVES:,} / {' / '.join(map(str, LEVELS))}")
    print(markdown(Table("", columns, rows)))


if __name__ == "__main__":
    main()
