"""The dataset card: what is in the final shards and how it came there, rendered from the manifests alone."""

import html
from typing import Any

from curation import storage
from curation.errors import ConfigError
from pipelines.catalog import complete_sets
from pipelines.stats import Table, markdown, report

CARD = "README.md"


def write_card(run: str) -> str:
    """Write the card beside the final shards; returns where."""
    place = storage.join(run, "shards", CARD)
    storage.write_bytes(place, render_card(run).encode())
    return place


def render_card(run: str) -> str:
    """The card of a run as Markdown. Raises ConfigError where there are no complete final shards."""
    sets = complete_sets(run)
    if "shards" not in sets:
        raise ConfigError(f"{run} has no final shards yet: run it to its end")
    shards = sets["shards"].manifest
    lines = [
        "# Dataset card",
        "",
        f"{shards['rows']:,} images in {len(shards['rows_per_part'])} Parquet shards "
        f"({shards['bytes'] / 1e6:,.1f} MB), "
        "curated from uncurated pools by copy detection, retrieval and balancing as DINOv2's LVD-142M was.",
        "Every row carries the image's bytes as fetched, where it came from, and why it was selected.",
        "",
        f"Seed {shards['config']['seed']}. Content `{shards['content']}`.",
        "",
    ]
    for table in report(run):
        lines += [f"## {table.title}", "", markdown(_escaped(table)), ""]
    lines += ["## Settings", "", markdown(_escaped(_settings(sets))), ""]
    lines += ["## Fingerprints", "", markdown(_fingerprints(sets)), ""]
    lines += [
        "## Before you use it",
        "",
        "Images were fetched with an honest user agent; servers that sent noai, noimageai, noindex or noimageindex "
        "were respected. Rights to the images remain with their owners; the URLs are kept so that images can be traced "
        "and taken down. No content filter beyond those listed above was applied.",
        "",
    ]
    return "\n".join(lines)


def _escaped(table: Table) -> Table:
    rows = [[html.escape(v, quote=False) if isinstance(v, str) else v for v in row] for row in table.rows]
    return Table(table.title, table.columns, rows)


def _settings(sets: dict[str, Any]) -> Table:
    rows = [[name, key, str(value)] for name, s in sets.items() for key, value in _flat(s.manifest["config"])]
    return Table("Settings", ["set", "setting", "value"], rows)


def _flat(config: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in config.items():
        found += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return found


def _fingerprints(sets: dict[str, Any]) -> Table:
    rows = [[name, f"`{s.manifest['fingerprint'][:16]}`", f"`{s.content[:16]}`"] for name, s in sets.items()]
    return Table("Fingerprints", ["set", "fingerprint", "content"], rows)
