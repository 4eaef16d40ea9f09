"""Shard sets: directories of Parquet parts with rejects, commits and a manifest.

    SET/part-00000.parquet          rows
    SET/rejects/part-00000.parquet  rows that could not be processed (only where there are some)
    SET/_commits/part-00000.json    written last by the task that made the part: no commit, no part
    SET/_begun.json                 what the set is being made from, written before the first part
    SET/manifest.json               written last by the driver: no manifest, no one's input

This module knows how sets are laid out, written and read, not how or by whom parts are made.
"""

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import cached_property
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curation import storage
from curation.errors import ConfigError
from curation.manifest import Commit, Origin, checksum, part_name, totals
from curation.schemas import REJECTS, storage_options

MANIFEST = "manifest.json"
BEGUN = "_begun.json"
COMMITS = "_commits"
BUCKETS = b"buckets"
GROUP_ROWS = 65_536
"""Rows of a row group of small columns."""
IMAGE_GROUP_ROWS = 64
"""Rows of a row group that holds images, so that one can be held many times over."""
STREAM_BUFFER = 1 << 20


def part_number(name: str) -> int | None:
    """The number in `part-00042.json`, None for any other name."""
    stem = name.split(".")[0]
    return int(stem[5:]) if stem.startswith("part-") and stem[5:].isdigit() else None


def read_json(uri: str) -> dict[str, Any] | None:
    """A JSON object, None where there is no file. Raises ConfigError for a file that is no JSON object."""
    try:
        value = json.loads(storage.read_bytes(uri))
    except FileNotFoundError:
        return None
    except ValueError:
        raise ConfigError(f"{uri} is not valid JSON: it was damaged or edited; delete its set and run again") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{uri} does not hold a JSON object; delete its set and run again")
    return value


class PartWriter:
    """Writes one part: rows to the part, failures to its rejects, then the commit.

    Used as a context manager; leaving it with an exception leaves nothing behind. Holds one row group.
    """

    def __init__(self, directory: str, part: int, schema: pa.Schema, fingerprint: str) -> None:
        self._directory, self._part, self._schema, self._fingerprint = directory, part, schema, fingerprint
        self._began = time.monotonic()
        self._rows = 0
        self._buckets: list[int] | None = None
        self._rejects: list[dict[str, Any]] = []
        self._file = storage.AtomicFile(storage.join(directory, f"{part_name(part)}.parquet"))
        self._writer = pq.ParquetWriter(self._file, schema, **storage_options(schema))
        self.commit: Commit | None = None

    def write(self, table: pa.Table, row_group_size: int | None = None) -> None:
        """Append rows, as one row group or as groups of `row_group_size`."""
        if table.num_rows:
            self._writer.write_table(table.cast(self._schema), row_group_size=row_group_size or table.num_rows)
            self._rows += table.num_rows

    def write_buckets(self, table: pa.Table, buckets: npt.NDArray[np.int64]) -> None:
        """Append rows as one row group for each of their destinations, which `gather` finds again.

        Rows of one destination keep their order. `buckets` is int64 [num_rows].
        """
        self._buckets = self._buckets or []
        order = np.argsort(buckets, kind="stable")
        present, starts = np.unique(buckets[order], return_index=True)
        table = table.take(pa.array(order))
        for bucket, start, end in zip(present, starts, [*starts, len(order)][1:], strict=True):
            self.write(table.slice(start, end - start))
            self._buckets.append(int(bucket))

    def reject(
        self,
        reason: str,
        detail: str | None = None,
        *,
        row: int | None = None,
        image_id: str | None = None,
        retryable: bool = False,
        url: str | None = None,
    ) -> None:
        """Keep a row that could not be processed, with the reason."""
        values = {
            "row": row,
            "image_id": image_id,
            "reason": reason,
            "detail": detail,
            "retryable": retryable,
            "url": url,
        }
        self._rejects.append(values)

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._writer.is_open = False  # else it would write its footer when it is collected
            self._file.discard()
            return
        with self._file:
            if self._buckets is not None:
                self._writer.add_key_value_metadata({BUCKETS.decode(): json.dumps(self._buckets)})
            self._writer.close()
        self._finish()

    def _finish(self) -> None:
        rejects_uri = storage.join(self._directory, "rejects", f"{part_name(self._part)}.parquet")
        rejects_bytes, rejects_sha256 = 0, None
        if self._rejects:
            with storage.AtomicFile(rejects_uri) as file:
                pq.write_table(pa.Table.from_pylist(self._rejects, REJECTS), file, compression="zstd")
            rejects_bytes, rejects_sha256 = file.size, file.sha256
        else:
            storage.remove_file(rejects_uri)  # of an attempt that was killed before its commit
        reasons: dict[str, int] = {}
        for values in sorted(self._rejects, key=lambda v: str(v["reason"])):
            reasons[values["reason"]] = reasons.get(values["reason"], 0) + 1
        self.commit = Commit(
            part=self._part,
            fingerprint=self._fingerprint,
            rows=self._rows,
            bytes=self._file.size,
            sha256=self._file.sha256,
            rejects=len(self._rejects),
            rejects_bytes=rejects_bytes,
            rejects_sha256=rejects_sha256,
            reasons=reasons,
            retryable=sum(1 for values in self._rejects if values["retryable"]),
            seconds=round(time.monotonic() - self._began, 3),
        )
        text = json.dumps(asdict(self.commit), sort_keys=True)
        storage.write_bytes(storage.join(self._directory, COMMITS, f"{part_name(self._part)}.json"), text.encode())


class ShardSet:
    """One shard set at a URI: its state, its manifest and its parts."""

    def __init__(self, uri: str) -> None:
        self.uri = storage.absolute(uri)

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The manifest. Raises ConfigError when the set is absent or not complete."""
        manifest = read_json(storage.join(self.uri, MANIFEST))
        if manifest is None:
            state = "is not complete: run its stage again" if self.begun() else "is not a shard set"
            raise ConfigError(f"{self.uri} {state} (no {MANIFEST})")
        return manifest

    @property
    def is_complete(self) -> bool:
        """Whether there is a manifest."""
        return "manifest" in self.__dict__ or storage.exists(storage.join(self.uri, MANIFEST))

    def begun(self) -> dict[str, Any] | None:
        """What the set is (being) made from, or None where nothing was begun."""
        return read_json(storage.join(self.uri, BEGUN))

    @property
    def content(self) -> str:
        """The hash of what is in the set."""
        return str(self.manifest["content"])

    @property
    def num_rows(self) -> int:
        """Rows in all parts."""
        return int(self.manifest["rows"])

    @property
    def num_parts(self) -> int:
        """Number of parts."""
        return len(self.manifest["rows_per_part"])

    @property
    def labels(self) -> dict[str, Any]:
        """What the set is of: source, role, embedder."""
        return dict(self.manifest["labels"])

    @property
    def source(self) -> str:
        """The source the set's rows come from. Raises ConfigError for a set that is of no single source."""
        source = self.labels.get("source")
        if source is None:
            raise ConfigError(f"{self.uri} holds {self.manifest['kind']}, not the rows of one source")
        return str(source)

    @property
    def rows_per_part(self) -> npt.NDArray[np.int64]:
        """int64 [num_parts]."""
        return np.asarray(self.manifest["rows_per_part"], dtype=np.int64)

    @property
    def offsets(self) -> npt.NDArray[np.int64]:
        """Prefix sums of rows_per_part, int64 [num_parts + 1]: where each part begins in the set."""
        return np.concatenate([[0], np.cumsum(self.rows_per_part)]).astype(np.int64)

    def require(self, kind: str) -> "ShardSet":
        """This set, if it is complete and of that kind; else ConfigError."""
        if self.manifest["kind"] != kind:
            raise ConfigError(f"{self.uri} holds {self.manifest['kind']}, but {kind} are needed here")
        return self

    def part_uri(self, part: int) -> str:
        """Where a part lies."""
        return storage.join(self.uri, f"{part_name(part)}.parquet")

    def rejects_uri(self, part: int) -> str:
        """Where a part's rejects lie, if it has some."""
        return storage.join(self.uri, "rejects", f"{part_name(part)}.parquet")

    def commit(self, part: int) -> Commit | None:
        """A part's commit, None where there is none."""
        values = read_json(storage.join(self.uri, COMMITS, f"{part_name(part)}.json"))
        try:
            return Commit(**values) if values else None
        except TypeError:
            raise ConfigError(f"{self.uri}: the commit of {part_name(part)} was damaged or edited") from None

    def committed(self) -> set[int]:
        """Numbers of the parts that have commits."""
        numbers = (part_number(name) for name in storage.names(storage.join(self.uri, COMMITS)))
        return {number for number in numbers if number is not None}

    def read(self, part: int, columns: list[str] | None = None) -> pa.Table:
        """One part whole, or some of its columns."""
        with storage.open_input(self.part_uri(part)) as file, ReadableParquet(self.part_uri(part)):
            return pq.ParquetFile(file).read(columns=columns, use_threads=False)

    def stream(self, part: int, columns: list[str] | None = None, rows: int = 64) -> Iterator[pa.Table]:
        """One part in tables of at most `rows` rows, in order; one row group is held at a time."""
        with storage.open_input(self.part_uri(part)) as file, ReadableParquet(self.part_uri(part)):
            parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=STREAM_BUFFER)
            for batch in parquet.iter_batches(batch_size=rows, columns=columns, use_threads=False):
                yield pa.Table.from_batches([batch])

    def gather(self, bucket: int, parts: Iterable[int] | None = None) -> Iterator[pa.Table]:
        """All rows that `PartWriter.write_buckets` sent to `bucket`, part by part in order; one table is held."""
        for part in range(self.num_parts) if parts is None else parts:
            with storage.open_input(self.part_uri(part)) as file, ReadableParquet(self.part_uri(part)):
                parquet = pq.ParquetFile(file, pre_buffer=False)
                buckets = json.loads((parquet.metadata.metadata or {}).get(BUCKETS, b"[]"))
                groups = [group for group, destination in enumerate(buckets) if destination == bucket]
                if groups:
                    yield parquet.read_row_groups(groups, use_threads=False)

    def read_rows(self, part: int, start: int, stop: int, columns: list[str] | None = None) -> pa.Table:
        """Rows [start, stop) of one part; only the row groups that hold them are read."""
        return pa.concat_tables(self.stream_rows(part, start, stop, columns))

    def stream_rows(self, part: int, start: int, stop: int, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """`read_rows` in a table for each row group, of which one is held; an empty table if there are no rows."""
        with storage.open_input(self.part_uri(part)) as file, ReadableParquet(self.part_uri(part)):
            parquet = pq.ParquetFile(file, pre_buffer=False)
            ends = np.cumsum(
                [parquet.metadata.row_group(g).num_rows for g in range(parquet.num_row_groups)], dtype=np.int64
            )
            if stop <= start:
                yield parquet.schema_arrow.empty_table().select(columns or parquet.schema_arrow.names)
                return
            first, last = np.searchsorted(ends, [start, stop - 1], side="right")
            for group in range(first, last + 1):
                begin = int(ends[group - 1]) if group else 0
                table = parquet.read_row_group(group, columns=columns, use_threads=False)
                yield table.slice(max(start - begin, 0), min(stop, int(ends[group])) - max(start, begin))

    def lookup(self, column: str, value: int | str, parts: Iterable[int] | None = None) -> Iterator[pa.Table]:
        """Rows with that value of a column the parts are sorted by; row groups are chosen by their statistics."""
        for part in range(self.num_parts) if parts is None else parts:
            with storage.open_input(self.part_uri(part)) as file, ReadableParquet(self.part_uri(part)):
                parquet = pq.ParquetFile(file, pre_buffer=False)
                where = parquet.schema_arrow.names.index(column)
                groups = [
                    group
                    for group in range(parquet.num_row_groups)
                    if (found := parquet.metadata.row_group(group).column(where).statistics) is None
                    or found.min <= value <= found.max
                ]
                if groups:
                    table = parquet.read_row_groups(groups, use_threads=False)
                    yield table.filter(pc.equal(table[column], value))

    def begin(self, origin: Origin) -> None:
        """Record what the set is made from, before its first part."""
        text = json.dumps(origin.record(self.uri), indent=1, sort_keys=True)
        storage.write_bytes(storage.join(self.uri, BEGUN), text.encode())

    def finish(self, origin: Origin, num_parts: int, info: dict[str, Any]) -> None:
        """Write the manifest from the commits. `info` is what a reader may like to know and no hash depends on."""
        self._sweep()
        record = origin.record(self.uri) | totals(self.uri, num_parts, self.commit) | {"info": info}
        self.write_manifest(record)

    def _sweep(self) -> None:
        """Remove what processes that died have left half-written."""
        for place in (self.uri, storage.join(self.uri, "rejects"), storage.join(self.uri, COMMITS)):
            for name in storage.names(place):
                if storage.is_temporary(name):
                    storage.remove_file(storage.join(place, name))

    def write_manifest(self, record: dict[str, Any]) -> None:
        """Store a manifest under its checksum."""
        record["checksum"] = checksum(record)
        storage.write_bytes(storage.join(self.uri, MANIFEST), json.dumps(record, indent=1, sort_keys=True).encode())
        self.__dict__.pop("manifest", None)

    def delete(self) -> None:
        """Delete the set. Refuses (ConfigError) a directory that holds something else."""
        if storage.names(self.uri) and self.begun() is None and not self.is_complete:
            raise ConfigError(f"{self.uri} is not a shard set of ours: not deleting it")
        # In this order a deletion cut short leaves a set that is known as ours, and no commit without its part.
        storage.remove_file(storage.join(self.uri, MANIFEST))
        storage.remove_tree(storage.join(self.uri, COMMITS))
        storage.remove_tree(self.uri, last=BEGUN)
        self.__dict__.pop("manifest", None)


class ReadableParquet:
    """Turns pyarrow's errors over a damaged file into one line that names the file."""

    def __init__(self, uri: str) -> None:
        self._uri = uri

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, (pa.ArrowInvalid, pa.ArrowIOError)) and not isinstance(error, FileNotFoundError):
            raise ConfigError(f"{self._uri} is not a readable Parquet file: {str(error).splitlines()[0]}") from None
