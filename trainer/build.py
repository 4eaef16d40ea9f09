"""From settings to what is trained: the networks, the objective, the optimizer, the schedules and the batches."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from curation.errors import ConfigError
from embedders.load import resolve_runtime
from embedders.vit import VARIANTS, VisionTransformer, ViTConfig
from trainer.batch import Batch
from trainer.crops import BLURS, CropMaker, CropSettings, Views, collate
from trainer.distill import Featured, FeatureMatching
from trainer.distributed import World, spread
from trainer.heads import Head
from trainer.loader import Loader
from trainer.masks import MaskSettings, block_masks, max_masked
from trainer.objective import Objective, SelfDistillation, Weights
from trainer.pair import Network, Pair, Trainable, set_up_blocks
from trainer.samples import Dataset, Source, open_dataset
from trainer.schedules import Schedules
from trainer.start import Weights as Opened
from trainer.start import fill, open_weights
from trainer.step import Precision, Trained, make_optimizer

if TYPE_CHECKING:  # pydantic is not everywhere that a run is
    from trainer.config import ModelSettings, TrainSettings


def vit_config(model: "ModelSettings", image_size: int) -> ViTConfig:
    """The backbone that is asked for; position embeddings are for `image_size` unless the settings have a size."""
    given: dict[str, Any] = {key: getattr(model, key) for key in ("dim", "depth", "heads", "ffn")}
    given = {key: value for key, value in given.items() if value is not None}
    given |= {"patch_size": model.patch_size, "registers": model.registers}
    given |= {"image_size": model.image_size or image_size}
    try:
        return replace(VARIANTS[model.variant], **given) if model.variant else ViTConfig(**given)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None


def make_backbone(settings: "TrainSettings") -> VisionTransformer:
    """The student's backbone with new weights."""
    config = vit_config(settings.model, settings.crops.global_size)
    return VisionTransformer(config, settings.model.drop_path, settings.model.layer_scale)


def make_network(settings: "TrainSettings") -> Network:
    """The student, with heads, with new weights."""
    backbone, heads = make_backbone(settings), settings.heads
    dino = Head(backbone.config.dim, heads.prototypes, heads.hidden, heads.bottleneck)
    ibot = None
    if heads.separate and settings.loss.ibot:
        sizes = (heads.ibot_prototypes or heads.prototypes, heads.hidden, heads.ibot_bottleneck or heads.bottleneck)
        ibot = Head(backbone.config.dim, *sizes)
    return Network(backbone, dino, ibot)


def make_student(settings: "TrainSettings", teacher: Opened | None) -> Trainable:
    """The student with new weights, the same on all ranks; `teacher` is that of distillation.

    Raises:
        ConfigError: its heads do not fit the teacher's.
    """
    torch.manual_seed(settings.seed)
    if teacher is not None and _by_features(settings, teacher):
        return Featured(make_backbone(settings), teacher.backbone.config.dim)
    network = make_network(settings)
    if teacher is not None:
        for name, head in network.named_children():
            theirs = teacher.heads.get(name) or teacher.heads.get("dino_head")
            if isinstance(head, Head) and theirs is not None:
                _check_prototypes(name, head, theirs)
    return network


def make_pair(settings: "TrainSettings", init: str | None = None) -> tuple[Pair, list[str]]:
    """Student, teacher and moving average on the CPU.

    Args:
        init: weights to start from, as `trainer/start.py` reads them.

    Returns:
        the pair, and the heads that `init` had no weights for.

    Raises:
        ConfigError: weights or settings do not fit.
    """
    opened = None if settings.teacher is None else open_weights(settings.teacher.model)
    student = make_student(settings, opened)
    left = [] if init is None else fill(student, open_weights(init))
    masked = settings.teacher is None and settings.loss.ibot > 0
    student.backbone.mask_token.requires_grad_(masked)
    return Pair.of(student, None if opened is None else _teacher(settings, opened)), left


def make_objective(settings: "TrainSettings", pair: Pair) -> Objective:
    """What the student learns."""
    if isinstance(pair.student, Featured):
        return FeatureMatching()
    loss, heads = settings.loss, settings.heads
    prototypes = (heads.prototypes, heads.ibot_prototypes or heads.prototypes)
    weights = Weights(loss.dino, loss.ibot, loss.koleo)
    return SelfDistillation(weights, loss.centering, prototypes, loss.student_temperature, loss.center_momentum)


def make_trained(settings: "TrainSettings", pair: Pair, world: World) -> Trained:
    """All that changes in a run, on the device and over all ranks."""
    precision, compiled = resolved(settings, world.device)
    for network in pair.networks:
        network.to(world.device)
        set_up_blocks(network.backbone, compiled, settings.checkpointing and network is pair.student)
    spread(pair, world, settings.sharding, precision)
    optimizer = settings.optimizer
    return Trained(
        pair,
        make_objective(settings, pair).to(world.device),
        make_optimizer(pair.student, optimizer.betas, optimizer.layerwise_decay, optimizer.patch_embed_factor),
        optimizer.clip,
        precision,
        settings.seed,
        world.rank,
    )


def resolved(settings: "TrainSettings", device: torch.device) -> tuple[Precision, bool]:
    """Precision, and whether blocks are compiled: left to itself that is on a GPU, as it takes a while to pay."""
    runtime = resolve_runtime("vit:network", device.type, settings.precision)
    compiled = device.type == "cuda" if settings.compile == "auto" else settings.compile
    return "bfloat16" if runtime.precision == "bfloat16" else "float32", compiled


def make_schedules(settings: "TrainSettings", images_per_step: int) -> Schedules:
    """All schedules."""
    optimizer, schedule, loss = settings.optimizer, settings.schedule, settings.loss
    return Schedules(
        steps=schedule.steps,
        global_batch=images_per_step,
        base_lr=optimizer.base_lr,
        warmup_steps=schedule.in_steps(schedule.warmup),
        final_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay[0],
        final_weight_decay=optimizer.weight_decay[1],
        momentum=schedule.momentum[0],
        final_momentum=schedule.momentum[1],
        warmup_teacher_temperature=loss.teacher_temperature[0],
        teacher_temperature=loss.teacher_temperature[1],
        teacher_temperature_steps=schedule.in_steps(loss.teacher_temperature_warmup),
        freeze_last_layer_steps=schedule.in_steps(schedule.freeze_last_layer),
    )


class MakeBatch:
    """Views of images to a batch, with masks; pickled to the workers.

    Args:
        settings: of the run.
        world: this process: batches of different ranks have different masks.

    Raises:
        ConfigError: no patch of a batch would be masked, though the iBOT loss is about those.
    """

    def __init__(self, settings: "TrainSettings", world: World) -> None:
        self._seed, self._rank, self._ranks = settings.seed, world.rank, world.size
        self._masks: MaskSettings | None = None
        if settings.teacher is None and settings.loss.ibot > 0:
            self._masks = MaskSettings(settings.masks.crops, settings.masks.patches)
        side = settings.crops.global_size // settings.model.patch_size
        self._grid = (side, side)
        if self._masks is not None and not max_masked(2 * settings.batch_size, self._grid, self._masks):
            raise ConfigError("masks: no patch of a batch would be masked; raise crops or patches, or set loss.ibot=0")

    def __call__(self, views: list[Views], image_ids: list[str], step: int) -> Batch:
        """The batch of a step."""
        if self._masks is None:
            return collate(views, image_ids, None)
        key = (self._seed, step * self._ranks + self._rank)
        return collate(views, image_ids, block_masks(2 * len(views), self._grid, self._masks, key))


def make_dataset(settings: "TrainSettings") -> Dataset:
    """The images of a run. Raises ConfigError."""
    sources = [
        Source(name, source.images, source.image_column, source.weight, source.homogeneous)
        for name, source in settings.data.sources.items()
    ]
    return open_dataset(sources)


def make_loader(
    settings: "TrainSettings", dataset: Dataset, world: World, workers: int, start_step: int
) -> Loader[Batch]:
    """Batches of this rank from a step on."""
    return Loader(
        dataset,
        CropMaker(crop_settings(settings)),
        MakeBatch(settings, world),
        batch_size=settings.batch_size,
        rank=world.rank,
        ranks=world.size,
        workers=workers,
        start_step=start_step,
        seed=settings.seed,
    )


def crop_settings(settings: "TrainSettings") -> CropSettings:
    """The views of an image."""
    crops = settings.crops
    return CropSettings(
        global_size=crops.global_size,
        local_size=crops.local_size,
        local_crops=crops.local_crops,
        global_scale=crops.global_scale,
        local_scale=crops.local_scale,
        blur=BLURS[crops.colors],
    )


def _by_features(settings: "TrainSettings", teacher: Opened) -> bool:
    objective = settings.teacher.objective if settings.teacher else "auto"
    if objective == "heads" and not teacher.heads:
        raise ConfigError(
            "teacher.objective heads: the teacher has none, as published weights do not; take features or a run's"
        )
    return objective == "features" or not teacher.heads


def _teacher(settings: "TrainSettings", opened: Opened) -> Trainable:
    patch = opened.backbone.config.patch_size
    for key in ("global_size", "local_size"):
        if getattr(settings.crops, key) % patch:
            raise ConfigError(f"crops.{key} {getattr(settings.crops, key)}: the teacher's patches are of {patch}")
    if _by_features(settings, opened):
        return Featured(opened.backbone)
    return Network(opened.backbone, opened.heads["dino_head"], opened.heads.get("ibot_head"))


def _check_prototypes(name: str, head: Head, theirs: Head) -> None:
    ours, others = len(head.last_layer.weight_v), len(theirs.last_layer.weight_v)
    if ours != others:
        key = "prototypes" if name == "dino_head" else "ibot_prototypes"
        raise ConfigError(f"heads.{key} is {ours}, the teacher has {others}: the student needs as many")
