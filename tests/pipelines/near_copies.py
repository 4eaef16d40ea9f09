"""Worlds of near-copies for tests of the dedup stage, and what it must say of them: brute force over all pairs."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from curation import schemas
from curation.shards import ShardSet
from pipelines.dedup import DedupUnit
from pipelines.recipe import DedupSettings, JoinSettings
from tests.builders import cut, random_ids, rows_of, table, write_embeddings, write_set

Rule = Literal["component", "direct"]
Edges = dict[str, dict[str, np.float32]]


@dataclass
class World:
    """Pools and references: ids, vectors and sizes, in the order that the stage numbers them through."""

    pools: dict[str, list[str]] = field(default_factory=dict)
    references: dict[str, list[str]] = field(default_factory=dict)
    vector: dict[str, np.ndarray] = field(default_factory=dict)
    area: dict[str, int] = field(default_factory=dict)


def make_world(
    tmp_path: Path,
    seed: int,
    pool_sizes: tuple[int, ...] = (31, 23),
    num_references: int = 9,
    num_families: int = 12,
    dim: int = 5,
    hub: int = 0,
) -> World:
    """Vectors in families, some the same as another, some zero; images beside them that have no vector.

    So many of each pool are a `hub`: cosines of about 0.998 among them, and some of them equal.
    """
    rng = np.random.default_rng(seed)
    families = rng.standard_normal((num_families, dim))
    center = rng.standard_normal(dim) if hub else np.zeros(dim)
    world = World()

    def fill(kind: dict[str, list[str]], names: list[str], sizes: list[int], role: str) -> None:
        for name, size in zip(names, sizes, strict=True):
            ids = random_ids(rng, size)
            family = families[rng.integers(0, num_families, size)]
            x = (family + 0.45 * rng.standard_normal((size, dim))).astype(np.float16)
            x[rng.random(size) < 0.04] = 0
            if role == "pool" and hub:
                members = rng.permutation(size)[:hub]
                x[members] = center + 0.03 * rng.standard_normal((hub, dim))
                x[members[: hub // 4]] = x[members[0]]
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


def cosines(x: np.ndarray) -> np.ndarray:
    """All cosines of rows, float32 [n, n]: sums in float64 and index order, as the project defines its scores."""
    wide = x.astype(np.float64)
    dot = np.zeros((len(x), len(x)))
    for column in wide.T:
        dot += column[:, None] * column[None, :]
    length = np.sqrt(np.diag(dot))
    scale = length[:, None] * length[None, :]
    return np.divide(dot, scale, out=np.zeros_like(dot), where=scale > 0).astype(np.float32)


def reached(start: Any, edges: dict[Any, dict[Any, Any]]) -> set[Any]:
    """All that hangs together with `start`."""
    seen, queue = {start}, [start]
    while queue:
        for other in edges[queue.pop()]:
            if other not in seen:
                seen.add(other)
                queue.append(other)
    return seen


def edges_above(world: World, ids: list[str], threshold: float) -> Edges:
    """The pairs above the threshold, both ways."""
    found: Edges = {name: {} for name in ids}
    similarity = cosines(np.asarray([world.vector[name] for name in ids]).reshape(len(ids), -1))
    for i, j in zip(*np.nonzero(similarity > np.float32(threshold)), strict=True):
        if i != j:
            found[ids[i]][ids[j]] = similarity[i, j]
    return found


def pool_ids(world: World) -> list[str]:
    """The pools' images in the order of their numbers."""
    return [name for ids in world.pools.values() for name in ids]


def brute_force(
    world: World, threshold: float, reference_threshold: float, rule: Rule, edges: Edges | None = None
) -> dict[str, dict[str, Any]]:
    """What each pool image's row must say; `edges` stand for all pairs of the pools above the threshold."""
    pool = pool_ids(world)
    number = {name: i for i, name in enumerate(pool)}
    references = {name: source for source, ids in world.references.items() for name in ids}
    edges = edges_above(world, pool, threshold) if edges is None else edges
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
        "seed": 0,
        "out": str(tmp_path / "duplicates"),
        "forest": str(tmp_path / "forest"),
        "recall": str(tmp_path / "recall"),
    }
    settings = {"threshold": 0.9, "reference_threshold": 0.8, "rule": rule}
    own = {key: changes.pop(key) for key in list(changes) if key in values}
    return DedupUnit(settings=DedupSettings(**(settings | changes)), **(values | own))


def joined(engine: str, **values: Any) -> JoinSettings:
    """Settings of the join by `engine`."""
    return JoinSettings(engine=engine, **values)


def all_lists(**values: Any) -> JoinSettings:
    """A partitioned join that compares every pair: all lists of all quantizers."""
    return JoinSettings(**({"engine": "partitioned", "num_lists": 7, "lists_joined": 7, "quantizers": 3} | values))


def found_rows(tmp_path: Path, world: World) -> dict[str, dict[str, Any]]:
    found = {}
    for name, ids in world.pools.items():
        rows = rows_of(tmp_path / "duplicates" / name)
        assert [row["image_id"] for row in rows] == ids
        assert ShardSet(str(tmp_path / "duplicates" / name)).labels == {"source": name, "role": "pool"}
        found |= {row["image_id"]: row for row in rows}
    return found


def stored_forest(tmp_path: Path) -> list[tuple[int, int, float]]:
    """The forest that the stage leaves: (a, b, similarity) as stored."""
    return [(row["a"], row["b"], row["similarity"]) for row in rows_of(tmp_path / "forest")]


def all_pairs(world: World, threshold: float) -> list[tuple[int, int, float]]:
    """(a, b, similarity) of the pools' pairs above the threshold by number, a < b; strongest first, then a, b."""
    similarity = cosines(np.asarray([world.vector[name] for name in pool_ids(world)]))
    i, j = np.nonzero(np.triu(similarity > np.float32(threshold), 1))
    return sorted(
        zip(i.tolist(), j.tolist(), similarity[i, j].tolist(), strict=True), key=lambda e: (-e[2], e[0], e[1])
    )


def labels_of(edges: list[tuple[int, int, float]], num_nodes: int) -> list[int]:
    """Lowest node of each node's component."""
    label = list(range(num_nodes))
    members = {node: [node] for node in label}
    for a, b, _ in edges:
        low, high = sorted((label[a], label[b]))
        if low != high:
            for node in members[high]:
                label[node] = low
            members[low] += members.pop(high)
    return label


def maximum_forest(edges: list[tuple[int, int, float]], num_nodes: int) -> list[tuple[int, int, float]]:
    """Kruskal's: of edges from strong to weak those that connect two components."""
    kept: list[tuple[int, int, float]] = []
    label = list(range(num_nodes))
    for a, b, similarity in edges:
        if label[a] != label[b]:
            old, new = label[b], label[a]
            label = [new if own == old else own for own in label]
            kept.append((a, b, similarity))
    return kept


def check_forest(found: list[tuple[int, int, float]], pairs: list[tuple[int, int, float]], num_nodes: int) -> None:
    """Whether it is a maximum spanning forest of the pairs, strongest first; equal similarities leave a choice."""
    assert set(found) <= set(pairs)
    assert found == sorted(found, key=lambda edge: (-edge[2], edge[0], edge[1]))
    assert [edge[2] for edge in found] == [edge[2] for edge in maximum_forest(pairs, num_nodes)]
    assert len(maximum_forest(found, num_nodes)) == len(found)
