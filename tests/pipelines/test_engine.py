"""Every engine of the join gives the verdicts and the forest of brute force over all pairs, in blocks of any size."""

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curation.errors import ConfigError
from curation.shards import ShardSet
from pipelines import engine, faiss_join, flat, in_place, join, partitioned, unit
from pipelines.join import ExactStep
from pipelines.nodes import Nodes
from pipelines.recipe import JoinSettings
from tests.builders import execute, fingerprints
from tests.pipelines.near_copies import (
    Rule,
    World,
    all_lists,
    all_pairs,
    brute_force,
    check_forest,
    dedup_unit,
    found_rows,
    joined,
    labels_of,
    make_world,
    stored_forest,
)

NUM = 54
ENGINES = {
    "exact": joined("exact"),
    "partitioned": all_lists(in_place=True),
    "one list": all_lists(in_place=True, num_lists=1, lists_joined=1, quantizers=1),
    "one partition": all_lists(in_place=False),
    "scattered": all_lists(in_place=False, partition_rows=20, num_lists=4, lists_joined=4),
    "faiss": joined("faiss", index="Flat", k=200),
}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four blocks of the exact join and FAISS, several of lists."""
    for module, name, rows in (
        (join, "SAMPLE_BLOCK", 11),
        (partitioned, "LIST_ROWS", 23),
        (flat, "FLAT_ROWS", 19),
        (in_place, "VISITS", 100),
        (faiss_join, "JOIN_ROWS", 17),
    ):
        monkeypatch.setattr(module, name, rows)
    in_blocks_of(monkeypatch, 14)


def in_blocks_of(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    for name in ("JOIN_ROWS", "LEAST_JOIN_ROWS"):
        monkeypatch.setattr(join, name, rows)


def check(tmp_path: Path, world: World, rule: Rule, settings: JoinSettings) -> None:
    """Run the stage; its verdicts and its forest must be those of all pairs."""
    execute(dedup_unit(tmp_path, world, rule, join=settings))
    expected = brute_force(world, 0.9, 0.8, rule)
    assert found_rows(tmp_path, world) == expected
    check_forest(stored_forest(tmp_path), all_pairs(world, 0.9), NUM)
    assert {row["reason"] for row in expected.values()} == {None, "near_duplicate", f"reference_{rule}"}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("rule", ["component", "direct"])
@pytest.mark.parametrize("name", ENGINES)
def test_verdicts_and_forest_equal_brute_force(tmp_path: Path, name: str, rule: Rule, seed: int) -> None:
    check(tmp_path, make_world(tmp_path, seed), rule, ENGINES[name])


@pytest.mark.parametrize("rule", ["component", "direct"])
@pytest.mark.parametrize(("blocks", "rows"), [(1, 70), (2, 27), (3, 18), (5, 11), (11, 5)])
def test_the_exact_join_in_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: int, rows: int, rule: Rule
) -> None:
    in_blocks_of(monkeypatch, rows)
    world = make_world(tmp_path, 5)
    nodes = Nodes([str(tmp_path / "e" / name) for name in world.pools], [])
    assert ExactStep("", "pairs", {}, False, nodes, 0.9, "forest", "").num_parts() == blocks
    check(tmp_path, world, rule, joined("exact"))


@pytest.mark.parametrize("num_blocks", range(1, 10))
def test_each_pair_of_blocks_meets_once(num_blocks: int) -> None:
    others = [list(join._others(block, num_blocks)) for block in range(num_blocks)]
    met = [tuple(sorted((block, other))) for block in range(num_blocks) for other in others[block]]
    assert sorted(met) == list(combinations(range(num_blocks), 2))
    assert max(map(len, others)) - min(map(len, others)) <= 1


@pytest.mark.parametrize("threshold", [0.999999, -1.0])
@pytest.mark.parametrize("name", ["partitioned", "scattered"])
def test_extreme_thresholds(tmp_path: Path, name: str, threshold: float) -> None:
    """Equal vectors alone; and nearly all in one component, zero vectors too."""
    world = make_world(tmp_path, 2)
    execute(dedup_unit(tmp_path, world, join=ENGINES[name], threshold=threshold, reference_threshold=threshold))
    assert found_rows(tmp_path, world) == brute_force(world, threshold, threshold, "component")
    check_forest(stored_forest(tmp_path), all_pairs(world, threshold), NUM)


@pytest.mark.parametrize("name", ["exact", "partitioned", "scattered"])
def test_the_forest_cut_anywhere_gives_the_components_of_all_pairs(tmp_path: Path, name: str) -> None:
    world = make_world(tmp_path, 4, pool_sizes=(60, 40))
    execute(dedup_unit(tmp_path, world, join=ENGINES[name], references=[]))
    for cut in (0.9, 0.93, 0.96, 0.99):
        kept = [edge for edge in stored_forest(tmp_path) if edge[2] > np.float32(cut)]
        assert labels_of(kept, 100) == labels_of(all_pairs(world, cut), 100)


@pytest.mark.parametrize("name", ["exact", "scattered", "faiss"])
def test_two_runs_give_the_same_bytes(tmp_path: Path, name: str) -> None:
    found: list[dict[str, str]] = []
    for place in (tmp_path / "one", tmp_path / "two"):
        execute(dedup_unit(place, make_world(place, 3), join=ENGINES[name]))
        found.append({n: value for n, value in fingerprints(place).items() if n[:2] not in ("e/", "i/")})
    assert found[0] == found[1]
    assert any(n.startswith("forest/") for n in found[0]) and not any("_" in n for n in found[0])
    assert any(n.startswith("recall/") for n in found[0]) == (name != "exact")


@pytest.mark.parametrize("size", [1, 9])
@pytest.mark.parametrize("name", ENGINES)
def test_one_pool_of_few_vectors(tmp_path: Path, name: str, size: int) -> None:
    world = make_world(tmp_path, 6, pool_sizes=(size,), num_references=4)
    settings = ENGINES[name].model_copy(update={"num_lists": 2, "lists_joined": 2})
    execute(dedup_unit(tmp_path, world, join=settings))
    assert found_rows(tmp_path, world) == brute_force(world, 0.9, 0.8, "component")


@pytest.mark.parametrize("name", ENGINES)
def test_a_pool_of_nothing(tmp_path: Path, name: str) -> None:
    world = make_world(tmp_path, 6, pool_sizes=(0,), num_references=4)
    execute(dedup_unit(tmp_path, world, join=ENGINES[name]))
    assert ShardSet(str(tmp_path / "duplicates/web")).num_rows == 0


def test_what_was_resolved_is_recorded(tmp_path: Path) -> None:
    world = make_world(tmp_path, 0)
    execute(dedup_unit(tmp_path, world, join=all_lists(quantizers=5)))
    config = ShardSet(str(tmp_path / "duplicates/web")).manifest["config"]
    rows = JoinSettings().partition_rows
    values = {"num_lists": 7, "lists_joined": 7, "quantizers": 5, "partition_rows": rows}
    assert (config["engine"], config["partitioned"]) == ("partitioned", values)
    assert (config["reference_engine"], config["recall_sample"]) == ("partitioned", 4_000)
    assert "min_recall" not in str(config)


@pytest.mark.parametrize(
    ("num_nodes", "name", "values"),
    [
        (0, "exact", {}),
        (1_000_000, "exact", {}),
        (1_000_001, "partitioned", {"num_lists": 2_048, "lists_joined": 24, "quantizers": 5}),
        (10_000_000, "partitioned", {"num_lists": 16_384, "lists_joined": 24, "quantizers": 8}),
        (1_200_000_000, "partitioned", {"num_lists": 65_536, "lists_joined": 24, "quantizers": 14}),
    ],
)
def test_auto_takes_the_engine_by_the_number_of_vectors(num_nodes: int, name: str, values: dict[str, Any]) -> None:
    found = engine.resolve(JoinSettings(), num_nodes, 512)
    assert found.name == name
    assert found.values | values == found.values
    assert f"{num_nodes:,} vectors" in found.why


@pytest.mark.parametrize("takes_int8", [False, True])
def test_a_slow_processor_is_told_of(takes_int8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "takes_int8", lambda: takes_int8)
    for name in ("exact", "partitioned"):
        found = engine.resolve(joined(name, device="cpu"), 1_000_000, 512)
        assert found.notes() == [found.why, engine.SLOW][: 1 if takes_int8 else 2]
        found = engine.resolve(joined(name, device="cpu"), 10_000, 512)  # a second's work
        assert found.notes() == [found.why]
    for settings in (joined("exact", device="cuda"), joined("faiss")):
        found = engine.resolve(settings, 1_000_000, 512)
        assert found.notes() == [found.why]


def test_no_more_lists_are_joined_than_there_are() -> None:
    assert engine.resolve(joined("partitioned"), 3_000, 8).values["lists_joined"] == 8
    assert engine.resolve(joined("partitioned"), 3_000, 8).values["quantizers"] == 3
    assert engine.resolve(joined("partitioned"), 300_000, 8).values["quantizers"] == 3
    with pytest.raises(ConfigError, match="the exact join takes at most 16,000,000 vectors"):
        engine.resolve(joined("exact"), 16_000_001, 8)


@pytest.mark.parametrize("num_lists", [2, 7, 16, 40])
def test_where_all_lists_are_joined_all_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_lists: int) -> None:
    """However few coarse cells there are: every vector names every list of every quantizer."""
    monkeypatch.setattr(unit, "_delete_working_sets", lambda steps: None)
    world = make_world(tmp_path, 1)
    execute(dedup_unit(tmp_path, world, join=all_lists(num_lists=num_lists, lists_joined=num_lists), references=[]))
    lists = ShardSet(str(tmp_path / "duplicates/_lists"))
    for name in ("lists_0", "lists_1", "lists_2"):
        rows = [row for part in range(lists.num_parts) for row in lists.read(part)[name].to_pylist()]
        assert len(rows) == NUM and all(sorted(row) == [*range(num_lists)] for row in rows)
