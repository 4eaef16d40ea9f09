"""The losses against their formulas, pair by pair and row by row in float64, with gradients."""

import pytest
import torch
from torch import Tensor

from trainer import losses
from trainer.losses import dino_loss, ibot_loss, koleo_loss

SEEDS = [0, 1, 2]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def slow_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """-sum_k p_k log q_k of one row, q the softmax at temperature 0.1."""
    exponents = torch.exp(logits / 0.1 - (logits / 0.1).max().detach())
    return -sum(p * torch.log(e / exponents.sum()) for p, e in zip(target, exponents, strict=True))


def slow_dino(logits: Tensor, probs: Tensor) -> Tensor:
    terms = []
    for student in range(len(logits)):
        for teacher in range(2):
            if student != teacher:
                rows = zip(logits[student], probs[teacher], strict=True)
                terms.append(sum(slow_cross_entropy(z, p) for z, p in rows) / logits.shape[1])
    return sum(terms) / len(terms)


def slow_ibot(logits: Tensor, probs: Tensor, masked: list[int]) -> Tensor:
    """`masked` patches of each crop; rows of the crops follow one another."""
    total, row = torch.zeros((), dtype=torch.float64), 0
    for count in masked:
        for _ in range(count):
            total = total + slow_cross_entropy(logits[row], probs[row]) / count
            row += 1
    return total / len(masked)


def slow_koleo(x: Tensor) -> Tensor:
    unit = [row / (row * row).sum().sqrt() for row in x]
    total = torch.zeros((), dtype=torch.float64)
    for i, row in enumerate(unit):
        distances = [((row - other) ** 2).sum().sqrt() for j, other in enumerate(unit) if j != i]
        total = total - torch.log(min(distances) + 1e-8)
    return total / len(unit)


def assert_same(found: Tensor, at: Tensor, expected: Tensor, slow_at: Tensor, tolerance: float = 1e-5) -> None:
    """Values, and gradients by `at` and `slow_at`."""
    assert found.dtype == torch.float32 and found.shape == ()
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    (gradient,), (wanted,) = torch.autograd.grad(found, at), torch.autograd.grad(expected, slow_at)
    torch.testing.assert_close(gradient.double(), wanted, rtol=10 * tolerance, atol=tolerance * wanted.abs().max())


@pytest.mark.parametrize("views", [2, 3, 6])
@pytest.mark.parametrize("seed", SEEDS)
def test_dino_loss_is_the_mean_over_its_pairs(seed: int, views: int) -> None:
    logits = normal(views, 3, 7, seed=seed).requires_grad_()
    probs = (3 * normal(2, 3, 7, seed=seed + 50)).softmax(-1)
    slow = logits.detach().double().requires_grad_()
    assert_same(dino_loss(logits, probs), logits, slow_dino(slow, probs.double()), slow)


def test_dino_loss_weights_18_terms_of_the_published_views() -> None:
    """A row of equal logits costs log K against any teacher."""
    probs = normal(2, 3, 7, seed=0).softmax(-1)
    logits = torch.zeros(10, 3, 7)
    torch.testing.assert_close(dino_loss(logits, probs), torch.tensor(7.0).log())
    logits[0, :, 2] = 5e3 * 0.1
    only = probs[1, :, :2].sum() + probs[1, :, 3:].sum()
    expected = (17 * torch.tensor(7.0).log() + 5e3 * only / 3) / 18
    torch.testing.assert_close(dino_loss(logits, probs), expected)


@pytest.mark.parametrize("rows_at_once", [3, 512])
@pytest.mark.parametrize("seed", SEEDS)
def test_ibot_loss_is_a_mean_within_crops_then_over_them(
    seed: int, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "ROWS_AT_ONCE", rows_at_once)
    masked = [3, 0, 1, 4]
    weight = torch.tensor([1 / count for count in masked for _ in range(count)] + [0.0, 0.0])
    logits, probs = normal(10, 5, seed=seed), (3 * normal(10, 5, seed=seed + 50)).softmax(-1)
    logits[8], logits[9, 2], probs[8, 0], probs[9] = torch.nan, torch.inf, torch.inf, torch.nan
    logits.requires_grad_()
    slow = logits.detach().double().requires_grad_()
    found = ibot_loss(logits, probs, weight, len(masked))
    expected = slow_ibot(slow[:8], probs[:8].double(), masked)
    assert found.isfinite()
    assert_same(found, logits, expected, slow)
    (gradient,) = torch.autograd.grad(ibot_loss(logits, probs, weight, len(masked)), logits)
    assert (gradient[8:] == 0).all() and (gradient[:8] != 0).all()


def test_ibot_loss_of_padding_alone_is_zero() -> None:
    logits = torch.full((4, 5), torch.nan, requires_grad=True)
    loss = ibot_loss(logits, torch.full((4, 5), torch.nan), torch.zeros(4), 2)
    assert loss == 0
    assert (torch.autograd.grad(loss, logits)[0] == 0).all()


def test_a_row_that_counts_passes_on_what_is_not_finite() -> None:
    """The step has to see it."""
    logits, probs = normal(4, 5, seed=0), normal(4, 5, seed=1).softmax(-1)
    logits[2, 1] = torch.nan
    assert not ibot_loss(logits, probs, torch.ones(4), 2).isfinite()
    assert not dino_loss(logits.view(2, 2, 5), probs.view(2, 2, 5)).isfinite()


def test_large_logits_give_finite_losses_and_gradients() -> None:
    logits = (1e4 * normal(2, 3, 7, seed=0)).requires_grad_()
    probs = normal(2, 3, 7, seed=1).softmax(-1)
    loss = dino_loss(logits, probs)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()


@pytest.mark.parametrize("name", ["dino", "ibot"])
def test_bfloat16_logits_are_computed_in_float32(name: str) -> None:
    half = normal(4, 6, 50, seed=0).bfloat16().requires_grad_()
    full = half.detach().float().requires_grad_()
    probs = normal(2, 6, 50, seed=1).softmax(-1)

    def loss(logits: Tensor) -> Tensor:
        if name == "dino":
            return dino_loss(logits, probs)
        return ibot_loss(logits[:2].flatten(0, 1), probs.flatten(0, 1), torch.ones(12), 4)

    with torch.autocast("cpu", torch.bfloat16):
        found = loss(half)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, loss(full))
    (gradient,), (wanted,) = torch.autograd.grad(found, half), torch.autograd.grad(loss(full), full)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient, wanted.bfloat16())


@pytest.mark.parametrize("seed", SEEDS)
def test_koleo_loss_is_its_formula(seed: int) -> None:
    x = normal(9, 4, seed=seed).requires_grad_()
    slow = x.detach().double().requires_grad_()
    assert_same(koleo_loss(x), x, slow_koleo(slow), slow)


@pytest.mark.parametrize("seed", SEEDS)
def test_koleo_loss_by_ranks_is_the_mean_of_theirs(seed: int) -> None:
    x = normal(9, 4, seed=seed).requires_grad_()
    slow = x.detach().double().requires_grad_()
    expected = sum(slow_koleo(part) for part in slow.split(3)) / 3
    assert_same(koleo_loss(x, rank_size=3), x, expected, slow)
    assert koleo_loss(x, rank_size=3) < koleo_loss(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_koleo_loss_of_equal_vectors_is_finite(dtype: torch.dtype) -> None:
    x = normal(6, 4, seed=0).to(dtype)
    x[3] = x[1]
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = koleo_loss(x)
    assert loss.dtype == torch.float32 and loss.isfinite()
    (gradient,) = torch.autograd.grad(loss, x)
    assert gradient.isfinite().all() and gradient[0].any()
    same = torch.ones(5, 4, dtype=dtype, requires_grad=True)
    assert koleo_loss(same).item() == pytest.approx(18.42, abs=0.01)
    assert (torch.autograd.grad(koleo_loss(same), same)[0] == 0).all()


def test_koleo_loss_under_autocast_finds_neighbors_in_float32() -> None:
    """Distances of 1e-3 on a circle: products in bfloat16 cannot tell them apart."""
    angles = torch.tensor([0.0, 1e-3, 3e-3, 6e-3, 10e-3])
    x = torch.stack([angles.cos(), angles.sin()], dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        found = koleo_loss(x)
    torch.testing.assert_close(found.double(), slow_koleo(x.double()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("images", "rank_size"), [(1, None), (4, 1)])
def test_koleo_loss_of_vectors_alone_is_zero(images: int, rank_size: int | None) -> None:
    x = normal(images, 4, seed=0).requires_grad_()
    loss = koleo_loss(x, rank_size)
    assert loss == 0
    assert (torch.autograd.grad(loss, x)[0] == 0).all()


def test_koleo_loss_refuses_ranks_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="5 vectors"):
        koleo_loss(torch.randn(5, 4), rank_size=2)
