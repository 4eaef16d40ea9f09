"""Stage `download`: URL lists, folders and Parquet files become image sets, bytes as found.

Each task holds one row group of images (at most 64, or GROUP_BYTES) and, for URLs, a spool file on local disk.
Cost grows with the bytes fetched.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa

from curation import schemas, storage
from curation.errors import ConfigError
from curation.hashing import image_id
from curation.manifest import Input
from curation.shards import GROUP_ROWS, IMAGE_GROUP_ROWS, PartWriter, ShardSet
from embedders.images import TooManyPixels, UndecodableImage, image_size
from pipelines.executor import Needs
from pipelines.fetch import Failed, Fetcher
from pipelines.guard import FetchPolicy
from pipelines.raw import Slice, cut, find_files, find_images, raw_input, read_slice
from pipelines.recipe import DownloadSettings, SourceSettings
from pipelines.unit import Step, Unit

GROUP_BYTES = 32_000_000


class _ImageGroups:
    """Collects images into row groups of bounded size."""

    def __init__(self, writer: PartWriter) -> None:
        self._writer = writer
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0

    def add(self, row: int, data: bytes, size: tuple[int, int, str], provenance: dict[str, Any]) -> None:
        width, height, kind = size
        values = {"image_id": image_id(data), "row": row, "image": data, "width": width, "height": height}
        self._rows.append({**values, "format": kind, **provenance})
        self._bytes += len(data)
        if len(self._rows) == IMAGE_GROUP_ROWS or self._bytes > GROUP_BYTES:
            self.flush()

    def flush(self) -> None:
        self._writer.write(pa.Table.from_pylist(self._rows, schemas.IMAGES))
        self._rows, self._bytes = [], 0


@dataclass
class UrlsStep(Step):
    """The list itself, cut into parts: `urls/SOURCE`."""

    source: SourceSettings
    rows_per_part: int
    slices: Sequence[Slice] = ()

    def schema(self) -> pa.Schema:
        return schemas.URLS

    def num_parts(self) -> int:
        self.slices = cut(find_files(self.source.urls or ""), self.source.url_column or "url", self.rows_per_part)
        return len(self.slices)

    def write_part(self, part: int, writer: PartWriter) -> None:
        columns = {"url": "url", **_columns(self.source)}
        for first_row, values in read_slice(self.slices[part], columns, GROUP_ROWS):
            count = len(values["url"])
            arrays = [pa.array(range(first_row, first_row + count), pa.int64())]
            arrays += [pa.array(_texts(values.get(name), count), pa.string()) for name in schemas.URLS.names[1:]]
            writer.write(pa.table(arrays, schema=schemas.URLS))


def _columns(source: SourceSettings) -> dict[str, str]:
    """Our names -> the input's, for the provenance columns that the source names."""
    named = {"url": source.url_column, "alt": source.alt_column, "page_url": source.page_url_column}
    return {name: column for name, column in {**named, "label": source.label_column}.items() if column is not None}


def _texts(values: list[Any] | None, count: int) -> list[str | None]:
    """Values as text, whatever the input's type (a label may be a number); nulls where there is no such column."""
    if values is None:
        return [None] * count
    return [value if value is None or isinstance(value, str) else str(value) for value in values]


@dataclass
class FetchStep(Step):
    """Part k of the URLs, fetched: part k of `images/SOURCE`."""

    urls: str
    policy: FetchPolicy

    @property
    def needs(self) -> Needs:
        return Needs(resident=True)

    def schema(self) -> pa.Schema:
        return schemas.IMAGES

    def num_parts(self) -> int:
        return ShardSet(self.urls).num_parts

    @cached_property
    def fetcher(self) -> Fetcher:
        """Made where the work is done, once a worker: it owns that process's connections."""
        return Fetcher(self.policy)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "fetcher"}

    def write_part(self, part: int, writer: PartWriter) -> None:
        rows = ShardSet(self.urls).read(part).to_pylist()
        groups = _ImageGroups(writer)
        fetched = self.fetcher.fetch([r["row"] for r in rows], [r["url"] for r in rows])
        for asked, got in zip(rows, fetched, strict=True):
            if isinstance(got, Failed):
                writer.reject(got.reason, got.detail, row=got.row, retryable=got.retryable, url=asked["url"])
                continue
            provenance = {name: asked[name] for name in ("url", "alt", "page_url", "label")}
            size = (got.width, got.height, got.format)
            groups.add(got.row, got.image, size, {**provenance, "final_url": got.final_url})
        groups.flush()


@dataclass
class _LocalStep(Step):
    """Images that are at hand, under the same limits as fetched ones."""

    source: SourceSettings
    rows_per_part: int
    max_bytes: int
    max_pixels: int

    def schema(self) -> pa.Schema:
        return schemas.IMAGES

    def images(self, part: int) -> Iterator[tuple[int, bytes | None, dict[str, Any]]]:
        """(row, bytes, provenance) of a part's images."""
        raise NotImplementedError

    def write_part(self, part: int, writer: PartWriter) -> None:
        groups = _ImageGroups(writer)
        for row, data, provenance in self.images(part):
            problem, size = self._examine(data)
            if data is None or size is None:
                writer.reject(problem[0], problem[1], row=row, url=provenance.get("url"))
            else:
                groups.add(row, data, size, provenance)
        groups.flush()

    def _examine(self, data: bytes | None) -> tuple[tuple[str, str], tuple[int, int, str] | None]:
        """The reason against an image, with a detail, or its size."""
        if not data:
            return ("empty", "no bytes"), None
        if len(data) > self.max_bytes:
            return ("too_large", f"{len(data)} bytes, limit {self.max_bytes}"), None
        try:
            width, height, kind = image_size(data)
        except TooManyPixels as error:
            return ("too_many_pixels", str(error)), None
        except UndecodableImage as error:
            return ("not_an_image", str(error)), None
        if width * height > self.max_pixels:
            return ("too_many_pixels", f"{width}x{height}, limit {self.max_pixels}"), None
        return ("", ""), (width, height, kind)


@dataclass
class FolderStep(_LocalStep):
    """Image files of a folder; the path below it stands as `url`, the directory as `label`."""

    paths: list[str] = field(default_factory=list)

    @property
    def needs(self) -> Needs:
        return Needs(resident=True)  # all paths travel to a worker once, not with every task

    def num_parts(self) -> int:
        self.paths = find_images(self.source.folder or "")
        return -(-len(self.paths) // self.rows_per_part)

    def images(self, part: int) -> Iterator[tuple[int, bytes | None, dict[str, Any]]]:
        first = part * self.rows_per_part
        for row, path in enumerate(self.paths[first : first + self.rows_per_part], start=first):
            label = path.rpartition("/")[0] or None
            yield (
                row,
                _read_limited(storage.join(self.source.folder or "", path), self.max_bytes),
                {"url": path, "label": label},
            )


def _read_limited(uri: str, limit: int) -> bytes:
    """A file's bytes, one more than the limit at most."""
    with storage.open_input(uri) as file:
        return file.read(limit + 1)


@dataclass
class ParquetStep(_LocalStep):
    """Parquet files with a column of image bytes."""

    slices: Sequence[Slice] = ()

    def num_parts(self) -> int:
        self.slices = cut(find_files(self.source.images or ""), self.source.image_column, self.rows_per_part)
        return len(self.slices)

    def images(self, part: int) -> Iterator[tuple[int, bytes | None, dict[str, Any]]]:
        columns = {"image": self.source.image_column, **_columns(self.source)}
        for first_row, values in read_slice(self.slices[part], columns, IMAGE_GROUP_ROWS):
            for i, data in enumerate(values["image"]):
                provenance = {name: _texts([values[name][i]], 1)[0] for name in columns if name != "image"}
                yield first_row + i, _image_bytes(data, self.source), provenance


def _image_bytes(value: Any, source: SourceSettings) -> bytes | None:
    """The bytes of an image column's value: binary, or the {bytes, path} structs that dataset hubs write."""
    if isinstance(value, dict):
        value = value.get("bytes")
    if value is not None and not isinstance(value, bytes):
        raise ConfigError(f"{source.images}: column {source.image_column!r} holds no image bytes; set image_column")
    return value


@dataclass
class DownloadUnit(Unit):
    """One source, from its raw input to `images/SOURCE`."""

    name: str
    source: SourceSettings
    settings: DownloadSettings
    rows_per_part: int
    urls_out: str
    out: str

    stage = "download"

    @property
    def title(self) -> str:
        return f"download {self.name}"

    def inputs(self) -> list[Input]:
        name = f"raw/{self.name}"
        if self.source.folder is not None:
            paths = find_images(self.source.folder)
            return [raw_input(name, paths, [storage.join(self.source.folder, p) for p in paths], ShardSet(self.out))]
        files = find_files(self.source.urls or self.source.images or "")
        made = ShardSet(self.urls_out if self.source.urls is not None else self.out)
        return [raw_input(name, [""] * len(files), files, made)]

    def config(self) -> dict[str, Any]:
        source = self.source.model_dump(exclude={"role", "urls", "folder", "images", "rows"}, exclude_none=True)
        limits = self.settings.model_dump(include={"max_bytes", "max_pixels"})
        if self.source.urls is not None:
            limits |= self.settings.model_dump(include={"user_agent", "allow_private"})
        return {"rows_per_part": self.rows_per_part, "source": source, "download": limits}

    def steps(self) -> list[Step]:
        labels = {"source": self.name, "role": self.source.role}
        if self.source.urls is not None:
            first = UrlsStep(self.urls_out, "urls", labels, True, self.source, self.rows_per_part)
            return [first, FetchStep(self.out, "images", labels, True, self.urls_out, self._policy())]
        kind = FolderStep if self.source.folder is not None else ParquetStep
        limits = (self.settings.max_bytes, self.settings.max_pixels)
        return [kind(self.out, "images", labels, True, self.source, self.rows_per_part, *limits)]

    def _policy(self) -> FetchPolicy:
        values = self.settings.model_dump(exclude_none=True)
        return FetchPolicy(**values)
