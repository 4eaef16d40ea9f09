"""Counts of what was retrieved, against sets in Python."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curation import schemas
from curation.shards import ShardSet
from pipelines.catalog import open_catalog
from pipelines.recipe import RetrieveSettings
from pipelines.retrieval_tables import retrieval_tables, tables_of
from tests.builders import random_ids, table, write_set

K = 6


def write_retrieved(place: Path, seed: int) -> tuple[list[str], np.ndarray, list[str]]:
    """A set of 9 queries with K neighbors each and some images of clusters; their ids, by query and rank."""
    rng = np.random.default_rng(seed)
    pool = random_ids(np.random.default_rng(99), 25)
    near = np.array([rng.permutation(pool)[:K] for _ in range(9)])
    members = sorted(set(rng.choice(pool, 8).tolist()))
    queries = random_ids(rng, 9)
    count, more = near.size, len(members)
    rows: dict[str, Any] = {
        "query_image_id": np.repeat(queries, K).tolist() + [None] * more,
        "image_id": near.ravel().tolist() + members,
        "source": ["web"] * (count + more),
        "part": [0] * (count + more),
        "mode": ["sample"] * count + ["cluster"] * more,
        "rank": [*np.tile(np.arange(1, K + 1), 9).tolist(), *[None] * more],
        "similarity": [0.5] * count + [None] * more,
        "cluster": [None] * count + [1] * more,
    }
    write_set(place, "retrieved", [table(schemas.RETRIEVED, **rows)], source=place.name, role="query")
    return queries, near, members


@pytest.mark.parametrize("seed", range(3))
def test_counts_collisions_and_overlap(tmp_path: Path, seed: int) -> None:
    _, near, members = write_retrieved(tmp_path / "retrieved/birds", seed)
    write_retrieved(tmp_path / "retrieved/cars", seed + 10)
    write_retrieved(tmp_path / "retrieved/art-2", seed + 20)
    own = tables_of(str(tmp_path / "retrieved/birds"))
    assert [found.title for found in own] == ["Retrieved", "Collisions as k grows"]
    assert own[0].rows == [
        ["birds", "cluster", len(members), len(members)],
        ["birds", "sample", 9 * K, len(set(near.ravel()))],
    ]
    expected = []
    for k in (1, 2, 4, K):
        unique = len(set(near[:, :k].ravel()))
        expected.append(["birds", k, 9 * k, unique, f"{100 * (1 - unique / (9 * k)):.1f} %"])
    assert own[1].rows == expected
    sets = [ShardSet(str(tmp_path / "retrieved" / name)) for name in ("birds", "cars", "art-2")]
    collisions, overlap, recall = retrieval_tables(sets, open_catalog(str(tmp_path)))
    assert collisions.rows[4:8] == expected
    assert [row[:2] for row in overlap.rows] == [["art-2", "birds"], ["art-2", "cars"], ["birds", "cars"]]
    every = [{row["image_id"] for row in found.read(0).to_pylist()} for found in sets[:2]]
    both = len(every[0] & every[1])
    assert overlap.rows[2] == ["birds", "cars", both, f"{100 * both / min(map(len, every)):.1f} %"]
    assert recall.rows == []


def test_nothing_retrieved_is_no_table(tmp_path: Path) -> None:
    write_set(tmp_path / "birds", "retrieved", [schemas.RETRIEVED.empty_table()], source="birds", role="query")
    assert tables_of(str(tmp_path / "birds")) == []
    assert retrieval_tables([], None) == []


def test_recall_of_a_search_that_is_not_exact_is_told(tmp_path: Path) -> None:
    from tests.builders import execute
    from tests.pipelines.test_retrieve import World

    world = World(tmp_path, 0)
    search = RetrieveSettings(engine="partitioned", num_lists=4, lists_joined=4, quantizers=1)
    execute(world.unit(2, None, **search.model_dump()))
    told = tables_of(str(tmp_path / "out/birds"))[-1]
    assert told.title == "Recall of retrieval"
    assert told.rows == [["birds", 2, "1.0000 (95 % interval 1.0000 to 1.0000)", 17]]
