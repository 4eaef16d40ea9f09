"""Small inputs for tests: pictures drawn from a seed, shard sets written directly, units run in this process."""

import hashlib
import io
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from curation import schemas
from curation.hashing import image_id
from curation.manifest import Input, Origin
from curation.partwise import fixed_size_lists
from curation.shards import PartWriter, ShardSet
from pipelines.executor import Executor, LocalExecutor, Needs, Outcome
from pipelines.progress import quiet
from pipelines.unit import Unit, run_unit


def photo(seed: int, width: int = 96, height: int = 80, kind: str = "PNG", **options: Any) -> bytes:
    """A smooth random picture. Lossless formats with other `options` give other bytes of the same pixels."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(file, kind, **options)
    return file.getvalue()


def near_copy(seed: int, width: int = 96, height: int = 80) -> bytes:
    """Other bytes with the pixels of `photo`: a copy for every embedder, whatever its thresholds."""
    return photo(seed, width, height, compress_level=0)


def truncated(seed: int) -> bytes:
    """An image whose header can be read and whose pixels cannot."""
    whole = photo(seed, kind="JPEG", quality=95)
    return whole[: len(whole) // 3]


def table(schema: pa.Schema, **columns: Sequence[Any]) -> pa.Table:
    """A table of `schema`; columns that are not given are null."""
    count = len(next(iter(columns.values())))
    arrays = [pa.array(columns[f.name], f.type) if f.name in columns else pa.nulls(count, f.type) for f in schema]
    return pa.table(arrays, schema=schema)


def embedding_table(ids: Sequence[str], vectors: npt.NDArray[Any]) -> pa.Table:
    """Embeddings, float [n, d], as a part of an embeddings set."""
    schema = schemas.embeddings(vectors.shape[1])
    column = fixed_size_lists(vectors.astype(np.float16), schema.field("embedding").type)
    return pa.table([pa.array(ids, pa.string()), column], schema=schema)


def image_table(images: Iterable[bytes], first_row: int = 0, width: int = 96, height: int = 80) -> pa.Table:
    """Bytes as a part of an images set, all of one size as far as the set says."""
    data = list(images)
    rows = range(first_row, first_row + len(data))
    sizes = {"width": [width] * len(data), "height": [height] * len(data)}
    return table(schemas.IMAGES, image_id=[image_id(d) for d in data], row=rows, image=data, **sizes)


def random_ids(rng: np.random.Generator, count: int) -> list[str]:
    """Ids that name no image."""
    return [rng.bytes(16).hex() for _ in range(count)]


def write_set(
    uri: str | Path,
    kind: str,
    parts: Sequence[pa.Table],
    *,
    config: dict[str, Any] | None = None,
    info: dict[str, Any] | None = None,
    inputs: tuple[Input, ...] = (),
    **labels: Any,
) -> ShardSet:
    """A complete shard set holding `parts`; labels are such as `source` and `role`."""
    shard_set = ShardSet(str(uri))
    origin = Origin(kind, "test", 1, config or {}, inputs, labels)
    shard_set.begin(origin)
    for number, part in enumerate(parts):
        with PartWriter(shard_set.uri, number, part.schema, origin.fingerprint) as writer:
            writer.write(part)
    shard_set.finish(origin, len(parts), info or {})
    return shard_set


def write_embeddings(
    uri: str | Path, source: str, parts: Sequence[tuple[list[str], npt.NDArray[Any]]], role: str = "pool"
) -> ShardSet:
    """An embeddings set from (ids, vectors [n, d]) of each part, as all made by one model."""
    info = {"model": "test", "dim": parts[0][1].shape[1], "copy_thresholds": None}
    tables = [embedding_table(ids, vectors) for ids, vectors in parts]
    return write_set(
        uri, "embeddings", tables, config={"model": "test"}, info=info, source=source, role=role, embedder="e"
    )


def cut(items: Sequence[Any], ends: Sequence[int]) -> list[Any]:
    """`items` cut at positions `ends`; equal ends give empty pieces."""
    bounds = [0, *ends, len(items)]
    return [items[a:b] for a, b in pairwise(bounds)]


class TwoWorkers(LocalExecutor):
    """Two parts at once, the last ones first, by work that has travelled as it does to another process."""

    workers = 2

    def map(self, work: Callable[[int], Any], items: Iterable[int], needs: Needs) -> Iterator[Outcome]:
        def do(item: int) -> Outcome:
            return next(super(TwoWorkers, self).map(pickle.loads(pickle.dumps(work)), [item], needs))  # noqa: S301

        with ThreadPoolExecutor(2) as pool:
            yield from pool.map(do, sorted(items, reverse=True))


def execute(unit: Unit, overwrite: bool = False, executor: Executor | None = None) -> bool:
    """Run a unit in this process."""
    return run_unit(unit, executor or LocalExecutor(), quiet(), overwrite)


def rows_of(uri: str | Path | ShardSet) -> list[dict[str, Any]]:
    """All rows of a set."""
    shard_set = uri if isinstance(uri, ShardSet) else ShardSet(str(uri))
    return [row for part in range(shard_set.num_parts) for row in shard_set.read(part).to_pylist()]


def rejects_of(uri: str | Path, part: int) -> list[dict[str, Any]]:
    """The rejects of one part."""
    return pq.read_table(ShardSet(str(uri)).rejects_uri(part)).to_pylist()


def fingerprints(directory: str | Path) -> dict[str, str]:
    """SHA-256 of every Parquet file below a directory, by relative path."""
    root = Path(directory)
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*.parquet")}
