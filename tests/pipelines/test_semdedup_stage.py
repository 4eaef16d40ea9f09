"""Preset semdedup: the verdicts of SemDeDup within the stored clusters, by the letter of the paper."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curation.shards import ShardSet
from pipelines import partitioned, unit
from pipelines.partitioned import read_quantizer
from tests.builders import execute, rows_of
from tests.pipelines.near_copies import World, cosines, dedup_unit, found_rows, joined, make_world, pool_ids

THRESHOLD = 0.8


@pytest.fixture(autouse=True)
def _working_sets_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit, "_delete_working_sets", lambda steps: None)
    monkeypatch.setattr(partitioned, "LIST_ROWS", 23)


def stored_clusters(tmp_path: Path) -> tuple[list[int], np.ndarray]:
    """Cluster of each image, and the centroids."""
    lists = rows_of(tmp_path / "duplicates/_lists")
    return [row["lists_0"][0] for row in lists], read_quantizer(str(tmp_path / "duplicates/_quantizers"), 0).fine


def literal(tmp_path: Path, world: World) -> dict[str, str | None]:
    """For each image the one it is dropped for: of those before it in its cluster, far from the center first."""
    names = pool_ids(world)
    cluster, centroids = stored_clusters(tmp_path)
    x = np.asarray([world.vector[name] for name in names])
    near = cosines(np.concatenate([x.astype(np.float64), centroids.astype(np.float64)]))
    similarity, to_center = near[: len(x), : len(x)], near[: len(x), len(x) :]
    found: dict[str, str | None] = {}
    for number in sorted(set(cluster)):
        rows = [i for i in range(len(x)) if cluster[i] == number]
        order = sorted(rows, key=lambda i: (-(np.float32(1) - to_center[i, number]), i))
        for place, i in enumerate(order):
            like = [j for j in order[:place] if similarity[i, j] > np.float32(THRESHOLD)]
            best = max(like, key=lambda j: (similarity[i, j], -order.index(j)), default=None)
            found[names[i]] = None if best is None else names[best]
    return found


def run(tmp_path: Path, world: World, **values: Any) -> dict[str, dict[str, Any]]:
    own = {"threshold": THRESHOLD, "references": [], "preset": "semdedup"} | values
    execute(dedup_unit(tmp_path, world, **own))
    return found_rows(tmp_path, world)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("num_lists", "partition_rows"), [(1, 1000), (6, 1000), (6, 20)])
def test_verdicts_are_those_of_the_paper(tmp_path: Path, seed: int, num_lists: int, partition_rows: int) -> None:
    world = make_world(tmp_path, seed)
    found = run(tmp_path, world, join=joined("auto", num_lists=num_lists, partition_rows=partition_rows))
    dropped_for = literal(tmp_path, world)
    assert len(set(stored_clusters(tmp_path)[0])) == num_lists
    assert {name for name, row in found.items() if row["kept"]} == {n for n, other in dropped_for.items() if not other}
    for name, row in found.items():
        root: str = name
        while (other := dropped_for[root]) is not None:
            root = other
        assert row["representative_id"] == root and found[root]["kept"]
        assert row["reason"] == (None if root == name else "near_duplicate")
    assert 10 < sum(row["kept"] for row in found.values()) < 50


def test_its_threshold_is_the_paper_s_unless_another_is_given(tmp_path: Path) -> None:
    world = make_world(tmp_path, 0)
    run(tmp_path, world, threshold=None, join=joined("auto", num_lists=1))
    config = ShardSet(str(tmp_path / "duplicates/web")).manifest["config"]
    assert (config["threshold"], config["engine"], config["semdedup"]["num_lists"]) == (0.97, "semdedup", 1)
    assert {row["similarity"] > np.float32(0.97) for row in rows_of(tmp_path / "forest")} == {True}


def test_representatives_alone_meet_the_references(tmp_path: Path) -> None:
    world = make_world(tmp_path, 1)
    references = [str(tmp_path / "e" / name) for name in world.references]
    found = run(tmp_path, world, references=references, rule=None, join=joined("auto", num_lists=1))
    reasons = {name: row["reason"] for name, row in found.items()}
    assert set(reasons.values()) == {None, "near_duplicate", "reference_direct"}
    dropped_for = literal(tmp_path, world)
    assert {name for name, reason in reasons.items() if reason == "near_duplicate"} == {
        name for name, other in dropped_for.items() if other
    }
    for name in (n for n, other in dropped_for.items() if other is None):
        of_references = [r for ids in world.references.values() for r in ids]
        x = np.asarray([world.vector[n] for n in (name, *of_references)])
        assert (reasons[name] is None) == (not (cosines(x)[0, 1:] > np.float32(0.8)).any())
