"""Images in Parquet files: their row groups by the footers, and the bytes of one row group.

The images are a column of binary values, or of structs with a field `bytes`, as Hugging Face datasets have them; no
other column is read but `image_id`, where there is one. Row groups are read whole, each from its own place in the file.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from curation import storage
from curation.errors import ConfigError
from curation.shards import BEGUN, MANIFEST, ReadableParquet, ShardSet
from trainer.order import FILES_TOGETHER, Groups

ID = "image_id"
BYTES = "bytes"
FOOTER_THREADS = 16
FILES_OPEN = 2 * FILES_TOGETHER
"""Files that a reader keeps open: those being read and, where they change, those that follow."""
LONGEST_RUN = 8
READ_PER_SAMPLE = 2**20
"""Bytes that may be read in vain for a sample before runs of several samples are taken from a row group."""


class Rows(NamedTuple):
    """One row group: the images' bytes (null where there are none), and their ids, if those are stored."""

    images: pa.ChunkedArray
    ids: pa.ChunkedArray | None = None


@dataclass(frozen=True)
class ParquetImages:
    """The images of some Parquet files. Holds 8 bytes for each row group, and the names of the files.

    Attributes:
        files: URIs, string [files].
        groups: the row groups, file by file.
        column: the name of the images' column.
    """

    files: pa.Array
    groups: Groups
    column: str

    @property
    def held(self) -> int:
        """Row groups that a reader should hold: those of a window."""
        return self.groups.window

    def place(self, group: int, row: int) -> tuple[str, int]:
        """The file of a row, and the row's number in it."""
        file = int(self.groups.file[group])
        before = self.groups.rows[self._first(file) : group]
        return str(self.files[file]), int(before.sum(dtype=np.int64)) + row

    def reader(self) -> Callable[[int], Rows]:
        """What reads a row group by its number, from several threads if need be, and keeps some files open.

        It raises ConfigError where a file is gone or damaged.
        """
        opened = lru_cache(FILES_OPEN)(_OpenFile)

        def read(group: int) -> Rows:
            file = int(self.groups.file[group])
            return opened(str(self.files[file]), self.column).read(group - self._first(file))

        return read

    def _first(self, file: int) -> int:
        return int(np.searchsorted(self.groups.file, file))


def open_parquet(uris: Sequence[str], column: str, window_bytes: int) -> ParquetImages:
    """The images of Parquet files, whose footers are read once, several at a time.

    Args:
        uris: of the files.
        column: the images' column.
        window_bytes: of row groups to shuffle together; it is one group where a group is larger.

    Raises:
        ConfigError: a file is missing or damaged, a column is missing or holds no bytes, or there are no rows.
    """
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        footers = list(pool.map(lambda uri: _OpenFile(uri, column).footer(), uris))
    rows = np.concatenate([np.empty(0, np.int32), *(rows for rows, _ in footers)])
    if not rows.sum(dtype=np.int64):
        raise ConfigError(f"no rows in {uris[0]}" + (f" and {len(uris) - 1} other files" if len(uris) > 1 else ""))
    mean = sum(size for _, size in footers) / np.count_nonzero(rows)
    window = min(len(rows), max(1, int(window_bytes / max(mean, 1))))
    run = min(LONGEST_RUN, -int(-mean // READ_PER_SAMPLE) or 1)
    file = np.repeat(np.arange(len(uris), dtype=np.int32), [len(rows) for rows, _ in footers])
    return ParquetImages(pa.array(uris, pa.large_string()), Groups(file, rows, window, run), column)


def parquet_files(uri: str) -> list[str] | None:
    """The Parquet files that a file, a glob pattern, a shard set or another directory means.

    None where it is a directory without any. Raises ConfigError where nothing is there, or a set that is not complete.
    """
    fs, path = storage.filesystem(uri)
    if fs.isdir(path):
        names = storage.names(uri)
        if MANIFEST in names or BEGUN in names:
            shards = ShardSet(uri)
            return [shards.part_uri(part) for part in range(shards.num_parts)]
        return [storage.join(uri, name) for name in names if name.endswith(".parquet")] or None
    if fs.exists(path):
        return [uri]
    found = sorted(name for name in fs.glob(path) if not fs.isdir(name)) if any(c in path for c in "*?[") else []
    if not found:
        raise ConfigError(f"{uri} does not exist")
    return [fs.unstrip_protocol(name) if "://" in uri else name for name in found]


class _OpenFile:
    """A Parquet file opened once, which one thread reads at a time."""

    def __init__(self, uri: str, column: str) -> None:
        self._uri, self._column, self._lock = uri, column, threading.Lock()
        with _readable(uri):
            self._parquet = _opened(uri)
        schema = self._parquet.schema_arrow
        self._leaf = image_leaf(uri, schema, column)
        self._ids = [ID] if ID in schema.names and column != ID else []

    def read(self, group: int) -> Rows:
        with self._lock, _readable(self._uri):
            table = self._parquet.read_row_group(group, [self._leaf, *self._ids], use_threads=False)
        images = table[self._column]
        if pa.types.is_struct(images.type):
            images = pa.chunked_array([chunk.flatten()[0] for chunk in images.chunks], images.type.field(0).type)
        return Rows(images, table[ID] if self._ids else None)

    def footer(self) -> tuple[npt.NDArray[np.int32], int]:
        """Rows of each row group, int32, and the bytes of all images before compression."""
        metadata = self._parquet.metadata
        leaf = [metadata.schema.column(number).path for number in range(metadata.num_columns)].index(self._leaf)
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        sizes = [group.column(leaf).total_uncompressed_size for group in groups]
        return np.array([group.num_rows for group in groups], np.int32), sum(sizes)


@contextmanager
def _readable(uri: str) -> Iterator[None]:
    """Turns what may be wrong with a file into one line that names it."""
    try:
        with ReadableParquet(uri):
            yield
    except FileNotFoundError:
        raise ConfigError(f"{uri} does not exist") from None


def _opened(uri: str) -> pq.ParquetFile:
    """Local files are read by pyarrow itself; of others, columns that lie side by side are fetched in one piece."""
    fs, path = storage.filesystem(uri)
    if storage.is_local(uri):
        return pq.ParquetFile(path, pre_buffer=False)
    return pq.ParquetFile(fs.open(path, "rb", cache_type="none"), pre_buffer=True)


def image_leaf(uri: str, schema: pa.Schema, column: str) -> str:
    """The Parquet column that holds the images' bytes. Raises ConfigError where there is none."""
    if column not in schema.names:
        raise ConfigError(f"{uri} has no column {column!r}; set image_column to one of {', '.join(schema.names)}")
    kind, leaf = schema.field(column).type, column
    if pa.types.is_struct(kind) and kind.get_field_index(BYTES) >= 0:
        kind, leaf = kind.field(BYTES).type, f"{column}.{BYTES}"
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)):
        raise ConfigError(
            f"{uri}: column {column!r} holds {schema.field(column).type}, not the bytes of images; "
            f"set image_column to another of {', '.join(schema.names)}"
        )
    return leaf
