"""The recall that the dedup stage measures of its own join, and what it does where that is not enough."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curation.errors import ConfigError, LvdError, PartialError
from curation.recall import joined_with
from curation.shards import ShardSet
from pipelines import unit
from pipelines.executor import LocalExecutor
from pipelines.progress import quiet
from pipelines.unit import run_unit
from tests.builders import execute, fingerprints, rows_of
from tests.pipelines.near_copies import (
    World,
    all_lists,
    all_pairs,
    dedup_unit,
    joined,
    labels_of,
    make_world,
    stored_forest,
)

NUM, LISTS = 300, 48
THRESHOLD = 0.75


def few_lists(lists_joined: int = 1, **values: Any) -> Any:
    return joined("partitioned", num_lists=LISTS, lists_joined=lists_joined, **({"quantizers": 1} | values))


def spread_world(tmp_path: Path, seed: int = 0) -> World:
    """Groups of about two that no list has a reason to hold together."""
    return make_world(tmp_path, seed, pool_sizes=(170, 130), num_families=150, dim=16)


def shares(pairs: list[tuple[int, int, float]], hit: Any) -> list[float]:
    """Of each node with pairs the share of its pairs that `hit`."""
    found: dict[int, list[bool]] = {}
    for a, b, _ in pairs:
        for node in (a, b):
            found.setdefault(node, []).append(hit(a, b))
    return [sum(hits) / len(hits) for hits in found.values()]


def test_the_figures_are_those_of_all_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit, "_delete_working_sets", lambda steps: None)
    world = spread_world(tmp_path)
    settings = few_lists(2, quantizers=2, min_recall=0)
    execute(dedup_unit(tmp_path, world, threshold=THRESHOLD, references=[], join=settings))
    (row,) = rows_of(tmp_path / "recall")
    pairs, label = all_pairs(world, THRESHOLD), labels_of(stored_forest(tmp_path), NUM)
    lists = [[r["lists_0"], r["lists_1"]] for r in rows_of(tmp_path / "duplicates/_lists")]
    flat = np.asarray(lists, np.int32)
    assert row["recall_component"] == pytest.approx(np.mean(shares(pairs, lambda a, b: label[a] == label[b])))
    for m in (1, 2):
        at = np.mean(shares(pairs, lambda a, b, m=m: joined_with(flat[[a]], flat[[b]])[0] <= m))
        assert row["recall_joined_at"][m - 1] == pytest.approx(at)
    assert (row["num_sampled"], row["num_pairs"]) == (NUM, 2 * len(pairs))
    assert 0.3 < row["recall_joined"] <= row["recall_component"] < 1
    assert ShardSet(str(tmp_path / "recall")).manifest["config"]["partitioned"]["lists_joined"] == 2


def test_too_little_recall_is_an_error_that_a_lower_target_resumes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = spread_world(tmp_path)
    values = {"threshold": THRESHOLD, "reference_threshold": THRESHOLD}
    for _ in range(2):  # as often as it is run
        with pytest.raises(LvdError) as raised:
            execute(dedup_unit(tmp_path, world, **values, join=few_lists()))
        assert not isinstance(raised.value, ConfigError | PartialError) and raised.value.exit_code == 1
        assert str(raised.value).startswith("recall is below the target 0.99: of the true pairs of ")
        message = r"raise dedup\.join\.lists_joined above 1 or dedup\.join\.quantizers to 2, or lower dedup\.join\.min_"
        raised.match(message)
    assert ShardSet(str(tmp_path / "recall")).is_complete and ShardSet(str(tmp_path / "forest")).is_complete
    assert not ShardSet(str(tmp_path / "duplicates/web")).is_complete
    before = {name: value for name, value in fingerprints(tmp_path).items() if name[:6] in ("recall", "forest")}
    asked: list[str] = []

    class Listening(LocalExecutor):
        def map(self, work: Any, items: Any, needs: Any) -> Any:
            asked.append(work.step.out.rsplit("/", 1)[1])
            return super().map(work, items, needs)

    run_unit(dedup_unit(tmp_path, world, **values, join=few_lists(min_recall=0.1)), Listening(), quiet())
    assert asked and all(name.startswith("_reference") or name in ("_leaks", "web", "book") for name in asked)
    assert before.items() <= fingerprints(tmp_path).items()
    (row,) = rows_of(tmp_path / "recall")
    assert 0.1 < row["recall_component"] < 0.99


def test_raising_what_the_message_names_helps(tmp_path: Path) -> None:
    world = spread_world(tmp_path)
    found = []
    for lists_joined, quantizers in ((1, 1), (1, 3), (6, 1), (LISTS, 1)):
        settings = few_lists(lists_joined, quantizers=quantizers, min_recall=0)
        execute(dedup_unit(tmp_path, world, threshold=THRESHOLD, references=[], join=settings), overwrite=True)
        found.append(rows_of(tmp_path / "recall")[0]["recall_joined"])
    assert found[0] < found[1] < 1 and found[0] < found[2] and found[3] == 1


def test_faiss_is_measured_too(tmp_path: Path) -> None:
    world = spread_world(tmp_path)
    index = joined("faiss", index="IVF32,Flat", k=2, nprobe=1)
    with pytest.raises(LvdError, match=r"use another engine, or lower dedup\.join\.min_recall$"):
        execute(dedup_unit(tmp_path, world, threshold=THRESHOLD, join=index))
    (row,) = rows_of(tmp_path / "recall")
    label = labels_of(stored_forest(tmp_path), NUM)
    expected = np.mean(shares(all_pairs(world, THRESHOLD), lambda a, b: label[a] == label[b]))
    assert row["recall_component"] == pytest.approx(expected)
    assert row["recall_joined"] is None


def test_another_number_of_sampled_vectors_is_another_stage(tmp_path: Path) -> None:
    world = make_world(tmp_path, 0)
    execute(dedup_unit(tmp_path, world, join=all_lists(recall_sample=10)))
    assert rows_of(tmp_path / "recall")[0]["num_sampled"] == 10
    assert not execute(dedup_unit(tmp_path, world, join=all_lists(recall_sample=10, min_recall=1)))
    with pytest.raises(ConfigError, match="recall_sample: 10 -> 11"):
        execute(dedup_unit(tmp_path, world, join=all_lists(recall_sample=11)))
