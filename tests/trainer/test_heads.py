"""The head against its formula, row by row, with gradients."""

import pytest
import torch
from torch import Tensor

from trainer.heads import Head


def small_head(seed: int = 0) -> Head:
    """Weights far from their initial values, so that every one of them counts."""
    head = Head(5, 11, hidden=7, bottleneck=4)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in head.parameters():
            value.copy_(torch.randn(value.shape, generator=draw))
    return head


def slow_head(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """One row through the published layers: [dim] to [K]."""
    for layer in (0, 2, 4):
        x = w[f"mlp.{layer}.weight"] @ x + w[f"mlp.{layer}.bias"]
        if layer < 4:
            x = x * (1 + torch.erf(x / 2**0.5)) / 2
    x = x / (x * x).sum().sqrt()
    rows = zip(w["last_layer.weight_g"], w["last_layer.weight_v"], strict=True)
    return torch.cat([g * (v @ x) / (v * v).sum().sqrt() for g, v in rows])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_head_is_its_formula_with_gradients(seed: int) -> None:
    head = small_head(seed)
    draw = torch.Generator().manual_seed(seed + 10)
    x, pull = torch.randn(6, 5, generator=draw), torch.randn(6, 11, generator=draw)
    names = [name for name, _ in head.named_parameters()]
    found = head(x)
    gradients = torch.autograd.grad((found * pull).sum(), list(head.parameters()))
    slow = {name: value.detach().double().requires_grad_() for name, value in head.named_parameters()}
    expected = torch.stack([slow_head(slow, row.double()) for row in x])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    wanted = torch.autograd.grad((expected * pull).sum(), [slow[name] for name in names])
    for name, gradient, want in zip(names, gradients, wanted, strict=True):
        torch.testing.assert_close(gradient.double(), want, rtol=1e-4, atol=1e-5, msg=name)


def test_names_shapes_and_initial_values_are_the_published_ones() -> None:
    torch.manual_seed(0)
    head = Head(64, 300)
    shapes = {name: tuple(value.shape) for name, value in head.state_dict().items()}
    assert shapes == {
        "mlp.0.weight": (2048, 64),
        "mlp.0.bias": (2048,),
        "mlp.2.weight": (2048, 2048),
        "mlp.2.bias": (2048,),
        "mlp.4.weight": (256, 2048),
        "mlp.4.bias": (256,),
        "last_layer.weight_g": (300, 1),
        "last_layer.weight_v": (300, 256),
    }
    for layer in (0, 2, 4):
        assert head.state_dict()[f"mlp.{layer}.weight"].std().item() == pytest.approx(0.02, rel=0.02)
        assert not head.state_dict()[f"mlp.{layer}.bias"].any()
    assert (head.last_layer.weight_g == 1).all() and head.last_layer.weight_g.requires_grad
    reference = torch.nn.Linear(256, 300, bias=False).weight
    assert head.last_layer.weight_v.std().item() == pytest.approx(reference.std().item(), rel=0.02)
    assert head.last_layer.weight_v.abs().max() <= 1 / 16


def test_logits_are_cosines_times_the_lengths() -> None:
    head = Head(5, 11, hidden=7, bottleneck=4)
    x = 100 * torch.randn(6, 5)
    assert head(x).abs().max() <= 1 + 1e-5
    with torch.no_grad():
        head.last_layer.weight_g.mul_(3)
    longer = head(x)
    with torch.no_grad():
        head.last_layer.weight_v.mul_(7)
    torch.testing.assert_close(head(x), longer)


@pytest.mark.parametrize("layers", [2, 4])
def test_other_depths_keep_the_order_of_names(layers: int) -> None:
    head = Head(5, 11, hidden=7, bottleneck=4, layers=layers)
    linear = [name for name in head.state_dict() if name.startswith("mlp") and name.endswith("weight")]
    assert linear == [f"mlp.{2 * layer}.weight" for layer in range(layers)]
    assert head(torch.randn(3, 5)).shape == (3, 11)


def test_a_zero_vector_gives_finite_logits_and_gradients() -> None:
    head = small_head()
    with torch.no_grad():
        head.mlp[4].weight.zero_()
        head.mlp[4].bias.zero_()
    x = torch.randn(3, 5, requires_grad=True)
    out = head(x)
    assert (out == 0).all()
    for gradient in torch.autograd.grad(out.sum(), [x, *head.parameters()]):
        assert gradient.isfinite().all()


def test_under_autocast_norms_are_float32() -> None:
    head, x = small_head(), torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        out, y = head(x), head.mlp(x).float()
        exact = head.last_layer(y / y.norm(dim=-1, keepdim=True))
    assert (out != exact).float().mean() < 0.01
    assert out.dtype == torch.bfloat16
    assert (out.float() - head(x)).norm() < 0.03 * head(x).norm()


def test_a_head_without_layers_or_width_is_refused() -> None:
    with pytest.raises(ValueError, match="head"):
        Head(5, 11, layers=1)
    with pytest.raises(ValueError, match="head"):
        Head(5, 0)
