"""Weights to start from: of a run with its heads, of a file without, at another image size, of another network."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from curation.errors import ConfigError
from embedders.checkpoints import save_vit
from embedders.dinov2 import standard_preprocessing
from embedders.vit import VARIANTS, VisionTransformer
from tests.trainer.test_distill import saved_run
from tests.trainer.tiny_runs import random_weights, settings
from trainer.build import make_pair
from trainer.pair import Network
from trainer.start import open_weights

SEPARATE = ("heads.separate=true", "heads.ibot_prototypes=20")


def test_a_run_with_its_heads(tmp_path: Path) -> None:
    run = saved_run(tmp_path, *SEPARATE)
    found = open_weights(str(run))
    assert set(found.heads) == {"dino_head", "ibot_head"}
    pair, left = make_pair(settings("model.depth=3", *SEPARATE), str(run))
    assert left == []
    assert isinstance(pair.student, Network) and pair.student.ibot_head is not None
    for ours, theirs in (
        (pair.student.backbone, found.backbone),
        (pair.student.dino_head, found.heads["dino_head"]),
        (pair.student.ibot_head, found.heads["ibot_head"]),
        (pair.ema.backbone, found.backbone),
    ):
        state = theirs.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())
    assert open_weights(str(run / "checkpoints" / "step-00000001")).heads.keys() == found.heads.keys()


def test_heads_of_another_shape_are_left_new(tmp_path: Path) -> None:
    run = saved_run(tmp_path)
    _, left = make_pair(settings("model.depth=3", "heads.prototypes=30"), str(run))
    assert left == ["dino_head"]
    _, left = make_pair(settings("model.depth=3", *SEPARATE), str(run))
    assert left == ["ibot_head"]


@pytest.mark.parametrize("interpolation", ["meta", "antialias"])
def test_a_file_without_heads_at_another_size(tmp_path: Path, interpolation: str) -> None:
    config = replace(VARIANTS["test"], image_size=84, interpolation=interpolation)
    model = VisionTransformer(config).eval()
    random_weights(model, 3)
    file = tmp_path / "model.safetensors"
    save_vit(model, file, standard_preprocessing(84))
    pair, left = make_pair(settings(), str(file))
    assert left == ["dino_head"]
    images = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    ours, theirs = pair.ema.backbone(images), model(images)
    torch.testing.assert_close(ours.patches, theirs.patches)
    assert pair.ema.backbone.config.grid == 4 and not torch.equal(ours.cls, model(images.flip(0)).cls)


def test_another_network_is_refused_by_its_first_difference(tmp_path: Path) -> None:
    run = saved_run(tmp_path)
    with pytest.raises(ConfigError, match="another network: depth is 3 there, 2 here"):
        make_pair(settings(), str(run))
    with pytest.raises(ConfigError, match="another network: registers is 0 there, 4 here"):
        make_pair(settings("model.depth=3", "model.registers=4"), str(run))


def test_no_weights_at_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.pth"):
        open_weights(str(tmp_path / "nothing.pth"))
