"""Raw inputs: files found and known by content, and slices that hold what reading the whole file gives."""

import csv
import io
import os
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.errors import ConfigError
from curation.manifest import Input, Origin
from curation.shards import ShardSet
from pipelines.raw import cut, find_files, find_images, raw_input, read_slice

PARTS = [1, 2, 3, 5, 7, 10, 1000]


def read_all(files: list[str], columns: dict[str, str], rows_per_part: int, batch: int) -> dict[str, list[Any]]:
    """All values by way of slices; checks that these are numbered through and of the right size."""
    slices = cut(files, columns.get("url", next(iter(columns.values()))), rows_per_part)
    found: dict[str, list[Any]] = {name: [] for name in columns}
    row = 0
    for where in slices:
        assert where.first_row == row
        assert 0 < where.num_rows <= rows_per_part
        for first_row, values in read_slice(where, columns, batch):
            assert first_row == row
            count = len(next(iter(values.values())))
            assert 0 < count <= batch
            row += count
            for name in columns:
                found[name] += values[name]
        assert row == where.first_row + where.num_rows
    full = [s for s in slices if s.num_rows == rows_per_part]
    assert len(slices) - len(full) <= len(files)
    return found


def awkward(rng: np.random.Generator) -> str:
    pieces = ["http://x/", "a,b", 'say "so"', "line\nbreak", "\r\n", "é漢", " padded ", "", "'", ";"]
    return "".join(rng.choice(pieces, rng.integers(1, 4)))


@pytest.mark.parametrize("rows_per_part", PARTS)
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_csv_slices_equal_the_whole(tmp_path: Path, rows_per_part: int, ending: str) -> None:
    rng = np.random.default_rng(rows_per_part)
    files, wanted = [], []
    for number in range(2):
        text = io.StringIO()
        writer = csv.writer(text, lineterminator=ending)
        writer.writerow(["alt", "url"])
        for _ in range(11):
            row = [awkward(rng), awkward(rng)]
            writer.writerow(row)
            wanted.append(row)
            if rng.random() < 0.3:
                text.write(ending)  # a blank line
        data = text.getvalue().encode()
        path = tmp_path / f"{number}.csv"
        path.write_bytes((b"\xef\xbb\xbf" if number else b"") + data.removesuffix(ending.encode() if number else b"x"))
        files.append(str(path))
    for batch in (1, 4, 100):
        found = read_all(files, {"url": "url", "alt": "alt"}, rows_per_part, batch)
        assert list(map(list, zip(found["alt"], found["url"], strict=True))) == wanted


@pytest.mark.parametrize("rows_per_part", PARTS)
def test_text_slices_equal_the_whole(tmp_path: Path, rows_per_part: int) -> None:
    path = tmp_path / "urls.txt"
    path.write_bytes('\ufeffhttp://a\n\n  http://b \r\n\n\nhttp://é\nhttp://d,e\n\n"http://f"\nhttp://last'.encode())
    wanted = ["http://a", "http://b", "http://é", "http://d,e", '"http://f"', "http://last"]
    for batch in (1, 4):
        assert read_all([str(path)], {"url": "anything"}, rows_per_part, batch)["url"] == wanted


@pytest.mark.parametrize("rows_per_part", PARTS)
@pytest.mark.parametrize("group", [1, 4, 1000])
def test_parquet_slices_equal_the_whole(tmp_path: Path, rows_per_part: int, group: int) -> None:
    files, wanted = [], []
    for number, count in enumerate([13, 0, 1, 20]):
        values = [f"http://{number}/{i}" if i % 5 else None for i in range(count)]
        table = pa.table({"other": range(count), "link": pa.array(values, pa.string())})
        pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=group)
        files.append(str(tmp_path / f"{number}.parquet"))
        wanted += values
    for batch in (1, 4, 100):
        found = read_all(files, {"url": "link", "label": "other", "alt": "link"}, rows_per_part, batch)
        assert found["url"] == found["alt"] == wanted
        assert found["label"] == [*range(13), 0, *range(20)]


def test_short_and_long_csv_rows(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("url,alt\nhttp://a\nhttp://b,text,more\n,empty\n")
    found = read_all([str(path)], {"url": "url", "alt": "alt"}, 2, 10)
    assert found == {"url": ["http://a", "http://b", ""], "alt": [None, "text", "empty"]}


def test_blank_lines_before_the_header(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("\n\nurl\nhttp://a\nhttp://b\n")
    assert read_all([str(path)], {"url": "url"}, 1, 1) == {"url": ["http://a", "http://b"]}


def test_the_only_record_of_a_csv_file_may_be_quoted_over_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('"url","a\nb"\n"http://a","1\n\n2"\n')
    assert read_all([str(path)], {"url": "url", "alt": "a\nb"}, 5, 5) == {"url": ["http://a"], "alt": ["1\n\n2"]}


@pytest.mark.parametrize("name", ["x.csv", "x.parquet"])
def test_a_wrong_column_is_told_with_those_there_are(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith("csv"):
        path.write_text("urls,alt\nhttp://a,b\n")
    else:
        pq.write_table(pa.table({"urls": ["http://a"], "alt": ["b"]}), path)
    with pytest.raises(ConfigError, match=r"has no column 'url' \(did you mean urls\?\); it has urls, alt"):
        cut([str(path)], "url", 10)
    (where,) = cut([str(path)], "urls", 10)
    with pytest.raises(ConfigError, match="has no column 'label'; it has urls, alt"):
        list(read_slice(where, {"url": "urls", "label": "label"}, 10))


@pytest.mark.parametrize("data", [b"", b"no parquet", b"PAR1 cut off"])
def test_a_corrupt_parquet_file_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.parquet").write_bytes(data)
    with pytest.raises(ConfigError, match=r"x\.parquet is not a readable Parquet file"):
        cut([str(tmp_path / "x.parquet")], "url", 10)


def test_a_parquet_file_with_damaged_pages_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"url": [f"http://{i}" for i in range(1000)]}), path, compression="zstd")
    data = bytearray(path.read_bytes())
    data[60:400] = bytes(340)
    path.write_bytes(data)
    (where,) = cut([str(path)], "url", 1000)
    with pytest.raises(ConfigError, match=r"x\.parquet is not a readable Parquet file"):
        list(read_slice(where, {"url": "url"}, 1000))


def test_csv_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"url\nhttp://a\rhttp://b\r\n" + b'"' + b"x" * 200_000)
    with pytest.raises(ConfigError, match=r"x\.csv is not a readable CSV file"):
        cut([str(tmp_path / "x.csv")], "url", 10)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.csv", b"", "has no column 'url'; it has none"),
        ("x.csv", b"url\n", "no rows"),
        ("x.csv", b"url\n\n\n", "no rows"),
        ("x.txt", b"", "no rows"),
        ("x.txt", b"\n \n", "no rows"),
    ],
)
def test_empty_inputs_are_told(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=message) as error:
        cut([str(tmp_path / name)], "url", 10)
    assert name in str(error.value)


def test_an_empty_parquet_file_is_told(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": pa.array([], pa.string())}), tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match="no rows"):
        cut([str(tmp_path / "x.parquet")], "url", 10)


def test_files_are_found_by_path_and_pattern(tmp_path: Path) -> None:
    for name in ("b.csv", "a.csv", "sub/c.csv", "d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("url\n")
    (tmp_path / "e.csv").mkdir()
    root = str(tmp_path)
    assert find_files(f"{root}/d.txt") == [f"{root}/d.txt"]
    assert find_files(f"{root}/*.csv") == [f"{root}/a.csv", f"{root}/b.csv"]
    assert find_files(f"{root}/**/*.csv") == [f"{root}/a.csv", f"{root}/b.csv", f"{root}/sub/c.csv"]
    for absent in (f"{root}/none.csv", f"{root}/*.parquet"):
        with pytest.raises(ConfigError, match="does not exist") as error:
            find_files(absent)
        assert absent in str(error.value)
    with pytest.raises(ConfigError, match="is a folder"):
        find_files(root)


def test_files_are_found_in_other_filesystems(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for name in ("b", "a"):
        memory.pipe(f"/{tmp_path.name}/{name}.txt", b"http://x\n")
    found = find_files(f"memory://{tmp_path.name}/*.txt")
    assert [name.rpartition("/")[2] for name in found] == ["a.txt", "b.txt"]
    assert len(cut(found, "url", 1)) == 2


def test_images_of_a_folder_in_order(tmp_path: Path) -> None:
    for name in ("b/2.JPG", "b/10.png", "a.webp", "notes.txt", "c/deep/er/x.tiff", "b/.hidden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert find_images(str(tmp_path)) == ["a.webp", "b/10.png", "b/2.JPG", "c/deep/er/x.tiff"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no image files"):
        find_images(str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match=r"a\.webp is not a folder"):
        find_images(str(tmp_path / "a.webp"))
    with pytest.raises(ConfigError, match="none does not exist"):
        find_images(str(tmp_path / "none"))


def known(tmp_path: Path, names: list[str] | None = None) -> Input:
    """The files of tmp_path/raw as an input, remembered by a set that was begun from them before."""
    made = ShardSet(str(tmp_path / "set"))
    uris = sorted(str(p) for p in (tmp_path / "raw").iterdir())
    found = raw_input("raw/x", names or [""] * len(uris), uris, made)
    if made.begun() is None:
        made.begin(Origin("urls", "download", 1, {}, (found,)))
    return found


def test_raw_inputs_are_known_by_content(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    path = tmp_path / "raw" / "a.txt"
    path.write_text("http://a\n")
    first = known(tmp_path)
    assert known(tmp_path) == first

    os.utime(path, (1, 1))
    touched = known(tmp_path)
    assert touched.stat != first.stat
    assert touched.content == first.content

    path.write_text("http://b\n")
    os.utime(path, (2, 2))
    assert known(tmp_path).content != first.content

    path.write_text("http://a\n")
    path.rename(tmp_path / "raw" / "renamed.txt")
    assert known(tmp_path).content == first.content
    (tmp_path / "raw" / "z.txt").write_text("")
    assert known(tmp_path).content != first.content


def test_names_of_a_folder_count(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.png").write_bytes(b"x")
    one, two = (raw_input("r", [n], [str(tmp_path / "raw/a.png")], ShardSet("/none")) for n in ("a.png", "b.png"))
    assert one.content != two.content


def test_files_that_are_remembered_are_not_read_again(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    path = tmp_path / "raw" / "a.txt"
    path.write_text("http://a\n")
    first = known(tmp_path)
    stat = path.stat()
    path.write_text("http://b\n")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert known(tmp_path) == first


@pytest.mark.parametrize("name", ["urls.csv.gz", "urls.tsv", "urls"])
def test_files_of_other_kinds_are_refused_and_not_read_as_lines(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"url\nhttp://a\n")
    with pytest.raises(ConfigError, match=r"must end in \.parquet, \.csv, \.txt"):
        find_files(str(tmp_path / name))
