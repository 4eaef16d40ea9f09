"""Parameter groups by name, the values that schedules write into them, and clipping, sharded too."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from embedders.vit import VARIANTS, VisionTransformer
from trainer.heads import Head
from trainer.parameters import clip_submodules, parameter_groups, set_values
from trainer.schedules import Values

KEYS = {"params", "names", "lr_factor", "wd_factor", "is_last_layer"}
CONFIG = replace(VARIANTS["test"], dim=16, depth=3, registers=2, image_size=28)


def student() -> nn.ModuleDict:
    torch.manual_seed(0)
    backbone = VisionTransformer(CONFIG)
    heads = {name: Head(16, 9, hidden=8, bottleneck=4) for name in ("dino_head", "ibot_head")}
    return nn.ModuleDict({"backbone": backbone, **heads})


def slow_settings(name: str, decay: float, blocks: int) -> tuple[float, float, bool]:
    """(lr_factor, wd_factor, is_last_layer) by the published rules, for names with or without `backbone.` before."""
    name = name.removeprefix("backbone.")
    power = 0
    if name.startswith(("patch_embed.", "pos_embed", "cls_token", "mask_token", "register_tokens")):
        power = blocks + 1
    elif name.startswith("blocks."):
        power = blocks - int(name.split(".")[1])
    lr = decay**power * (0.2 if name.startswith("patch_embed.") else 1)
    kept = name.endswith(".bias") or "norm" in name or "gamma" in name
    return lr, 0.0 if kept else 1.0, "last_layer" in name


def settings(groups: list[dict]) -> dict[str, tuple[float, float, bool]]:
    return {
        name: (group["lr_factor"], group["wd_factor"], group["is_last_layer"])
        for group in groups
        for name in group["names"]
    }


@pytest.mark.parametrize("decay", [1.0, 0.9])
@pytest.mark.parametrize("part", ["all", "backbone", "dino_head"])
def test_groups_follow_the_published_rules(part: str, decay: float) -> None:
    model = student() if part == "all" else student()[part]
    groups = parameter_groups(model, decay)
    named = dict(model.named_parameters())
    found = settings(groups)
    assert found.keys() == named.keys() and sum(len(group["names"]) for group in groups) == len(named)
    blocks = 0 if part == "dino_head" else 3
    for name, (lr, wd, last) in found.items():
        assert (lr, wd, last) == (pytest.approx(slow_settings(name, decay, blocks)[0]), *slow_settings(name, 1, 3)[1:])
    for group in groups:
        assert group.keys() == KEYS
        assert all(value is named[name] for name, value in zip(group["names"], group["params"], strict=True))
    assert len(set(found.values())) == len(groups)


def test_what_the_rules_come_to() -> None:
    found = settings(parameter_groups(student(), 0.5))
    assert found["backbone.patch_embed.proj.weight"] == (0.5**4 * 0.2, 1, False)
    assert found["backbone.patch_embed.proj.bias"] == (0.5**4 * 0.2, 0, False)
    for token in ("pos_embed", "cls_token", "mask_token", "register_tokens"):
        assert found[f"backbone.{token}"] == (0.5**4, 1, False)
    assert found["backbone.blocks.0.attn.qkv.weight"] == (0.5**3, 1, False)
    assert found["backbone.blocks.2.ls1.gamma"] == (0.5, 0, False)
    assert found["backbone.blocks.2.norm1.weight"] == (0.5, 0, False)
    assert found["backbone.norm.weight"] == (1, 0, False)
    assert found["dino_head.mlp.0.weight"] == (1, 1, False)
    assert found["ibot_head.last_layer.weight_g"] == found["ibot_head.last_layer.weight_v"] == (1, 1, True)
    assert len(parameter_groups(student(), 1.0)) == 5


def test_frozen_parameters_are_left_out_and_count_as_blocks() -> None:
    model = student()
    model["backbone"].mask_token.requires_grad_(False)
    model["backbone"].blocks[2].requires_grad_(False)
    found = settings(parameter_groups(model, 0.5))
    assert not any("mask_token" in name or "blocks.2" in name for name in found)
    assert found["backbone.blocks.1.mlp.fc1.weight"][0] == 0.25


def test_tied_heads_stand_in_one_group() -> None:
    model = student()
    model["ibot_head"] = model["dino_head"]
    assert not any(name.startswith("ibot_head") for name in settings(parameter_groups(model, 0.9)))


def test_values_of_a_step_reach_the_optimizer() -> None:
    model = student()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.5), fused=True)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    set_values(optimizer, Values(0.1, 0.0, 0.4, 0.99, 0.05))
    for group in optimizer.param_groups:
        assert group["lr"] == (0 if group["is_last_layer"] else 0.1 * group["lr_factor"])
        assert group["weight_decay"] == 0.4 * group["wd_factor"]
    for value in model.parameters():
        value.grad = torch.zeros_like(value)
    optimizer.step()  # without a gradient only the decay acts
    for name, value in model.named_parameters():
        lr, wd, last = slow_settings(name, 0.5, 3)
        torch.testing.assert_close(value.detach(), before[name] * (1 - 0.1 * lr * 0.4 * wd * (not last)))
    set_values(optimizer, Values(0.1, 0.3, 0.4, 0.99, 0.05))
    assert [group["lr"] for group in optimizer.param_groups if group["is_last_layer"]] == [0.3]


def draw_gradients(modules: nn.ModuleDict, seed: int) -> dict[str, Tensor]:
    """One for each parameter but mask_token, large for the backbone, small for ibot_head."""
    draw = torch.Generator().manual_seed(seed)
    scales = {"backbone": 5.0, "dino_head": 1.0, "ibot_head": 1e-3}
    return {
        name: scales[name.split(".")[0]] * torch.randn(value.shape, generator=draw)
        for name, value in modules.named_parameters()
        if "mask_token" not in name
    }


def slow_clip(gradients: dict[str, Tensor], max_norm: float) -> tuple[dict[str, Tensor], dict[str, float]]:
    norms: dict[str, float] = {}
    for module in ("backbone", "dino_head", "ibot_head"):
        parts = [value for name, value in gradients.items() if name.split(".")[0] == module]
        norms[module] = sum(float((part.double() ** 2).sum()) for part in parts) ** 0.5
    factors = {module: min(1.0, max_norm / norm) for module, norm in norms.items()}
    return {name: value * factors[name.split(".")[0]] for name, value in gradients.items()}, norms


@pytest.mark.parametrize("seed", [0, 1])
def test_modules_are_clipped_each_by_itself(seed: int) -> None:
    model = student()
    gradients = draw_gradients(model, seed)
    for name, value in model.named_parameters():
        value.grad = gradients[name].clone() if name in gradients else None
    norms = clip_submodules(dict(model.items()), 3.0)
    expected, wanted = slow_clip(gradients, 3.0)
    assert wanted["backbone"] > wanted["dino_head"] > 3 > wanted["ibot_head"]
    assert {name: norm.item() for name, norm in norms.items()} == pytest.approx(wanted, rel=1e-5)
    for name, value in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(value.grad, expected[name], rtol=1e-5, atol=1e-7)
        else:
            assert value.grad is None
    assert torch.equal(model["ibot_head"].last_layer.weight_g.grad, gradients["ibot_head.last_layer.weight_g"])


def test_a_gradient_that_is_not_finite_shows_in_its_module_alone() -> None:
    model = student()
    for value in model.parameters():
        value.grad = torch.ones_like(value)
    model["dino_head"].mlp[0].bias.grad[3] = torch.inf
    norms = clip_submodules(dict(model.items()), 3.0)
    assert [name for name, norm in norms.items() if not norm.isfinite()] == ["dino_head"]
    assert model["backbone"].norm.weight.grad.isfinite().all()


def sharded_clip(rank: int, folder: str) -> None:
    """Two ranks that hold halves (of uneven shapes too) clip as one that holds all."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, distribute_tensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = student()
    gradients = draw_gradients(model, 0)
    mesh = init_device_mesh("cpu", (2,))
    for module in model.values():
        fully_shard(module, mesh=mesh)
    for name, value in model.named_parameters():
        assert isinstance(value, DTensor)
        if name in gradients:
            value.grad = distribute_tensor(gradients[name], mesh, value.placements)
    norms = clip_submodules(dict(model.items()), 3.0)
    expected, wanted = slow_clip(gradients, 3.0)
    for name, norm in norms.items():
        assert not isinstance(norm, DTensor) and norm.item() == pytest.approx(wanted[name], rel=1e-5)
    for name, value in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(value.grad.full_tensor(), expected[name], rtol=1e-5, atol=1e-7)
    dist.destroy_process_group()


def test_sharded_modules_are_clipped_by_their_whole_norm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(sharded_clip, args=(str(tmp_path),), nprocs=2)
