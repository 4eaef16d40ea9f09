"""Distillation: the objective for teachers without heads by its formula, and the published one with them."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

from curation.errors import ConfigError
from embedders.checkpoints import save_vit
from embedders.dinov2 import standard_preprocessing
from embedders.vit import VARIANTS, VisionTransformer, ViTConfig
from tests.trainer.tiny_runs import copied, random_batch, random_weights, settings, trained
from trainer.build import make_pair, make_schedules
from trainer.checkpoints import Checkpoints, Facts, newest, tensors_of
from trainer.config import TrainSettings
from trainer.distill import Featured, FeatureMatching
from trainer.distributed import World
from trainer.objective import Inputs
from trainer.pair import Network, Pair
from trainer.step import Trained, augmented, train_step

ALONE = World(0, 1, torch.device("cpu"), None)
WIDE = ViTConfig(dim=48, depth=1, heads=2, patch_size=7, image_size=56)


pytestmark = pytest.mark.usefixtures("one_thread")


def featured(seed: int) -> tuple[Pair, Inputs]:
    student, teacher = Featured(VisionTransformer(VARIANTS["test"]), WIDE.dim), Featured(VisionTransformer(WIDE))
    random_weights(student, seed)
    random_weights(teacher, seed + 1)
    return Pair.of(student, teacher), augmented(random_batch(settings(), seed, masked=False))


@pytest.mark.parametrize("seed", [0, 1])
def test_features_are_compared_crop_by_crop(seed: int) -> None:
    pair, inputs = featured(seed)
    loss, parts = FeatureMatching()(pair, inputs, 0.07)
    cls: list[Tensor] = []
    patches: list[Tensor] = []
    student, teacher = pair.student, pair.teacher
    assert isinstance(student, Featured)
    for crop in [*inputs.global_crops, *inputs.local_crops]:
        ours, theirs = student.backbone(crop[None]), teacher.backbone(crop[None])
        grid = crop.shape[1] // 14
        # Patches of 7 pixels to patches of 14: bilinear with antialiasing is a tent over four of them, cut at the edge.
        plane = theirs.patches[0].T.view(1, -1, 2 * grid, 2 * grid)
        plane = F.interpolate(plane, (grid, grid), mode="bilinear", antialias=True)[0].flatten(1).T
        cls.append(1 - F.cosine_similarity(student.cls_projection(ours.cls[0]), theirs.cls[0], dim=0))
        pairs = zip(student.patch_projection(ours.patches[0]), plane, strict=True)
        patches += [1 - F.cosine_similarity(a, b, dim=0) for a, b in pairs]
    expected = torch.stack(cls).mean(), torch.stack(patches).mean()
    torch.testing.assert_close(parts["cls"], expected[0].detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts["patches"], expected[1].detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, sum(expected), rtol=1e-4, atol=1e-5)
    loss.backward()
    assert all(value.grad is not None for name, value in student.named_parameters() if "mask_token" not in name)
    assert all(value.grad is None for value in teacher.parameters())


def run_of(given: TrainSettings) -> Trained:
    return trained(given)


def saved_run(folder: Path, *assignments: str) -> Path:
    """A checkpoint of a run with heads."""
    given = settings("model.depth=3", *assignments)
    run = trained(given, seed=8)
    checkpoints = Checkpoints(folder, 1, ALONE)
    config = run.pair.student.backbone.config
    checkpoints.save(tensors_of(run), Facts(1, 4, config, given.deciding()))
    checkpoints.finish()
    return folder


def test_a_teacher_with_heads(tmp_path: Path) -> None:
    given = settings(f"teacher.model={saved_run(tmp_path)}")
    run = run_of(given)
    pair = run.pair
    assert isinstance(pair.student, Network) and isinstance(pair.teacher, Network)
    assert pair.teacher is not pair.ema and len(pair.networks) == 3
    assert (pair.teacher.backbone.config.depth, pair.student.backbone.config.depth) == (3, 2)
    assert not pair.student.backbone.mask_token.requires_grad
    teacher, ema = copied(pair.teacher), copied(pair.ema)
    batch = random_batch(given, 0, masked=False)
    metrics = train_step(run, batch, 3, make_schedules(given, 4).at(3))
    assert metrics.names[:4] == ("loss", "dino", "ibot", "koleo")
    assert all(torch.equal(value, teacher[name]) for name, value in pair.teacher.state_dict().items())
    assert any(not torch.equal(value, ema[name]) for name, value in pair.ema.state_dict().items())
    assert torch.equal(pair.student.backbone.mask_token, ema["backbone.mask_token"])


def test_the_ibot_loss_is_over_all_patches_of_both_global_crops(tmp_path: Path) -> None:
    given = settings(f"teacher.model={saved_run(tmp_path)}", "loss.centering=sinkhorn", "loss.koleo=0")
    run = run_of(given)
    student, teacher = run.pair.student, run.pair.teacher
    assert isinstance(student, Network) and isinstance(teacher, Network)
    inputs = augmented(random_batch(given, 0, masked=False))
    _, parts = run.objective(run.pair, inputs, 0.05)
    with torch.no_grad():
        there = teacher.dino_head(teacher.backbone(inputs.global_crops).patches.flatten(0, 1))
        here = student.dino_head(student.backbone(inputs.global_crops).patches.flatten(0, 1))
    shares = (there.double() / 0.05).exp()
    for _ in range(3):
        shares = shares / shares.sum(dim=0, keepdim=True)
        shares = shares / shares.sum(dim=1, keepdim=True)
    expected = -(shares * (here.double() / 0.1).log_softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(parts["ibot"].double(), expected, rtol=1e-4, atol=1e-5)


def test_teachers_without_heads_are_learned_from_by_features(tmp_path: Path) -> None:
    teacher = VisionTransformer(WIDE)
    random_weights(teacher, 0)
    save_vit(teacher, tmp_path / "teacher.safetensors", standard_preprocessing(56))
    place = f"teacher.model={tmp_path}/teacher.safetensors"
    run = run_of(settings(place))
    assert isinstance(run.objective, FeatureMatching)
    before = copied(run.pair.student)
    first = train_step(run, random_batch(settings(), 0, masked=False), 3, make_schedules(settings(), 4).at(3))
    assert first.names[:3] == ("loss", "cls", "patches")
    frozen = {name for name, value in run.pair.student.state_dict().items() if torch.equal(value, before[name])}
    assert frozen == {"backbone.mask_token"}
    with pytest.raises(ConfigError, match=r"teacher\.objective heads: the teacher has none"):
        make_pair(settings(place, "teacher.objective=heads"))
    with pytest.raises(ConfigError, match=r"crops\.global_size 50: the teacher's patches are of 7"):
        make_pair(settings(place, "model.patch_size=10", "crops.global_size=50", "crops.local_size=20"))


def test_heads_must_have_as_many_prototypes(tmp_path: Path) -> None:
    place = saved_run(tmp_path)
    with pytest.raises(ConfigError, match=r"heads\.prototypes is 30, the teacher has 24"):
        make_pair(settings(f"teacher.model={place}", "heads.prototypes=30"))
    assert newest(place) is not None
    features = make_pair(settings(f"teacher.model={place}", "heads.prototypes=30", "teacher.objective=features"))
    assert isinstance(features[0].student, Featured)
