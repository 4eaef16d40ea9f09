"""Sources: what is found where, which rows it has, and what is said where it is not usable."""

import pickle
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.errors import ConfigError
from curation.hashing import image_id
from curation.shards import ShardSet
from tests.builders import image_table, photo, write_set
from tests.trainer.images_for_training import random_files, write_files
from trainer import parquet, samples
from trainer.reader import Reader
from trainer.samples import Dataset, Place, Samples, Source, open_dataset


def everything(dataset: Dataset, source: int = 0) -> list[tuple[str, bytes | None, str, int]]:
    """Id, bytes, file and row of all images of a source, in the order of the files."""
    images = pickle.loads(pickle.dumps(dataset)).images[source]  # noqa: S301
    with Reader(dataset) as reader:
        places = [Place(source, 0, g, r) for g, count in enumerate(images.groups.rows) for r in range(count)]
        return [(*reader.read(place), *images.place(place.group, place.row)) for place in places]


def one(place: object, **more: object) -> Dataset:
    return open_dataset([Source("web", str(place), **more)])  # type: ignore[arg-type]


def test_a_shard_set_is_read_by_its_manifest(tmp_path: Path) -> None:
    data = [photo(i, 8, 8) for i in range(7)]
    tables = [image_table(data[:4]), image_table([]), image_table(data[4:])]
    shards = write_set(tmp_path / "shards", "shards", tables)
    (tmp_path / "shards" / "part-00009.parquet").write_bytes(b"not of the set")
    found = everything(one(shards.uri))
    assert [(name, image) for name, image, _, _ in found] == [(image_id(d), d) for d in data]
    assert [(file[-13:], row) for _, _, file, row in found[3:5]] == [("00000.parquet", 3), ("00002.parquet", 0)]
    (tmp_path / "shards" / "manifest.json").unlink()
    with pytest.raises(ConfigError, match=r"^source web: .*shards is not complete: run its stage again"):
        one(ShardSet(shards.uri).uri)


@pytest.mark.parametrize("end", ["", "/*.parquet", "/000.parquet"])
def test_files_by_folder_pattern_and_name(tmp_path: Path, end: str) -> None:
    rng = np.random.default_rng(0)
    files = [[3, 0, 2], [0], [4]]
    write_files(tmp_path / "a", files)
    (tmp_path / "a" / "notes.txt").write_text("x")
    found = everything(one(f"{tmp_path / 'a'}{end}"))
    expected = 5 if end.startswith("/0") else 9
    assert [(name, int(image)) for name, image, _, _ in found if image] == [(f"id{i}", i) for i in range(expected)]
    for name, _, file, row in [found[int(i)] for i in rng.integers(0, expected, 5)]:
        assert pq.read_table(file)["image_id"][row].as_py() == name


def test_ids_are_made_where_there_are_none_and_structs_of_bytes_are_read(tmp_path: Path) -> None:
    data = [b"one", None, b"three", b"four"]
    structs = [d and {"bytes": d, "path": "x"} for d in data]
    pq.write_table(pa.table({"picture": structs, "label": range(4)}), tmp_path / "hf.parquet", row_group_size=3)
    found = everything(one(tmp_path / "hf.parquet", image_column="picture"))
    assert [(name, image) for name, image, _, _ in found] == [(image_id(d) if d else "", d) for d in data]
    pq.write_table(
        pa.table({"image": pa.array(data, pa.large_binary()), "image_id": [7, 8, None, None]}), tmp_path / "b.parquet"
    )
    assert [name for name, _, _, _ in everything(one(tmp_path / "b.parquet"))] == [
        "7",
        "8",
        image_id(b"three"),
        image_id(b"four"),
    ]


def test_a_folder_of_images(tmp_path: Path) -> None:
    names = ["a/1.jpg", "a/2.PNG", "b/c/3.webp"]
    for name in [*names, "a/readme.md"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    dataset = one(tmp_path)
    found = everything(dataset)
    assert found == [(image_id(n.encode()), n.encode(), str(tmp_path / n), 0) for n in names]
    (tmp_path / "a/1.jpg").unlink()
    with pytest.raises(ConfigError, match=r"cannot read .*a/1.jpg: No such file"):
        everything(dataset)


def test_other_file_systems(tmp_path: Path) -> None:
    write_files(tmp_path / "a", [[3, 4], [2]])
    fs = fsspec.filesystem("memory")
    fs.put(str(tmp_path / "a"), "/trainer-samples/a", recursive=True)
    for place in ("memory://trainer-samples/a", "memory://trainer-samples/*/00?.parquet"):
        found = everything(one(place))
        assert [int(image) for _, image, _, _ in found if image] == list(range(9))
        assert all(file.startswith("memory://") for _, _, file, _ in found)
    fs.rm("/trainer-samples", recursive=True)
    with pytest.raises(ConfigError, match=r"^source web: memory://trainer-samples/a does not exist$"):
        one("memory://trainer-samples/a")


def numbers_only(path: Path) -> None:
    pq.write_table(pa.table({"image": [1, 2], "photo": [b"", b""]}), path / "a.parquet")


def other_columns(path: Path) -> None:
    pq.write_table(pa.table({"photo": [b""], "label": [1]}), path / "a.parquet")


def second_file_differs(path: Path) -> None:
    write_files(path, [[3]])
    pq.write_table(pa.table({"photo": [b""], "label": [1]}), path / "other.parquet")


def no_rows(path: Path) -> None:
    write_files(path, [[0], []])


def damaged(path: Path) -> None:
    (path / "a.parquet").write_bytes(b"PAR1 and nothing more PAR1")


def nothing(path: Path) -> None:
    (path / "notes.txt").write_text("")


@pytest.mark.parametrize(
    ("make", "end", "words"),
    [
        (numbers_only, "", r"a.parquet: column 'image' holds int64, not the bytes of images; .* image, photo$"),
        (other_columns, "", r"a.parquet has no column 'image'; set image_column to one of photo, label$"),
        (second_file_differs, "", r"other.parquet has no column 'image'"),
        (no_rows, "", r"no rows in .*000.parquet and 1 other files$"),
        (damaged, "", r"a.parquet is not a readable Parquet file"),
        (nothing, "", r"holds neither Parquet files nor images \(.jpg"),
        (nothing, "/b", r"/b does not exist$"),
        (nothing, "/*.parquet", r"/\*.parquet does not exist$"),
    ],
)
def test_what_is_not_usable_is_said_in_one_line(
    tmp_path: Path, make: Callable[[Path], None], end: str, words: str
) -> None:
    make(tmp_path)
    with pytest.raises(ConfigError, match=f"^source web: .*{words}") as caught:
        one(f"{tmp_path}{end}")
    assert "\n" not in str(caught.value)


def test_sources_must_be_told_apart_and_weigh_something(tmp_path: Path) -> None:
    write_files(tmp_path, [[3]])
    source = Source("a", str(tmp_path))
    for sources, words in (
        ([], "no sources"),
        ([source, source], "two sources are called 'a'"),
        ([Source("a", str(tmp_path), weight=0.0)], "source a: weight 0.0"),
        ([Source("a", str(tmp_path), weight=float("nan"))], "source a: weight nan"),
    ):
        with pytest.raises(ConfigError, match=words):
            open_dataset(sources)


def test_a_file_that_is_gone_or_damaged_later_is_named(tmp_path: Path) -> None:
    write_files(tmp_path, [[3], [4]])
    dataset = one(tmp_path)
    (tmp_path / "001.parquet").unlink()
    with pytest.raises(ConfigError, match=r"001.parquet does not exist$"):
        everything(dataset)
    whole = (tmp_path / "000.parquet").read_bytes()
    (tmp_path / "001.parquet").write_bytes(whole[:4] + bytes(200) + whole[204:])
    with pytest.raises(ConfigError, match=r"001.parquet is not a readable Parquet file"):
        everything(dataset)


def test_windows_and_runs_follow_from_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"image": [bytes(1000)] * 64}
    pq.write_table(pa.table(sizes), tmp_path / "a.parquet", row_group_size=16, compression="none", use_dictionary=False)
    groups = open_dataset([Source("a", str(tmp_path))], 2**30).images[0].groups
    assert (groups.window, groups.run) == (4, 1)  # all that there is
    groups = open_dataset([Source("a", str(tmp_path))], 40_000).images[0].groups
    assert (groups.window, groups.run) == (2, 1)
    monkeypatch.setattr(parquet, "READ_PER_SAMPLE", 5_000)
    two = open_dataset([Source("a", str(tmp_path)), Source("b", str(tmp_path))], 20_000)
    assert [(i.groups.window, i.groups.run) for i in two.images] == [(1, 4)] * 2
    monkeypatch.setattr(parquet, "READ_PER_SAMPLE", 100)
    assert open_dataset([Source("a", str(tmp_path))], 1).images[0].groups.run == parquet.LONGEST_RUN


def test_each_row_group_is_read_once_for_a_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one reader takes of a window costs one reading of each group, whatever it takes; files are opened once."""
    rng = np.random.default_rng(1)
    total = write_files(tmp_path, random_files(rng) + random_files(rng))
    dataset = open_dataset([Source("a", str(tmp_path))], 500)
    assert 1 < dataset.images[0].groups.window < 20
    read: list[int] = []
    opened: list[str] = []
    make, begin = parquet._OpenFile.read, parquet._OpenFile.__init__
    monkeypatch.setattr(parquet._OpenFile, "read", lambda file, group: read.append(group) or make(file, group))
    monkeypatch.setattr(
        parquet._OpenFile, "__init__", lambda file, uri, column: opened.append(uri) or begin(file, uri, column)
    )
    monkeypatch.setattr("trainer.reader.THREADS", 1)  # else two may open a file at once
    places = Samples(dataset, 4, 0).part
    with Reader(dataset) as reader:
        mine = [place for step in range(-(-total // 4)) for place in places(step, 0, 4)][:total]
        data = [reader.read(place)[1] for place in reader.ahead(iter(mine))]
    assert sorted(int(d) for d in data if d) == list(range(total))
    assert len(read) == np.count_nonzero(dataset.images[0].groups.rows)
    assert len(opened) == len(set(opened))


def test_the_fingerprint_tells_what_the_order_depends_on(tmp_path: Path) -> None:
    write_files(tmp_path / "a", [[3, 4], [2]])
    write_files(tmp_path / "b", [[3, 4], [2]])
    write_files(tmp_path / "c", [[3, 4], [1, 1]])
    prints = [one(tmp_path / name).fingerprint for name in "abc"]
    prints += [
        one(tmp_path / "a", weight=2.0).fingerprint,
        open_dataset([Source("x", str(tmp_path / "a"))]).fingerprint,
    ]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 4


def test_samples_of_a_mixture_go_through_each_source_in_its_order(tmp_path: Path) -> None:
    ends = [0, *(write_files(tmp_path / name, [[5, 6], [4]], first=100 * i) for i, name in enumerate("abc"))]
    assert ends[1] == 15
    weights = {"a": (0.2, True), "b": (0.5, False), "c": (0.3, False)}
    dataset = open_dataset([Source(n, str(tmp_path / n), weight=w, homogeneous=h) for n, (w, h) in weights.items()])
    places = [place for step in range(100) for place in Samples(dataset, 6, 1).part(step, 0, 6)]
    for source in range(3):
        mine = [place for place in places if place.source == source]
        assert [place.position for place in mine] == list(range(len(mine)))
        for epoch in range(len(mine) // 15):
            rows = {(place.group, place.row) for place in mine[15 * epoch : 15 * epoch + 15]}
            assert len(rows) == 15
    assert samples.Samples(dataset, 6, 1).part(50, 2, 5) == places[302:305]
