"""What retrieval brought: images again and again found as k grows, what query sets share, and the search's recall.

Counts are DuckDB's, over the parts where they lie; ranks are stored, so that smaller k need no search of their own.
"""

from typing import Any

from curation import storage
from curation.shards import ShardSet
from pipelines.catalog import one_line_errors
from pipelines.retrieve import recall_uri
from pipelines.retrieve_recall import told
from pipelines.stats import Table, query_sets


def retrieval_tables(retrieved: list[ShardSet], connection: Any) -> list[Table]:
    """Tables over the complete sets `retrieved/QUERY`, of which `connection` has the view `retrieved`."""
    if not retrieved:
        return []
    return [collisions(connection), overlap(connection), recall(retrieved)]


def tables_of(uri: str) -> list[Table]:
    """All tables of one retrieved set, the counts included; those without rows are left out."""
    import duckdb

    shard_set = ShardSet(uri).require("retrieved")
    if not shard_set.num_rows:
        return []
    parts = [shard_set.part_uri(part) for part in range(shard_set.num_parts)]
    with one_line_errors():
        connection = duckdb.connect()
        connection.execute("SET enable_progress_bar = false")
        if not storage.is_local(uri):
            connection.register_filesystem(storage.filesystem(uri)[0])
        name = shard_set.source.replace("'", "''")
        connection.read_parquet(parts).project(f"'{name}' AS query_set, *").create_view("retrieved")
        tables = [query_sets({"retrieved/": shard_set}, connection), *retrieval_tables([shard_set], connection)]
    return [table for table in tables if table.rows]


def collisions(connection: Any) -> Table:
    """Sample-based: what k' = 1, 2, 4, ... and k itself would have brought, and the share of it that is not new."""
    sampled = "FROM retrieved WHERE mode = 'sample'"
    nominal = _by_rank(connection, f"SELECT query_set, rank, count(*) {sampled} GROUP BY ALL")
    first = f"(SELECT query_set, image_id, min(rank) AS rank {sampled} GROUP BY ALL)"
    unique = _by_rank(connection, f"SELECT query_set, rank, count(*) FROM {first} GROUP BY ALL")
    rows: list[list[Any]] = []
    for name in sorted(nominal):
        largest = max(nominal[name])
        steps = [2**power for power in range(largest.bit_length()) if 2**power < largest]
        for k in [*steps, largest]:
            asked, found = (
                sum(count for rank, count in by_rank[name].items() if rank <= k) for by_rank in (nominal, unique)
            )
            rows.append([name, k, asked, found, f"{100 * (1 - found / asked):.1f} %"])
    return Table("Collisions as k grows", ["query set", "k", "nominal", "unique", "collisions"], rows)


def _by_rank(connection: Any, sql: str) -> dict[str, dict[int, int]]:
    found: dict[str, dict[int, int]] = {}
    for name, rank, count in connection.execute(sql).fetchall():
        found.setdefault(name, {})[rank] = count
    return found


def overlap(connection: Any) -> Table:
    """Unique images that two query sets both retrieved, in whatever mode, and their share of the smaller of the two."""
    each = "(SELECT DISTINCT query_set, image_id FROM retrieved)"
    sizes = dict(connection.execute(f"SELECT query_set, count(*) FROM {each} GROUP BY ALL").fetchall())
    sql = f"SELECT a.query_set, b.query_set, count(*) FROM {each} a JOIN {each} b USING (image_id) "
    sql += "WHERE a.query_set < b.query_set GROUP BY ALL ORDER BY ALL"
    shared = {(first, second): count for first, second, count in connection.execute(sql).fetchall()}
    rows: list[list[Any]] = []
    for second in sorted(sizes):
        for first in sorted(name for name in sizes if name < second):
            count = shared.get((first, second), 0)
            rows.append([first, second, count, f"{100 * count / min(sizes[first], sizes[second]):.1f} %"])
    return Table("Retrieved for two query sets", ["query set", "and", "images", "of the smaller"], sorted(rows))


def recall(retrieved: list[ShardSet]) -> Table:
    """The measured recall of each search that was not exact."""
    rows: list[list[Any]] = []
    for shard_set in retrieved:
        if shard_set.manifest["config"].get("engine") == "partitioned":
            kept = ShardSet(recall_uri(shard_set.uri.rpartition("/")[0], shard_set.source))
            (row,) = kept.read(0).to_pylist()
            rows.append([shard_set.source, row["k"], told(row), row["num_sampled"]])
    return Table("Recall of retrieval", ["query set", "k", "recall@k", "sampled queries"], rows)
