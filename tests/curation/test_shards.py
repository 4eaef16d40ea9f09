"""Shard sets: commits, manifests, hashes, and every way of reading against reading all of it."""

import gc
import json
import os
from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation import schemas, storage
from curation.errors import ConfigError
from curation.manifest import Input, Origin, checksum, part_name
from curation.shards import BEGUN, IMAGE_GROUP_ROWS, MANIFEST, PartWriter, ShardSet, part_number
from tests.builders import embedding_table, image_table, random_ids, rejects_of, rows_of, table, write_set

NUMBERS = pa.schema([("value", pa.int64()), ("text", pa.string())])


def numbers(values: list[int]) -> pa.Table:
    return table(NUMBERS, value=values, text=[str(v) for v in values])


def test_part_names() -> None:
    assert part_name(42) == "part-00042"
    for part in (0, 7, 99_999, 123_456):
        assert part_number(f"{part_name(part)}.parquet") == part
    for other in ("manifest.json", "_begun.json", "part-x.parquet", ".part-00001.parquet.0f.tmp", "parts"):
        assert part_number(other) is None


ORIGIN = Origin("images", "download", 1, {"a": 1, "b": {"c": 2}}, (Input("raw/web", "abc"),), {"source": "web"})


@pytest.mark.parametrize(
    "other",
    [
        replace(ORIGIN, kind="urls"),
        replace(ORIGIN, stage="filter"),
        replace(ORIGIN, version=2),
        replace(ORIGIN, config={"a": 1, "b": {"c": 3}}),
        replace(ORIGIN, inputs=(Input("raw/web", "abd"),)),
        replace(ORIGIN, inputs=(Input("raw/books", "abc"),)),
        replace(ORIGIN, inputs=()),
        replace(ORIGIN, inputs=(*ORIGIN.inputs, Input("x", "y"))),
    ],
)
def test_what_can_change_the_bytes_is_in_the_fingerprint(other: Origin) -> None:
    assert other.fingerprint != ORIGIN.fingerprint


@pytest.mark.parametrize(
    "other",
    [
        replace(ORIGIN, labels={"source": "web", "role": "query"}),
        replace(ORIGIN, inputs=(Input("raw/web", "abc", uri="/elsewhere", stat="7"),)),
        replace(ORIGIN, config={"b": {"c": 2}, "a": 1}),
    ],
)
def test_places_and_labels_are_not_in_the_fingerprint(other: Origin) -> None:
    assert other.fingerprint == ORIGIN.fingerprint


def test_an_origin_comes_back_from_its_record() -> None:
    record = json.loads(json.dumps(ORIGIN.record("/run/images/web")))
    assert Origin.from_record(record) == ORIGIN
    assert record["fingerprint"] == ORIGIN.fingerprint


def test_inputs_are_written_relative_to_the_set() -> None:
    origin = replace(ORIGIN, inputs=(Input("images/web", "c", uri="/run/images/web"),))
    assert origin.record("/run/filtered/web")["inputs"][0]["uri"] == "../../images/web"


def write_part(directory: Path, rows: list[int], rejects: list[tuple[str, bool]], part: int = 0) -> PartWriter:
    with PartWriter(str(directory), part, NUMBERS, "f") as writer:
        writer.write(numbers(rows))
        for row, (reason, retryable) in enumerate(rejects):
            writer.reject(reason, "why", row=row, retryable=retryable, url=f"http://x/{row}")
    return writer


def test_a_commit_tells_what_was_written(tmp_path: Path) -> None:
    writer = write_part(tmp_path, [1, 2, 3], [("late", True), ("bad", False), ("late", True)], part=3)
    commit = ShardSet(str(tmp_path)).commit(3)
    assert commit == writer.commit
    assert (commit.part, commit.fingerprint, commit.rows, commit.rejects, commit.retryable) == (3, "f", 3, 3, 2)
    assert list(commit.reasons.items()) == [("bad", 1), ("late", 2)]
    assert commit.bytes == (tmp_path / "part-00003.parquet").stat().st_size
    assert commit.rejects_bytes == (tmp_path / "rejects" / "part-00003.parquet").stat().st_size
    kept = rejects_of(tmp_path, 3)
    assert [(r["row"], r["reason"], r["url"]) for r in kept] == [
        (0, "late", "http://x/0"),
        (1, "bad", "http://x/1"),
        (2, "late", "http://x/2"),
    ]


def test_without_rejects_there_is_no_file_of_them(tmp_path: Path) -> None:
    commit = write_part(tmp_path, [1], []).commit
    assert commit is not None
    assert (commit.rejects, commit.rejects_sha256, commit.rejects_bytes) == (0, None, 0)
    assert not (tmp_path / "rejects").exists()


def test_rejects_of_an_attempt_without_commit_do_not_outlive_the_next(tmp_path: Path) -> None:
    write_part(tmp_path, [1], [("timeout", True)])
    os.unlink(tmp_path / "_commits" / "part-00000.json")
    write_part(tmp_path, [1, 2], [])
    assert list((tmp_path / "rejects").iterdir()) == []


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("rows", [[], [1, 2]])
def test_an_exception_leaves_neither_part_nor_commit(tmp_path: Path, rows: list[int]) -> None:
    writer = PartWriter(str(tmp_path), 0, NUMBERS, "f")
    writer.write(numbers(rows))
    writer.reject("bad")
    writer.__exit__(RuntimeError, RuntimeError(), None)
    assert writer.commit is None
    assert list(tmp_path.rglob("*")) == []
    del writer
    gc.collect()


def test_a_set_is_complete_with_its_manifest(tmp_path: Path) -> None:
    shard_set = ShardSet(str(tmp_path))
    with pytest.raises(ConfigError, match="is not a shard set"):
        _ = shard_set.manifest
    shard_set.begin(ORIGIN)
    assert not shard_set.is_complete
    with pytest.raises(ConfigError, match="is not complete: run its stage again"):
        _ = shard_set.manifest
    write_part(tmp_path, [1, 2], [("bad", False)], part=0)
    with pytest.raises(ConfigError, match="part-00001 has no commit"):
        shard_set.finish(ORIGIN, 2, {})
    write_part(tmp_path, [], [("bad", False), ("late", True)], part=1)
    write_part(tmp_path, [3], [], part=2)
    assert shard_set.committed() == {0, 1, 2}
    shard_set.finish(ORIGIN, 3, {"dim": 5})
    manifest = ShardSet(str(tmp_path)).manifest
    assert manifest["rows_per_part"] == [2, 0, 1]
    assert (manifest["rows"], manifest["rejects"], manifest["retryable"]) == (3, 3, 1)
    assert manifest["reasons"] == {"bad": 2, "late": 1}
    assert manifest["info"] == {"dim": 5}
    assert manifest["bytes"] == sum(p.stat().st_size for p in tmp_path.rglob("*.parquet"))
    assert manifest["fingerprint"] == ORIGIN.fingerprint
    assert manifest["checksum"] == checksum(manifest)
    assert shard_set.offsets.tolist() == [0, 2, 2, 3]
    assert (shard_set.num_rows, shard_set.num_parts, shard_set.source) == (3, 3, "web")


def test_a_set_is_asked_for_by_kind(tmp_path: Path) -> None:
    shard_set = write_set(tmp_path / "a", "urls", [numbers([1])])
    assert shard_set.require("urls") is shard_set
    with pytest.raises(ConfigError, match="holds urls, but images are needed here"):
        shard_set.require("images")
    with pytest.raises(ConfigError, match="not the rows of one source"):
        _ = shard_set.source


@pytest.mark.parametrize("text", ["{", "[1]", "", '{"rows": '])
def test_damaged_json_is_told(tmp_path: Path, text: str) -> None:
    shard_set = write_set(tmp_path / "a", "urls", [numbers([1])])
    (tmp_path / "a" / MANIFEST).write_text(text)
    with pytest.raises(ConfigError, match=r"manifest\.json (is not valid JSON|does not hold a JSON object)"):
        _ = ShardSet(shard_set.uri).manifest
    (tmp_path / "a" / "_commits" / "part-00000.json").write_text('{"part": 0}')
    with pytest.raises(ConfigError, match="the commit of part-00000 was damaged"):
        shard_set.commit(0)


def content_of(directory: Path, parts: list[list[int]], rejects: list[tuple[str, bool]]) -> str:
    shard_set = ShardSet(str(directory))
    shard_set.begin(ORIGIN)
    for part, rows in enumerate(parts):
        write_part(directory, rows, rejects, part)
    shard_set.finish(ORIGIN, len(parts), {})
    return shard_set.content


def test_content_is_the_rows_rejects_and_parts(tmp_path: Path) -> None:
    variants = [
        ([[1, 2], [3]], []),
        ([[1, 2], [4]], []),
        ([[2, 1], [3]], []),
        ([[1], [2, 3]], []),
        ([[3], [1, 2]], []),
        ([[1, 2, 3]], []),
        ([[1, 2], [3], []], []),
        ([[1, 2], [3]], [("bad", False)]),
        ([[1, 2], [3]], [("bad", True)]),
    ]
    contents = [content_of(tmp_path / str(i), *variant) for i, variant in enumerate(variants)]
    assert len(set(contents)) == len(variants)
    assert content_of(tmp_path / "again", *variants[7]) == contents[7]


def shuffled_set(tmp_path: Path, seed: int) -> tuple[ShardSet, list[pa.Table], list[np.ndarray]]:
    """Parts of several tables scattered to 5 buckets, of which bucket 3 gets nothing."""
    rng = np.random.default_rng(seed)
    shard_set = ShardSet(str(tmp_path / f"set{seed}"))
    shard_set.begin(ORIGIN)
    parts, buckets, start = [], [], 0
    for part in range(4):
        tables, places = [], []
        with PartWriter(shard_set.uri, part, NUMBERS, ORIGIN.fingerprint) as writer:
            for _ in range(part):  # part 0 stays empty
                count = int(rng.choice([0, 1, rng.integers(2, 30)]))
                tables.append(numbers(list(range(start, start + count))))
                places.append(rng.choice([0, 1, 2, 4], count))
                writer.write_buckets(tables[-1], places[-1])
                start += count
        parts.append(pa.concat_tables([NUMBERS.empty_table(), *tables]))
        buckets.append(np.concatenate([np.zeros(0, np.int64), *places]))
    shard_set.finish(ORIGIN, 4, {})
    return shard_set, parts, buckets


@pytest.mark.parametrize("seed", range(4))
def test_gather_finds_what_was_scattered(tmp_path: Path, seed: int) -> None:
    shard_set, parts, buckets = shuffled_set(tmp_path, seed)
    assert shard_set.num_rows == sum(p.num_rows for p in parts)
    for bucket in range(6):
        for chosen in (None, range(2, 4), [1]):
            got = [v for t in shard_set.gather(bucket, chosen) for v in t["value"].to_pylist()]
            wanted = []
            for part in range(4) if chosen is None else chosen:
                values = np.asarray(parts[part]["value"])
                wanted += values[buckets[part] == bucket].tolist()
            assert got == wanted


def test_scattering_keeps_the_rows_whole(tmp_path: Path) -> None:
    shard_set, _, _ = shuffled_set(tmp_path, 9)
    assert all(row["text"] == str(row["value"]) for row in rows_of(shard_set))


@pytest.mark.parametrize("group", [1, 3, 7, 100])
def test_read_rows_and_stream_equal_reading_all(tmp_path: Path, group: int) -> None:
    values = list(range(20))
    shard_set = ShardSet(str(tmp_path))
    with PartWriter(shard_set.uri, 0, NUMBERS, "f") as writer:
        writer.write(numbers(values), group)
        writer.write(numbers([]), group)
    for start in range(21):
        for stop in range(start, 21):
            got = shard_set.read_rows(0, start, stop, ["value"])
            assert got["value"].to_pylist() == values[start:stop]
            assert got.schema.names == ["value"]
            pieces = list(shard_set.stream_rows(0, start, stop, ["value"]))
            assert len(pieces) == max(1, -(-stop // group) - start // group)
    for rows in (1, 4, 50):
        pieces = list(shard_set.stream(0, ["text"], rows))
        assert all(0 < piece.num_rows <= rows for piece in pieces)
        assert [v for piece in pieces for v in piece["text"].to_pylist()] == [str(v) for v in values]


def test_reading_an_empty_part(tmp_path: Path) -> None:
    shard_set = write_set(tmp_path / "s", "x", [numbers([])])
    assert shard_set.read(0).num_rows == 0
    assert list(shard_set.stream(0)) == []
    assert shard_set.read_rows(0, 0, 0).schema.names == NUMBERS.names
    assert list(shard_set.lookup("value", 1)) == []
    assert list(shard_set.gather(0)) == []


@pytest.mark.parametrize("seed", range(3))
def test_lookup_finds_all_rows_of_a_value(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shard_set = ShardSet(str(tmp_path))
    shard_set.begin(ORIGIN)
    parts = [np.sort(rng.integers(0, 12, rng.integers(0, 25))).tolist() for _ in range(3)]
    for part, values in enumerate(parts):
        with PartWriter(shard_set.uri, part, NUMBERS, "f") as writer:
            writer.write(numbers(values), 4)
    shard_set.finish(ORIGIN, 3, {})
    for value in range(-1, 13):
        for chosen in (None, [1]):
            got = [v for t in shard_set.lookup("value", value, chosen) for v in t["value"].to_pylist()]
            wanted = [v for part in (range(3) if chosen is None else chosen) for v in parts[part] if v == value]
            assert got == wanted


def test_lookup_by_image_id(tmp_path: Path) -> None:
    ids = sorted(random_ids(np.random.default_rng(0), 50))
    columns = {"row": range(50), "part": [0] * 50, "position": range(50)}
    shard_set = write_set(tmp_path / "i", "index", [table(schemas.INDEX, image_id=ids, **columns)])
    for position in (0, 17, 49):
        (found,) = shard_set.lookup("image_id", ids[position])
        assert found["position"].to_pylist() == [position]
    assert [t.num_rows for t in shard_set.lookup("image_id", "8" * 32)] in ([], [0])


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    shard_set = write_set(tmp_path / "s", "x", [numbers([1, 2])])
    path = tmp_path / "s" / "part-00000.parquet"
    for damaged in (b"", b"no parquet at all", path.read_bytes()[:-9]):
        path.write_bytes(damaged)
        for read in (shard_set.read, lambda p: list(shard_set.stream(p)), lambda p: shard_set.read_rows(p, 0, 1)):
            with pytest.raises(ConfigError, match=r"part-00000\.parquet is not a readable Parquet file"):
                read(0)


def test_duckdb_reads_vectors_and_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids, vectors = random_ids(rng, 9), rng.standard_normal((9, 5)).astype(np.float16)
    embeddings = write_set(tmp_path / "e", "embeddings", [embedding_table(ids, vectors)])
    rows = duckdb.sql(f"SELECT image_id, embedding FROM read_parquet('{embeddings.part_uri(0)}')").fetchall()
    assert [name for name, _ in rows] == ids
    assert np.array_equal(np.array([v for _, v in rows], np.float16), vectors)
    pictures = [bytes([i]) * 1000 for i in range(5)]
    images = write_set(tmp_path / "i", "images", [image_table(pictures)])
    assert [r[0] for r in duckdb.sql(f"SELECT image FROM '{images.part_uri(0)}'").fetchall()] == pictures


def test_images_and_vectors_lie_plain(tmp_path: Path) -> None:
    """What does not compress is neither compressed nor put into dictionaries; the rest is compressed."""
    images = write_set(tmp_path / "i", "images", [image_table([b"x" * 5000] * IMAGE_GROUP_ROWS)])
    group = pq.ParquetFile(images.part_uri(0)).metadata.row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    assert columns["image"].compression == "UNCOMPRESSED"
    assert columns["image_id"].compression == "ZSTD"
    assert columns["image"].statistics is None
    assert columns["image"].dictionary_page_offset is None
    assert columns["label"].dictionary_page_offset is not None


def test_a_deleted_set_is_gone_and_others_are_not_deleted(tmp_path: Path) -> None:
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "part-00000.parquet").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="is not a shard set of ours: not deleting it"):
        ShardSet(str(foreign)).delete()
    assert (foreign / "part-00000.parquet").exists()
    ours = write_set(tmp_path / "ours", "x", [numbers([1])])
    write_set(tmp_path / "ours" / "_keys", "y", [numbers([1])])
    ours.delete()
    ours.delete()
    assert not (tmp_path / "ours").exists()
    assert not ours.is_complete


@pytest.mark.parametrize("survives", range(10))
def test_a_deletion_cut_short_can_be_taken_up_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survives: int
) -> None:
    """Killed after any of its steps, what is left is known as ours, not complete, and has no commit without a part."""
    shard_set = write_set(tmp_path / "set", "x", [numbers([1]), numbers([2])])
    write_set(tmp_path / "set" / "_keys", "y", [numbers([1])])
    steps = 0

    def counted(original):  # type: ignore[no-untyped-def]
        def call(*args, **kwargs):  # type: ignore[no-untyped-def]
            nonlocal steps
            if steps == survives:
                raise KeyboardInterrupt
            steps += 1
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patched:
        for name in ("unlink", "rmdir", "remove"):
            patched.setattr(os, name, counted(getattr(os, name)))
        with pytest.raises(KeyboardInterrupt):
            shard_set.delete()
    left = ShardSet(shard_set.uri)
    assert steps == survives
    assert left.begun() is not None
    assert not left.is_complete or survives == 0
    for part in left.committed():
        assert storage.exists(left.part_uri(part))
    left.delete()
    assert not (tmp_path / "set").exists()


def test_begun_is_written_first(tmp_path: Path) -> None:
    shard_set = ShardSet(str(tmp_path))
    assert shard_set.begun() is None
    shard_set.begin(ORIGIN)
    assert os.listdir(tmp_path) == [BEGUN]
    assert Origin.from_record(shard_set.begun() or {}) == ORIGIN
