"""Labelled images in Parquet, for evaluation: which files and rows, read one by one in order, and labels as numbers.

Rows that cannot be used are skipped and named, never lost without a word.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from curation import storage
from curation.errors import ConfigError
from curation.shards import STREAM_BUFFER, ReadableParquet
from trainer.parquet import image_leaf, parquet_files

Label = str | int

READ_ROWS = 64
"""Rows read at a time, so that few encoded images are held."""
HELD_OUT = 10
"""One training row in so many is held out, where something is chosen by it."""


@dataclass(frozen=True)
class Labelled:
    """Rows of Parquet files with an image and a label.

    Attributes:
        uri: a file, a glob pattern, or a directory of `*.parquet`, anywhere fsspec reaches.
        image_column: encoded images: binary, or a struct with a field `bytes`, as Hugging Face datasets write them.
        label_column: strings or whole numbers.
        start, stop: rows [start, stop), counted through all files in the order of their names.
        sample: if given, so many of these rows, drawn by `seed`; all of them where there are no more.
    """

    uri: str
    image_column: str = "image"
    label_column: str = "label"
    start: int = 0
    stop: int | None = None
    sample: int | None = None
    seed: int = 0


class Row(NamedTuple):
    """One image: its row in the whole set, where that is in words, the encoded image, its label."""

    number: int
    place: str
    data: bytes
    label: Label


class Skipped(NamedTuple):
    """A row that could not be used: where it is, and why."""

    place: str
    reason: str


def read(source: Labelled, skipped: list[Skipped]) -> Iterator[Row]:
    """The rows of `source`, in order; those without an image or a label are added to `skipped`.

    Holds READ_ROWS rows and what pyarrow buffers of one row group; row groups without wanted rows are not read.

    Raises:
        ConfigError: no such file, no readable Parquet, a column is missing or of a wrong type, or there are no rows.
    """
    files = _files(source.uri)
    counts = [_checked_rows(file, source) for file in files]
    wanted = _wanted(source, sum(counts))
    first = 0
    for file, count in zip(files, counts, strict=True):
        mine = wanted[np.searchsorted(wanted, first) : np.searchsorted(wanted, first + count)]
        yield from _rows(file, source, mine - first, first, skipped)
        first += count


def class_numbers(train: Sequence[Label], test: Sequence[Label]) -> tuple[list[Label], Tensor, Tensor]:
    """Labels as numbers.

    Returns:
        the classes, those of `train`, sorted; int64 [len(train)] and int64 [len(test)], places among them.

    Raises:
        ConfigError: `train` has fewer than two classes, or `test` one that `train` lacks.
    """
    classes = sorted(set(train), key=lambda label: (isinstance(label, str), label))
    if len(classes) < 2:
        raise ConfigError(f"the training rows have one class alone ({classes}): nothing can be told apart")
    numbers = {label: number for number, label in enumerate(classes)}
    unknown = sorted({label for label in test if label not in numbers}, key=str)
    if unknown:
        raise ConfigError(
            f"{len(unknown)} labels of the test rows, such as {unknown[0]!r}, are on no training row "
            f"(which have {len(classes)}, such as {classes[0]!r}); take rows with the same labels"
        )
    return classes, _numbers(train, numbers), _numbers(test, numbers)


def held_out_rows(num_rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and the 10 % held out, both int64 and ascending, drawn by `seed`. ConfigError below 10 rows."""
    if num_rows < HELD_OUT:
        raise ConfigError(f"{num_rows} training rows are too few to hold some out; take at least {HELD_OUT}")
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))
    held = num_rows // HELD_OUT
    return order[held:].sort().values, order[:held].sort().values


def _numbers(labels: Iterable[Label], numbers: dict[Label, int]) -> Tensor:
    return torch.tensor([numbers[label] for label in labels], dtype=torch.int64)


def _files(uri: str) -> list[str]:
    found = parquet_files(storage.absolute(uri))
    if found is None:
        raise ConfigError(f"{uri} holds no Parquet files")
    return found


def _checked_rows(file: str, source: Labelled) -> int:
    """How many rows a file has. Raises ConfigError where its columns are not as `source` says."""
    with storage.open_input(file) as opened, ReadableParquet(file):
        parquet = pq.ParquetFile(opened, pre_buffer=False)
        schema = parquet.schema_arrow
        image_leaf(file, schema, source.image_column)
        column = source.label_column
        if column not in schema.names:
            raise ConfigError(f"{file} has no column {column!r}; set label_column to one of {', '.join(schema.names)}")
        if not _is_label(schema.field(column).type):
            kind = schema.field(column).type
            raise ConfigError(f"{file}: label_column {column!r} holds {kind}, not strings or whole numbers")
        return int(parquet.metadata.num_rows)


def _is_label(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _wanted(source: Labelled, total: int) -> npt.NDArray[np.int64]:
    """Numbers of the rows that `source` means, int64, ascending."""
    rows = np.arange(total, dtype=np.int64)[source.start : source.stop]
    if source.sample is not None and source.sample < len(rows):
        rows = np.sort(np.random.default_rng(source.seed).permutation(rows)[: source.sample])
    if not len(rows):
        span = f"[{source.start}, {'end' if source.stop is None else source.stop})"
        raise ConfigError(f"{source.uri} has no rows in {span}: it has {total} in all")
    return rows


def _rows(
    file: str, source: Labelled, wanted: npt.NDArray[np.int64], first: int, skipped: list[Skipped]
) -> Iterator[Row]:
    """The `wanted` rows of one file, whose first row is row `first` of the whole."""
    for number, image, label in _values(file, source, wanted):
        place = f"{file} row {number}"
        data = image.get("bytes") if isinstance(image, dict) else image
        if data is None or label is None:
            skipped.append(Skipped(place, "no image" if data is None else "no label"))
        else:
            yield Row(first + number, place, data, label)


def _values(
    file: str, source: Labelled, wanted: npt.NDArray[np.int64]
) -> Iterator[tuple[int, bytes | dict[str, bytes | None] | None, Label | None]]:
    """(row, image, label) as the file has them."""
    columns = [source.image_column, source.label_column]
    with storage.open_input(file) as opened, ReadableParquet(file):
        parquet = pq.ParquetFile(opened, pre_buffer=False, buffer_size=STREAM_BUFFER)
        start = 0
        for group in range(parquet.num_row_groups):
            stop = start + parquet.metadata.row_group(group).num_rows
            if np.searchsorted(wanted, start) == np.searchsorted(wanted, stop):
                start = stop
                continue
            for batch in parquet.iter_batches(READ_ROWS, [group], columns, use_threads=False):
                here = wanted[np.searchsorted(wanted, start) : np.searchsorted(wanted, start + len(batch))]
                taken = batch.take(pa.array(here - start))
                yield from zip(here.tolist(), *(taken.column(name).to_pylist() for name in columns), strict=True)
                start += len(batch)
