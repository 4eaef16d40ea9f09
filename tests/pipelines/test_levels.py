"""Levels of clusters through the stage: against `curation.hierarchy` in memory, resumed, and in degenerate worlds."""

import typing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from curation.clustering import assign, fit_kmeans
from curation.errors import ConfigError, LvdError
from curation.hierarchy import PRESETS, KMeans, Level, closest_points, stack_levels
from curation.shards import ShardSet
from pipelines import level_steps
from pipelines.cluster import ClusterUnit, read_centroids
from pipelines.executor import LocalExecutor
from pipelines.explain import explain
from pipelines.level_steps import ClosestStep, RefitStep, StackStep
from pipelines.levels import centroid_table, centroids_of, levels_of, num_levels, read_tree
from pipelines.progress import quiet
from pipelines.recipe import ClusterSettings, load_recipe
from pipelines.run import run
from pipelines.stats import report
from pipelines.verify import verify
from tests.builders import TwoWorkers, execute, fingerprints, rows_of, write_set
from tests.vectors import write_pools

SIZES = {"web": 90, "book": 50}


def unit(tmp_path: Path, out: str = "out", seed: int = 5, **settings: Any) -> ClusterUnit:
    pools, duplicates = ([str(tmp_path / kind / name) for name in SIZES] for kind in ("e", "d"))
    places = (str(tmp_path / out / "centroids"), str(tmp_path / out / "clusters"))
    return ClusterUnit(pools, duplicates, ClusterSettings(iterations=4, **settings), seed, *places)


def num_kept(tmp_path: Path) -> int:
    return sum(row["kept"] for name in SIZES for row in rows_of(tmp_path / "d" / name))


def in_memory(x: np.ndarray, levels: tuple[Level, ...], seed: int = 5) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Centroids of each level, and the clusters of each vector, by what `curation` has for arrays in memory."""
    settings: dict[str, Any] = {"iterations": 4, "threads": 1, "init": "k-means||"}
    first = levels[0]
    centroids = fit_kmeans(x, first.num_clusters, seed=seed, **settings)
    kmeans = KMeans(4, seed, 1)
    for turn in range(1, first.fits):
        rows = closest_points(*assign(x, centroids), first.nearest, first.num_clusters).row
        if len(rows) > first.num_clusters:
            centroids = kmeans.centroids(x[rows], first.num_clusters, 1, turn)
    found = stack_levels(centroids, levels[1:], kmeans)
    return list(found.centroids), found.tree.path(assign(x, centroids)[0])


def assert_made(tmp_path: Path, x: np.ndarray, levels: tuple[Level, ...], out: str = "out") -> None:
    centroids, path = in_memory(x, levels)
    made = ShardSet(str(tmp_path / out / "centroids"))
    rows = rows_of(made)
    assert [(row["level"], row["cluster"]) for row in rows] == [
        (level, c) for level, found in enumerate(centroids, 1) for c in range(len(found))
    ]
    assert [row["parent"] for row in rows if row["level"] == len(levels)] == [None] * levels[-1].num_clusters
    for level, expected in enumerate(centroids, 1):
        np.testing.assert_array_equal(centroids_of(made, level), expected)
    np.testing.assert_array_equal(read_centroids(made.uri), centroids[0])
    images = [row for name in SIZES for row in rows_of(tmp_path / out / "clusters" / name)]
    assert list(images[0]) == ["image_id", *(f"cluster_{level}" for level in range(1, len(levels) + 1)), "distance"]
    for level, expected in enumerate(path, 1):
        assert [row[f"cluster_{level}"] for row in images] == expected.tolist()
    np.testing.assert_array_equal(np.float32([row["distance"] for row in images]), assign(x, centroids[0])[1])
    tree = read_tree(made)
    for found, expected in zip(tree.path(path[0]), path, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert not list((tmp_path / out / "clusters").glob("_*"))


@pytest.mark.parametrize("groups", [1, 3, 16])
@pytest.mark.parametrize("seed", range(3))
def test_levels_equal_those_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, groups: int) -> None:
    monkeypatch.setattr(level_steps, "GROUPS", groups)
    _, x = write_pools(tmp_path, SIZES, seed)
    execute(unit(tmp_path, num_clusters=16, levels=(6, 2), fits=4, finest_fits=3))
    nearest = -(-num_kept(tmp_path) // 32)
    assert nearest > 1
    assert_made(tmp_path, x, (Level(16, nearest, 3), Level(6, 2, 4), Level(2, 2, 4)))


def test_the_finest_level_alone_is_resampled(tmp_path: Path) -> None:
    _, x = write_pools(tmp_path, SIZES, 0)
    execute(unit(tmp_path, num_clusters=9, finest_fits=4, memory_rows=30, sample=30))
    rows = rows_of(tmp_path / "out/centroids")
    assert [row["parent"] for row in rows] == [None] * 9
    execute(unit(tmp_path, "once", num_clusters=9, memory_rows=30, sample=30, init="k-means||"))
    start = read_centroids(str(tmp_path / "once/centroids"))
    for turn in range(1, 4):
        chosen = closest_points(*assign(x, start), 30 // 9, 9).row
        start = KMeans(4, 5, 1).centroids(x[chosen], 9, 1, turn)
    np.testing.assert_array_equal(read_centroids(str(tmp_path / "out/centroids")), start)


def test_a_preset_is_scaled_to_what_was_kept(tmp_path: Path) -> None:
    _, x = write_pools(tmp_path, SIZES, 1)
    execute(unit(tmp_path, preset="vo4", fraction=0.5, fits=3))
    count = round(num_kept(tmp_path) * 0.5)
    assert_made(tmp_path, x, (Level(count, 1, 1), Level(3, 10, 3), Level(2, 5, 3), Level(1, 3, 3)))


@pytest.mark.parametrize(("step", "turn"), [(ClosestStep, 0), (RefitStep, 1), (RefitStep, 2), (StackStep, 0)])
def test_levels_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: type, turn: int) -> None:
    write_pools(tmp_path, SIZES, 2)
    settings: dict[str, Any] = {"num_clusters": 16, "levels": (5, 2), "finest_fits": 3}
    execute(unit(tmp_path, "whole", **settings))
    whole = step.write_part

    def write_part(self: Any, part: int, writer: Any) -> None:
        if getattr(self, "turn", turn) == turn and part == self.num_parts() - 1:
            raise LvdError("lost")
        whole(self, part, writer)

    with monkeypatch.context() as patch:
        patch.setattr(step, "write_part", write_part)
        with pytest.raises(LvdError, match="lost"):
            execute(unit(tmp_path, **settings))
    assert not ShardSet(str(tmp_path / "out/centroids")).is_complete
    monkeypatch.setattr("pipelines.cluster.CentroidsStep.write_part", None)  # is not done again
    assert execute(unit(tmp_path, **settings))
    assert not execute(unit(tmp_path, **settings))
    assert fingerprints(tmp_path / "out") == fingerprints(tmp_path / "whole")


def test_workers_do_not_change_the_bytes(tmp_path: Path) -> None:
    write_pools(tmp_path, SIZES, 3)
    settings: dict[str, Any] = {"num_clusters": 16, "levels": (5, 2), "finest_fits": 2}
    execute(unit(tmp_path, "one", **settings))
    execute(unit(tmp_path, "two", **settings), executor=TwoWorkers())
    assert len(fingerprints(tmp_path / "one")) == 11
    assert fingerprints(tmp_path / "one") == fingerprints(tmp_path / "two")
    execute(unit(tmp_path, "three", seed=6, **settings))
    assert fingerprints(tmp_path / "one") != fingerprints(tmp_path / "three")


def test_equal_images_leave_clusters_empty(tmp_path: Path) -> None:
    """Nodes without images at every level: they are stored, and nothing lies in them."""
    _, x = write_pools(tmp_path, SIZES, 4, same=90)
    assert len(np.unique(x, axis=0)) == 1
    execute(unit(tmp_path, num_clusters=12, levels=(6, 3), finest_fits=2))
    nearest = -(-num_kept(tmp_path) // 24)
    assert_made(tmp_path, x, (Level(12, nearest, 2), Level(6, 1, 10), Level(3, 1, 10)))
    assert len({row["cluster_1"] for name in SIZES for row in rows_of(tmp_path / "out/clusters" / name)}) == 1


def test_clusters_of_one_image(tmp_path: Path) -> None:
    _, x = write_pools(tmp_path, SIZES, 5)
    execute(unit(tmp_path, num_clusters=len(x), levels=(len(x), 1), finest_fits=2))
    assert_made(tmp_path, x, (Level(len(x), 1, 2), Level(len(x), 1, 10), Level(1, -(-len(x) // 2), 10)))


def test_a_run_with_levels(tiny_recipe: Path, tmp_path: Path) -> None:
    """What reads clusters goes on reading them: retrieval, shards, statistics, explanations, the proof of the run."""
    changes = ["cluster.num_clusters=8", "cluster.levels=[4, 2]", "parts.3.strategy=spread", "parts.3.target=16"]
    out = str(tmp_path / "run")
    run(load_recipe(str(tiny_recipe), changes), out, LocalExecutor(), quiet())
    assert list(verify(out, LocalExecutor(), quiet())) == []
    tree = read_tree(ShardSet(f"{out}/centroids"))
    assert tree.num_clusters == (8, 4, 2)
    pool = [row for name in ("web", "book") for row in rows_of(f"{out}/clusters/{name}")]
    path = {row["image_id"]: [row[f"cluster_{level}"] for level in (1, 2, 3)] for row in pool}
    shards = [row for row in rows_of(f"{out}/shards") if row["source"] != "birds"]
    assert shards and all(row["clusters"] == path[row["image_id"]] for row in shards)
    found = {table.title: table.rows for table in report(out)}
    assert [row[:4] for row in found["Balance by level"] if row[1] == "pool after dedup"] == [
        [str(level), "pool after dedup", len(pool), count] for level, count in ((1, 8), (2, 4), (3, 2))
    ]
    assert found["Balance by level"][0][4] == len({finest for finest, *_ in path.values()})
    coverage = [row for row in found["Seed coverage"] if row[1] != "birds"]
    for level in (1, 2, 3):
        touched = [row[3] for row in coverage if row[0] == str(level)]
        assert sum(touched) == tree.num_clusters[level - 1] and touched[0] > 0
    for level, count in enumerate(tree.num_clusters, 1):
        sizes = [explain(out, f"{level}:{number}").size for number in range(count)]
        assert sizes == np.bincount([one[level - 1] for one in path.values()], minlength=count).tolist()
    with pytest.raises(ConfigError, match="there is no level 4: the clusters have 3"):
        explain(out, "4:0")


@pytest.mark.parametrize("seed", range(3))
def test_centroids_are_read_by_number_however_they_lie(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    found = [rng.standard_normal((count, 3)).astype(np.float32) for count in (7, 3)]
    parent = rng.integers(0, 3, 7).astype(np.int32)
    whole = pa.concat_tables([centroid_table(found[0], 1, parent), centroid_table(found[1], 2)])
    shuffled = whole.take(rng.permutation(10))
    made = write_set(tmp_path / "centroids", "centroids", [shuffled.slice(0, 4), shuffled.slice(4)])
    for level, expected in enumerate(found, 1):
        np.testing.assert_array_equal(centroids_of(made, level), expected)
    assert len(centroids_of(made, 3)) == 0
    tree = read_tree(made)
    assert tree.num_clusters == (7, 3)
    np.testing.assert_array_equal(tree.parents[0], parent)


def test_a_cluster_below_the_top_without_a_parent_is_refused(tmp_path: Path) -> None:
    below = centroid_table(np.ones((3, 2), np.float32)).slice(0, 2)
    above = centroid_table(np.ones((1, 2), np.float32), 2)
    with pytest.raises(LvdError, match="parent"):
        read_tree(write_set(tmp_path / "centroids", "centroids", [below, above]))


def test_levels_are_those_that_the_presets_publish() -> None:
    (told,) = [
        typing.get_args(kind)
        for kind in typing.get_args(ClusterSettings.model_fields["preset"].annotation)
        if kind is not type(None)
    ]
    assert set(told) == set(PRESETS)
    for name, preset in PRESETS.items():
        settings = ClusterSettings(preset=name)
        assert levels_of(settings, preset.pool)[1:] == preset.levels[1:]
        counts = [level.num_clusters for level in preset.levels]
        same = ClusterSettings(num_clusters=counts[0], levels=tuple(counts[1:]))
        assert levels_of(same, preset.pool)[1:] == preset.levels[1:]  # half the mean cluster, rounded up
        assert num_levels(settings) == num_levels(same) == len(counts)
        assert levels_of(settings, preset.pool)[0].fits == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"levels": (7,), "num_clusters": 6}, "7 clusters cannot lie above 6"),
        ({"levels": (5, 6), "num_clusters": 6}, "6 clusters cannot lie above 5"),
        ({"preset": "vo4", "levels": (5,)}, "leave out levels"),
        ({"preset": "vo4", "num_clusters": 5}, "leave out levels and num_clusters"),
        ({"fraction": 0.1}, "fraction goes with preset"),
        ({"preset": "vo5"}, "vo4"),
    ],
)
def test_what_makes_no_levels_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClusterSettings(**settings)


def test_more_finest_clusters_than_images_are_refused(tmp_path: Path) -> None:
    write_pools(tmp_path, SIZES, 0)
    with pytest.raises(ConfigError, match="cluster: k-means needs at least as many vectors as clusters"):
        execute(unit(tmp_path, preset="vo4", fraction=1.0))
