"""What is told of thresholds and chains, against deduplicating anew at each threshold and counting rows one by one."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curation import schemas
from curation.errors import ConfigError, LvdError
from curation.shards import ShardSet
from pipelines import chains
from pipelines.chains import Member, SizeClass, components, curve, num_components, pool_names, pool_sources, thresholds
from tests.builders import execute, random_ids, rows_of, table, write_set
from tests.pipelines.near_copies import World, all_pairs, dedup_unit, labels_of, make_world, pool_ids


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chains, "GROUP_ROWS", 5)


def deduplicated(tmp_path: Path, seed: int, **changes: Any) -> tuple[World, ShardSet, list[ShardSet]]:
    """A world, the forest that dedup leaves of it, and its verdicts in the pools' order."""
    world = make_world(tmp_path, seed)
    execute(dedup_unit(tmp_path, world, **changes))
    return world, ShardSet(str(tmp_path / "forest")), [ShardSet(str(tmp_path / "duplicates" / p)) for p in world.pools]


@pytest.mark.parametrize("base", [-1.0, 0.0, 0.45, 0.6, 0.61234, 0.9, 0.95, 0.97, 0.979, 0.9799])
def test_thresholds_lead_from_the_base_to_the_last_in_even_steps(base: float) -> None:
    found = thresholds(base)
    assert (found[0], found[-1]) == (base, 0.98)
    assert len(found) <= 18 and (len(found) >= 9 or base > 0.97)
    steps = np.diff(found)
    assert (steps > 0).all()
    assert len(found) < 4 or np.ptp(steps[1:-1]) < 1e-9  # the first and the last may be cut short
    assert steps[0] <= steps[1:-1].max(initial=1) + 1e-9 and steps[-1] <= steps[1:-1].max(initial=1) + 1e-9


@pytest.mark.parametrize("base", [0.98, 0.999, 1.0])
def test_above_the_last_threshold_the_base_alone_is_told(base: float) -> None:
    assert thresholds(base) == [base]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("base", [0.6, 0.9])
def test_the_curve_tells_what_all_pairs_say_at_each_threshold(tmp_path: Path, seed: int, base: float) -> None:
    world, forest, duplicates = deduplicated(tmp_path, seed, threshold=base)
    num_images = len(pool_ids(world))
    found = curve(forest, num_images)
    assert [point.threshold for point in found] == thresholds(base)
    for point in found:
        sizes = Counter(labels_of(all_pairs(world, point.threshold), num_images))
        assert (point.kept, point.largest) == (len(sizes), max(sizes.values()))
    assert len({point.kept for point in found}) > 3
    assert found[0].kept == num_components(duplicates)


@pytest.mark.parametrize("seed", range(2))
def test_the_curve_of_capped_components_tells_what_dedup_would_keep(tmp_path: Path, seed: int) -> None:
    _, forest, duplicates = deduplicated(tmp_path, seed, threshold=0.6, max_component=4)
    num_images = sum(s.num_rows for s in duplicates)
    found = curve(forest, num_images)
    assert found[0].kept == num_components(duplicates) > curve_without_cap(forest, num_images)
    for number, point in enumerate(found[::5]):
        place = tmp_path / str(number)
        _, _, again = deduplicated(place, seed, threshold=point.threshold, max_component=4)
        rows = [row for s in again for row in rows_of(s)]
        assert point.kept == sum(row["reason"] != "near_duplicate" for row in rows)
        assert point.largest == max(row["component_size"] for row in rows)


def curve_without_cap(forest: ShardSet, num_images: int) -> int:
    return num_images - forest.num_rows


def test_a_forest_of_other_images_is_refused(tmp_path: Path) -> None:
    _, forest, _ = deduplicated(tmp_path, 0)
    with pytest.raises(LvdError, match="but there are 3"):
        curve(forest, 3)


def test_semdedup_has_no_curve_but_components(tmp_path: Path) -> None:
    _, forest, duplicates = deduplicated(tmp_path, 0, preset="semdedup", threshold=0.8)
    with pytest.raises(ConfigError, match="semdedup has no curve"):
        curve(forest, sum(s.num_rows for s in duplicates))
    check_components(duplicates)
    assert num_components(duplicates) == sum(s.num_rows for s in duplicates) - forest.num_rows


def check_components(duplicates: list[ShardSet]) -> None:
    """Classes and members, counted row by row."""
    rows = [{**row, "source": s.source} for s in duplicates for row in rows_of(s)]
    sizes = Counter(row["component"] for row in rows)
    assert num_components(duplicates) == len(sizes)
    classes, members = components(duplicates)
    expected, low, high = [], 1, 1
    while low <= max(sizes.values(), default=0):
        inside = [size for size in sizes.values() if low <= size <= high]
        expected += [SizeClass(low, high, len(inside), sum(inside))] if inside else []
        low, high = high + 1, 2 * high
    assert classes == expected
    top = sorted((number for number in sizes if sizes[number] > 1), key=lambda number: (-sizes[number], number))[:5]
    named = {n: [(row["source"], row["image_id"]) for row in rows if row["component"] == n][:5] for n in top}
    assert members == [Member(n, sizes[n], *name) for n in top for name in named[n]]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("threshold", [0.6, 0.9, 0.999])
def test_components_are_those_of_the_verdicts(tmp_path: Path, seed: int, threshold: float) -> None:
    check_components(deduplicated(tmp_path, seed, threshold=threshold)[2])


@pytest.mark.parametrize("seed", range(6))
def test_components_of_random_verdicts(tmp_path: Path, seed: int) -> None:
    """Many components of equal size, over empty parts and sources."""
    rng = np.random.default_rng(seed)
    group = rng.integers(0, [3, 12, 40][seed % 3], 70)
    label = np.array([np.flatnonzero(group == g)[0] for g in group])
    size = np.bincount(group)[group]
    ids, found, at = random_ids(rng, 70), [], 0
    for name, parts in {"a": (13, 0, 9), "empty": (0,), "b": (1, 30, 17)}.items():
        tables = []
        for rows in parts:
            own = slice(at, at + rows)
            columns = {"image_id": ids[own], "component": label[own], "component_size": size[own]}
            tables.append(table(schemas.DUPLICATES, **columns, kept=[True] * rows))
            at += rows
        found.append(write_set(tmp_path / name, "duplicates", tables, source=name))
    assert at == 70
    check_components(found)


def test_no_images_at_all(tmp_path: Path) -> None:
    world = make_world(tmp_path, 8, pool_sizes=(0,), num_references=0)
    execute(dedup_unit(tmp_path, world, references=[]))
    duplicates = [ShardSet(str(tmp_path / "duplicates/web"))]
    assert components(duplicates) == ([], [])
    assert {tuple(point[1:]) for point in curve(ShardSet(str(tmp_path / "forest")), 0)} == {(0, 0)}


def test_pools_are_told_from_references(tmp_path: Path) -> None:
    _, forest, duplicates = deduplicated(tmp_path, 0)
    assert len(forest.manifest["inputs"]) == 6
    for shard_set in (forest, *duplicates):
        assert pool_sources(shard_set.manifest) == ["web", "book"]
        assert pool_names(shard_set.manifest) == ["embeddings/e/web", "embeddings/e/book"]
