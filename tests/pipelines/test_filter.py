"""Verdicts on every image and the index by id, against a look at all images at once."""

from pathlib import Path

import numpy as np
import pytest

from curation.hashing import image_id
from curation.shards import ShardSet
from pipelines import filter as stage
from pipelines.filter import FilterUnit
from pipelines.recipe import FilterSettings
from tests.builders import cut, execute, fingerprints, image_table, photo, rows_of, truncated, write_set


def filter_unit(tmp_path: Path, min_side: int = 32, max_aspect_ratio: float = 4.0) -> FilterUnit:
    settings = FilterSettings(min_side=min_side, max_aspect_ratio=max_aspect_ratio)
    places = (str(tmp_path / "filtered/web"), str(tmp_path / "index/web"))
    return FilterUnit(str(tmp_path / "images/web"), settings, 1_000_000, *places)


def write_images(tmp_path: Path, parts: list[list[bytes]]) -> None:
    """An images set; rows have gaps, as they have where some could not be fetched."""
    tables, row = [], 3
    for part in parts:
        tables.append(image_table(part, row))
        row += len(part) + 2
    write_set(tmp_path / "images" / "web", "images", tables, source="web", role="pool")


@pytest.mark.parametrize("seed", range(5))
def test_verdicts_equal_brute_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(stage, "BUCKET_ROWS", 11)
    rng = np.random.default_rng(seed)
    distinct = [photo(i, 40, 40) for i in range(20)] + [truncated(i) for i in range(3)]
    chosen = [distinct[i] for i in rng.integers(0, len(distinct), 50)]
    parts = cut(chosen, sorted(rng.integers(0, 50, 6).tolist()))
    write_images(tmp_path, parts)
    execute(filter_unit(tmp_path))

    images = ShardSet(str(tmp_path / "images/web"))
    filtered, index = (ShardSet(str(tmp_path / kind / "web")) for kind in ("filtered", "index"))
    assert filtered.rows_per_part.tolist() == images.rows_per_part.tolist()
    assert index.num_parts == 5
    seen: set[str] = set()
    expected = {}
    for image, verdict in zip(rows_of(images), rows_of(filtered), strict=True):
        name = image["image_id"]
        reason = "exact_duplicate" if name in seen else "undecodable" if image["image"] in distinct[20:] else None
        seen.add(name)
        expected[image["row"]] = (name, reason)
        assert verdict == {"row": image["row"], "image_id": name, "kept": reason is None, "reason": reason}

    entries = rows_of(index)
    assert [(e["image_id"], e["row"]) for e in entries] == sorted((e["image_id"], e["row"]) for e in entries)
    assert {e["row"]: (e["image_id"], e["reason"]) for e in entries} == expected
    for entry in entries:
        there = images.read_rows(entry["part"], entry["position"], entry["position"] + 1).to_pylist()[0]
        assert (there["image_id"], there["row"]) == (entry["image_id"], entry["row"])


def test_the_lowest_row_stands_for_an_image(tmp_path: Path) -> None:
    one, two = photo(1), photo(2)
    write_images(tmp_path, [[one, two], [one], [two, one, two]])
    execute(filter_unit(tmp_path))
    rows = rows_of(tmp_path / "filtered/web")
    assert [row["kept"] for row in rows] == [True, True, False, False, False, False]


def test_rules_by_size(tmp_path: Path) -> None:
    sizes = [(32, 32), (31, 100), (128, 32), (129, 32), (32, 128), (32, 129)]
    tables = [image_table([photo(i, *size)], i, *size) for i, size in enumerate(sizes)]
    write_set(tmp_path / "images/web", "images", tables, source="web", role="pool")
    execute(filter_unit(tmp_path))
    reasons = [row["reason"] for row in rows_of(tmp_path / "filtered/web")]
    assert reasons == [None, "too_small", None, "too_elongated", None, "too_elongated"]


def test_the_number_of_buckets_does_not_change_the_verdicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [photo(i % 9, 40, 40) for i in range(30)]
    for place, rows in (("one", 1000), ("many", 4)):
        monkeypatch.setattr(stage, "BUCKET_ROWS", rows)
        write_images(tmp_path / place, cut(pictures, [10, 20]))
        execute(filter_unit(tmp_path / place))
    assert fingerprints(tmp_path / "one/filtered") == fingerprints(tmp_path / "many/filtered")
    assert rows_of(tmp_path / "one/index/web") == rows_of(tmp_path / "many/index/web")


def test_only_the_outputs_stay(tmp_path: Path) -> None:
    write_images(tmp_path, [[photo(1)], []])
    execute(filter_unit(tmp_path))
    assert sorted(p.name for p in (tmp_path / "filtered/web").iterdir() if p.name.startswith("_")) == [
        "_begun.json",
        "_commits",
    ]
    assert rows_of(tmp_path / "index/web")[0]["image_id"] == image_id(photo(1))
