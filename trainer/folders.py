"""Images as files in a folder: each is a row group of one row."""

import posixpath
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from curation import storage
from curation.errors import ConfigError
from trainer.order import Groups
from trainer.parquet import Rows

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
WINDOW = 1024
"""Files among which another is sought for one that cannot be used. Their order is random whatever this is."""


@dataclass(frozen=True)
class FolderImages:
    """The image files anywhere under a folder. Holds their names.

    Attributes:
        folder: its URI.
        names: relative paths, string [files], sorted.
        groups: one of one row for each file.
    """

    folder: str
    names: pa.Array
    groups: Groups

    @property
    def held(self) -> int:
        """Row groups that a reader should hold: none, as no file is read twice in an epoch."""
        return 0

    @property
    def files(self) -> pa.Array:
        """What the files are called in the folder."""
        return self.names

    def place(self, group: int, row: int) -> tuple[str, int]:
        """The file of an image, and its row in it, which is 0."""
        return storage.join(self.folder, str(self.names[group])), row

    def reader(self) -> Callable[[int], Rows]:
        """What reads a file by its number, from several threads if need be. It raises ConfigError where one is gone."""

        def read(group: int) -> Rows:
            uri, _ = self.place(group, 0)
            try:
                data = storage.read_bytes(uri)
            except OSError as error:
                raise ConfigError(f"cannot read {uri}: {error.strerror or error}") from None
            return Rows(pa.chunked_array([[data]], pa.large_binary()))

        return read


def open_folder(folder: str) -> FolderImages:
    """The image files anywhere under `folder`, known by their endings. Raises ConfigError where there are none."""
    fs, root = storage.filesystem(folder)
    relative = (posixpath.relpath(name, root) for name in fs.find(root))
    names = sorted(name for name in relative if name.lower().endswith(ENDINGS))
    if not names:
        raise ConfigError(f"{folder} holds neither Parquet files nor images ({', '.join(ENDINGS)})")
    numbers = np.arange(len(names), dtype=np.int32)
    groups = Groups(numbers, np.ones_like(numbers), min(WINDOW, len(names)), 1)
    return FolderImages(folder, pa.array(names, pa.large_string()), groups)
