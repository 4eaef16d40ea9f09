"""Fixtures for all tests: a small run that is made once, and copies of it to damage."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.builders import near_copy, photo, truncated


@pytest.fixture(scope="session", autouse=True)
def _no_fsync() -> Iterator[None]:
    """Tests do not outlive a power failure."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch in one thread, where sums are compared bit for bit."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _write_sources(root: Path) -> None:
    """Two pools, a query set and a reference set, with all that can be wrong with an image.

    web (folder): 30 photographs, byte copies and near-copies of some, one of a reference image, a tiny, a long, a
    broken and an empty one. book (Parquet): 12 photographs, of which one is a byte copy of web's.
    """
    images = {f"{i % 3}/{i:02d}.png": photo(i) for i in range(30)}
    images |= {"1/copy.png": photo(3), "2/near.png": near_copy(5), "2/near-again.png": near_copy(8, 96, 80)}
    images |= {"0/leak.png": near_copy(200), "0/tiny.png": photo(40, 20, 20), "0/long.png": photo(41, 600, 60)}
    images |= {"1/broken.jpg": truncated(42), "1/empty.jpg": b"", "1/text.jpg": b"<html>not found</html>"}
    queries = {f"{i}.png": photo(100 + i) for i in range(9)} | {"like-4.png": photo(4, 90, 78)}
    references = {f"{i}.png": photo(200 + i) for i in range(5)}
    for folder, files in {"web": images, "birds": queries, "bench": references}.items():
        for name, data in files.items():
            path = root / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    pages = [photo(300 + i) for i in range(11)]
    pages.insert(4, photo(7))
    links = [f"http://book/{i}" for i in range(12)]
    pq.write_table(pa.table({"picture": pages, "link": links, "topic": range(12)}), root / "book.parquet")


RECIPE = """
name: tiny
seed: 7
rows_per_part: 10
sources:
  web: {role: pool, folder: web}
  book: {role: pool, images: book.parquet, image_column: picture, url_column: link, label_column: topic}
  birds: {role: query, folder: birds}
  bench: {role: reference, folder: bench}
filter: {min_side: 32}
dedup: {threshold: 0.999, reference_threshold: 0.999}
cluster: {num_clusters: 4, iterations: 3}
parts:
  - {as_is: birds}
  - {retrieved: birds, mode: sample, k: 2}
  - {retrieved: birds, mode: cluster, images_per_cluster: 3, min_hits: 1, cap: 5}
  - {balanced: pool, target: 12}
shard: {shard_bytes: 100000}
"""


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe over small local sources; do not change it."""
    root = tmp_path_factory.mktemp("tiny")
    _write_sources(root)
    (root / "tiny.yaml").write_text(RECIPE)
    return root / "tiny.yaml"


@pytest.fixture(scope="session")
def tiny_run(tiny_recipe: Path) -> Path:
    """The run of `tiny_recipe`, made in this process; do not change it."""
    from pipelines.executor import LocalExecutor
    from pipelines.progress import quiet
    from pipelines.recipe import load_recipe
    from pipelines.run import run

    out = tiny_recipe.parent / "run"
    run(load_recipe(str(tiny_recipe)), str(out), LocalExecutor(), quiet())
    return out


@pytest.fixture
def run_copy(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_run` to damage."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))
