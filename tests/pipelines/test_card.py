"""The dataset card: written from the manifests, with nothing in it that a page would run."""

from pathlib import Path

import pytest

from curation.errors import ConfigError
from curation.shards import ShardSet
from pipelines.card import CARD, render_card, write_card
from pipelines.catalog import complete_sets
from pipelines.stats import cell, report


def test_a_run_writes_its_card(tiny_run: Path) -> None:
    assert (tiny_run / "shards" / CARD).read_text() == render_card(str(tiny_run))


def test_the_card_tells_all_of_it(tiny_run: Path) -> None:
    card = render_card(str(tiny_run))
    sets = complete_sets(str(tiny_run))
    shards = sets["shards"].manifest
    assert f"{shards['rows']:,} images in {len(shards['rows_per_part'])} Parquet shards" in card
    assert f"Seed 7. Content `{shards['content']}`" in card
    for table in report(str(tiny_run)):
        assert f"## {table.title}" in card
        for row in table.rows:
            assert " | ".join(cell(value) for value in row) in card
    for name, shard_set in sets.items():
        assert f"| {name} | `{shard_set.manifest['fingerprint'][:16]}` | `{shard_set.content[:16]}` |" in card
    assert "| duplicates/web | threshold | 0.999 |" in card
    assert "| duplicates/web | reference_threshold | 0.999 |" in card


def test_the_card_is_the_same_each_time(tiny_run: Path) -> None:
    assert render_card(str(tiny_run)) == render_card(str(tiny_run))


def test_markup_in_settings_is_escaped(run_copy: Path) -> None:
    shard_set = ShardSet(str(run_copy / "selection"))
    hostile = "<script>alert(1)</script> | [x](javascript:y)\n# heading"
    shard_set.write_manifest({**shard_set.manifest, "config": {"parts": {"0": {"name": hostile}}}})
    card = render_card(str(run_copy))
    assert "<script>" not in card
    assert "&lt;script&gt;alert(1)&lt;/script&gt; \\|" in card
    assert "\n# heading" not in card


def test_the_card_lies_beside_the_shards_and_harms_nothing(run_copy: Path) -> None:
    (run_copy / "shards" / CARD).unlink()
    place = write_card(str(run_copy))
    assert place == str(run_copy / "shards" / CARD)
    assert ShardSet(str(run_copy / "shards")).num_rows > 0


def test_a_run_without_shards_has_no_card(run_copy: Path) -> None:
    ShardSet(str(run_copy / "shards")).delete()
    with pytest.raises(ConfigError, match="no final shards"):
        render_card(str(run_copy))
