"""Images at hand: folders and Parquet files become image sets, bytes as found; the rest becomes rejects."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.errors import ConfigError
from curation.hashing import image_id
from curation.shards import IMAGE_GROUP_ROWS, ShardSet
from pipelines.download import DownloadUnit, UrlsStep
from pipelines.recipe import DownloadSettings, SourceSettings
from tests.builders import execute, fingerprints, photo, rejects_of, rows_of


def unit(tmp_path: Path, rows_per_part: int = 4, limits: dict[str, Any] | None = None, **source: Any) -> DownloadUnit:
    settings = SourceSettings(**{"role": "pool", **source})
    places = (str(tmp_path / "run/urls/web"), str(tmp_path / "run/images/web"))
    return DownloadUnit("web", settings, DownloadSettings(**(limits or {})), rows_per_part, *places)


def images(tmp_path: Path) -> ShardSet:
    return ShardSet(str(tmp_path / "run/images/web"))


def all_rejects(tmp_path: Path) -> list[dict[str, Any]]:
    made = images(tmp_path)
    return [r for p in range(made.num_parts) if made.commit(p).rejects for r in rejects_of(made.uri, p)]


def folder(tmp_path: Path, files: dict[str, bytes]) -> str:
    for name, data in files.items():
        path = tmp_path / "raw" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return str(tmp_path / "raw")


FILES = {
    "b/1.png": photo(1, 50, 40),
    "a.jpg": photo(2, 30, 20, "JPEG"),
    "b/c/2.png": photo(3),
    "b/c/empty.png": b"",
    "b/page.jpg": b"<html></html>",
    "z.webp": photo(4, 64, 48, "WEBP"),
    "b/wide.png": photo(5, 300, 10),
    "readme.txt": b"not looked at",
}


def test_a_folder_in_order_of_its_paths(tmp_path: Path) -> None:
    execute(unit(tmp_path, folder=folder(tmp_path, FILES)))
    names = sorted(name for name in FILES if not name.endswith("txt"))
    rows, rejects = rows_of(images(tmp_path)), all_rejects(tmp_path)
    assert sorted(r["row"] for r in [*rows, *rejects]) == list(range(len(names)))
    assert [r["row"] for r in rows] == sorted(r["row"] for r in rows)
    for row in rows:
        name = names[row["row"]]
        assert row["image"] == FILES[name]
        assert row["image_id"] == image_id(FILES[name])
        assert row["url"] == name
        assert row["label"] == (name.rpartition("/")[0] or None)
    sizes = {r["url"]: (r["width"], r["height"], r["format"]) for r in rows}
    assert sizes["b/1.png"] == (50, 40, "png")
    assert sizes["a.jpg"] == (30, 20, "jpeg")
    assert sizes["z.webp"] == (64, 48, "webp")
    assert {(r["url"], r["reason"], r["retryable"]) for r in rejects} == {
        ("b/c/empty.png", "empty", False),
        ("b/page.jpg", "not_an_image", False),
    }
    assert images(tmp_path).num_parts == 2
    assert images(tmp_path).labels == {"source": "web", "role": "pool"}


def test_limits_hold_for_images_at_hand(tmp_path: Path) -> None:
    limit = len(FILES["b/1.png"])
    execute(unit(tmp_path, folder=folder(tmp_path, FILES), limits={"max_bytes": limit, "max_pixels": 2999}))
    reasons = {r["url"]: (r["reason"], r["detail"]) for r in all_rejects(tmp_path)}
    for name, data in FILES.items():
        if len(data) > limit:
            assert reasons[name] == ("too_large", f"{limit + 1} bytes, limit {limit}")
    assert "b/1.png" not in reasons
    assert reasons["z.webp"] == ("too_many_pixels", "64x48, limit 2999")


def parquet(path: Path, pictures: list[Any], **columns: list[Any]) -> str:
    pq.write_table(pa.table({"image": pictures, **columns}), path, row_group_size=3)
    return str(path)


@pytest.mark.parametrize("rows_per_part", [1, 4, 100])
def test_parquet_files_with_a_column_of_images(tmp_path: Path, rows_per_part: int) -> None:
    pictures = [photo(i) if i % 4 else None for i in range(11)]
    place = parquet(tmp_path / "x.parquet", pictures, topic=[i * 2 for i in range(11)], at=[f"u{i}" for i in range(11)])
    execute(unit(tmp_path, rows_per_part, images=place, label_column="topic", url_column="at"))
    rows = rows_of(images(tmp_path))
    assert [(r["row"], r["image"]) for r in rows] == [(i, p) for i, p in enumerate(pictures) if p]
    assert [(r["label"], r["url"]) for r in rows] == [(str(2 * i), f"u{i}") for i in range(11) if i % 4]
    assert [(r["row"], r["reason"], r["url"]) for r in all_rejects(tmp_path)] == [
        (i, "empty", f"u{i}") for i in (0, 4, 8)
    ]


def test_images_in_structs_as_dataset_hubs_write_them(tmp_path: Path) -> None:
    values = [{"bytes": photo(1), "path": "x.png"}, {"bytes": None, "path": "y.png"}]
    execute(unit(tmp_path, images=parquet(tmp_path / "x.parquet", values)))
    assert [r["image"] for r in rows_of(images(tmp_path))] == [photo(1)]
    assert [r["reason"] for r in all_rejects(tmp_path)] == ["empty"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_column": "imgae"}, r"has no column 'imgae' \(did you mean image\?\); it has image, text"),
        ({"image_column": "text"}, "column 'text' holds no image bytes; set image_column"),
        ({"label_column": "labels"}, "has no column 'labels'"),
    ],
)
def test_wrong_columns_are_told(tmp_path: Path, change: dict[str, str], message: str) -> None:
    place = parquet(tmp_path / "x.parquet", [photo(1)], text=["words"])
    with pytest.raises(ConfigError, match=message):
        execute(unit(tmp_path, images=place, **change))


def test_absent_inputs_are_told(tmp_path: Path) -> None:
    for source in ({"folder": "/none/x"}, {"images": "/none/x.parquet"}, {"urls": "/none/*.csv"}):
        with pytest.raises(ConfigError, match=r"/none/.* does not exist"):
            execute(unit(tmp_path, **source))


def test_many_small_images_lie_in_small_row_groups(tmp_path: Path) -> None:
    place = parquet(tmp_path / "x.parquet", [photo(i, 16, 16) for i in range(IMAGE_GROUP_ROWS + 6)])
    execute(unit(tmp_path, 1000, images=place))
    file = pq.ParquetFile(images(tmp_path).part_uri(0))
    assert [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)] == [IMAGE_GROUP_ROWS, 6]


def test_an_input_is_known_by_its_content(tmp_path: Path) -> None:
    place = folder(tmp_path, FILES)
    assert execute(unit(tmp_path, folder=place))
    before = fingerprints(tmp_path / "run")
    for name, data in FILES.items():
        (tmp_path / "raw" / name).write_bytes(data)  # touched, the same
    (tmp_path / "raw" / "more.txt").write_bytes(b"not an image")
    assert not execute(unit(tmp_path, folder=place))
    (tmp_path / "raw" / "a.jpg").write_bytes(photo(99, 31, 20, "JPEG"))
    with pytest.raises(ConfigError, match="input raw/web has changed"):
        execute(unit(tmp_path, folder=place))
    assert fingerprints(tmp_path / "run") == before
    assert execute(unit(tmp_path, folder=place), overwrite=True)


def test_urls_are_listed_as_they_stand_in_the_input(tmp_path: Path) -> None:
    for number in range(2):
        lines = [f"http://{number}/{i},{'' if i == 2 else i},page{i}" for i in range(5)]
        (tmp_path / f"{number}.csv").write_text("\n".join(["link,topic,from", *lines]))
    stage = unit(tmp_path, urls=f"{tmp_path}/*.csv", url_column="link", label_column="topic", page_url_column="from")
    first = stage.steps()[0]
    assert isinstance(first, UrlsStep)
    one_step = type("OneStep", (DownloadUnit,), {"steps": lambda self: [first]})
    execute(one_step(**vars(stage)))
    made = ShardSet(str(tmp_path / "run/urls/web"))
    rows = rows_of(made)
    assert [r["row"] for r in rows] == list(range(10))
    assert [r["url"] for r in rows] == [f"http://{n}/{i}" for n in range(2) for i in range(5)]
    assert [r["label"] for r in rows] == ["0", "1", "", "3", "4"] * 2
    assert [r["page_url"] for r in rows] == [f"page{i}" for i in range(5)] * 2
    assert {r["alt"] for r in rows} == {None}
    assert made.rows_per_part.tolist() == [4, 1, 4, 1]
