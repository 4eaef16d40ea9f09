"""The whole dedup stage, over several parts, pools and references, against brute force over all pairs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curation.errors import ConfigError, LvdError
from curation.shards import ShardSet
from pipelines import dedup, engine, join, vectors
from tests.builders import cut, embedding_table, execute, fingerprints, rows_of, write_set
from tests.pipelines.near_copies import (
    Edges,
    Rule,
    World,
    all_lists,
    brute_force,
    dedup_unit,
    found_rows,
    joined,
    make_world,
    pool_ids,
    reached,
    stored_forest,
)


@pytest.fixture(params=[7, 1000])
def block_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    for module in (dedup, vectors):
        monkeypatch.setattr(module, "BLOCK_ROWS", request.param)
    monkeypatch.setattr(dedup, "GROUP_ROWS", request.param // 2)
    monkeypatch.setattr(join, "SAMPLE_BLOCK", request.param)
    return int(request.param)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rule", ["component", "direct"])
def test_verdicts_equal_brute_force(tmp_path: Path, block_rows: int, seed: int, rule: Rule) -> None:
    world = make_world(tmp_path, seed)
    execute(dedup_unit(tmp_path, world, rule))
    expected = brute_force(world, 0.9, 0.8, rule)
    found = found_rows(tmp_path, world)
    assert found == expected
    reasons = {row["reason"] for row in expected.values()}
    assert reasons == {None, "near_duplicate", f"reference_{rule}"}  # else the test would show little


def test_the_rules_differ(tmp_path: Path) -> None:
    """The component rule discards images that hang on a reference by way of others."""
    for seed in range(4):
        world = make_world(tmp_path / str(seed), seed)
        component, direct = (brute_force(world, 0.9, 0.8, rule) for rule in ("component", "direct"))
        dropped = [{n for n, row in e.items() if not row["kept"]} for e in (component, direct)]
        if dropped[0] > dropped[1]:
            return
    pytest.fail("these worlds do not tell the rules apart")


def test_one_pool_without_references(tmp_path: Path, block_rows: int) -> None:
    world = make_world(tmp_path, 7, pool_sizes=(20,))
    execute(dedup_unit(tmp_path, world, references=[], reference_threshold=None))
    world.references = {}
    assert found_rows(tmp_path, world) == brute_force(world, 0.9, 0.8, "component")
    assert "rule" not in ShardSet(str(tmp_path / "duplicates/web")).manifest["config"]


def test_empty_pools(tmp_path: Path, block_rows: int) -> None:
    world = make_world(tmp_path, 8, pool_sizes=(0, 5), num_references=0)
    execute(dedup_unit(tmp_path, world))
    assert found_rows(tmp_path, world) == brute_force(world, 0.9, 0.8, "component")
    nothing = make_world(tmp_path / "nothing", 8, pool_sizes=(0,), num_references=0)
    execute(dedup_unit(tmp_path / "nothing", nothing))
    assert found_rows(tmp_path / "nothing", nothing) == {}


@pytest.mark.parametrize("threshold", [1.0, -1.0])
def test_extreme_thresholds(tmp_path: Path, block_rows: int, threshold: float) -> None:
    """Above 1 nothing is a copy; above -1 nearly all is one component."""
    world = make_world(tmp_path, 9)
    execute(dedup_unit(tmp_path, world, threshold=threshold, reference_threshold=threshold))
    assert found_rows(tmp_path, world) == brute_force(world, threshold, threshold, "component")


def test_two_runs_give_the_same_bytes(tmp_path: Path, block_rows: int) -> None:
    for place in ("one", "two"):
        world = make_world(tmp_path / place, 3)
        execute(dedup_unit(tmp_path / place, world))
    first, second = (fingerprints(tmp_path / place / "duplicates") for place in ("one", "two"))
    assert first == second
    assert all("_" not in name for name in first)  # working sets are gone


def test_thresholds_come_from_the_embedder_or_are_asked_for(tmp_path: Path) -> None:
    world = make_world(tmp_path, 0)
    with pytest.raises(
        ConfigError, match=r"test states no copy thresholds of its own for preset paper: set dedup\.threshold"
    ):
        execute(dedup_unit(tmp_path, world, threshold=None))
    with pytest.raises(ConfigError, match="states no copy thresholds"):
        execute(dedup_unit(tmp_path, world, reference_threshold=None))
    state_thresholds(tmp_path, world, self_dedup=0.9, reference=0.8)
    execute(dedup_unit(tmp_path, world, threshold=None, reference_threshold=None))
    assert found_rows(tmp_path, world) == brute_force(world, 0.9, 0.8, "component")


def test_vectors_of_two_models_are_refused(tmp_path: Path) -> None:
    world = make_world(tmp_path, 0)
    shard_set = ShardSet(str(tmp_path / "e" / "bench"))
    shard_set.write_manifest({**shard_set.manifest, "config": {"model": "another", "precision": "bfloat16"}})
    message = (
        r"e/\w+ \(test test, precision unset\) and .*e/bench \(test another, precision bfloat16\) were not made by one"
    )
    with pytest.raises(ConfigError, match=message):
        execute(dedup_unit(tmp_path, world))


def test_images_of_another_making_are_refused(tmp_path: Path) -> None:
    world = make_world(tmp_path, 0)
    images = [str(tmp_path / "i/book"), str(tmp_path / "i/web")]
    with pytest.raises(ConfigError, match="is not in the set it was made from"):
        execute(dedup_unit(tmp_path, world, images=images))


def test_a_pool_too_large_for_the_exact_join_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(tmp_path, 0)
    monkeypatch.setattr(engine, "EXACT_AT_MOST", 54)
    message = r"takes at most 54 vectors, but there are 67: set dedup\.join\.engine to partitioned"
    with pytest.raises(ConfigError, match=message):  # the pools alone are few enough, with the references they are not
        execute(dedup_unit(tmp_path, world, join=joined("exact")))
    world.references = {}
    execute(dedup_unit(tmp_path, world, join=joined("exact")))
    assert found_rows(tmp_path, world) == brute_force(world, 0.9, 0.8, "component")


def state_thresholds(tmp_path: Path, world: World, **thresholds: float) -> None:
    """Let the embedder state its own thresholds in all sets."""
    for name in [*world.pools, *world.references]:
        shard_set = ShardSet(str(tmp_path / "e" / name))
        info = {**shard_set.manifest["info"], "copy_thresholds": thresholds}
        shard_set.write_manifest({**shard_set.manifest, "info": info})


@pytest.mark.parametrize("seed", range(2))
def test_preset_precise_takes_the_precise_threshold_and_rule_direct(tmp_path: Path, seed: int) -> None:
    world = make_world(tmp_path, seed)
    state_thresholds(tmp_path, world, self_dedup=0.5, reference=0.4, precise=0.85)
    own = {"preset": "precise", "threshold": None, "reference_threshold": None}
    execute(dedup_unit(tmp_path, world, **own, rule=None))
    expected = brute_force(world, 0.85, 0.85, "direct")
    assert found_rows(tmp_path, world) == expected
    assert expected != brute_force(world, 0.85, 0.85, "component")
    execute(dedup_unit(tmp_path, world, **(own | {"threshold": 0.9}), rule="component"), overwrite=True)
    assert found_rows(tmp_path, world) == brute_force(world, 0.9, 0.85, "component")


@pytest.mark.parametrize("stated", [{"self_dedup": 0.5, "reference": 0.4}, {"self_dedup": 0.5, "precise": None}])
def test_preset_precise_demands_a_precise_threshold(tmp_path: Path, stated: dict[str, Any]) -> None:
    world = make_world(tmp_path, 0)
    state_thresholds(tmp_path, world, **stated)
    with pytest.raises(ConfigError, match=r"for preset precise: set dedup\.threshold"):
        execute(dedup_unit(tmp_path, world, preset="precise", threshold=None, reference_threshold=None))


def cut_at_weakest(world: World, forest: list[tuple[int, int, float]], cap: int) -> Edges:
    """The forest's edges without the weakest one of each component above `cap`, over and over."""
    names = pool_ids(world)
    left = sorted(forest, key=lambda edge: (-edge[2], edge[0], edge[1]))
    while True:
        edges: Edges = {name: {} for name in names}
        for a, b, similarity in left:
            edges[names[a]][names[b]] = edges[names[b]][names[a]] = np.float32(similarity)
        large = [edge for edge in left if len(reached(names[edge[0]], edges)) > cap]
        if not large:
            return edges
        left.remove(large[-1])


@pytest.mark.parametrize("cap", [1, 2, 5])
def test_components_above_the_cap_are_cut_at_their_weakest_edges(tmp_path: Path, cap: int) -> None:
    world = make_world(tmp_path, 1)
    execute(dedup_unit(tmp_path, world, max_component=cap))
    edges = cut_at_weakest(world, stored_forest(tmp_path), cap)
    expected = brute_force(world, 0.9, 0.8, "component", edges)
    assert found_rows(tmp_path, world) == expected
    assert max(row["component_size"] for row in expected.values()) == cap
    uncut = brute_force(world, 0.9, 0.8, "component")
    assert max(row["component_size"] for row in uncut.values()) > 5


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("settings", [joined("exact"), all_lists(), joined("faiss", index="Flat")])
def test_what_is_not_finite_is_one_clear_error(tmp_path: Path, value: float, settings: Any) -> None:
    world = make_world(tmp_path, 0)
    place = tmp_path / "e/web"
    ids, start = world.pools["web"], ShardSet(str(place)).manifest
    x = np.asarray([row["embedding"] for row in rows_of(place)], np.float16)
    x[17, 2] = value
    tables = [embedding_table(*part) for part in zip(cut(ids, [20]), cut(x, [20]), strict=True)]
    ShardSet(str(place)).delete()
    write_set(place, "embeddings", tables, config=start["config"], info=start["info"], **start["labels"])
    with pytest.raises(LvdError, match=r"web/part-00000\.parquet: the vector in row 17 has NaN or inf") as e:
        execute(dedup_unit(tmp_path, world, join=settings))
    assert "\n" not in str(e.value)
