"""What a run did, in numbers: the funnel, rejects, near-copies, sources and query sets; `report` has all tables."""

import math
from dataclasses import dataclass
from typing import Any

from curation.recall import PAPER_K
from curation.shards import ShardSet
from pipelines.catalog import complete_sets, one_line_errors, open_catalog
from pipelines.chains import components, curve, pool_sources


@dataclass(frozen=True)
class Table:
    """One table of a report: a title, column names and rows of plain values."""

    title: str
    columns: list[str]
    rows: list[list[Any]]


def report(run: str) -> list[Table]:
    """All tables that the complete sets of a run allow."""
    from pipelines.cluster_tables import cluster_tables  # which takes Table from here
    from pipelines.retrieval_tables import retrieval_tables  # which does, too

    sets = complete_sets(run)
    connection = open_catalog(run)
    with one_line_errors():
        tables = [
            funnel(sets, connection),
            verdicts(sets, connection),
            rejects(sets),
            *near_copies(sets),
            recall(sets),
            sources(sets, connection),
            query_sets(sets, connection),
            *retrieval_tables(_of_kind(sets, "retrieved"), connection),
        ]
    tables += cluster_tables(run)
    return [table for table in tables if table.rows]


def _of_kind(sets: dict[str, ShardSet], kind: str, role: str | None = None) -> list[ShardSet]:
    found = [s for name, s in sets.items() if name.split("/")[0] == kind]
    return [s for s in found if role is None or s.labels.get("role") == role]


def _one(connection: Any, sql: str) -> int:
    value = connection.execute(sql).fetchone()[0]
    return int(value or 0)


def _pool_names(sets: dict[str, ShardSet]) -> str:
    return ", ".join("'" + str(s.labels["source"]) + "'" for s in _of_kind(sets, "images", "pool"))


def funnel(sets: dict[str, ShardSet], connection: Any) -> Table:
    """From the pools' inputs to the final shards; each row with what is left of the one before."""
    images, filtered = _of_kind(sets, "images", "pool"), _of_kind(sets, "filtered", "pool")
    steps: list[tuple[str, int]] = []
    if images:
        steps.append(("pool rows", sum(s.num_rows + s.manifest["rejects"] for s in images)))
        steps.append(("fetched", sum(s.num_rows for s in images)))
    if filtered:
        where = f"source IN ({_pool_names(sets)})"
        steps.append(
            (
                "unique",
                _one(
                    connection,
                    f"SELECT count(*) FROM filtered WHERE {where} AND reason IS DISTINCT FROM 'exact_duplicate'",
                ),
            )
        )
        steps.append(("kept by filter", _one(connection, f"SELECT count(*) FROM filtered WHERE {where} AND kept")))
    if "duplicates" in {name.split("/")[0] for name in sets}:
        steps.append(("embedded", _one(connection, "SELECT count(*) FROM duplicates")))
        steps.append(
            (
                "after self-dedup",
                _one(connection, "SELECT count(*) FROM duplicates WHERE reason IS DISTINCT FROM 'near_duplicate'"),
            )
        )
        steps.append(("after relative dedup", _one(connection, "SELECT count(*) FROM duplicates WHERE kept")))
    rows = [[name, count, _share(count, steps[i - 1][1]) if i else ""] for i, (name, count) in enumerate(steps)]
    if retrieved := _of_kind(sets, "retrieved"):
        rows.append(["retrieved (nominal)", sum(s.num_rows for s in retrieved), ""])
        rows.append(["retrieved (unique)", _one(connection, "SELECT count(DISTINCT image_id) FROM retrieved"), ""])
    if "selection" in sets:
        rows.append(["selected", sets["selection"].num_rows, ""])
    if "shards" in sets:
        rows.append(["in shards (copies counted)", sets["shards"].num_rows, ""])
    return Table("Funnel", ["step", "images", "of the step before"], rows)


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else ""


def verdicts(sets: dict[str, ShardSet], connection: Any) -> Table:
    """Images of the pools that a deciding stage dropped, by reason."""
    rows: list[list[Any]] = []
    for kind in ("filtered", "duplicates"):
        if _of_kind(sets, kind, "pool"):
            where = f"source IN ({_pool_names(sets)}) AND NOT kept"
            sql = f"SELECT reason, count(*) FROM {kind} WHERE {where} GROUP BY 1 ORDER BY 1"
            rows += [[kind, reason, count] for reason, count in connection.execute(sql).fetchall()]
    return Table("Dropped from the pools", ["by", "reason", "images"], rows)


def rejects(sets: dict[str, ShardSet]) -> Table:
    """Rows that could not be processed, by set and reason."""
    rows = [[name, reason, count] for name, s in sets.items() for reason, count in s.manifest["reasons"].items()]
    return Table("Rejects", ["set", "reason", "rows"], rows)


def near_copies(sets: dict[str, ShardSet]) -> list[Table]:
    """`chain_tables` of a run, as far as dedup is complete."""
    if "forest" not in sets:
        return []
    names = [f"duplicates/{source}" for source in pool_sources(sets["forest"].manifest)]
    complete = set(names) <= set(sets)
    return chain_tables(sets["forest"], [sets[name] for name in names]) if complete else []


def chain_tables(forest: ShardSet, duplicates: list[ShardSet]) -> list[Table]:
    """What other thresholds would keep (not for SemDeDup), components by size, and members of the largest.

    Args:
        forest: dedup's forest.
        duplicates: the verdicts on all pools, in the order of `chains.pool_sources`.
    """
    num_images = sum(s.num_rows for s in duplicates)
    is_semdedup = forest.manifest["config"]["preset"] == "semdedup"
    points = [] if is_semdedup else curve(forest, num_images)
    kept = [[point.threshold, point.kept, _share(point.kept, num_images), point.largest] for point in points]
    classes, members = components(duplicates)
    sizes = [[str(c.low) if c.low == c.high else f"{c.low} to {c.high}", c.components, c.images] for c in classes]
    shown = [[str(m.component), m.size, m.source, m.image_id] for m in members]
    return [
        Table("Self-dedup at higher thresholds", ["threshold", "images kept", "share kept", "largest component"], kept),
        Table("Components of near-copies", ["images of a component", "components", "images"], sizes),
        Table("First images of the largest components", ["component", "images", "source", "image_id"], shown),
    ]


def recall(sets: dict[str, ShardSet]) -> Table:
    """What a join that is not exact found of the true near-copies of sampled images, with 95 % intervals."""
    columns = ["near-copies found", "value", "from", "to"]
    if "recall" not in sets:
        return Table("Recall of the join", columns, [])
    (row,) = sets["recall"].read(0).to_pylist()
    rows: list[list[Any]] = []
    for name, what in (("recall_component", "recall: in one component"), ("recall_joined", "recall: compared")):
        if row[name] is not None:
            rows.append([what, *(_rounded_down(row[name + end]) for end in ("", "_low", "_high"))])
    counts = {
        "num_sampled": "sampled images",
        "num_with_pairs": "of these with near-copies",
        "num_pairs": "their near-copies",
        "k_too_short": f"sampled images with more than {PAPER_K}",
    }
    rows += [[what, row[name], None, None] for name, what in counts.items()]
    if row["note"]:
        rows.append([row["note"], None, None, None])
    return Table("Recall of the join", columns, rows)


def _rounded_down(value: float) -> float:
    """Four digits: what is below a target must not read as the target."""
    return math.floor(value * 1e4 + 1e-6) / 1e4


def sources(sets: dict[str, ShardSet], connection: Any) -> Table:
    """Each source: images, kept, and how many are in the final set."""
    rows: list[list[Any]] = []
    for shard_set in _of_kind(sets, "images"):
        name = shard_set.source
        kept = selected = None
        if f"filtered/{name}" in sets:
            kept = _one(connection, f"SELECT count(*) FROM filtered WHERE source = '{name}' AND kept")
        if "selection" in sets:
            selected = _one(connection, f"SELECT count(*) FROM selection WHERE source = '{name}'")
        rows.append([name, shard_set.labels["role"], shard_set.num_rows, kept, selected])
    return Table("Sources", ["source", "role", "images", "kept by filter", "selected"], rows)


def query_sets(sets: dict[str, ShardSet], connection: Any) -> Table:
    """What was retrieved for each query set: nominal rows and unique images."""
    if not _of_kind(sets, "retrieved"):
        return Table("Retrieved", [], [])
    sql = "SELECT query_set, mode, count(*), count(DISTINCT image_id) FROM retrieved GROUP BY ALL ORDER BY ALL"
    rows = [list(row) for row in connection.execute(sql).fetchall()]
    return Table("Retrieved", ["query set", "mode", "nominal", "unique"], rows)


def markdown(table: Table) -> str:
    """A table as Markdown; bars in values are escaped, and lines joined."""
    lines = ["| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
    cells = [[" ".join(cell(v).replace("|", "\\|").splitlines()) for v in row] for row in table.rows]
    lines += ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join(lines)


def cell(value: Any) -> str:
    """A value as a person reads it."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
