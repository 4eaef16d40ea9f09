"""The whole pipeline on real photographs: CIFAR-10 as a web of single URLs, with planted near-copies and leaks.

    python -m benchmarks.cifar_pipeline --data DIR [--out RUN] [--images 50000] [--copies 2000] [--sheet FILE]

DIR holds `cifar10_train.parquet` (columns image, label). Every photograph is served as a URL of its own from a process
on loopback. Printed: the funnel, planted copies found, images wrongly dropped, classes before and after, and wall time
and peak anonymous memory of every stage. `--sheet` draws pairs that were dropped though nothing was planted.
"""

import argparse
import io
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageEnhance

from benchmarks.calibrate_descriptor import judge, num_dropped, thumbnails
from benchmarks.measure import PeakMemory, machine
from pipelines.catalog import complete_sets, open_catalog
from pipelines.cluster_tables import balance_tables
from pipelines.executor import Executor, RayExecutor
from pipelines.loopback import Reply, serve_blobs, write_blobs
from pipelines.planted import label_balance, planted_copies, wrongly_dropped
from pipelines.progress import Progress
from pipelines.recipe import Recipe
from pipelines.run import STAGES, Plan, make
from pipelines.stats import Table, funnel, markdown, query_sets, rejects

CLASSES = ("airplane", "automobile", "horse")
KINDS = ("recompressed", "cropped", "resized", "brightness")
NUM_QUERIES, NUM_REFERENCES = 300, 200
PORT = 18555


def near_copy(data: bytes, kind: str, rng: np.random.Generator) -> bytes:
    """A copy of a 32 px photograph as the web makes them; crops take 5 to 20 % off both width and height."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    quality = 90
    if kind == "recompressed":
        quality = int(rng.integers(40, 80))
    elif kind == "cropped":
        side = round(image.width * (1 - float(rng.uniform(0.05, 0.2))))
        left, top = (int(v) for v in rng.integers(0, image.width - side + 1, 2))
        image = image.crop((left, top, left + side, top + side))
    elif kind == "resized":
        size = round(image.width * float(rng.uniform(0.6, 2)))
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    else:
        image = ImageEnhance.Brightness(image).enhance(
            float(rng.choice([rng.uniform(0.7, 0.9), rng.uniform(1.1, 1.3)]))
        )
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return out.getvalue()


def plant(photos: pa.Table, copies: int, rng: np.random.Generator) -> tuple[list[dict[str, Any]], list[int]]:
    """The pool's rows (url, kind, original_url, reference, label, image), shuffled, and the references' rows."""
    images, labels = photos["image"].to_pylist(), photos["label"].to_pylist()
    order = rng.permutation(len(images)).tolist()
    references, originals = order[:NUM_REFERENCES], order[NUM_REFERENCES:]
    rows = []
    for i in range(len(images)):
        leak = {"kind": "leak", "reference": f"/reference/{i}.jpg"} if i in set(references) else {"kind": "original"}
        rows.append({"url": f"/photo/{i}.jpg", "label": labels[i], "image": images[i], **leak})
    for n, i in enumerate(rng.choice(originals, copies, replace=False).tolist()):
        kind = KINDS[n % len(KINDS)]
        copy = {"url": f"/copy/{n}.jpg", "kind": kind, "original_url": f"/photo/{i}.jpg", "label": labels[i]}
        rows.append({**copy, "image": near_copy(images[i], kind, rng)})
    return [rows[i] for i in rng.permutation(len(rows))], references


def write_sources(photos: pa.Table, copies: int, folder: Path, base: str) -> None:
    """Everything the recipe reads: the site, the pool's list with the truth, query sets and references."""
    rng = np.random.default_rng(0)
    rows, references = plant(photos, copies, rng)
    write_blobs(str(folder / "site"), ((row["url"], Reply(body=row["image"])) for row in rows))
    for row in rows:
        row.update({key: base + row[key] for key in ("url", "original_url", "reference") if row.get(key)})
    columns = ("url", "label", "kind", "original_url", "reference")
    schema = pa.schema([(name, pa.string()) for name in columns])
    pq.write_table(
        pa.Table.from_pylist([{c: r.get(c) for c in columns} for r in rows], schema), folder / "pool.parquet"
    )
    labels = np.asarray(photos["label"].to_pylist())
    for name in CLASSES:
        chosen = rng.permutation(np.flatnonzero(labels == name))[:NUM_QUERIES]
        pq.write_table(photos.take(pa.array(chosen)), folder / f"{name}.parquet")
    leaked = [near_copy(photos["image"][i].as_py(), KINDS[n % 4], rng) for n, i in enumerate(references)]
    pq.write_table(pa.table({"image": leaked}), folder / "references.parquet")


def recipe(folder: Path, target: int) -> Recipe:
    """The whole pipeline: 8 neighbors of two query sets, clusters of the third, and an even draw."""
    queries = {
        name: {"role": "query", "images": str(folder / f"{name}.parquet"), "label_column": "label"} for name in CLASSES
    }
    return Recipe.model_validate(
        {
            "name": "cifar",
            "sources": {
                "web": {"role": "pool", "urls": str(folder / "pool.parquet"), "label_column": "label"},
                **queries,
                "benchmark": {"role": "reference", "images": str(folder / "references.parquet")},
            },
            "download": {"allow_private": True, "retries": 0},
            "filter": {"min_side": 16},
            "cluster": {"num_clusters": 200},
            "parts": [
                *({"retrieved": name, "mode": "sample", "k": 8} for name in CLASSES[:2]),
                {"retrieved": CLASSES[2], "mode": "cluster", "images_per_cluster": 100, "min_hits": 4, "cap": 3000},
                {"balanced": "pool", "target": target},
            ],
        }
    )


def run_stages(plan: Plan, executor: Executor) -> Iterator[tuple[str, float, float]]:
    """Run all units; yields (stage, wall seconds, peak bytes) of each."""
    progress = Progress()
    for unit in plan.units():
        began = time.monotonic()
        with PeakMemory() as memory:
            make(unit, executor, progress, overwrite=False)
        yield unit.stage, time.monotonic() - began, memory.peak


def stage_table(measured: list[tuple[str, float, float]]) -> Table:
    """Wall time and peak memory by stage."""
    rows: list[list[Any]] = []
    for stage in STAGES:
        mine = [(seconds, peak) for name, seconds, peak in measured if name == stage]
        rows.append([stage, f"{sum(s for s, _ in mine):.1f}", f"{max(p for _, p in mine) / 2**20:.0f}"])
    rows.append(["all", f"{sum(s for _, s, _ in measured):.1f}", f"{max(p for _, _, p in measured) / 2**20:.0f}"])
    return Table("Stages", ["stage", "wall s", "peak anonymous MiB, all processes"], rows)


def drop_wrongly(run: str, truth: str) -> tuple[int, int]:
    """(near-duplicates that CIFAR-10 has of its own among the images dropped, images dropped without good reason).

    Components with images of several families are looked at again with true edges alone: planted ones, and those that
    the calibration's slow judge, which knows nothing of the descriptor, takes for copies. What then falls apart was
    dropped wrongly.
    """
    sql = f"""
    WITH pool AS (SELECT d.component, any_value(i.image) AS image,
                         any_value(coalesce(t.original_url, t.reference, t.url)) AS family
                  FROM duplicates_web d JOIN images_web i USING (image_id) JOIN read_parquet('{truth}') t USING (url)
                  WHERE d.component_size > 1 GROUP BY d.component, d.image_id)
    SELECT component, list(image), list(family) FROM pool GROUP BY 1 HAVING count(DISTINCT family) > 1 ORDER BY 1
    """
    own = wrong = 0
    for _, images, families in open_catalog(run).execute(sql).fetchall():
        pixels = thumbnails(images)
        _, family = np.unique(families, return_inverse=True)
        i, j = np.triu_indices(len(images), 1)
        true = family[i] == family[j]
        planted = num_dropped(len(images), i[true], j[true])
        true[~true] = judge(pixels, i[~true], pixels, j[~true])
        right = num_dropped(len(images), i[true], j[true])
        own += right - planted
        wrong += len(images) - 1 - right
    return own, wrong


def draw_sheet(run: str, truth: str, file: str, count: int = 40) -> None:
    """Pairs dropped though nothing was planted, side by side: the image, its representative."""
    sql = f"""
    WITH pool AS (SELECT i.image_id, any_value(i.image) AS image,
                         any_value(coalesce(t.original_url, t.reference, t.url)) AS family
                  FROM images_web i JOIN read_parquet('{truth}') t USING (url) GROUP BY 1)
    SELECT a.image, b.image FROM duplicates_web d JOIN pool a USING (image_id)
    JOIN pool b ON b.image_id = d.representative_id
    WHERE d.reason = 'near_duplicate' AND a.family <> b.family ORDER BY d.image_id LIMIT {count}
    """
    pairs = open_catalog(run).execute(sql).fetchall()
    sheet = Image.new("RGB", (8 * 140, max(1, -(-len(pairs) // 8)) * 74), "white")
    for n, pair in enumerate(pairs):
        for side, data in enumerate(pair):
            image = Image.open(io.BytesIO(data)).convert("RGB").resize((64, 64), Image.Resampling.NEAREST)
            sheet.paste(image, (n % 8 * 140 + side * 66, n // 8 * 74))
    sheet.save(file)


def main() -> None:
    """Run it and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with cifar10_train.parquet")
    parser.add_argument("--out", help="where the run goes; default: a temporary folder")
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--copies", type=int, default=2_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--sheet", help="PNG of pairs dropped though nothing was planted")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, out = Path(temporary), options.out or f"{temporary}/run"
        photos = pq.read_table(Path(options.data) / "cifar10_train.parquet").slice(0, options.images)
        write_sources(photos, options.copies, folder, f"http://127.0.0.1:{PORT}")
        executor = RayExecutor(options.workers)
        with serve_blobs(str(folder / "site"), PORT):
            measured = list(run_stages(Plan(recipe(folder, options.images // 5), out), executor))
        executor.close()
        truth, connection, sets = str(folder / "pool.parquet"), open_catalog(out), complete_sets(out)
        planted, (wrong, looked) = planted_copies(out, "web", truth), wrongly_dropped(out, "web", truth)
        if options.sheet:
            draw_sheet(out, truth, options.sheet)
        own, without_reason = drop_wrongly(out, truth)
        near = [row for row in planted.rows if row[0] in KINDS]
        print(f"{machine()}; {options.workers} workers\n")
        tables = [funnel(sets, connection), rejects(sets), planted, query_sets(sets, connection)]
        tables += [label_balance(out, "web"), *balance_tables(out), stage_table(measured)]
        for table in tables:
            print(f"### {table.title}\n\n{markdown(table)}\n")
        found = sum(row[2] for row in near) / max(1, sum(row[1] for row in near))
        print(f"Near-copies found: {found:.4f} of those planted.\n")
        print(
            f"Dropped though nothing was planted: {wrong:,} of {looked:,} ({wrong / looked:.2%}); {own:,} of them are "
            f"near-duplicates that CIFAR-10 has of its own, {without_reason:,} ({without_reason / looked:.2%}) were "
            "dropped wrongly."
        )


if __name__ == "__main__":
    main()
