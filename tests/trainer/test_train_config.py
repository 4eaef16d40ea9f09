"""Settings of training: presets with the published numbers, overrides, errors that name the key, what decides a run."""

from pathlib import Path

import pytest
import torch

from curation.errors import ConfigError
from embedders.vit import VARIANTS
from tests.trainer.tiny_runs import settings
from trainer.build import MakeBatch, crop_settings, make_schedules, vit_config
from trainer.config import TrainSettings, difference, load_settings, shipped
from trainer.distributed import World
from trainer.masks import MaskSettings


@pytest.mark.parametrize("name", shipped())
def test_presets_are_valid_and_say_what_they_are(name: str) -> None:
    found = load_settings(name)
    assert len(found.description) > 20
    assert make_schedules(found, found.batch_size).steps == found.schedule.steps
    assert crop_settings(found).global_size == found.crops.global_size
    MaskSettings(found.masks.crops, found.masks.patches)
    assert vit_config(found.model, found.crops.global_size).grid == found.crops.global_size // found.model.patch_size


def test_presets_that_are_asked_for_are_there() -> None:
    names = {"laptop", "small_batch", "one_gpu", "vitl16_short", "vitl14", "vitg14", "high_resolution"}
    assert names <= set(shipped())


def test_the_short_run_is_as_published() -> None:
    found = load_settings("vitl16_short")
    config = vit_config(found.model, 224)
    assert (config.dim, config.depth, config.heads, config.patch_size, config.ffn, config.registers) == (
        *(1024, 24, 16, 16),
        "mlp",
        0,
    )
    schedules = make_schedules(found, 32 * found.batch_size)
    assert schedules.peak_lr == pytest.approx(5.66e-3, rel=1e-3)
    assert (schedules.steps, schedules.warmup_steps, schedules.freeze_last_layer_steps) == (125_000, 12_500, 1250)
    assert schedules.teacher_temperature_steps == 37_500
    assert (schedules.weight_decay, schedules.final_weight_decay) == (0.04, 0.4)
    assert (schedules.momentum, schedules.final_momentum, schedules.final_lr) == (0.992, 1.0, 1e-6)
    assert (found.heads.prototypes, found.heads.bottleneck, found.heads.separate) == (65_536, 256, False)
    assert (found.optimizer.layerwise_decay, found.optimizer.patch_embed_factor, found.optimizer.clip) == (0.9, 0.2, 3)
    assert (found.optimizer.betas, found.model.drop_path, found.model.layer_scale) == ((0.9, 0.999), 0.3, 1e-5)
    assert (found.loss.dino, found.loss.ibot, found.loss.koleo, found.loss.centering) == (1, 1, 0.1, "softmax")
    assert (found.crops.global_size, found.crops.local_size, found.crops.local_crops) == (224, 96, 8)


@pytest.mark.parametrize(("name", "ranks"), [("vitl14", 96), ("vitg14", 256)])
def test_the_long_runs_are_as_published(name: str, ranks: int) -> None:
    found = load_settings(name)
    config = vit_config(found.model, 224)
    assert (config.patch_size, config.ffn) == (14, "swiglu")
    assert config.dim == {"vitl14": 1024, "vitg14": 1536}[name]
    schedules = make_schedules(found, ranks * found.batch_size)
    assert ranks * found.batch_size == 3072
    assert schedules.peak_lr == pytest.approx(3.464e-4, rel=1e-3)
    assert (schedules.steps, schedules.warmup_steps) == (625_000, 100_000)
    assert (schedules.momentum, schedules.final_weight_decay) == (0.994, 0.2)
    heads = found.heads
    assert (heads.prototypes, heads.bottleneck, heads.separate, heads.ibot_bottleneck) == (131_072, 384, True, 256)
    assert (found.loss.centering, found.optimizer.layerwise_decay, found.model.drop_path) == ("sinkhorn", 1.0, 0.4)


def test_variants_are_the_networks_there_are() -> None:
    for name, variant in VARIANTS.items():
        assert vit_config(settings(f"model.variant={name}").model, variant.image_size) == variant


def test_defaults_fit_together() -> None:
    assert (TrainSettings().model.patch_size, TrainSettings().crops.local_size) == (14, 98)


def test_a_network_by_its_sizes() -> None:
    found = settings("model={dim: 48, depth: 3, heads: 4, patch_size: 7, registers: 2, ffn: swiglu}")
    config = vit_config(found.model, 56)
    assert (config.dim, config.depth, config.heads, config.patch_size, config.grid) == (48, 3, 4, 7, 8)
    assert (config.registers, config.ffn, config.interpolation) == (2, "swiglu", "antialias")
    assert vit_config(settings("model.image_size=112").model, 56).grid == 8
    with pytest.raises(ConfigError, match="model: dim 48 is not a multiple of heads 5"):
        vit_config(settings("model={dim: 48, depth: 3, heads: 5}").model, 56)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optimizer.bas_lr=1", "unknown key optimizer.bas_lr .did you mean base_lr"),
        ("model={dim: 3}", "model: give a variant, or dim, depth and heads"),
        ("crops.local_size=30", "crops.local_size 30 is not a multiple of model.patch_size 14"),
        ("batch_size=1", "KoLeo compares the images of a rank"),
        ("heads.ibot_prototypes=5", "heads: .*separate"),
        ("schedule.warmup=7", "schedule: warmup 7 is above steps 6"),
        ("loss.centering=mean", "loss.centering"),
        ("data.sources={a b: {images: x}}", "data.sources.a b"),
    ],
)
def test_errors_name_the_key(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(assignment)


def test_distillation_is_without_drop_path() -> None:
    assert settings("teacher.model=x").teacher is not None
    with pytest.raises(ConfigError, match=r"set model\.drop_path=0"):
        settings("teacher.model=x", "model.drop_path=0.1")


def test_files_and_overrides(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "model: {variant: tiny}\ndata: {sources: {web: {images: shards}, far: {images: s3://b/x, weight: 2}}}\n"
    )
    found = load_settings(str(file), ["data.sources.far.weight=3", "seed=5"])
    assert found.data.sources["web"].images == str(tmp_path / "shards")
    assert (found.data.sources["far"].images, found.data.sources["far"].weight, found.seed) == ("s3://b/x", 3, 5)
    with pytest.raises(ConfigError, match=r"no preset 'laptp' .did you mean laptop.*: give a YAML file or one"):
        load_settings("laptp")
    file.write_text("data: {sources: 3}\n")
    with pytest.raises(ConfigError, match=r"data\.sources"):
        load_settings(str(file))


def test_what_decides_a_run_and_what_does_not() -> None:
    here = settings("data.sources={web: {images: a}}").deciding()
    same = settings("data.sources={web: {images: b}}", "keep=5", "compile=true", "data.workers=3", "batch_size=8")
    assert difference(here, same.deciding()) is None
    other = settings("data.sources={web: {images: a, weight: 2}}")
    assert difference(here, other.deciding()) == "data.sources.web.weight was 1.0, now 2.0"
    assert difference(here, settings("optimizer.base_lr=1").deciding()) is not None
    assert difference(here, {key: value for key, value in here.items() if key != "seed"}) == "seed was 0, now None"


def test_images_by_their_places(tmp_path: Path, tiny_run: Path) -> None:
    found = load_settings("laptop", ["data.sources.images.weight=2"], [str(tiny_run), "photos"]).data.sources
    assert {name: source.images for name, source in found.items()} == {
        "images": str(tiny_run / "shards"),
        "images-2": str(Path("photos").absolute()),
    }
    assert found["images"].weight == 2
    (tmp_path / "a.yaml").write_text("data: {sources: {web: {images: x}}, workers: 3}\n")
    data = load_settings(str(tmp_path / "a.yaml"), images="s3://bucket/*.parquet").data
    assert data.sources["images"].images == "s3://bucket/*.parquet" and len(data.sources) == 1 and data.workers == 3


def test_places_in_a_file_are_beside_it_and_in_overrides_here(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    evaluation = "evaluation: {train: a.parquet, test: s3://b/c.parquet}\n"
    file.write_text(f"model: {{variant: tiny}}\nteacher: {{model: runs/net}}\n{evaluation}")
    found = load_settings(str(file))
    assert found.teacher is not None and found.teacher.model == str(tmp_path / "runs/net")
    assert (found.evaluation.train, found.evaluation.test) == (str(tmp_path / "a.parquet"), "s3://b/c.parquet")
    for given, expected in (("vit:net", Path("net").absolute()), ("dinov2_vits14", "dinov2_vits14"), ("/a", "/a")):
        found = load_settings(str(file), [f"teacher.model={given}", "evaluation.train=b"])
        assert found.teacher is not None and found.teacher.model == str(expected)
        assert found.evaluation.train == str(Path("b").absolute())


def test_shares_of_the_run_follow_its_length() -> None:
    spans = ("schedule.warmup=0.1", "schedule.freeze_last_layer=0.02", "loss.teacher_temperature_warmup=0.5")
    for steps in (100, 40):
        made = make_schedules(settings(f"schedule.steps={steps}", *spans), 4)
        lengths = (made.warmup_steps, made.freeze_last_layer_steps, made.teacher_temperature_steps)
        assert lengths == (steps // 10, round(steps / 50), steps // 2)
    with pytest.raises(ConfigError, match=r"schedule\.warmup"):
        settings("schedule.warmup=1.5")


def test_masks_that_would_hide_nothing_are_refused() -> None:
    alone = World(0, 1, torch.device("cpu"), None)
    with pytest.raises(ConfigError, match="no patch of a batch would be masked"):
        MakeBatch(settings("masks.crops=0.1"), alone)
    MakeBatch(settings("masks.crops=0.1", "loss.ibot=0"), alone)
