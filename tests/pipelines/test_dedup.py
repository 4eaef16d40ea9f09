"""The whole dedup stage, over several parts, pools and references, against brute force over all pairs."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from curation import schemas
from curation.errors import ConfigError
from curation.shards import ShardSet
from pipelines import dedup, vectors
from pipelines.dedup import DedupUnit
from tests.builders import cut, execute, fingerprints, random_ids, rows_of, table, write_embeddings, write_set

Rule = Literal["component", "direct"]


@dataclass
class World:
    """Pools and references: ids, vectors and sizes, in the order that the stage numbers them through."""

    pools: dict[str, list[str]] = field(default_factory=dict)
    references: dict[str, list[str]] = field(default_factory=dict)
    vector: dict[str, np.ndarray] = field(default_factory=dict)
    area: dict[str, int] = field(default_factory=dict)


def make_world(tmp_path: Path, seed: int, pool_sizes: tuple[int, ...] = (31, 23), num_references: int = 9) -> World:
    """Vectors in families, some the same as another, some zero; images beside them that have no vector."""
    rng = np.random.default_rng(seed)
    families = rng.standard_normal((12, 5))
    world = World()

    def fill(kind: dict[str, list[str]], names: list[str], sizes: list[int], role: str) -> None:
        for name, size in zip(names, sizes, strict=True):
            ids = random_ids(rng, size)
            x = (families[rng.integers(0, 12, size)] + 0.45 * rng.standard_normal((size, 5))).astype(np.float16)
            x[rng.random(size) < 0.04] = 0
            if size > 3:
                x[[-1, -2]] = x[0]
            kind[name] = ids
            world.vector |= dict(zip(ids, x, strict=True))
            ends = sorted(rng.integers(0, size + 1, 3).tolist())
            write_embeddings(tmp_path / "e" / name, name, list(zip(cut(ids, ends), cut(x, ends), strict=True)), role)
            write_images(name, cut(ids, ends), role)

    def write_images(name: str, parts: list[list[str]], role: str) -> None:
        tables = []
        for part in parts:
            ids = [i for known in part for i in (*random_ids(rng, int(rng.random() < 0.3)), known)]
            width = rng.integers(1, 4, len(ids)) * 50_000
            sizes = {"width": width, "height": rng.integers(1, 3, len(ids)) * 50_000}
            world.area |= dict(zip(ids, (sizes["width"] * sizes["height"]).tolist(), strict=True))
            tables.append(table(schemas.IMAGES, image_id=ids, row=range(len(ids)), image=[b""] * len(ids), **sizes))
        write_set(tmp_path / "i" / name, "images", tables, source=name, role=role)

    fill(world.pools, ["web", "book"][: len(pool_sizes)], list(pool_sizes), "pool")
    fill(world.references, ["bench", "exam"], [num_references, 4], "reference")
    return world


def cosine(x: np.ndarray, y: np.ndarray) -> np.float32:
    dot = xx = yy = 0.0
    for a, b in zip(x.astype(np.float64), y.astype(np.float64), strict=True):
        dot, xx, yy = dot + a * b, xx + a * a, yy + b * b
    scale = math.sqrt(xx) * math.sqrt(yy)
    return np.float32(dot / scale if scale else 0.0)


def reached(start: Any, edges: dict[Any, dict[Any, np.float32]]) -> set[Any]:
    """All that hangs together with `start`."""
    seen, queue = {start}, [start]
    while queue:
        for other in edges[queue.pop()]:
            if other not in seen:
                seen.add(other)
                queue.append(other)
    return seen


def edges_above(world: World, ids: list[str], threshold: float) -> dict[str, dict[str, np.float32]]:
    found: dict[str, dict[str, np.float32]] = {name: {} for name in ids}
    for i, one in enumerate(ids):
        for two in ids[:i]:
            similarity = cosine(world.vector[one], world.vector[two])
            if similarity > np.float32(threshold):
                found[one][two] = found[two][one] = similarity
    return found


def brute_force(world: World, threshold: float, reference_threshold: float, rule: Rule) -> dict[str, dict[str, Any]]:
    """What each pool image's row must say."""
    pool = [name for ids in world.pools.values() for name in ids]
    number = {name: i for i, name in enumerate(pool)}
    references = {name: source for source, ids in world.references.items() for name in ids}
    edges = edges_above(world, pool, threshold)
    expected: dict[str, dict[str, Any]] = {}
    for name in pool:
        members = reached(name, edges)
        best = min(members, key=lambda member: (-world.area[member], member))
        expected[name] = {
            "image_id": name,
            "component": min(number[member] for member in members),
            "component_size": len(members),
            "representative_id": best,
            "similarity": max(edges[name].values(), default=None),
            "reference": None,
            "reference_source": None,
            "reference_similarity": None,
            "reason": None if best == name else "near_duplicate",
        }
    kept = [name for name in pool if expected[name]["reason"] is None]
    cross = edges_above(world, [*kept, *references], reference_threshold)
    for name in kept:
        near = {r: s for r, s in cross[name].items() if r in references}
        if near:
            best = min(near, key=lambda r: (-near[r], r))
            told = {"reference": best, "reference_source": references[best], "reference_similarity": near[best]}
            expected[name].update(told)
        touched = near if rule == "direct" else reached(name, cross) & set(references)
        if touched:
            expected[name]["reason"] = f"reference_{rule}"
    for row in expected.values():
        row["kept"] = row["reason"] is None
    return expected


def dedup_unit(tmp_path: Path, world: World, rule: Rule = "component", **changes: Any) -> DedupUnit:
    values = {
        "pools": [str(tmp_path / "e" / name) for name in world.pools],
        "images": [str(tmp_path / "i" / name) for name in world.pools],
        "references": [str(tmp_path / "e" / name) for name in world.references],
        "threshold": 0.9,
        "reference_threshold": 0.8,
        "rule": rule,
        "out": str(tmp_path / "duplicates"),
    }
    return DedupUnit(**(values | changes))


def found_rows(tmp_path: Path, world: World) -> dict[str, dict[str, Any]]:
    found = {}
    for name, ids in world.pools.items():
        rows = rows_of(tmp_path / "duplicates" / name)
        assert [row["image_id"] for row in rows] == ids
        assert ShardSet(str(tmp_path / "duplicates" / name)).labels == {"source": name, "role": "pool"}
        found |= {row["image_id"]: row for row in rows}
    return found


@pytest.fixture(params=[7, 1000])
def block_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    for module in (dedup, vectors):
        monkeypatch.setattr(module, "BLOCK_ROWS", request.param)
    monkeypatch.setattr(dedup, "GROUP_ROWS", request.param // 2)
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
    with pytest.raises(ConfigError, match=r"test states no copy thresholds of its own: set dedup\.threshold"):
        execute(dedup_unit(tmp_path, world, threshold=None))
    with pytest.raises(ConfigError, match="states no copy thresholds"):
        execute(dedup_unit(tmp_path, world, reference_threshold=None))
    for name in [*world.pools, *world.references]:
        shard_set = ShardSet(str(tmp_path / "e" / name))
        info = {**shard_set.manifest["info"], "copy_thresholds": {"self_dedup": 0.9, "reference": 0.8}}
        shard_set.write_manifest({**shard_set.manifest, "info": info})
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


def test_a_pool_too_large_for_exact_search_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(tmp_path, 0)
    monkeypatch.setattr("curation.neighbors.MAX_EXACT_VECTORS", 50)
    with pytest.raises(ConfigError, match="exact search of 54 vectors against 54 is too large"):
        execute(dedup_unit(tmp_path, world))
