"""The cluster stage: what it fits on, what it assigns, and that both follow from ids and vectors alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curation import schemas
from curation.clustering import fit_kmeans
from curation.errors import ConfigError
from curation.hashing import id_words, keyed_hash
from curation.shards import ShardSet
from pipelines.cluster import ClusterUnit, read_centroids
from pipelines.recipe import ClusterSettings
from tests.builders import cut, execute, fingerprints, random_ids, rows_of, table, write_embeddings, write_set

SIZES = {"web": 60, "book": 40}


def write_pools(tmp_path: Path, seed: int) -> tuple[list[str], np.ndarray]:
    """Two pools; ids and vectors, in order, of what dedup kept. Some kept images have no vector of this model."""
    rng = np.random.default_rng(seed)
    kept_ids, kept_vectors = [], []
    for name, size in SIZES.items():
        ids, x = random_ids(rng, size), rng.standard_normal((size, 4)).astype(np.float16)
        kept, embedded = rng.random(size) < 0.7, rng.random(size) < 0.9
        ends = sorted(rng.integers(0, size, 3).tolist())
        parts = cut(range(size), ends)
        known = [[ids[i] for i in part if embedded[i]] for part in parts]
        values = [x[[i for i in part if embedded[i]]] for part in parts]
        write_embeddings(tmp_path / "e" / name, name, list(zip(known, values, strict=True)))
        verdicts = [
            table(
                schemas.DUPLICATES,
                image_id=[ids[i] for i in part],
                component=list(part),
                component_size=[1] * len(part),
                kept=[bool(kept[i]) for i in part],
            )
            for part in parts
        ]
        write_set(tmp_path / "d" / name, "duplicates", verdicts, source=name, role="pool")
        both = np.flatnonzero(kept & embedded)
        kept_ids += [ids[i] for i in both]
        kept_vectors.append(x[both])
    return kept_ids, np.concatenate(kept_vectors)


def cluster_unit(tmp_path: Path, out: str = "out", seed: int = 5, **settings: Any) -> ClusterUnit:
    values = ClusterSettings(**{"num_clusters": 6, "iterations": 4, **settings})
    pools, duplicates = ([str(tmp_path / kind / name) for name in SIZES] for kind in ("e", "d"))
    return ClusterUnit(
        pools, duplicates, values, seed, str(tmp_path / out / "centroids"), str(tmp_path / out / "clusters")
    )


def assigned(tmp_path: Path, out: str = "out") -> list[dict[str, Any]]:
    return [row for name in SIZES for row in rows_of(tmp_path / out / "clusters" / name)]


@pytest.mark.parametrize("seed", range(3))
def test_every_kept_vector_goes_to_its_nearest_centroid(tmp_path: Path, seed: int) -> None:
    ids, x = write_pools(tmp_path, seed)
    execute(cluster_unit(tmp_path))
    centroids = read_centroids(str(tmp_path / "out/centroids"))
    assert centroids.shape == (6, 4)
    rows = assigned(tmp_path)
    assert [row["image_id"] for row in rows] == ids
    wide = x.astype(np.float64)
    cosine = wide @ centroids.astype(np.float64).T / np.linalg.norm(wide, axis=1, keepdims=True)
    assert [row["cluster_1"] for row in rows] == cosine.argmax(axis=1).tolist()
    assert np.allclose([row["distance"] for row in rows], 1 - cosine.max(axis=1), atol=1e-6)
    for name in SIZES:
        made, vectors = ShardSet(str(tmp_path / "out/clusters" / name)), ShardSet(str(tmp_path / "e" / name))
        assert made.num_parts == vectors.num_parts


def test_it_is_fitted_on_all_where_these_are_few(tmp_path: Path) -> None:
    _, x = write_pools(tmp_path, 0)
    execute(cluster_unit(tmp_path, sample=1000))
    expected = fit_kmeans(x, 6, iterations=4, seed=5, threads=1)
    assert np.array_equal(read_centroids(str(tmp_path / "out/centroids")), expected)


def test_it_is_fitted_on_the_images_of_lowest_draw(tmp_path: Path) -> None:
    ids, x = write_pools(tmp_path, 1)
    execute(cluster_unit(tmp_path, sample=20))
    everything = [
        row["image_id"] for name in SIZES for row in rows_of(tmp_path / "d" / name) if row["kept"]
    ]  # the draw is over all that dedup kept; those without a vector of this model leave the sample smaller
    draw = dict(zip(everything, keyed_hash(5, "cluster", id_words(everything)).tolist(), strict=True))
    lowest = set(sorted(everything, key=lambda name: draw[name])[:20])
    sample = x[[name in lowest for name in ids]]
    assert 6 < len(sample) <= 20
    expected = fit_kmeans(sample, 6, iterations=4, seed=5, threads=1)
    assert np.array_equal(read_centroids(str(tmp_path / "out/centroids")), expected)


def test_two_runs_give_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    write_pools(tmp_path, 0)
    for out, seed in (("one", 5), ("two", 5), ("three", 6)):
        execute(cluster_unit(tmp_path, out, seed, sample=30))
    assert fingerprints(tmp_path / "one") == fingerprints(tmp_path / "two")
    assert fingerprints(tmp_path / "one") != fingerprints(tmp_path / "three")


def test_more_clusters_than_images_are_refused(tmp_path: Path) -> None:
    write_pools(tmp_path, 0)
    with pytest.raises(ConfigError, match="cluster: k-means needs at least as many vectors as clusters"):
        execute(cluster_unit(tmp_path, num_clusters=1000))
