"""Vectors in tests: the scores of all pairs, and pools of them with what dedup kept."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from curation import schemas
from curation.scoring import cosine_pairs
from curation.shards import ShardSet
from tests.builders import cut, random_ids, table, write_embeddings, write_set


def all_cosines(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Scores of each row of `x` with each of `y`, pair by pair, float32 [len(x), len(y)]."""
    i, j = np.divmod(np.arange(len(x) * len(y)), max(len(y), 1))
    return cosine_pairs(x, i, y, j).reshape(len(x), len(y))


def write_verdicts(
    uri: str | Path, source: str, ids: Sequence[str], kept: np.ndarray, parts: Sequence[Sequence[int]]
) -> ShardSet:
    """The verdicts on a pool without near-copies, of which some images are kept; `parts` are rows of `ids`."""
    tables = [
        table(
            schemas.DUPLICATES,
            image_id=[ids[i] for i in part],
            component=list(part),
            component_size=[1] * len(part),
            kept=kept[list(part)].tolist(),
        )
        for part in parts
    ]
    return write_set(uri, "duplicates", tables, source=source, role="pool")


def write_pools(tmp_path: Path, sizes: Mapping[str, int], seed: int, same: int = 0) -> tuple[list[str], np.ndarray]:
    """Pools of so many images, the first `same` of each equal; their sets are e/NAME and d/NAME below `tmp_path`.

    Returns ids and vectors, in order, of what was kept and embedded: some kept images have no vector of this model.
    """
    rng = np.random.default_rng(seed)
    kept_ids, kept_vectors = [], []
    for name, size in sizes.items():
        ids, x = random_ids(rng, size), rng.standard_normal((size, 4)).astype(np.float16)
        x[:same] = 1
        kept, embedded = rng.random(size) < 0.8, rng.random(size) < 0.9
        parts = cut(range(size), sorted(rng.integers(0, size, 4).tolist()))
        known = [[i for i in part if embedded[i]] for part in parts]
        write_embeddings(tmp_path / "e" / name, name, [([ids[i] for i in part], x[part]) for part in known])
        write_verdicts(tmp_path / "d" / name, name, ids, kept, parts)
        both = np.flatnonzero(kept & embedded)
        kept_ids += [ids[i] for i in both]
        kept_vectors.append(x[both])
    return kept_ids, np.concatenate(kept_vectors)
