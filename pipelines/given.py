"""Images that a user gives to compare with a run: found, read and embedded as the run's own were.

They go through the stages download, filter and embed into sets of their own in a working place, so that readers, limits
on hostile bytes, batches and progress are those of the stages. Names of files in a folder are data: they are joined to
the folder's path inside its file system, never read as a URI. The working place takes the bytes of all images once.
"""

import os
import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow.parquet as pq

from curation import storage
from curation.errors import ConfigError
from curation.hashing import digest
from curation.manifest import Input
from curation.shards import ShardSet
from pipelines.download import DownloadUnit, FolderStep
from pipelines.embed import EmbedUnit
from pipelines.executor import Executor
from pipelines.filter import FilterUnit
from pipelines.progress import Progress
from pipelines.raw import find_files, find_images
from pipelines.recipe import DownloadSettings, EmbedderSettings, FilterSettings, SourceSettings
from pipelines.shown import printable
from pipelines.unit import Step, Unit, run_unit

ROWS_PER_PART = 2000
ANY_SHAPE = FilterSettings(min_side=1, max_aspect_ratio=1e9)
"""Any image that can be decoded is compared, also one that the run's own filter would drop."""


@dataclass(frozen=True)
class Given:
    """Images of one place.

    Attributes:
        place: a folder, or a Parquet file or pattern.
        paths: of the image files below the folder, by row; empty for Parquet files.
    """

    place: str
    paths: list[str] = field(default_factory=list)

    def name(self, row: int) -> str:
        """What to call the image of a row; it may hold any character."""
        return storage.join(self.place, self.paths[row]) if self.paths else f"{self.place} row {row}"


def find_given(places: list[str]) -> list[Given]:
    """Image files, folders and Parquet files, files of one directory together. Raises ConfigError for anything else."""
    found: list[Given] = []
    single: dict[str, list[str]] = {}
    for place in places:
        fs, path = _inside(place)
        if fs.isdir(path):
            found.append(Given(place, find_images(place)))
        elif place.endswith(".parquet"):
            find_files(place)
            found.append(Given(place))
        elif place.endswith((".csv", ".txt")):
            raise ConfigError(
                f"{printable(place)} is a list of URLs; give image files, folders or Parquet files with images"
            )
        elif not fs.exists(path):
            raise ConfigError(f"{printable(place)} does not exist")
        else:
            folder, _, name = (place if "://" in place else os.path.abspath(place)).rpartition("/")
            single.setdefault(folder or "/", []).append(name)
    return [*found, *(Given(folder, names) for folder, names in single.items())]


def _inside(place: str) -> tuple[Any, str]:
    """The file system of a place and the path in it; what exists on this machine is a path, whatever it looks like."""
    if os.path.exists(place):
        return storage.filesystem(".")[0], os.path.abspath(place)
    return storage.filesystem(storage.absolute(place))


@dataclass
class FilesStep(FolderStep):
    """Chosen files of a folder. What cannot be opened counts as a file without bytes; names are not stored."""

    def num_parts(self) -> int:
        return -(-len(self.paths) // self.rows_per_part)

    def images(self, part: int) -> Iterator[tuple[int, bytes | None, dict[str, Any]]]:
        fs, root = _inside(self.source.folder or "")
        first = part * self.rows_per_part
        for row, path in enumerate(self.paths[first : first + self.rows_per_part], start=first):
            try:
                with fs.open(posixpath.join(root, path), "rb") as file:
                    yield row, file.read(self.max_bytes + 1), {}
            except OSError:
                yield row, None, {}


@dataclass
class FilesUnit(DownloadUnit):
    """Chosen files of a folder as an images set; they are known by name, size and time."""

    paths: list[str] = field(default_factory=list)

    def inputs(self) -> list[Input]:
        fs, root = _inside(self.source.folder or "")
        return [Input(f"raw/{self.name}", digest([_state(fs, root, path) for path in self.paths]))]

    def steps(self) -> list[Step]:
        labels = {"source": self.name, "role": self.source.role}
        limits = (self.settings.max_bytes, self.settings.max_pixels)
        return [FilesStep(self.out, "images", labels, True, self.source, self.rows_per_part, *limits, paths=self.paths)]


def _state(fs: Any, root: str, path: str) -> list[str]:
    try:
        info = fs.info(posixpath.join(root, path))
    except OSError:
        return [path]
    return [path, str(info["size"]), str(info.get("ETag") or info.get("mtime") or info.get("LastModified"))]


@dataclass(frozen=True)
class Read:
    """A given image: its name (any characters), its id if it could be read, and what kept it from being compared."""

    name: str
    image_id: str | None
    problem: str | None


def source_name(number: int) -> str:
    """The name that the given images of a place have as a source of the working sets."""
    return f"given{number}"


def vectors_of(given: list[Given], work: str, embedder: str) -> list[str]:
    """Where the embeddings of all given images lie, in order."""
    return [storage.join(work, "embeddings", embedder, source_name(number)) for number in range(len(given))]


def read_sets(given: list[Given], work: str, embedders: Iterable[str]) -> Iterator[Read]:
    """Every given image in order, as `make_sets` has left it. Holds the ids and names of one place."""
    for number, place in enumerate(given):
        name = source_name(number)
        images, filtered = (ShardSet(storage.join(work, kind, name)) for kind in ("images", "filtered"))
        wrong: dict[str, str] = {}
        for embedder in embedders:
            made = ShardSet(storage.join(work, "embeddings", embedder, name))
            wrong |= {row["image_id"]: row["detail"] or row["reason"] for row in _rejects(made)}
        found = {row["row"]: Read(place.name(row["row"]), None, _problem(row)) for row in _rejects(images)}
        for part in range(filtered.num_parts):
            for row in filtered.read(part).to_pylist():
                problem = row["reason"] if row["reason"] == "undecodable" else wrong.get(row["image_id"])
                found[row["row"]] = Read(place.name(row["row"]), row["image_id"], problem)
        for row in sorted(found):
            yield found[row]


def _rejects(made: ShardSet) -> Iterator[dict[str, Any]]:
    for part in range(made.num_parts):
        commit = made.commit(part)
        if commit is not None and commit.rejects:
            with storage.open_input(made.rejects_uri(part)) as file:
                yield from pq.read_table(file).to_pylist()


def _problem(row: dict[str, Any]) -> str:
    if row["reason"] == "empty":
        return "empty, or it cannot be opened"
    return f"{row['reason']} ({row['detail']})" if row["detail"] else str(row["reason"])


def make_sets(
    given: list[Given],
    work: str,
    image_column: str,
    limits: DownloadSettings,
    embedders: dict[str, ShardSet],
    executor: Executor,
    progress: Progress,
) -> None:
    """Make images, filtered, index and embeddings of the given images below `work`.

    Args:
        given: the places.
        work: a directory that all workers reach.
        image_column: of Parquet files.
        limits: on an image's bytes and pixels.
        embedders: by name, a set of the run whose model is to be used.
        executor, progress: where work runs and is shown.

    Raises:
        ConfigError: a place cannot be read, or a model is no longer the one that made the run's vectors.
    """
    for number, place in enumerate(given):
        name = source_name(number)
        at = {kind: storage.join(work, kind, name) for kind in ("urls", "images", "filtered", "index")}
        kind: dict[str, Any] = {"folder": place.place} if place.paths else {"images": storage.absolute(place.place)}
        source = SourceSettings(role="query", image_column=image_column, **kind)
        first = (name, source, limits, ROWS_PER_PART, at["urls"], at["images"])
        units: list[Unit] = [FilesUnit(*first, paths=place.paths) if place.paths else DownloadUnit(*first)]
        units.append(FilterUnit(at["images"], ANY_SHAPE, limits.max_pixels, at["filtered"], at["index"]))
        for embedder, like in embedders.items():
            out = storage.join(work, "embeddings", embedder, name)
            units.append(_embed_like(like, embedder, at["images"], at["filtered"], out))
        for unit in units:
            run_unit(unit, executor, progress, overwrite=True)


def _embed_like(like: ShardSet, name: str, images: str, filtered: str, out: str) -> EmbedUnit:
    """The unit that embeds as `like` was made: same model, batch and precision, as far as this machine can.

    Networks are not compiled, which changes last bits alone and takes longer than a few images.
    """
    config, model = like.manifest["config"], like.manifest["info"]["model"]
    how: dict[str, Any] = {"device": config["device"], "precision": config["precision"]}
    if lacks_gpu(like):
        how = {"device": "cpu", "precision": "float32"}
    chosen = EmbedderSettings(
        model=model, batch_size=config["batch_size"], threads=config["threads"], compile=False, **how
    )
    unit = EmbedUnit(name, chosen, images, filtered, out)
    if unit.embedder.fingerprint != config["model"]:
        raise ConfigError(
            f"model {model} is not the one that made {like.uri} (fingerprint {unit.embedder.fingerprint[:12]}, "
            f"then {str(config['model'])[:12]}): put back its files, or embed the run again"
        )
    return unit


def lacks_gpu(like: ShardSet) -> bool:
    """Whether those vectors were made on a GPU and there is none here: then the CPU does it in float32."""
    return like.manifest["config"]["device"] == "cuda" and not _has_gpu()


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
