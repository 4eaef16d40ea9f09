"""The student-teacher pair: one packed forward against separate ones, moving average, blocks carried out otherwise."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer.tiny_runs import copied, random_batch, random_weights, settings
from trainer.build import make_network, make_pair
from trainer.pair import Network, Pair, resampled, set_up_blocks
from trainer.step import augmented

SEPARATE = ("heads.separate=true", "heads.ibot_prototypes=20")


pytestmark = pytest.mark.usefixtures("one_thread")


def network(*assignments: str, seed: int = 0) -> Network:
    made = make_network(settings(*assignments))
    random_weights(made, seed)
    return made


@pytest.mark.parametrize("heads", [(), SEPARATE])
@pytest.mark.parametrize("seed", [0, 1])
def test_one_packed_forward_equals_separate_ones(heads: tuple[str, ...], seed: int) -> None:
    made, inputs = network(*heads, seed=seed), augmented(random_batch(settings(), seed))
    masks = inputs.masks
    assert masks is not None and (masks.weight == 0).any() and masks.mask.any()
    out = made(inputs.global_crops, inputs.local_crops, masks.mask, masks.at)
    features = [
        made.backbone(crop[None], mask[None]) for crop, mask in zip(inputs.global_crops, masks.mask, strict=True)
    ]
    cls = torch.cat([each.cls for each in features])
    local = torch.cat([made.backbone(crop[None]).cls for crop in inputs.local_crops])
    torch.testing.assert_close(out.cls, cls, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.dino, made.dino_head(torch.cat([cls, local])), rtol=1e-4, atol=1e-5)
    patches = torch.cat([each.patches[0] for each in features])
    expected = torch.stack([(made.ibot_head or made.dino_head)(patches[at][None])[0] for at in masks.at.tolist()])
    torch.testing.assert_close(out.ibot, expected, rtol=1e-4, atol=1e-5)


def test_without_places_no_patch_goes_through_a_head() -> None:
    made, inputs = network(), augmented(random_batch(settings(), 0))
    out = made(inputs.global_crops)
    assert out.ibot is None
    assert out.dino.shape == (8, 24)


def test_both_start_alike_and_the_teacher_neither_learns_nor_drops_paths() -> None:
    pair, left = make_pair(settings("model.drop_path=0.5"))
    assert left == [] and pair.teacher is pair.ema and pair.networks == [pair.student, pair.ema]
    assert all(torch.equal(a, b) for a, b in zip(pair.student.parameters(), pair.ema.parameters(), strict=True))
    assert all(a is not b for a, b in zip(pair.student.parameters(), pair.ema.parameters(), strict=True))
    assert not any(value.requires_grad for value in pair.ema.parameters())
    assert all(value.requires_grad for value in pair.student.parameters())
    random_weights(pair.ema, 0)
    crops = augmented(random_batch(settings(), 0)).global_crops
    assert torch.equal(pair.ema(crops).dino, pair.ema(crops).dino)
    random_weights(pair.student, 0)
    assert not torch.equal(pair.student(crops).dino, pair.student(crops).dino)


def test_pairs_are_a_function_of_the_seed() -> None:
    first, again, other = (make_pair(settings(f"seed={seed}"))[0].student.backbone.pos_embed for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_moving_average() -> None:
    pair, _ = make_pair(settings())
    random_weights(pair.student, 1)
    before = copied(pair.ema)
    pair.update(0.9, torch.tensor(True))
    for name, value in pair.ema.state_dict().items():
        expected = 0.9 * before[name] + 0.1 * pair.student.state_dict()[name]
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)
    before = copied(pair.ema)
    pair.update(0.9, torch.tensor(False))
    assert all(torch.equal(value, before[name]) for name, value in pair.ema.state_dict().items())


def test_resampled_patches() -> None:
    patches = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(0))
    assert resampled(patches, (3, 4), None) is patches
    assert resampled(patches, (3, 4), (3, 4)) is patches
    rows = torch.linspace(-1, 1, 4)[:, None].expand(4, 6).reshape(1, 24, 1)
    coarse = resampled(rows, (4, 6), (2, 3)).view(2, 3)
    assert (coarse[0] < coarse[1]).all()
    torch.testing.assert_close(coarse, coarse[:, :1].expand(2, 3))
    halved = resampled(torch.tensor([0.0, 0, 1, 0]).view(1, 4, 1), (1, 4), (1, 2)).flatten()
    torch.testing.assert_close(halved, torch.tensor([1 / 7, 3 / 7]))  # a tent over four patches, cut at the edges
    doubled = resampled(torch.tensor([0.0, 1.0]).view(1, 2, 1), (1, 2), (1, 4)).flatten()
    torch.testing.assert_close(doubled, torch.tensor([0.0, 0.25, 0.75, 1.0]))  # between centres, held at the edges


def gradients(made: Network, inputs: Any, drawn: int) -> dict[str, Tensor]:
    torch.manual_seed(drawn)
    made(inputs.global_crops, inputs.local_crops, inputs.masks.mask, inputs.masks.at).dino.square().sum().backward()
    found = {name: value.grad.clone() for name, value in made.named_parameters() if value.grad is not None}
    made.zero_grad()
    return found


def test_checkpointed_blocks_give_the_same_gradients_under_drop_path() -> None:
    made, inputs = network("model.drop_path=0.5"), augmented(random_batch(settings(), 0))
    made.train()
    names = list(made.state_dict())
    before = gradients(made, inputs, 5)
    set_up_blocks(made.backbone, compiled=False, checkpointing=True)
    assert list(made.state_dict()) == names
    after = gradients(made, inputs, 5)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(before[name], value) for name, value in gradients(made, inputs, 6).items())


def test_every_block_is_compiled_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Callable[..., Tensor]] = []

    def record(call: Callable[..., Tensor], dynamic: bool) -> Callable[..., Tensor]:
        compiled.append(call)
        return call

    monkeypatch.setattr(torch, "compile", record)
    pair = Pair.of(network())
    set_up_blocks(pair.student.backbone, compiled=True)
    assert len(compiled) == len(pair.student.backbone.blocks) == 2
    crops = augmented(random_batch(settings(), 0)).global_crops
    assert torch.equal(pair.student(crops).dino, pair.ema(crops).dino)
