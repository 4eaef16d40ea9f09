"""How a network is trained, as one YAML file. The models here are the documentation of its keys.

Numbers of steps are optimizer steps; the published "epoch" is 1250 of them, whatever the data. Section numbers are of
arXiv 2304.07193.
"""

import json
import re
from collections.abc import Sequence
from importlib import resources
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from curation import storage
from curation.config import Settings, load_yaml, override, suggest, validate
from curation.errors import ConfigError
from curation.shards import MANIFEST
from embedders.specs import DINOV2

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Span = Count | Annotated[float, Field(gt=0, lt=1)]
"""A number of steps, or a share of all steps of the run: shares go along where `schedule.steps` is changed."""
Scale = tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]]

RUNTIME = re.compile(
    r"description|data\.(workers|sources\.[^.]+\.images)|batch_size|compile|checkpointing|sharding|checkpoint_every"
    r"|keep|eval_every|log_every|evaluation\..*"
)
"""Keys that decide how a run is carried out, not what comes of it: a resumed run may change them.

Where images lie is not what they are, which the data says itself; and images a step count over all ranks.
"""


class SourceSettings(Settings):
    """Images to train on: Parquet files with a column of encoded images, or a folder of image files.

    `images` is a path or any URI that fsspec opens, and may be a glob pattern. `weight` is the source's share among
    all; whole batches come from a `homogeneous` source, images one by one from the others (arXiv 2508.10104).
    """

    images: str
    image_column: str = "image"
    weight: PositiveFloat = 1.0
    homogeneous: bool = False


class DataSettings(Settings):
    """What is read, by how many worker processes a rank; `auto` is one for each core of the rank but one."""

    sources: dict[Name, SourceSettings] = Field(default_factory=dict)
    workers: Literal["auto"] | Count = "auto"


class CropSettings(Settings):
    """Two global and some local crops of each image: sides in pixels, areas as shares of the image.

    `colors` names the probabilities of blur as they are in effect: `dinov2` (0, 0.9, 0.5), `dino` (1, 0.1, 0.5) and
    `sharp` (none) for the first global crop, the second, and local ones. The blur reaches up to 4 pixels whatever the
    size of crops, which is much of a crop of 16.
    """

    global_size: Positive = 224
    global_scale: Scale = (0.32, 1.0)
    local_size: Positive = 98
    local_scale: Scale = (0.05, 0.32)
    local_crops: Positive = 8
    colors: Literal["dinov2", "dino", "sharp"] = "dinov2"


class MaskSettings(Settings):
    """Block masks, but in distillation: the share of global crops that have one, and of their patches, from and to."""

    crops: Fraction = 0.5
    patches: tuple[Rate, Rate] = (0.1, 0.5)


class ModelSettings(Settings):
    """The network: a `variant`, or `dim`, `depth` and `heads`; what is given beside a variant replaces its own.

    `image_size` is the side of the images that position embeddings are made for, by default that of global crops.
    """

    variant: Literal["test", "tiny", "small", "base", "large", "giant"] | None = None
    dim: Positive | None = None
    depth: Positive | None = None
    heads: Positive | None = None
    patch_size: Positive = 14
    image_size: Positive | None = None
    registers: Count = 0
    ffn: Literal["mlp", "swiglu"] | None = None
    drop_path: Rate = 0.0
    layer_scale: PositiveFloat = 1e-5

    @model_validator(mode="after")
    def _complete(self) -> "ModelSettings":
        if self.variant is None and None in (self.dim, self.depth, self.heads):
            raise ValueError("give a variant, or dim, depth and heads")
        return self


class HeadSettings(Settings):
    """The heads: widths and number of prototypes. The iBOT head is the DINO head itself unless `separate`.

    What is not given of a separate iBOT head is as the DINO head has it.
    """

    prototypes: Positive = 65_536
    hidden: Positive = 2048
    bottleneck: Positive = 256
    separate: bool = False
    ibot_prototypes: Positive | None = None
    ibot_bottleneck: Positive | None = None

    @model_validator(mode="after")
    def _tied(self) -> "HeadSettings":
        if not self.separate and not (self.ibot_prototypes is None and self.ibot_bottleneck is None):
            raise ValueError("ibot_prototypes and ibot_bottleneck go with separate: true, and with nothing else")
        return self


class LossSettings(Settings):
    """Weights of the losses, temperatures, and how the teacher's outputs are centred.

    The teacher's temperature rises linearly from the first to the second of `teacher_temperature`, over
    `teacher_temperature_warmup` steps. `center_momentum` is of softmax centring, where the centre is a moving average.
    """

    dino: NonNegative = 1.0
    ibot: NonNegative = 1.0
    koleo: NonNegative = 0.1
    centering: Literal["softmax", "sinkhorn"] = "softmax"
    student_temperature: PositiveFloat = 0.1
    teacher_temperature: tuple[PositiveFloat, PositiveFloat] = (0.04, 0.07)
    teacher_temperature_warmup: Span = 37_500
    center_momentum: Rate = 0.9


class OptimizerSettings(Settings):
    """AdamW. The learning rate is `base_lr` x sqrt(images a step / 1024); its cosine ends at `min_lr`, null for none.

    `weight_decay` goes by a cosine from the first value to the second. `clip` bounds the gradient's norm of backbone,
    DINO head and iBOT head each. Block by block from the last, rates shrink by `layerwise_decay`; those of the patch
    embedding also by `patch_embed_factor`.
    """

    base_lr: PositiveFloat = 4e-3
    min_lr: NonNegative | None = 1e-6
    betas: tuple[Rate, Rate] = (0.9, 0.999)
    weight_decay: tuple[NonNegative, NonNegative] = (0.04, 0.4)
    clip: PositiveFloat = 3.0
    layerwise_decay: Annotated[float, Field(gt=0, le=1)] = 0.9
    patch_embed_factor: NonNegative = 0.2


class ScheduleSettings(Settings):
    """Numbers of steps: of the run, of the learning rate's warm-up, and that last layers stay frozen at first.

    The last two, and `loss.teacher_temperature_warmup`, may be shares of `steps`, such as 0.1.
    The first `heads_only` steps train the heads alone; left out, none, and twice `freeze_last_layer` where a run starts
    from weights without heads. `momentum` of the moving average goes by a cosine from the first value to the second.
    """

    steps: Positive = 125_000
    warmup: Span = 12_500
    freeze_last_layer: Span = 1250
    heads_only: Count | None = None
    momentum: tuple[Fraction, Fraction] = (0.992, 1.0)

    @model_validator(mode="after")
    def _within(self) -> "ScheduleSettings":
        if self.warmup > self.steps:
            raise ValueError(f"warmup {self.warmup} is above steps {self.steps}; lower it, or give a share such as 0.1")
        return self

    def in_steps(self, span: float) -> int:
        """A span as a number of steps."""
        return round(span * self.steps) if isinstance(span, float) else span


class TeacherSettings(Settings):
    """Distillation: the frozen teacher that a student learns from, and how.

    `model` is a checkpoint of a run, a file of weights, or a directory of transformers. Objective `heads` is the
    published one (appendix D) and needs a teacher with heads, so a checkpoint of a run; `features` compares class and
    patch tokens and needs none; `auto` takes `heads` where there are some.
    """

    model: str
    objective: Literal["auto", "heads", "features"] = "auto"


class EvaluationSettings(Settings):
    """Labelled images for k-NN and collapse gauges during training: Parquet files, `train` the bank, `test` queries.

    At most so many of each are drawn by the run's seed, among the rows [from, to) if those are given; the main process
    holds them prepared, at the size of global crops: 3 bytes a pixel.
    """

    train: str | None = None
    test: str | None = None
    train_images: Positive = 4000
    test_images: Positive = 1000
    train_rows: tuple[Count, Count | None] = (0, None)
    test_rows: tuple[Count, Count | None] = (0, None)
    image_column: str = "image"
    label_column: str = "label"

    @model_validator(mode="after")
    def _both(self) -> "EvaluationSettings":
        if (self.train is None) != (self.test is None):
            raise ValueError("give both train and test (the same file with other train_rows and test_rows will do)")
        return self


class TrainSettings(Settings):
    """A whole run. `batch_size` is images a rank and step; nothing else depends on the machine.

    `checkpoint_every`, `eval_every` and `log_every` are steps; with 0 only the end is evaluated. `keep` of the newest
    checkpoints stay. `sharding` acts with several ranks: `ddp` copies the networks, `fsdp` shares them out.
    `checkpointing` computes activations again in the backward pass, to save memory.
    """

    description: str = ""
    data: DataSettings = DataSettings()
    crops: CropSettings = CropSettings()
    masks: MaskSettings = MaskSettings()
    model: ModelSettings = ModelSettings(variant="large", drop_path=0.3)
    heads: HeadSettings = HeadSettings()
    loss: LossSettings = LossSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    teacher: TeacherSettings | None = None
    evaluation: EvaluationSettings = EvaluationSettings()
    batch_size: Positive = 64
    seed: int = 0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: Literal["auto"] | bool = "auto"
    checkpointing: bool = False
    sharding: Literal["ddp", "fsdp"] = "ddp"
    checkpoint_every: Positive = 2500
    keep: Positive = 2
    eval_every: Count = 0
    log_every: Positive = 10

    @model_validator(mode="after")
    def _sizes(self) -> "TrainSettings":
        patch = self.model.patch_size
        for key in ("global_size", "local_size"):
            size = getattr(self.crops, key)
            if size % patch:
                raise ValueError(f"crops.{key} {size} is not a multiple of model.patch_size {patch}")
        if self.loss.koleo and self.batch_size < 2:
            raise ValueError("KoLeo compares the images of a rank: it needs batch_size 2, or loss.koleo=0")
        if self.teacher is not None and self.model.drop_path:
            raise ValueError("distillation is without drop-path (appendix D): set model.drop_path=0")
        return self

    def deciding(self) -> dict[str, Any]:
        """The keys and values that decide what comes of the run, `a.b` each; those of RUNTIME are left out."""
        values = flat(self.model_dump(mode="json"))
        return {key: value for key, value in values.items() if not RUNTIME.fullmatch(key)}


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as one of dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = isinstance(value, dict) and value
        found |= flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return found


def difference(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """The first key in which two `deciding()` differ, as one line; None where they agree."""
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            return f"{key} was {before.get(key)}, now {after.get(key)}"
    return None


def shipped() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(item.name.removesuffix(".yaml") for item in _folder().iterdir() if item.name.endswith(".yaml"))


def _folder() -> Any:
    return resources.files("trainer") / "presets"


def load_settings(place: str, assignments: Sequence[str] = (), images: str | Sequence[str] = ()) -> TrainSettings:
    """Settings from a YAML file anywhere, or a preset by its name, with overrides. Raises ConfigError.

    Local paths in a file are relative to its own directory; in a preset and in overrides, to the working directory.

    Args:
        place: the file, or the name of a preset.
        assignments: `a.b=value` each, applied in order.
        images: what to train on, in place of `data.sources`: places as `SourceSettings.images` has them, or runs of
            the pipeline, of which the final shards are meant.
    """
    uri = place
    if place in shipped():
        uri = str(_folder() / f"{place}.yaml")
    elif not place.endswith((".yaml", ".yml")):
        raise ConfigError(f"no preset {place!r}{suggest(place, shipped())}: give a YAML file or one of {_presets()}")
    base = storage.absolute(".") if place in shipped() else storage.absolute(uri).rpartition("/")[0]
    return changed(_located(load_yaml(uri), base), place, assignments, images)


def changed(
    values: dict[str, Any], where: str, assignments: Sequence[str], images: str | Sequence[str]
) -> TrainSettings:
    """Nested values as settings, with overrides as in `load_settings`; `where` is for errors. Raises ConfigError."""
    places = [images] if isinstance(images, str) else list(images)
    if places:
        values = override(values, [f"data.sources={json.dumps(_sources(places))}"])
    values = override(values, list(assignments))
    return validate(TrainSettings, _located(values, storage.absolute(".")), where)


def _presets() -> str:
    return ", ".join(shipped())


def _sources(places: Sequence[str]) -> dict[str, Any]:
    """Sources called images, images-2, ... of places or of runs."""
    names = ["images", *(f"images-{number}" for number in range(2, len(places) + 1))]
    return {name: {"images": final_shards(place)} for name, place in zip(names, places, strict=False)}


def final_shards(place: str) -> str:
    """The final shards of a run, where `place` is one; other places as they are, absolute."""
    place = storage.absolute(place)
    if place.endswith(".parquet") or "*" in place:
        return place
    shards = storage.join(place, "shards")
    return shards if storage.exists(storage.join(shards, MANIFEST)) else place


def _located(written: dict[str, Any], base: str) -> dict[str, Any]:
    """Settings with relative paths to images and weights resolved from a directory; what is no mapping stays."""
    data, sources = _mapping(written, "data"), _mapping(_mapping(written, "data"), "sources")
    found = dict(written)
    if sources:
        found["data"] = data | {"sources": {name: _from(source, base, "images") for name, source in sources.items()}}
    if evaluation := _mapping(written, "evaluation"):
        found["evaluation"] = _from(evaluation, base, "train", "test")
    if teacher := _mapping(written, "teacher"):
        model = teacher.get("model")
        found["teacher"] = teacher | {"model": located_weights(model, base)} if isinstance(model, str) else teacher
    return found


def located_weights(place: str, base: str) -> str:
    """A place of weights, as `trainer/start.py` reads them, with a relative path resolved from a directory."""
    return place if place in DINOV2 else storage.resolve(place.removeprefix("vit:"), base)


def _mapping(values: Any, key: str) -> dict[str, Any]:
    """What is under a key, if that is a mapping."""
    found = values.get(key) if isinstance(values, dict) else None
    return found if isinstance(found, dict) else {}


def _from(values: Any, base: str, *keys: str) -> Any:
    if not isinstance(values, dict):
        return values
    return values | {key: storage.resolve(values[key], base) for key in keys if isinstance(values.get(key), str)}
