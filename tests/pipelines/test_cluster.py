"""The cluster stage: what it fits on, what it assigns, and that both follow from ids and vectors alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curation.clustering import fit_kmeans
from curation.distances import Space, encode_points
from curation.errors import ConfigError, LvdError
from curation.hashing import id_words, keyed_hash
from curation.kmeans_rounds import partial_sums, update
from curation.shards import ShardSet
from pipelines import cluster, cluster_rounds
from pipelines.cluster import CentroidsStep, ClusterUnit, read_centroids
from pipelines.cluster_rounds import RoundStep
from pipelines.recipe import ClusterSettings
from tests.builders import execute, fingerprints, rows_of
from tests.vectors import write_pools

SIZES = {"web": 60, "book": 40}


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
    ids, x = write_pools(tmp_path, SIZES, seed)
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
    _, x = write_pools(tmp_path, SIZES, 0)
    execute(cluster_unit(tmp_path, sample=1000))
    expected = fit_kmeans(x, 6, iterations=4, seed=5, threads=1)
    assert np.array_equal(read_centroids(str(tmp_path / "out/centroids")), expected)


def test_rounds_end_as_soon_as_the_tolerance_allows(tmp_path: Path) -> None:
    _, x = write_pools(tmp_path, SIZES, 0)
    execute(cluster_unit(tmp_path, tolerance=0.9))
    settings: dict[str, Any] = {"iterations": 4, "seed": 5, "threads": 1}
    early, late = (fit_kmeans(x, 6, tolerance=tolerance, **settings) for tolerance in (0.9, 0.0))
    assert not np.array_equal(early, late)
    assert np.array_equal(read_centroids(str(tmp_path / "out/centroids")), early)


def test_it_is_fitted_on_the_images_of_lowest_draw(tmp_path: Path) -> None:
    ids, x = write_pools(tmp_path, SIZES, 1)
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
    write_pools(tmp_path, SIZES, 0)
    for out, seed in (("one", 5), ("two", 5), ("three", 6)):
        execute(cluster_unit(tmp_path, out, seed, sample=30))
    assert fingerprints(tmp_path / "one") == fingerprints(tmp_path / "two")
    assert fingerprints(tmp_path / "one") != fingerprints(tmp_path / "three")


@pytest.mark.parametrize("sample", [55, 1000])
def test_a_sample_that_is_streamed_goes_through_the_same_rounds(
    tmp_path: Path, sample: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From centroids fitted on part of the sample, over parts that are shared out to any number of groups."""
    ids, x = write_pools(tmp_path, SIZES, 2)
    monkeypatch.setattr(cluster, "STREAMED_ROUNDS", 3)
    for out, groups in (("out", 16), ("other", 2)):
        monkeypatch.setattr(cluster_rounds, "GROUPS", groups)
        execute(cluster_unit(tmp_path, out, sample=sample, memory_rows=25))
    found = read_centroids(str(tmp_path / "out/centroids"))
    assert np.array_equal(found, read_centroids(str(tmp_path / "other/centroids")))
    kept = [row["image_id"] for name in SIZES for row in rows_of(tmp_path / "d" / name) if row["kept"]]
    draw = dict(zip(kept, keyed_hash(5, "cluster", id_words(kept)).tolist(), strict=True))
    order = sorted(kept, key=lambda name: draw[name])
    few, many = (x[[name in set(order[:count]) for name in ids]] for count in (25, sample))
    assert 6 < len(few) < len(many)
    expected = fit_kmeans(few, 6, iterations=4, seed=5, threads=1)
    points = encode_points(many, Space())
    for turn in range(3):
        expected = update(expected, partial_sums([points], expected, Space()), Space(), seed=5, turn=turn)
    assert np.array_equal(found, expected)
    assert [row["image_id"] for row in assigned(tmp_path)] == ids
    assert not list((tmp_path / "out/clusters").glob("_*"))


def test_streamed_rounds_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pools(tmp_path, SIZES, 3)
    execute(cluster_unit(tmp_path, "whole", memory_rows=25))
    broken, whole = [True], RoundStep.write_part

    def write_part(step: RoundStep, part: int, writer: Any) -> None:
        if step.turn == 2 and broken.pop():
            raise LvdError("lost")
        whole(step, part, writer)

    monkeypatch.setattr(RoundStep, "write_part", write_part)
    with pytest.raises(LvdError, match="lost"):
        execute(cluster_unit(tmp_path, memory_rows=25))
    monkeypatch.setattr(CentroidsStep, "write_part", None)  # is not done again
    broken.append(False)
    execute(cluster_unit(tmp_path, memory_rows=25))
    for name in ("centroids", "clusters"):
        assert fingerprints(tmp_path / "out" / name) == fingerprints(tmp_path / "whole" / name)


def test_more_clusters_than_images_are_refused(tmp_path: Path) -> None:
    write_pools(tmp_path, SIZES, 0)
    with pytest.raises(ConfigError, match="cluster: k-means needs at least as many vectors as clusters"):
        execute(cluster_unit(tmp_path, num_clusters=1000))
