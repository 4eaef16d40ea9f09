"""Raw inputs: finding the files of a source, knowing them by content, and cutting them into the slices of parts."""

import csv
import hashlib
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation import storage
from curation.config import suggest
from curation.errors import ConfigError
from curation.hashing import digest
from curation.manifest import Input
from curation.shards import STREAM_BUFFER, ReadableParquet, ShardSet

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")


FILE_ENDINGS = (".parquet", ".csv", ".txt")


@dataclass(frozen=True)
class Slice:
    """Rows of one part in a raw file.

    Attributes:
        uri: the file.
        start: where they begin: a row of a Parquet file, a byte of a text file.
        first_row: their number in the whole input.
        num_rows: how many there are.
    """

    uri: str
    start: int
    first_row: int
    num_rows: int


def find_files(pattern: str) -> list[str]:
    """Files of a path or glob pattern, sorted. Raises ConfigError when there is none."""
    fs, path = storage.filesystem(pattern)
    found = sorted(fs.glob(path)) if any(c in path for c in "*?[") else [path] if fs.exists(path) else []
    files = [fs.unstrip_protocol(name) if "://" in pattern else name for name in found if not fs.isdir(name)]
    if not files and found == [path]:
        raise ConfigError(f"{pattern} is a folder; name its files, such as {storage.join(pattern, '*.parquet')}")
    if not files:
        raise ConfigError(f"{pattern} does not exist")
    for name in files:
        if not name.endswith(FILE_ENDINGS):
            raise ConfigError(f"{name} is of no kind that is read here: its name must end in {', '.join(FILE_ENDINGS)}")
    return files


def find_images(folder: str) -> list[str]:
    """Paths of image files anywhere under `folder`, relative to it, sorted; files of other endings are passed over."""
    fs, root = storage.filesystem(folder)
    if not fs.isdir(root):
        raise ConfigError(f"{folder} is not a folder" if fs.exists(root) else f"{folder} does not exist")
    relative = (posixpath.relpath(name, root) for name in fs.find(root))
    found = sorted(name for name in relative if name.lower().endswith(IMAGE_ENDINGS))
    if not found:
        raise ConfigError(f"{folder} holds no image files ({', '.join(IMAGE_ENDINGS)})")
    return found


def raw_input(name: str, names: list[str], uris: list[str], made: ShardSet) -> Input:
    """The files at `uris` as an input, known by content (remote: by ETag and size).

    Args:
        name: the input's name in fingerprints.
        names: what of the files' names matters (relative paths of a folder), or empty strings.
        uris: the files.
        made: the set made from them; when it remembers the same sizes and times, files are not read again.
    """
    stat = digest([[part, *_stat(uri)] for part, uri in zip(names, uris, strict=True)])
    begun = made.begun()
    for known in begun["inputs"] if begun else []:
        if known["name"] == name and known["stat"] == stat:
            return Input(name, known["content"], stat=stat)
    return Input(name, digest([[part, _content(uri)] for part, uri in zip(names, uris, strict=True)]), stat=stat)


def _stat(uri: str) -> list[Any]:
    fs, path = storage.filesystem(uri)
    info = fs.info(path)
    return [info["size"], str(info.get("ETag") or info.get("mtime") or info.get("LastModified"))]


def _content(uri: str) -> str:
    fs, path = storage.filesystem(uri)
    info = fs.info(path)
    if info.get("ETag"):
        return f"etag {info['ETag']} {info['size']}"
    whole = hashlib.sha256()
    with fs.open(path, "rb") as file:
        while block := file.read(1 << 20):
            whole.update(block)
    return whole.hexdigest()


class Slices(Sequence[Slice]):
    """The slices of all parts, in 24 bytes each: they travel with every task."""

    def __init__(self, uris: list[str], columns: list[tuple[int, int, int]]) -> None:
        """`columns` are (number of the file, start, num_rows) of each slice, in order."""
        self._uris = uris
        self._files, self._starts, self._counts = np.asarray(columns, np.int64).reshape(-1, 3).T.copy()
        self._counts = np.concatenate([[0], np.cumsum(self._counts)])

    def __len__(self) -> int:
        return len(self._files)

    @overload
    def __getitem__(self, part: int) -> Slice: ...

    @overload
    def __getitem__(self, part: slice) -> list[Slice]: ...

    def __getitem__(self, part: int | slice) -> Slice | list[Slice]:
        if isinstance(part, slice):
            return [self[number] for number in range(len(self))[part]]
        part = range(len(self))[part]
        first, last = (int(count) for count in self._counts[part : part + 2])
        return Slice(self._uris[self._files[part]], int(self._starts[part]), first, last - first)


def cut(uris: list[str], column: str, rows_per_part: int) -> Slices:
    """The files cut into slices of at most `rows_per_part` rows; no slice spans two files.

    Parquet files are cut by their footers; CSV and text files are read through once, to find where slices begin.
    Raises ConfigError for a missing column, a damaged file, or no rows at all. Holds one slice for each part.
    """
    found = [(number, *at) for number, uri in enumerate(uris) for at in _cut_file(uri, column, rows_per_part)]
    if not found:
        raise ConfigError(f"{', '.join(uris)}: no rows")
    return Slices(uris, found)


def _cut_file(uri: str, column: str, rows_per_part: int) -> Iterator[tuple[int, int]]:
    if uri.endswith(".parquet"):
        num_rows = _open_parquet(uri, [column]).num_rows
        for start in range(0, num_rows, rows_per_part):
            yield start, min(rows_per_part, num_rows - start)
        return
    records = _records(uri, 0)
    if uri.endswith(".csv"):
        _check_columns(uri, next(records, (0, []))[1], [column])
    start, count = 0, 0
    for begin, _ in records:
        if count % rows_per_part == 0:
            if count:
                yield start, rows_per_part
            start = begin
        count += 1
    if count:
        yield start, (count - 1) % rows_per_part + 1


def _open_parquet(uri: str, columns: list[str]) -> Any:
    try:
        with storage.open_input(uri) as file:
            parquet = pq.ParquetFile(file)
            _check_columns(uri, parquet.schema_arrow.names, columns)
            return parquet.metadata
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigError(f"{uri} is not a readable Parquet file: {str(error).splitlines()[0]}") from None


def _check_columns(uri: str, present: list[str], wanted: list[str]) -> None:
    for column in wanted:
        if column not in present:
            raise ConfigError(
                f"{uri} has no column {column!r}{suggest(column, present)}; it has {', '.join(present) or 'none'}"
            )


def _records(uri: str, start: int) -> Iterator[tuple[int, list[str]]]:
    """(byte offset, fields) of the records of a CSV file, or of the non-empty lines of a text file, from a byte on."""
    with storage.open_input(uri) as file:
        file.seek(start)
        position = start
        begin = start

        def lines() -> Iterator[str]:
            nonlocal position
            for line in file:
                position += len(line)
                yield line.decode("utf-8-sig" if position == len(line) else "utf-8", errors="replace")

        if uri.endswith(".csv"):
            try:
                for record in csv.reader(lines()):
                    if record:
                        yield begin, record
                    begin = position
            except csv.Error as error:
                raise ConfigError(f"{uri} is not a readable CSV file: {error}") from None
        else:
            for line in lines():
                if line.strip():
                    yield begin, [line.strip()]
                begin = position


def csv_header(uri: str) -> list[str]:
    """The names in the first record of a CSV file."""
    return next((record for _, record in _records(uri, 0)), [])


def read_slice(where: Slice, columns: dict[str, str], rows: int) -> Iterator[tuple[int, dict[str, list[Any]]]]:
    """A slice's rows in batches: (number of the first row, values by our names).

    Args:
        where: the slice.
        columns: our names -> the file's columns. Of a text file only `url` exists.
        rows: rows of a batch.
    """
    if where.uri.endswith(".parquet"):
        yield from _read_parquet(where, columns, rows)
        return
    header = csv_header(where.uri) if where.uri.endswith(".csv") else [columns["url"]]
    _check_columns(where.uri, header, list(columns.values()))
    places = {name: header.index(column) for name, column in columns.items()}
    records = _records(where.uri, where.start)
    for first in range(0, where.num_rows, rows):
        batch = [next(records)[1] for _ in range(min(rows, where.num_rows - first))]
        values = {n: [r[i] if i < len(r) else None for r in batch] for n, i in places.items()}
        yield where.first_row + first, values


def _read_parquet(where: Slice, columns: dict[str, str], rows: int) -> Iterator[tuple[int, dict[str, list[Any]]]]:
    metadata = _open_parquet(where.uri, list(columns.values()))
    groups: list[int] = []
    skip = seen = 0
    for group in range(metadata.num_row_groups):
        size = metadata.row_group(group).num_rows
        if seen + size > where.start and seen < where.start + where.num_rows:
            skip = skip if groups else where.start - seen
            groups.append(group)
        seen += size
    position = -skip
    with storage.open_input(where.uri) as file, ReadableParquet(where.uri):
        parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=STREAM_BUFFER)
        wanted = list(dict.fromkeys(columns.values()))
        for batch in parquet.iter_batches(batch_size=rows, row_groups=groups, columns=wanted, use_threads=False):
            first, last = max(position, 0), min(position + batch.num_rows, where.num_rows)
            if last > first:
                piece = batch.slice(first - position, last - first)
                yield where.first_row + first, {n: piece.column(c).to_pylist() for n, c in columns.items()}
            position += batch.num_rows
