"""What there is to train on, and in which order: the images of all sources, and the endless order of their mixture.

Of the images only the row groups and file names are held; reading is for `trainer/reader.py`.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from curation import storage
from curation.errors import ConfigError
from curation.hashing import digest
from trainer.folders import open_folder
from trainer.mixtures import Mixture
from trainer.order import Groups, Order
from trainer.parquet import Rows, open_parquet, parquet_files

WINDOW_BYTES = 2**27
"""Images that are shuffled together, in bytes, shared equally by the sources; each worker holds as much."""


@dataclass(frozen=True)
class Source:
    """Images to train on.

    Attributes:
        name: short; the order of its images depends on it.
        images: a shard set of the pipeline, Parquet files (a path, a glob pattern or a directory), or a folder of
            image files, local or at any URI that fsspec opens.
        image_column: of Parquet files.
        weight: its share among those of all sources, above 0.
        homogeneous: whether it gives whole steps; samples of the others are mixed one by one.
    """

    name: str
    images: str
    image_column: str = "image"
    weight: float = 1.0
    homogeneous: bool = False


class Images(Protocol):
    """The images of a source: `ParquetImages` or `FolderImages`. It is pickled, and opens nothing before `reader`."""

    @property
    def groups(self) -> Groups:
        """Its row groups."""

    @property
    def files(self) -> pa.Array:
        """The names of its files."""

    @property
    def held(self) -> int:
        """Row groups that a reader should hold."""

    def place(self, group: int, row: int) -> tuple[str, int]:
        """The file of a row, and the row's number in it."""

    def reader(self) -> Callable[[int], Rows]:
        """What reads a row group by its number."""


@dataclass(frozen=True)
class Dataset:
    """The sources and, in the same order, their images."""

    sources: tuple[Source, ...]
    images: tuple[Images, ...]

    @property
    def num_images(self) -> list[int]:
        """Of each source: what one epoch of it has."""
        return [images.groups.num_rows for images in self.images]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over what the order depends on beside seed and step size: names, ratios, files, row groups.

        Wherever the files lie, a run goes on exactly only with the same fingerprint.
        """
        parts = []
        for source, images in zip(self.sources, self.images, strict=True):
            names = hashlib.sha256()
            for uri in images.files:
                names.update(str(uri).rpartition("/")[2].encode() + b"\0")
            groups = images.groups
            arrays = [hashlib.sha256(a.astype("<i4").tobytes()).hexdigest() for a in (groups.file, groups.rows)]
            sizes = [groups.window, groups.run, source.weight, source.homogeneous]
            parts.append([source.name, names.hexdigest(), *arrays, *sizes])
        return digest(parts)


def open_dataset(sources: Sequence[Source], window_bytes: int = WINDOW_BYTES) -> Dataset:
    """Find the files of all sources and read their footers.

    Args:
        sources: with different names.
        window_bytes: images to shuffle together, see WINDOW_BYTES.

    Raises:
        ConfigError: no sources, two of one name, a weight of 0 or less; or as `open_images`, with the source's name.
    """
    names = [source.name for source in sources]
    if not names:
        raise ConfigError("no sources to train on: give --images, or data.sources in the recipe")
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two sources are called {name!r}; give each a name of its own")
    for source in sources:
        if not 0 < source.weight < float("inf"):
            raise ConfigError(f"source {source.name}: weight {source.weight} is not a number above 0")
    return Dataset(tuple(sources), tuple(open_images(source, window_bytes // len(names)) for source in sources))


def open_images(source: Source, window_bytes: int) -> Images:
    """The images of one source.

    Raises:
        ConfigError: nothing is there, or a shard set that is not complete, a damaged file, no column of images, no
            images at all; one line that begins with the source's name.
    """
    try:
        uri = storage.absolute(source.images)
        files = parquet_files(uri)
        return open_folder(uri) if files is None else open_parquet(files, source.image_column, window_bytes)
    except ConfigError as error:
        raise ConfigError(f"source {source.name}: {error}") from None


class Place(NamedTuple):
    """Where a sample is: number of its source, place in the source's endless order, row group, row in that."""

    source: int
    position: int
    group: int
    row: int


class Samples:
    """The endless order of a dataset's samples: step s has those from s * step_size on."""

    def __init__(self, dataset: Dataset, step_size: int, seed: int) -> None:
        """`step_size` is the number of samples of a step, over all ranks."""
        weights, alone = zip(*((source.weight, source.homogeneous) for source in dataset.sources), strict=True)
        self._mixture = Mixture(weights, alone, step_size, seed)
        self._orders = [
            Order(images.groups, seed, source.name)
            for source, images in zip(dataset.sources, dataset.images, strict=True)
        ]

    def part(self, step: int, first: int, last: int) -> list[Place]:
        """Samples [first, last) of a step."""
        sources, before = self._mixture.part(step, first, last)
        places = np.empty((last - first, 4), np.int64)
        places[:, 0] = sources
        for source in np.unique(sources):
            here = np.flatnonzero(sources == source)
            places[here, 1] = before[source] + np.arange(len(here))
            places[here, 2:] = self._orders[source].stretch(before[source], len(here))
        return [Place(*place) for place in places.tolist()]

    def instead(self, place: Place, attempt: int, anywhere: bool) -> Place:
        """A sample of the same source in the place of one that cannot be used; see `Order.instead`."""
        group, row = self._orders[place.source].instead(place.position, attempt, anywhere)
        return place._replace(group=group, row=row)
