"""An audit as tables for people, and as JSON or Parquet with all that was found."""

import json
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation import storage
from pipelines.audit import Audit, Audited, Finding, Where
from pipelines.shown import printable, shown
from pipelines.stats import Table

FEW = 20
"""Up to so many given images each is shown; of more, the report and the worst."""
WORST = 10
SHOWN_ALIKE = 3
"""Images that look alike which a table shows, of those in the set and of the others."""

FOUND = pa.schema(
    [
        *[pa.field(name, pa.string()) for name in ("name", "query_image_id", "problem", "verdict", "relation")],
        pa.field("similarity", pa.float32()),
        *[pa.field(name, pa.string()) for name in ("source", "role")],
        pa.field("row", pa.int64()),
        *[pa.field(name, pa.string()) for name in ("image_id", "url", "label")],
        pa.field("in_set", pa.bool_()),
        *[pa.field(name, pa.string()) for name in ("stage", "reason", "of", "of_source")],
        pa.field("of_similarity", pa.float32()),
        pa.field("parts", pa.list_(pa.string())),
    ]
)
"""One row for each finding of each given image; an image without any has one row, with nulls."""


def tables(audit: Audit) -> list[Table]:
    """The report, and each image where they are few; text from data is escaped."""
    found = [_unreadable(audit.images), contamination(audit), _dropped(audit)]
    if len(audit.images) <= FEW:
        numbered = [(str(number), image) for number, image in enumerate(audit.images, 1)]
        found = [_verdicts(audit.images), _findings("Found", numbered), *(found if len(audit.images) > 1 else [])]
    else:
        found.append(_findings("Worst", [(shown(image.name), image) for image in _worst(audit.images)]))
    return [table for table in found if table.rows]


def contamination(audit: Audit) -> Table:
    """Given images that have an exact copy, or one of them or a near-copy above each threshold: how many, by place."""
    readable = [image for image in audit.images if image.problem is None]
    limits: list[tuple[str, float | None]] = [("exact copy", None)]
    for threshold in audit.thresholds:
        names = ", ".join(name for name, value in audit.own.items() if value == threshold)
        limits.append((f"cosine above {threshold:g}" + (f" ({names})" if names else ""), threshold))
    rows: list[list[Any]] = []
    for title, limit in limits:
        inside = sum(_reaches(image, limit, "set") for image in readable)
        both = sum(_reaches(image, limit, "set") or _reaches(image, limit, "pool") for image in readable)
        in_set = [inside, _share(inside, len(readable))] if audit.has_set else [None, ""]
        rows.append([title, *in_set, both, _share(both, len(readable))])
    columns = ["images with", "in the set", "share", "in the set or the pool", "share of all"]
    return Table(f"Contamination of {len(readable):,} images", columns, rows)


def _reaches(image: Audited, limit: float | None, where: Where) -> bool:
    """Whether there is an exact copy, or with `limit` also a near-copy of a higher cosine."""
    if image.best("exact", where) is not None:
        return True
    near = image.best("near_copy", where) if limit is not None else None
    return near is not None and bool(np.float32(near) > np.float32(limit or 0))


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f} %" if whole else ""


def _dropped(audit: Audit) -> Table:
    """What kept copies out of the set, by the first copy of each image that has none in it."""
    counts: Counter[tuple[str, str]] = Counter()
    for image in audit.images:
        copies = [f for f in image.findings if f.relation != "alike" and f.lies("pool")]
        if copies and not any(image.best(relation, "set") for relation in ("exact", "near_copy")):
            counts[copies[0].fate.stage or "", copies[0].fate.reason or "kept so far"] += 1
    rows = [[stage, reason, count] for (stage, reason), count in sorted(counts.items())]
    return Table("Copies that are not in the set", ["dropped by", "reason", "images"], rows)


def _unreadable(images: list[Audited]) -> Table:
    counts = Counter(printable(image.problem) for image in images if image.problem is not None)
    return Table("Unreadable images", ["problem", "images"], [list(item) for item in sorted(counts.items())])


def _verdicts(images: list[Audited]) -> Table:
    rows: list[list[Any]] = [[str(n), shown(i.name), i.image_id, shown(i.verdict)] for n, i in enumerate(images, 1)]
    return Table("Images", ["", "image", "image_id", "verdict"], rows)


def _findings(title: str, images: list[tuple[str, Audited]]) -> Table:
    """What was found for each image, by its number or name."""
    rows: list[list[Any]] = []
    for name, image in images:
        for finding in _few_alike(image.findings):
            fate = finding.fate
            cosine = None if finding.similarity is None else round(finding.similarity, 3)
            start = [name, finding.relation, cosine, fate.source, str(fate.row)]
            rows.append([*start, fate.image_id, shown(fate.text), shown(fate.url or "")])
    return Table(title, ["image", "relation", "cosine", "source", "row", "image_id", "what became of it", "url"], rows)


def _few_alike(findings: list[Finding]) -> list[Finding]:
    """The copies; where there are none, SHOWN_ALIKE of what looks alike in the set, and of the rest."""
    if copies := [f for f in findings if f.relation != "alike"]:
        return copies
    return [f for side in (True, False) for f in [f for f in findings if bool(f.fate.in_set) == side][:SHOWN_ALIKE]]


def _worst(images: list[Audited]) -> list[Audited]:
    """Images with copies in the set, then with copies that were dropped, the closest first; with those copies alone."""
    ranked: list[tuple[float, float, int, Finding]] = []
    for number, image in enumerate(images):
        copies = [f for f in image.findings if f.relation != "alike" and not f.lies("other")]
        if copies:
            best = max(copies, key=_closeness)
            place, similarity = _closeness(best)
            ranked.append((-place, -similarity, number, best))
    ranked.sort(key=lambda entry: entry[:3])
    return [Audited(images[number].name, findings=[best]) for _, _, number, best in ranked[:WORST]]


def _closeness(finding: Finding) -> tuple[float, float]:
    return float(bool(finding.fate.in_set)), 2.0 if finding.similarity is None else finding.similarity


def _rows(audit: Audit) -> list[dict[str, Any]]:
    rows = []
    for image in audit.images:
        own = {"name": _storable(image.name), "query_image_id": image.image_id, "problem": image.problem}
        own["verdict"] = image.verdict
        rows += [{**own, **_values(finding)} for finding in image.findings] or [own]
    return rows


def _values(finding: Finding) -> dict[str, Any]:
    fate = finding.fate
    keys = ("source", "role", "row", "image_id", "url", "label", "in_set", "stage", "reason", "of", "of_source")
    values = {key: getattr(fate, key) for key in keys}
    told = {"relation": finding.relation, "similarity": finding.similarity, "of_similarity": fate.similarity}
    return {**values, **told, "parts": list(fate.parts)}


def _storable(text: str) -> str:
    """A file's name as UTF-8: bytes that are none are escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def write_parquet(audit: Audit, uri: str) -> None:
    """All findings, in columns FOUND; holds them once more."""
    with storage.AtomicFile(uri) as file:
        pq.write_table(pa.Table.from_pylist(_rows(audit), FOUND), file, compression="zstd")


def write_json(audit: Audit, run: str, uri: str) -> None:
    """All findings by image, the report and the notes; holds the text."""
    images = []
    for image in audit.images:
        own = {"name": _storable(image.name), "image_id": image.image_id, "problem": image.problem}
        images.append({**own, "verdict": image.verdict, "findings": [_values(f) for f in image.findings]})
    report = contamination(audit)
    value = {
        "run": run,
        "notes": audit.notes,
        "thresholds": audit.thresholds,
        "own_thresholds": audit.own,
        "contamination": [dict(zip(report.columns, row, strict=True)) for row in report.rows],
        "images": images,
    }
    storage.write_bytes(uri, json.dumps(value, indent=1).encode())
