"""Stage `embed`: the kept images of one source through one model, to float16 vectors.

A worker holds the model, one batch of preprocessed images and the vectors of VECTOR_ROWS images. Cost grows with
the images; batches have one shape (the last is padded), so that a vector does not depend on what is beside it.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation import schemas
from curation.errors import ConfigError
from curation.manifest import Input
from curation.partwise import fixed_size_lists
from curation.shards import IMAGE_GROUP_ROWS, PartWriter, ShardSet
from embedders.base import Embedder, EmbedderError
from embedders.images import UndecodableImage
from embedders.load import load_embedder, resolve_device
from pipelines.executor import Needs
from pipelines.recipe import EmbedderSettings
from pipelines.unit import Step, Unit, set_input

VECTOR_ROWS = 4096


def open_embedder(settings: EmbedderSettings) -> Embedder:
    """The model that the settings name. Raises ConfigError."""
    try:
        return load_embedder(settings.model, settings.device, settings.precision, settings.threads)
    except EmbedderError as error:
        raise ConfigError(str(error)) from None


@dataclass
class EmbedStep(Step):
    """Part k of `embeddings/NAME/SOURCE` from the kept images of part k."""

    images: str
    filtered: str
    settings: EmbedderSettings
    dim: int
    details: dict[str, Any]

    @property
    def needs(self) -> Needs:
        return Needs(resident=True, gpus=1 if self.settings.device == "cuda" else 0)

    def schema(self) -> pa.Schema:
        return schemas.embeddings(self.dim)

    def num_parts(self) -> int:
        return ShardSet(self.images).num_parts

    def info(self) -> dict[str, Any]:
        return self.details

    @cached_property
    def embedder(self) -> Embedder:
        """The model, loaded where the work is done, once a worker."""
        return open_embedder(self.settings)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "embedder"}

    def write_part(self, part: int, writer: PartWriter) -> None:
        batches = _Batches(self.embedder, self.settings.batch_size, writer, self.schema())
        kept = ShardSet(self.filtered).read(part, ["kept"])["kept"].to_numpy(zero_copy_only=False)
        begin = 0
        for table in ShardSet(self.images).stream(part, ["image_id", "image"], IMAGE_GROUP_ROWS):
            chosen = table.filter(pa.array(kept[begin : begin + table.num_rows]))
            begin += table.num_rows
            for image in chosen.to_pylist():
                try:
                    batches.add(image["image_id"], self.embedder.preprocess(image["image"]))
                except UndecodableImage as error:
                    writer.reject("undecodable", str(error), image_id=image["image_id"])
        batches.flush()


class _Batches:
    """Collects preprocessed images into batches of one shape, and vectors into row groups."""

    def __init__(self, embedder: Embedder, size: int, writer: PartWriter, schema: pa.Schema) -> None:
        self._embedder, self._size, self._writer, self._schema = embedder, size, writer, schema
        self._inputs: list[npt.NDArray[Any]] = []
        self._ids: list[str] = []
        self._vectors: list[npt.NDArray[np.float16]] = []

    def add(self, name: str, pixels: npt.NDArray[Any]) -> None:
        self._ids.append(name)
        self._inputs.append(pixels)
        if len(self._inputs) == self._size:
            self._embed()
        if len(self._ids) >= VECTOR_ROWS and not self._inputs:
            self._write()

    def flush(self) -> None:
        if self._inputs:
            self._embed()
        if self._ids:
            self._write()

    def _embed(self) -> None:
        count = len(self._inputs)
        batch = np.stack(self._inputs + [self._inputs[-1]] * (self._size - count))
        self._vectors.append(self._embedder.embed(batch)[:count])
        self._inputs = []

    def _write(self) -> None:
        vectors = np.concatenate(self._vectors)
        if not np.isfinite(vectors).all():
            raise ConfigError("the model gave vectors that are not finite; try precision float32, or other weights")
        columns = [pa.array(self._ids), fixed_size_lists(vectors, self._schema.field("embedding").type)]
        self._writer.write(pa.table(columns, schema=self._schema))
        self._ids, self._vectors = [], []


@dataclass
class EmbedUnit(Unit):
    """One source through one model: `embeddings/NAME/SOURCE`."""

    name: str
    settings: EmbedderSettings
    images: str
    filtered: str
    out: str

    stage = "embed"

    @property
    def title(self) -> str:
        return f"embed {self.images.rpartition('/')[2]} ({self.name})"

    @cached_property
    def embedder(self) -> Embedder:
        """The model, loaded here to be known by its fingerprint."""
        return open_embedder(self.settings)

    def inputs(self) -> list[Input]:
        return [set_input(self.images, "images"), set_input(self.filtered, "filtered")]

    def config(self) -> dict[str, Any]:
        numerics = self._resolved().model_dump(include={"device", "precision", "batch_size", "threads"})
        return {"model": self.embedder.fingerprint, **numerics}

    def _resolved(self) -> EmbedderSettings:
        """The settings with the device and precision that workers are to use, the same for all of them."""
        if self.settings.model == "dct":
            return self.settings.model_copy(update={"device": "cpu", "precision": "float32"})
        try:
            device, precision = resolve_device(self.settings.device, self.settings.precision)
        except EmbedderError as error:
            raise ConfigError(str(error)) from None
        return self.settings.model_copy(update={"device": device, "precision": precision})

    def steps(self) -> list[Step]:
        labels = {**ShardSet(self.images).labels, "embedder": self.name}
        thresholds = self.embedder.copy_thresholds
        copies = {"self_dedup": thresholds.self_dedup, "reference": thresholds.reference} if thresholds else None
        info = {"model": self.settings.model, "dim": self.embedder.dim, "copy_thresholds": copies}
        settings = (self.images, self.filtered, self._resolved(), self.embedder.dim, info)
        return [EmbedStep(self.out, "embeddings", labels, True, *settings)]
