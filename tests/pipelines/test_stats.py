"""Figures of a run, against counting rows one by one."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from curation.balance_measures import gini, kl_to_uniform, normalized_entropy
from curation.shards import ShardSet
from pipelines.cluster_tables import balance_tables
from pipelines.recall import RECALL
from pipelines.stats import Table, cell, markdown, report
from tests.builders import image_table, rows_of, table, write_set

POOLS = ("web", "book")


@pytest.fixture(scope="module")
def tables(tiny_run: Path) -> dict[str, Table]:
    return {table.title: table for table in report(str(tiny_run))}


def by_name(table: Table) -> dict[str, list[object]]:
    return {row[0]: row[1:] for row in table.rows}


def test_the_funnel(tiny_run: Path, tables: dict[str, Table]) -> None:
    funnel = {name: row[0] for name, row in by_name(tables["Funnel"]).items()}
    filtered = [row for name in POOLS for row in rows_of(tiny_run / "filtered" / name)]
    duplicates = [row for name in POOLS for row in rows_of(tiny_run / "duplicates" / name)]
    retrieved = rows_of(tiny_run / "retrieved/birds")
    assert funnel == {
        "pool rows": 51,
        "fetched": 49,
        "unique": sum(row["reason"] != "exact_duplicate" for row in filtered),
        "kept by filter": sum(row["kept"] for row in filtered),
        "embedded": len(duplicates),
        "after self-dedup": sum(row["reason"] != "near_duplicate" for row in duplicates),
        "after relative dedup": sum(row["kept"] for row in duplicates),
        "retrieved (nominal)": len(retrieved),
        "retrieved (unique)": len({row["image_id"] for row in retrieved}),
        "selected": len(rows_of(tiny_run / "selection")),
        "in shards (copies counted)": len(rows_of(tiny_run / "shards")),
    }
    assert funnel["unique"] == 48
    assert funnel["kept by filter"] == 45
    assert funnel["after self-dedup"] < funnel["embedded"]
    assert funnel["after relative dedup"] < funnel["after self-dedup"]
    assert by_name(tables["Funnel"])["fetched"][1] == f"{100 * 49 / 51:.1f} %"


def test_verdicts_and_rejects(tiny_run: Path, tables: dict[str, Table]) -> None:
    counts: Counter[tuple[str, str]] = Counter()
    for kind in ("filtered", "duplicates"):
        for name in POOLS:
            counts.update((kind, row["reason"]) for row in rows_of(tiny_run / kind / name) if not row["kept"])
    assert {(row[0], row[1]): row[2] for row in tables["Dropped from the pools"].rows} == dict(counts)
    assert {reason for kind, reason in counts if kind == "filtered"} == {
        "exact_duplicate",
        "too_elongated",
        "too_small",
        "undecodable",
    }
    assert tables["Rejects"].rows == [["images/web", "empty", 1], ["images/web", "not_an_image", 1]]


def test_sources_and_query_sets(tiny_run: Path, tables: dict[str, Table]) -> None:
    selected = Counter(row["source"] for row in rows_of(tiny_run / "selection"))
    for name, row in by_name(tables["Sources"]).items():
        filtered = rows_of(tiny_run / "filtered" / name)
        assert row == [
            {"birds": "query", "bench": "reference"}.get(name, "pool"),
            len(filtered),
            sum(r["kept"] for r in filtered),
            selected[name],
        ]
    modes = Counter(row["mode"] for row in rows_of(tiny_run / "retrieved/birds"))
    assert {row[1]: row[2] for row in tables["Retrieved"].rows} == dict(modes)


def test_balance(tiny_run: Path, tables: dict[str, Table]) -> None:
    """What is selected, with its copies, is what the final shards hold."""
    before = Counter(row["cluster_1"] for name in POOLS for row in rows_of(tiny_run / "clusters" / name))
    after = Counter(row["clusters"][0] for row in rows_of(tiny_run / "shards") if row["clusters"])
    expected = []
    for name, counts in (("pool after dedup", before), ("selection", after)):
        sizes = np.array([counts[c] for c in range(4)])
        figures = [round(f(sizes), 3) for f in (normalized_entropy, gini, kl_to_uniform)]
        expected.append(["1", name, sizes.sum(), 4, (sizes > 0).sum(), *figures])
    assert tables["Balance by level"].rows == expected
    assert balance_tables(str(tiny_run)) == [tables["Balance by level"]]


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    write_set(tmp_path / "images/web", "images", [image_table([b"x", b"y"])], source="web", role="pool")
    assert [(t.title, t.rows) for t in report(str(tmp_path))] == [
        ("Funnel", [["pool rows", 2, ""], ["fetched", 2, "100.0 %"]]),
        ("Sources", [["web", "pool", 2, None, None]]),
    ]


def test_a_run_cut_off_after_any_stage_can_be_told_of(run_copy: Path) -> None:
    for name in ("shards", "selection", "retrieved/birds", "clusters/web", "centroids", "duplicates/web"):
        ShardSet(str(run_copy / name)).delete()
        assert report(str(run_copy))[0].title == "Funnel"


def test_near_copies(tiny_run: Path, tables: dict[str, Table]) -> None:
    rows = [{**row, "source": name} for name in POOLS for row in rows_of(tiny_run / "duplicates" / name)]
    stay = sum(row["reason"] != "near_duplicate" for row in rows)
    largest = max(row["component_size"] for row in rows)
    kept = [0.999, stay, f"{100 * stay / len(rows):.1f} %", largest]
    assert tables["Self-dedup at higher thresholds"].rows == [kept]
    sizes = tables["Components of near-copies"].rows
    assert sizes[0] == ["1", *[sum(row["component_size"] == 1 for row in rows)] * 2]
    assert [sum(row[at] for row in sizes) for at in (1, 2)] == [stay, len(rows)]
    source_of = {(row["source"], row["image_id"]): row for row in rows}
    shown = tables["First images of the largest components"].rows
    assert len(shown) > 3
    for component, size, source, name in shown:
        row = source_of[source, name]
        assert (component, size) == (str(row["component"]), row["component_size"])


def test_components_of_semdedup_have_no_curve(run_copy: Path) -> None:
    forest = ShardSet(str(run_copy / "forest"))
    config = {**forest.manifest["config"], "preset": "semdedup"}
    forest.write_manifest({**forest.manifest, "config": config})
    titles = [table.title for table in report(str(run_copy))]
    assert "Components of near-copies" in titles
    assert "Self-dedup at higher thresholds" not in titles


def write_recall(run: Path, **changes: object) -> None:
    """A recall set of one row; `changes` are to its figures."""
    ends = {"": 0.98996, "_low": 0.97, "_high": 1.0}
    figures = {f"recall_{what}{end}": value for what in ("component", "joined") for end, value in ends.items()}
    counts = {"num_sampled": 4000, "num_with_pairs": 900, "num_pairs": 12345, "k_too_short": 17}
    row = {**figures, **counts, **changes}
    write_set(run / "recall", "recall", [table(RECALL, **{name: [value] for name, value in row.items()})])


def test_recall(tmp_path: Path) -> None:
    write_recall(tmp_path, recall_joined_low=0.96)
    (found,) = report(str(tmp_path))
    assert (found.title, found.columns) == ("Recall of the join", ["near-copies found", "value", "from", "to"])
    assert found.rows == [
        ["recall: in one component", 0.9899, 0.97, 1.0],
        ["recall: compared", 0.9899, 0.96, 1.0],
        ["sampled images", 4000, None, None],
        ["of these with near-copies", 900, None, None],
        ["their near-copies", 12345, None, None],
        ["sampled images with more than 64", 17, None, None],
    ]


def test_recall_of_an_engine_without_lists_and_without_pairs(tmp_path: Path) -> None:
    write_recall(tmp_path, recall_joined=None, note="nothing measured")
    (found,) = report(str(tmp_path))
    assert [row[0] for row in found.rows if "compared" in row[0]] == []
    assert found.rows[-1] == ["nothing measured", None, None, None]


def test_markdown() -> None:
    table = Table("T", ["a", "b"], [["x|y", 1234567], [None, 0.5]])
    assert markdown(table) == "| a | b |\n|---|---|\n| x\\|y | 1,234,567 |\n|  | 0.5 |"
    assert [cell(v) for v in (None, 1000, 1.5, True, "x")] == ["", "1,000", "1.5", "True", "x"]
