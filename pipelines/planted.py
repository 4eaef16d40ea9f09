"""How well dedup did where the truth is known: planted copies found and missed, and images dropped wrongly."""

from typing import Any

import numpy as np

from curation.balance_measures import entropy, gini
from pipelines.catalog import open_catalog
from pipelines.stats import Table

_POOL = """
CREATE VIEW pool AS
SELECT i.url, i.image_id, t.kind, coalesce(t.original_url, t.reference, t.url) AS family,
       f.reason AS filter_reason, d.component, d.reason, d.representative_id, coalesce(d.kept, false) AS kept
FROM images_{source} i
JOIN (SELECT * FROM read_parquet('{truth}')) t USING (url)
JOIN filtered_{source} f ON f.row = i.row
LEFT JOIN duplicates_{source} d ON d.image_id = i.image_id AND f.kept
"""

_FOUND = """
CASE WHEN kind = 'leak' THEN NOT kept
     WHEN filter_reason = 'exact_duplicate' THEN true
     ELSE EXISTS (SELECT 1 FROM pool o WHERE o.component = p.component AND o.family = p.family AND o.url <> p.url)
END
"""

_WRONG = """
SELECT count(*) FROM pool p
LEFT JOIN pool r ON r.image_id = p.representative_id AND r.filter_reason IS NULL
WHERE (p.reason = 'near_duplicate' AND r.family <> p.family)
   OR (p.reason LIKE 'reference%'
       AND NOT EXISTS (SELECT 1 FROM pool o WHERE o.component = p.component AND o.kind = 'leak'))
"""


def _connect(run: str, source: str, truth: str) -> Any:
    connection = open_catalog(run)
    connection.execute(_POOL.format(source=source, truth=truth.replace("'", "''")))
    return connection


def planted_copies(run: str, source: str, truth: str) -> Table:
    """Planted copies by kind, and how many were found.

    A byte copy is found by the filter, a near-copy when it shares a component with its original or another copy of
    it, a leak when it was dropped. `truth` is a Parquet file with columns url, kind, original_url and reference.
    """
    sql = f"""
    SELECT kind, count(*) AS planted, count(*) FILTER ({_FOUND}) AS found
    FROM pool p WHERE kind NOT IN ('original', 'small') GROUP BY kind ORDER BY kind
    """
    found = _connect(run, source, truth).execute(sql).fetchall()
    rows = [[kind, planted, hits, planted - hits, round(hits / planted, 3)] for kind, planted, hits in found]
    return Table("Planted copies", ["kind", "planted", "found", "missed", "share found"], rows)


def wrongly_dropped(run: str, source: str, truth: str) -> tuple[int, int]:
    """(images dropped as copies of what they are no planted copies of, images that dedup looked at)."""
    connection = _connect(run, source, truth)
    wrong = connection.execute(_WRONG).fetchone()[0]
    looked = connection.execute("SELECT count(*) FROM pool WHERE component IS NOT NULL").fetchone()[0]
    return int(wrong), int(looked)


def label_balance(run: str, source: str) -> Table:
    """Labels of a pool's images before curation, after dedup, and of what the final shards took from the pool."""
    connection = open_catalog(run)
    counts = {
        "fetched": f"SELECT label, count(*) FROM images_{source} GROUP BY 1",
        "after dedup": f"""SELECT i.label, count(*) FROM images_{source} i JOIN filtered_{source} f USING (row)
                           JOIN duplicates_{source} d ON d.image_id = i.image_id AND f.kept WHERE d.kept GROUP BY 1""",
        "final": f"SELECT label, count(*) FROM shards WHERE source = '{source}' GROUP BY 1",
    }
    found = {name: dict(connection.execute(sql).fetchall()) for name, sql in counts.items()}
    labels = sorted(found["fetched"], key=lambda label: (-found["fetched"][label], str(label)))
    rows: list[list[Any]] = [[label, *(found[name].get(label, 0) for name in counts)] for label in labels]
    sizes = [np.asarray([row[i] for row in rows]) for i in range(1, 4)]
    rows.append(["entropy (nats)", *(round(entropy(size), 3) for size in sizes)])
    rows.append(["Gini", *(round(gini(size), 3) for size in sizes)])
    return Table("Labels", ["label", *counts], rows)
