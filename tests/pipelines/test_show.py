"""One image's way through a run, against looking for it in every row of every set."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from curation.errors import ConfigError
from curation.hashing import image_id
from pipelines.catalog import complete_sets
from pipelines.show import show
from tests.builders import near_copy, photo, rows_of


def steps(run: Path, name: str) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for label, values in show(str(run), name):
        found.setdefault(label, []).append(values)
    return found


def test_every_image_is_found_wherever_it_is(tiny_run: Path) -> None:
    kinds = ("images", "filtered", "duplicates", "clusters", "retrieved", "selection", "shards")
    sets = {n: rows_of(s) for n, s in complete_sets(str(tiny_run)).items() if n.split("/")[0] in kinds}
    names = sorted({row["image_id"] for label, rows in sets.items() if "images/" in label for row in rows})
    assert len(names) == 62
    for name in names[::4]:
        wanted = Counter(label for label, rows in sets.items() for row in rows if row["image_id"] == name)
        assert Counter(label for label, _ in show(str(tiny_run), name)) == wanted


def test_what_the_sets_say_is_shown_without_the_bytes(tiny_run: Path) -> None:
    found = steps(tiny_run, image_id(photo(5)).upper())
    (image,) = found["images/web"]
    assert (image["url"], image["width"], image["part"]) == ("2/05.png", 96, 2)
    assert "image" not in image
    (verdict,) = found["duplicates/web"]
    assert verdict["component_size"] == 2
    assert {verdict["reason"], *(r["reason"] for r in steps(tiny_run, image_id(near_copy(5)))["duplicates/web"])} == {
        None,
        "near_duplicate",
    }


def test_byte_copies_are_shown_each_with_its_verdict(tiny_run: Path) -> None:
    found = steps(tiny_run, image_id(photo(3)))
    assert [row["url"] for row in found["images/web"]] == ["0/03.png", "1/copy.png"]
    assert [row["reason"] for row in found["filtered/web"]] == [None, "exact_duplicate"]
    assert len(found["duplicates/web"]) == 1


def test_an_image_of_two_sources_is_shown_in_both(tiny_run: Path) -> None:
    found = steps(tiny_run, image_id(photo(7)))
    assert {"images/web", "images/book", "duplicates/web", "duplicates/book"} <= set(found)


def test_where_it_lies_in_the_shards(tiny_run: Path) -> None:
    shards = complete_sets(str(tiny_run))["shards"]
    row = rows_of(shards)[7]
    for found in steps(tiny_run, row["image_id"])["shards"]:
        place = shards.read_rows(found["part"], found["row_in_part"], found["row_in_part"] + 1)
        assert place["image_id"].to_pylist() == [row["image_id"]]


@pytest.mark.parametrize("name", ["", "12", "x" * 32, "0" * 33])
def test_what_is_no_image_id_is_told(tiny_run: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="is no image_id: 32 hexadecimal digits are"):
        show(str(tiny_run), name)


def test_unknown_images_and_runs_are_told(tiny_run: Path) -> None:
    with pytest.raises(ConfigError, match=f"image {'0' * 32} is in no index of"):
        show(str(tiny_run), "0" * 32)
    with pytest.raises(ConfigError, match="does not exist"):
        show(str(tiny_run / "none"), "0" * 32)
