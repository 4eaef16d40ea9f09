"""Stage `embed`: the kept images of one source through one model, to float16 vectors.

Reading and decoding go on in threads while the model works on the batch before. A worker holds the model, the images
of one row group, READY_BATCHES + 2 batches of preprocessed images, a few decoded images a decoding thread, and the
vectors of VECTOR_ROWS images; none of it grows with the number of images. Cost grows with the images. Batches have one
shape (the last is padded), so that a vector does not depend on what is beside it.
"""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
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
from embedders.base import Embedder, EmbedderError, Runtime
from embedders.images import UndecodableImage
from embedders.load import load_embedder, resolve_runtime
from pipelines.ahead import ahead, ordered_map
from pipelines.executor import Needs
from pipelines.recipe import EmbedderSettings
from pipelines.unit import Step, Unit, set_input

VECTOR_ROWS = 4096
READY_BATCHES = 2
"""Batches that wait decoded (and, on a GPU, uploaded) while the model works on another."""
BATCH_SIZES = {"cpu": 16, "cuda": 128}
"""Images of a batch unless the settings say: on a CPU, a layer's activations then stay in the cache."""
DCT_BATCH_SIZE = 64
MAX_DECODE_THREADS = 16


def open_embedder(model: str, runtime: Runtime) -> Embedder:
    """The model that a specification names. Raises ConfigError."""
    try:
        return load_embedder(model, runtime)
    except EmbedderError as error:
        raise ConfigError(str(error)) from None


@dataclass
class EmbedStep(Step):
    """Part k of `embeddings/NAME/SOURCE` from the kept images of part k."""

    images: str
    filtered: str
    model: str
    runtime: Runtime
    batch_size: int
    decode_threads: int | None
    dim: int
    details: dict[str, Any]

    @property
    def needs(self) -> Needs:
        return Needs(resident=True, cpus=self.runtime.threads, gpus=1 if self.runtime.device == "cuda" else 0)

    def schema(self) -> pa.Schema:
        return schemas.embeddings(self.dim)

    def num_parts(self) -> int:
        return ShardSet(self.images).num_parts

    def info(self) -> dict[str, Any]:
        return self.details

    @cached_property
    def embedder(self) -> Embedder:
        """The model, loaded where the work is done, once a worker."""
        return open_embedder(self.model, self.runtime)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "embedder"}

    def write_part(self, part: int, writer: PartWriter) -> None:
        vectors = _VectorWriter(writer, self.schema())
        embedder = self.embedder  # opened before there are threads
        try:
            with ahead(self._batches(part), READY_BATCHES) as batches:
                for batch in batches:
                    for name, reason in batch.rejects:
                        writer.reject("undecodable", reason, image_id=name)
                    if batch.ids:
                        vectors.add(batch.ids, embedder.embed(batch.inputs)[: len(batch.ids)])
        except EmbedderError as error:
            raise ConfigError(str(error)) from None
        vectors.write()

    def _batches(self, part: int) -> Iterator["_Batch"]:
        """The part's images, decoded, in batches of one shape."""
        size = self.batch_size if self.embedder.fixed_shape else 1
        batch = _Batch([], [], [])
        inputs: list[npt.NDArray[Any]] = []
        for name, decoded in ordered_map(self._decode, self._kept(part), self._num_decode_threads()):
            if isinstance(decoded, UndecodableImage):
                batch.rejects.append((name, str(decoded)))
                continue
            batch.ids.append(name)
            inputs.append(decoded)
            if len(inputs) == size:
                batch.inputs = self.embedder.upload(np.stack(inputs))
                yield batch
                batch, inputs = _Batch([], [], []), []
        if inputs:
            batch.inputs = self.embedder.upload(np.stack(inputs + [inputs[-1]] * (size - len(inputs))))
        yield batch

    def _kept(self, part: int) -> Iterator[tuple[str, bytes]]:
        """Id and bytes of each image of the part that the filter kept."""
        kept = ShardSet(self.filtered).read(part, ["kept"])["kept"].to_numpy(zero_copy_only=False)
        begin = 0
        for table in ShardSet(self.images).stream(part, ["image_id", "image"], IMAGE_GROUP_ROWS):
            chosen = table.filter(pa.array(kept[begin : begin + table.num_rows]))
            begin += table.num_rows
            for name, data in zip(chosen["image_id"], chosen["image"], strict=True):
                yield name.as_py(), data.as_py()

    def _decode(self, image: tuple[str, bytes]) -> tuple[str, npt.NDArray[Any] | UndecodableImage]:
        name, data = image
        try:
            return name, self.embedder.preprocess(data)
        except UndecodableImage as error:
            return name, error

    def _num_decode_threads(self) -> int:
        """One beside a model on the CPU, where there is a worker a core; beside a GPU as many as there are cores."""
        if self.decode_threads is not None:
            return self.decode_threads
        return self.runtime.threads if self.runtime.device == "cpu" else min(MAX_DECODE_THREADS, os.cpu_count() or 1)


@dataclass
class _Batch:
    """Inputs of one shape, padded; ids of the images among them, and what could not be decoded on the way."""

    ids: list[str]
    rejects: list[tuple[str, str]]
    inputs: Any


class _VectorWriter:
    """Collects vectors into row groups."""

    def __init__(self, writer: PartWriter, schema: pa.Schema) -> None:
        self._writer, self._schema = writer, schema
        self._ids: list[str] = []
        self._vectors: list[npt.NDArray[np.float16]] = []

    def add(self, ids: list[str], vectors: npt.NDArray[np.float16]) -> None:
        if not np.isfinite(vectors).all():
            raise ConfigError("the model gave vectors that are not finite; try precision float32, or other weights")
        self._ids += ids
        self._vectors.append(vectors)
        if len(self._ids) >= VECTOR_ROWS:
            self.write()

    def write(self) -> None:
        """Append what is there as one row group."""
        if self._ids:
            vectors = fixed_size_lists(np.concatenate(self._vectors), self._schema.field("embedding").type)
            self._writer.write(pa.table([pa.array(self._ids), vectors], schema=self._schema))
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
    def runtime(self) -> Runtime:
        """The device and precision that workers are to use, the same for all of them."""
        chosen = self.settings
        try:
            return resolve_runtime(chosen.model, chosen.device, chosen.precision, chosen.threads, chosen.compile)
        except EmbedderError as error:
            raise ConfigError(str(error)) from None

    @cached_property
    def embedder(self) -> Embedder:
        """The model as a name with a fingerprint; its weights are loaded by the workers."""
        return open_embedder(self.settings.model, self.runtime)

    @property
    def batch_size(self) -> int:
        default = DCT_BATCH_SIZE if self.settings.model == "dct" else BATCH_SIZES[self.runtime.device]
        return self.settings.batch_size or default

    def inputs(self) -> list[Input]:
        return [set_input(self.images, "images"), set_input(self.filtered, "filtered")]

    def config(self) -> dict[str, Any]:
        return {"model": self.embedder.fingerprint, "batch_size": self.batch_size, **asdict(self.runtime)}

    def steps(self) -> list[Step]:
        labels = {**ShardSet(self.images).labels, "embedder": self.name}
        thresholds = self.embedder.copy_thresholds
        copies = vars(thresholds) if thresholds else None
        info = {
            "model": self.settings.model,
            "dim": self.embedder.dim,
            "copy_thresholds": copies,
            "details": self.embedder.details,
        }
        return [
            EmbedStep(
                self.out,
                "embeddings",
                labels,
                keep=True,
                images=self.images,
                filtered=self.filtered,
                model=self.settings.model,
                runtime=self.runtime,
                batch_size=self.batch_size,
                decode_threads=self.settings.decode_threads,
                dim=self.embedder.dim,
                details=info,
            )
        ]
