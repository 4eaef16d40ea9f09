"""What explain tells of a cluster, and the tables on clusters in stats, against counting rows one by one."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from curation.errors import ConfigError
from curation.manifest import Input
from curation.partwise import fixed_size_lists, matrix
from curation.scoring import cosine_pairs
from curation.shards import ShardSet
from pipelines import coverage
from pipelines.cluster_tables import cluster_tables
from pipelines.explain import Explained, Member, explain, tables, write_json
from pipelines.fates import Fate
from pipelines.stats import Table, report
from tests.builders import rows_of, write_set

POOLS = ("book", "web")
FINEST, COARSE = 4, 3
WITHIN = (2, 0, 2, 0)
"""The cluster of level 2 that each finest one lies in; cluster 1 of level 2 is empty."""


def vectors(run: Path, source: str) -> dict[str, Any]:
    found = ShardSet(str(run / "embeddings/default" / source))
    made = {}
    for part in range(found.num_parts):
        table = found.read(part)
        made |= dict(zip(table["image_id"].to_pylist(), matrix(table), strict=True))
    return made


@pytest.fixture
def two_levels(run_copy: Path) -> Path:
    """The small run with a second level: clusters of whole clusters, and made-up centroids."""
    centroids = ShardSet(str(run_copy / "centroids"))
    schema = centroids.read(0).schema
    finest = matrix(centroids.read(0), "centroid")
    coarse = np.stack([finest[1], -finest[1], finest[0]]).astype(np.float32)
    levels = [1] * FINEST + [2] * COARSE
    columns = [pa.array(levels, pa.int32()), pa.array([*range(FINEST), *range(COARSE)], pa.int32())]
    both = fixed_size_lists(np.concatenate([finest, coarse]), schema.field("centroid").type)
    order = [5, 0, 4, 1, 6, 2, 3]
    parents = pa.array([*WITHIN, *[None] * COARSE], pa.int32())
    made = pa.table([*columns, both, parents], schema=schema).take(order)
    labels = centroids.labels
    centroids.delete()
    write_set(centroids.uri, "centroids", [made.slice(0, 3), made.slice(3)], **labels)
    for source in POOLS:
        clusters = ShardSet(str(run_copy / "clusters" / source))
        tables = [clusters.read(part) for part in range(clusters.num_parts)]
        lifted = [
            t.add_column(2, "cluster_2", pa.array([WITHIN[c] for c in t["cluster_1"].to_pylist()], pa.int32()))
            for t in tables
        ]
        labels = clusters.labels
        clusters.delete()
        write_set(clusters.uri, "clusters", lifted, **labels)
    selection = ShardSet(str(run_copy / "selection"))
    parts = [selection.read(part) for part in range(selection.num_parts)]
    copied = [
        t.set_column(2, t.schema.field(2), pa.array([1 + n % 3 for n in range(len(t))], pa.int32())) for t in parts
    ]
    manifest = selection.manifest
    selection.delete()
    inputs = tuple(Input(record["name"], record["content"]) for record in manifest["inputs"])
    write_set(selection.uri, "selection", copied, config=manifest["config"], inputs=inputs)
    return run_copy


def centroids_of(run: Path, level: int) -> Any:
    rows = [row for row in rows_of(run / "centroids") if row["level"] == level]
    return np.array([row["centroid"] for row in sorted(rows, key=lambda row: row["cluster"])], np.float32)


def members(run: Path, level: int, number: int) -> list[dict[str, Any]]:
    rows = [{**row, "source": source} for source in POOLS for row in rows_of(run / "clusters" / source)]
    return [row for row in rows if row[f"cluster_{level}"] == number]


def hits(run: Path, level: int) -> Counter[int]:
    """Queries by the cluster that their nearest finest centroid lies in."""
    queries = np.stack(list(vectors(run, "birds").values()))
    finest = centroids_of(run, 1)
    nearest = []
    for row in range(len(queries)):
        scores = cosine_pairs(queries, np.full(FINEST, row), finest, np.arange(FINEST))
        nearest.append(int(scores.argmax()))
    return Counter(nearest if level == 1 else [WITHIN[c] for c in nearest])


def check(run: Path, found: Explained) -> None:
    rows = members(run, found.level, found.cluster)
    assert (found.size, found.pool) == (len(rows), sum(len(rows_of(run / "clusters" / s)) for s in POOLS))
    assert found.sources == Counter(row["source"] for row in rows)
    ids = {(row["source"], row["image_id"]) for row in rows}
    images = {(s, row["image_id"]): row for s in POOLS for row in reversed(rows_of(run / "images" / s))}
    labels = (images[key]["label"] for key in ids)
    assert found.labels == Counter(label for label in labels if label is not None)
    selected = [row for row in rows_of(run / "selection") if (row["source"], row["image_id"]) in ids]
    assert (found.selected, found.copies) == (len(selected), sum(row["copies"] for row in selected))
    assert found.parts == Counter(reason["part"] for row in selected for reason in row["reasons"])
    assert found.queries == {"birds": (hits(run, found.level)[found.cluster], 10)}
    check_members(run, found, rows)
    for member in [*found.typical, *found.outlying]:
        image = images[member.fate.source, member.fate.image_id]
        assert (member.fate.url, member.fate.label) == (image["url"], image["label"])
        chosen = [row["image_id"] for row in selected if row["source"] == member.fate.source]
        assert member.fate.in_set == (member.fate.image_id in chosen)


def check_members(run: Path, found: Explained, rows: list[dict[str, Any]]) -> None:
    centroid = centroids_of(run, found.level)[[found.cluster]]
    known = {source: vectors(run, source) for source in POOLS}
    every = []
    for row in rows:
        vector = known[row["source"]][row["image_id"]][None]
        distance = float(np.float32(1) - cosine_pairs(vector, np.zeros(1, int), centroid, np.zeros(1, int))[0])
        every.append((distance, row["image_id"]))
    named = [[(m.distance, m.fate.image_id) for m in side] for side in (found.typical, found.outlying)]
    assert named[0] == sorted(every)[:3]
    assert named[1] == sorted(every, key=lambda e: (-e[0], e[1]))[:3]


@pytest.mark.parametrize("cluster", ["0", "1", "2", "1:3"])
def test_a_cluster_of_the_only_level(tiny_run: Path, cluster: str) -> None:
    found = explain(str(tiny_run), cluster, 3)
    check(tiny_run, found)
    centroids = centroids_of(tiny_run, 1)
    others = [c for c in range(FINEST) if c != found.cluster]
    cosine = cosine_pairs(centroids, np.full(3, found.cluster), centroids, np.array(others)).tolist()
    expected = sorted(zip(cosine, others, strict=True), reverse=True)
    assert [(n.cosine, n.cluster) for n in found.neighbors] == expected
    assert all(n.size == len(members(tiny_run, 1, n.cluster)) for n in found.neighbors)


@pytest.mark.parametrize("cluster", ["2:0", "2:1", "2:2", "0"])
def test_a_cluster_of_any_level(two_levels: Path, cluster: str) -> None:
    found = explain(str(two_levels), cluster, 3)
    assert found.size > 0 or cluster == "2:1"
    check(two_levels, found)
    assert tables(found)[0].rows[0] == ["images", found.size]


def test_what_is_no_cluster_is_refused(two_levels: Path, tmp_path: Path) -> None:
    wrong = {
        "4": "there is no cluster 4 at level 1: they are numbered 0 to 3",
        "3:0": "there is no level 3: the clusters have 2",
        "0:0": "there is no level 0",
        "-1": "names no cluster",
        "1:²": "names no cluster",
        "x\x1b": "names no cluster",
    }
    for cluster, words in wrong.items():
        with pytest.raises(ConfigError, match=words) as refused:
            explain(str(two_levels), cluster)
        assert str(refused.value).isprintable()
    for name in ("clusters/web", "selection", "shards"):
        ShardSet(str(two_levels / name)).delete()
    with pytest.raises(ConfigError, match="has no clusters yet"):
        explain(str(two_levels), "0")


def test_before_there_is_a_selection(run_copy: Path, tmp_path: Path) -> None:
    for name in ("shards", "selection", "retrieved/birds"):
        ShardSet(str(run_copy / name)).delete()
    found = explain(str(run_copy), "0")
    assert (found.selected, found.copies, found.parts) == (None, None, {})
    assert {member.fate.in_set for member in found.typical} == {None}
    write_json(found, str(tmp_path / "c.json"))
    stored = json.loads((tmp_path / "c.json").read_text())
    assert [m["fate"]["image_id"] for m in stored["typical"]] == [m.fate.image_id for m in found.typical]
    assert stored["queries"]["birds"] == list(found.queries["birds"])


def test_texts_of_the_run_are_escaped() -> None:
    fate = Fate("web", "pool", 0, 0, "0" * 32, "http://x/\x1b[2J", "\x07" + "l" * 500, True, parts=("a\x9b",))
    found = Explained(1, 0, 1, 1, labels=Counter({"\x1b]0;\x07": 1}), typical=[Member(0.1, fate)])
    cells = [cell for table in tables(found) for row in table.rows for cell in row if isinstance(cell, str)]
    assert all(cell.isprintable() and len(cell) < 200 for cell in cells)
    assert "\\x1b]0;\\x07" in cells and "http://x/\\x1b[2J" in cells


def by_title(run: Path) -> dict[str, Table]:
    return {table.title: table for table in cluster_tables(str(run))}


def test_balance_by_level(two_levels: Path) -> None:
    selected = {(row["source"], row["image_id"]): row["copies"] for row in rows_of(two_levels / "selection")}
    expected = []
    for level, count in ((1, FINEST), (2, COARSE)):
        rows = [members(two_levels, level, number) for number in range(count)]
        pool = np.array([len(own) for own in rows])
        taken = np.array([sum(selected.get((r["source"], r["image_id"]), 0) for r in own) for own in rows])
        for name, sizes in (("pool after dedup", pool), ("selection", taken)):
            share = sizes[sizes > 0] / sizes.sum()
            entropy = -(share * np.log(share)).sum()
            gini = np.abs(sizes[:, None] - sizes[None]).mean() / (2 * sizes.mean())
            figures = [entropy / np.log(count), gini, np.log(count) - entropy]
            expected.append([str(level), name, sizes.sum(), count, len(share), *np.round(figures, 3)])
    assert by_title(two_levels)["Balance by level"].rows == expected


def test_seed_coverage(two_levels: Path) -> None:
    rows = by_title(two_levels)["Seed coverage"].rows
    expected = []
    for level, count in ((1, FINEST), (2, COARSE)):
        touched = [number in hits(two_levels, level) for number in range(count)]
        sizes = [len(members(two_levels, level, number)) for number in range(count)]
        for name, queries, side in (("birds", 10, True), ("any of them", 10, True), ("none of them", None, False)):
            inside = [size for size, is_touched in zip(sizes, touched, strict=True) if is_touched == side]
            shares = [f"{100 * len(inside) / count:.1f} %", f"{100 * sum(inside) / sum(sizes):.1f} %"]
            expected.append([str(level), name, queries, len(inside), *shares])
    assert rows == expected
    assert rows[5][3] > 0


def test_many_queries_are_sampled(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {row[1]: row[2:] for row in by_title(tiny_run)["Seed coverage"].rows}
    monkeypatch.setattr(coverage, "MAX_PRODUCTS", 5 * FINEST * 128)
    some = {row[1]: row[2:] for row in by_title(tiny_run)["Seed coverage"].rows}
    assert whole["birds"][0] == 10 and 0 < some["birds"][0] < 10
    assert some["birds"][1] <= whole["birds"][1]


def test_stats_tells_of_clusters_once_they_are_there(run_copy: Path) -> None:
    titles = [table.title for table in report(str(run_copy))]
    assert titles[-2:] == ["Balance by level", "Seed coverage"]
    for name in ("shards", "selection"):
        ShardSet(str(run_copy / name)).delete()
    assert [row[1] for row in by_title(run_copy)["Balance by level"].rows] == ["pool after dedup"]
    ShardSet(str(run_copy / "clusters/web")).delete()
    assert cluster_tables(str(run_copy)) == []
