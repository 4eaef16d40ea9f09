"""Synthetic descriptors for the dedup benchmarks: structured (S) and hard (H), with planted near-copies.

Directions follow a power-law spectrum, as descriptors' do. S adds topics (images of one subject resemble each other),
groups of near-copies of very unequal size and one hub; H has no topics, and its groups are all there is to find.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation import schemas, storage
from curation.manifest import Origin
from curation.partwise import fixed_size_lists, ids_of
from curation.shards import GROUP_ROWS, PartWriter, ShardSet

DIM = 512
CHUNK = 65_536

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Kind:
    """What distinguishes S from H; `hub` is the hub's share of all vectors."""

    shift: float
    decay: float
    topic_every: int | None
    group_decay: float
    largest_group: int
    copy_weight: tuple[float, float]
    hub: float


STRUCTURED = Kind(20, 0.35, 100, 2.2, 500, (0.60, 0.97), 1 / 200)
HARD = Kind(15, 0.50, None, 0.0, 64, (0.62, 0.97), 0.0)
KINDS = {"S": STRUCTURED, "H": HARD}
IN_GROUPS = 0.3
TOPIC_WEIGHT = (0.15, 0.60)


def _unit(x: Float32) -> Float32:
    norm: Float32 = np.sqrt(np.einsum("nd,nd->n", x, x))
    return x / norm[:, None]


def _directions(rng: np.random.Generator, count: int, kind: Kind) -> Float32:
    """Random unit vectors with the kind's spectrum, float32 [count, DIM]."""
    spread: Float32 = ((np.arange(DIM) + kind.shift) ** -kind.decay).astype(np.float32)
    drawn: Float32 = rng.standard_normal((count, DIM), dtype=np.float32)
    return _unit(drawn * spread)


def _mixed(weight: Float32, toward: Float32, other: Float32) -> Float32:
    rest = np.sqrt(1 - weight**2).astype(np.float32)
    mixed: Float32 = weight[:, None] * toward + rest[:, None] * other
    return _unit(mixed)


def _group_sizes(rng: np.random.Generator, members: int, kind: Kind) -> Int64:
    """Sizes, probability proportional to size ** -group_decay on 2..largest_group, that add up to `members`."""
    sizes = np.arange(2, kind.largest_group + 1)
    share = sizes**-kind.group_decay
    mean = float((sizes * share).sum() / share.sum())
    drawn = rng.choice(sizes, size=int(1.2 * members / mean) + 16, p=share / share.sum())
    drawn = drawn[: int(np.searchsorted(np.cumsum(drawn), members))]
    return np.append(drawn, members - drawn.sum()) if drawn.sum() < members else drawn


def generate(kind: Kind, count: int, seed: int) -> Iterator[tuple[Int64, npt.NDArray[np.float16]]]:
    """(rows, vectors) in chunks: where each vector belongs in the set, so that copies lie anywhere, and the vectors.

    Holds the topics, one chunk, and 24 bytes a vector.
    """
    rng = np.random.default_rng(seed)
    hub = int(count * kind.hub)
    sizes = _group_sizes(rng, int(count * IN_GROUPS), kind)
    if hub:
        sizes = np.append(sizes, hub)
    starts = np.cumsum(sizes) - sizes  # the first `sizes.sum()` vectors are groups, each begun by its original
    origin = np.arange(count)
    origin[: sizes.sum()] = np.repeat(starts, sizes)
    rows = rng.permutation(count)
    topics = _directions(rng, count // kind.topic_every, kind) if kind.topic_every else None
    original = np.zeros((1, DIM), np.float32)
    for start in range(0, count, CHUNK):
        at = np.arange(start, min(start + CHUNK, count))
        fresh = _directions(rng, len(at), kind)
        own = fresh if topics is None else _placed(rng, fresh, topics)
        # A group may begin in the chunk before: its original is carried over as row -1.
        known = np.concatenate([own, original])
        index = np.where(origin[at] >= start, origin[at] - start, len(at))
        copies = np.flatnonzero(origin[at] != at)
        weight = rng.uniform(*kind.copy_weight, len(copies)).astype(np.float32)
        own[copies] = _mixed(weight, known[index[copies]], fresh[copies])
        original = known[index[-1:]]
        yield rows[at], own.astype(np.float16)


def _placed(rng: np.random.Generator, fresh: Float32, topics: Float32) -> Float32:
    weight = rng.uniform(*TOPIC_WEIGHT, len(fresh)).astype(np.float32)
    return _mixed(weight, topics[rng.integers(len(topics), size=len(fresh))], fresh)


def vectors(kind: str, count: int, seed: int = 0, out: Any = None) -> npt.NDArray[np.float16]:
    """All vectors, float16 [count, DIM], in `out` (such as a memory map) if given."""
    filled = np.empty((count, DIM), np.float16) if out is None else out
    for rows, part in generate(KINDS[kind], count, seed):
        filled[rows] = part
    found: npt.NDArray[np.float16] = filled
    return found


PART_ROWS, VECTOR_GROUP = 100_000, 4_096


def write_sets(folder: str, kind: str, count: int, hub: int = 0, seed: int = 0) -> tuple[str, str]:
    """Embeddings and images sets of such vectors below `folder`, made if they are not there; their URIs.

    The images have no bytes: dedup reads their sizes alone. Needs room for the vectors twice while it works.
    """
    place = storage.join(folder, f"{kind}{count}-{hub}")
    embeddings_uri, images_uri = (storage.join(place, what) for what in ("embeddings", "images"))
    if ShardSet(images_uri).is_complete:
        return embeddings_uri, images_uri
    os.makedirs(place, exist_ok=True)
    path = storage.join(place, "vectors.npy")
    held = np.lib.format.open_memmap(path, "w+", np.float16, (count, DIM))
    vectors(kind, count, seed, held)
    _add_hub(held, hub, seed)
    store(place, held, kind, f"{kind} {count} {hub} {seed}", {"self_dedup": 0.6, "reference": 0.45})
    os.remove(path)
    return embeddings_uri, images_uri


def store(
    place: str, held: npt.NDArray[np.float16], source: str, model: str, thresholds: dict[str, float]
) -> tuple[str, str]:
    """Vectors [n, d] as sets `embeddings` and `images` below `place`; their URIs."""
    embeddings_uri, images_uri = (storage.join(place, what) for what in ("embeddings", "images"))
    config, labels = {"model": model}, {"source": source, "role": "pool"}
    origin = Origin("embeddings", "benchmark", 1, config, (), {**labels, "embedder": "made"})
    images = Origin("images", "benchmark", 1, config, (), labels)
    ShardSet(embeddings_uri).begin(origin)
    ShardSet(images_uri).begin(images)
    rng = np.random.default_rng(0)
    num_parts = -(-len(held) // PART_ROWS)
    for part in range(num_parts):
        values = np.ascontiguousarray(held[part * PART_ROWS : (part + 1) * PART_ROWS])
        _write_part(part, values, rng, embeddings_uri, images_uri, origin.fingerprint, images.fingerprint)
    ShardSet(embeddings_uri).finish(origin, num_parts, {**config, "dim": held.shape[1], "copy_thresholds": thresholds})
    ShardSet(images_uri).finish(images, num_parts, {})
    return embeddings_uri, images_uri


def _add_hub(held: npt.NDArray[np.float16], size: int, seed: int) -> None:
    """Make the first `size` vectors but every second near-copies of the very first: cosines of 0.996 to 1 to it."""
    rng = np.random.default_rng(seed + 1)
    center = _unit(held[:1].astype(np.float32))
    for start in range(0, 2 * size, 2 * CHUNK):
        rows = np.arange(start, min(start + 2 * CHUNK, 2 * size), 2)
        noise = _unit(rng.standard_normal((len(rows), DIM), dtype=np.float32))
        weight = rng.uniform(0.9965, 1.0, len(rows)).astype(np.float32)
        held[rows] = _mixed(weight, center, noise).astype(np.float16)


def _write_part(
    part: int,
    values: npt.NDArray[np.float16],
    rng: np.random.Generator,
    embeddings_uri: str,
    images_uri: str,
    *fingerprints: str,
) -> None:
    ids = ids_of(rng.integers(0, 2**63, (len(values), 2)).astype(np.uint64))
    schema = schemas.embeddings(values.shape[1])
    with PartWriter(embeddings_uri, part, schema, fingerprints[0]) as writer:
        columns = [ids, fixed_size_lists(values, schema.field("embedding").type)]
        writer.write(pa.table(columns, schema=schema), VECTOR_GROUP)
    sizes = {"width": rng.integers(64, 2048, len(ids)), "height": rng.integers(64, 2048, len(ids))}
    known = {"image_id": ids, "row": np.arange(len(ids)), "image": [b""] * len(ids), **sizes}
    columns = [
        pa.array(known[field.name], field.type) if field.name in known else pa.nulls(len(ids), field.type)
        for field in schemas.IMAGES
    ]
    with PartWriter(images_uri, part, schemas.IMAGES, fingerprints[1]) as writer:
        writer.write(pa.table(columns, schema=schemas.IMAGES), GROUP_ROWS)
