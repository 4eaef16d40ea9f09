"""Vectors of real photographs and of near-copies of them, for the dedup benchmark: the descriptor `dct`.

Of each photograph of `cifar10_train.parquet` there are the original and COPIES copies as benchmarks.cifar_pipeline
plants them: recompressed, cropped, resized, or of another brightness.
"""

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from benchmarks.cifar_pipeline import KINDS, near_copy
from benchmarks.vectors import store
from curation import storage
from curation.shards import ShardSet
from embedders.dct import THRESHOLDS, DctEmbedder

COPIES = 3
BATCH = 500


def write_photos(folder: str, data: str, count: int) -> tuple[str, str]:
    """Embeddings and images sets of about `count` vectors below `folder`, made if not there; their URIs."""
    place = storage.join(folder, f"photos{count}")
    uris = storage.join(place, "embeddings"), storage.join(place, "images")
    if ShardSet(uris[1]).is_complete:
        return uris
    photos = pq.read_table(Path(data) / "cifar10_train.parquet", columns=["image"])["image"]
    originals = photos.slice(0, count // (1 + COPIES)).to_pylist()
    batches = [(start, originals[start : start + BATCH]) for start in range(0, len(originals), BATCH)]
    with ProcessPoolExecutor() as pool:
        found = np.concatenate(list(pool.map(_embedded, batches)))
    order = np.random.default_rng(0).permutation(len(found))
    thresholds = {"self_dedup": THRESHOLDS.self_dedup, "reference": THRESHOLDS.reference}
    return store(place, found[order], "photos", "dct", thresholds)


def _embedded(batch: tuple[int, list[bytes]]) -> npt.NDArray[np.float16]:
    start, originals = batch
    rng, embedder = np.random.default_rng(start), DctEmbedder()
    every = [
        data
        for original in originals
        for data in (original, *(near_copy(original, kind, rng) for kind in rng.permutation(KINDS)[:COPIES]))
    ]
    return embedder.embed(np.stack([embedder.preprocess(data) for data in every]))
