"""Centres and Sinkhorn-Knopp: against slow versions, under padding and bad steps, and over two processes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from trainer.centering import SoftmaxCenter, sinkhorn, sum_of_logits

SEEDS = [0, 1, 2]
YES, NO = torch.tensor(True), torch.tensor(False)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def slow_sinkhorn(logits: Tensor, temperature: float, iterations: int) -> Tensor:
    """The published form: prototypes then samples, each to equal sums; float64 [n, K]."""
    q = torch.exp(logits.double() / temperature)
    n, k = q.shape
    q = q / q.sum()
    for _ in range(iterations):
        for column in range(k):
            q[:, column] = q[:, column] / q[:, column].sum() / k
        for row in range(n):
            q[row] = q[row] / q[row].sum() / n
    return q * n


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_sinkhorn_is_the_published_one(seed: int, iterations: int) -> None:
    logits = normal(9, 5, seed=seed).clamp(-1, 1)
    before = logits.clone()
    found = sinkhorn(logits, 0.05, iterations=iterations)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), slow_sinkhorn(logits, 0.05, iterations), rtol=1e-4, atol=1e-7)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("seed", SEEDS)
def test_sinkhorn_excludes_padding_exactly(seed: int) -> None:
    logits = normal(9, 5, seed=seed)
    padded = torch.cat([logits, torch.full((3, 5), torch.nan)])
    padded[10], padded[11] = torch.inf, 1e30
    weights = torch.cat([torch.rand(9) + 0.1, torch.zeros(3)])
    found = sinkhorn(padded, 0.07, weights)
    torch.testing.assert_close(found[:9], sinkhorn(logits, 0.07), rtol=1e-6, atol=0)
    assert (found[9:] == 0).all()
    # Far below 0, which stands in for padding; Sinkhorn-Knopp does not change with a shift of all logits.
    torch.testing.assert_close(sinkhorn(padded - 64, 0.07, weights), found, rtol=2e-3, atol=1e-6)


def test_sinkhorn_of_padding_alone_is_zero() -> None:
    assert (sinkhorn(normal(3, 5, seed=0), 0.07, torch.zeros(3)) == 0).all()


@pytest.mark.parametrize("scale", [10.0, 1e3, 1e6])
@pytest.mark.parametrize("seed", SEEDS)
def test_sinkhorn_survives_logits_that_overflow_or_vanish(seed: int, scale: float) -> None:
    logits = scale * normal(8, 6, seed=seed)
    logits[3] -= 100 * scale  # far below the others: exp of it is 0 beside theirs
    logits[:, 4] = -200 * scale  # a prototype that nothing is near
    found = sinkhorn(logits, 0.04)
    assert found.isfinite().all()
    torch.testing.assert_close(found.sum(dim=1), torch.ones(8))


def test_sinkhorn_in_float32_where_float64_still_reaches() -> None:
    logits = 1.5 * normal(8, 6, seed=0)
    expected = slow_sinkhorn(logits + 20, 0.04, 3)  # exp(500) and more: beyond float32
    torch.testing.assert_close(sinkhorn(logits + 20, 0.04).double(), expected, rtol=1e-3, atol=1e-6)


def test_sinkhorn_is_float32_whatever_comes_in() -> None:
    half = normal(40, 6, seed=0).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = sinkhorn(half, 0.07)
    assert torch.equal(found, sinkhorn(half.float(), 0.07))


def test_a_logit_that_is_not_finite_shows() -> None:
    logits = normal(4, 5, seed=0)
    logits[1, 2] = torch.nan
    assert not sinkhorn(logits, 0.07).isfinite().any()
    assert not SoftmaxCenter(5).probabilities(logits, 0.07).isfinite().all()


@pytest.mark.parametrize("seed", SEEDS)
def test_the_center_is_a_moving_average_of_mean_logits_one_step_late(seed: int) -> None:
    center, mean = SoftmaxCenter(5), torch.zeros(5, dtype=torch.float64)
    for step in range(4):
        logits = 3 * normal(7 + step, 5, seed=seed * 10 + step)
        found = center.probabilities(logits, 0.05)
        for row, probs in zip(logits.double(), found, strict=True):
            exponents = torch.exp((row - mean) / 0.05 - ((row - mean) / 0.05).max())
            torch.testing.assert_close(probs.double(), exponents / exponents.sum(), rtol=1e-4, atol=1e-7)
        center.update(*sum_of_logits(logits), YES)
        mean = 0.9 * mean + 0.1 * sum(row.double() for row in logits) / len(logits)


def test_sums_leave_padding_out_whatever_it_holds() -> None:
    logits = normal(4, 5, seed=0)
    logits[2], logits[3, 1] = torch.nan, torch.inf
    total, count = sum_of_logits(logits, torch.tensor([0.5, 0.1, 0.0, 0.0]))
    torch.testing.assert_close(total, logits[0] + logits[1])
    assert count == 2 and count.dtype == total.dtype == torch.float32
    total, count = sum_of_logits(logits[:2].bfloat16())
    assert torch.equal(total, logits[0].bfloat16().float() + logits[1].bfloat16().float()) and count == 2


def test_a_bad_step_or_one_without_rows_moves_nothing() -> None:
    center = SoftmaxCenter(5)
    center.update(*sum_of_logits(normal(4, 5, seed=0)), YES)
    center.apply_pending()
    before = center.center.clone()
    assert before.all()
    center.update(torch.full((5,), torch.nan), torch.tensor(4.0), NO)
    assert not center.pending.any()
    center.apply_pending()
    center.update(normal(5, seed=1), torch.tensor(4.0), NO)
    center.apply_pending()
    center.update(torch.zeros(5), torch.tensor(0.0), YES)
    center.apply_pending()
    assert torch.equal(center.center, before)


def test_an_update_is_applied_once() -> None:
    center = SoftmaxCenter(5, momentum=0.5)
    center.update(torch.full((5,), 8.0), torch.tensor(4.0), YES)
    assert (center.center == 0).all()
    center.apply_pending()
    center.apply_pending()
    assert (center.center == 1).all()
    center.update(torch.full((5,), 8.0), torch.tensor(4.0), YES)
    center.update(torch.full((5,), 8.0), torch.tensor(4.0), YES)  # without probabilities between
    center.apply_pending()
    torch.testing.assert_close(center.center, torch.full((5,), 1.75))


def test_a_resumed_center_goes_on_bitwise() -> None:
    one, steps = SoftmaxCenter(5), [normal(6, 5, seed=seed) for seed in range(4)]
    for logits in steps[:2]:
        one.probabilities(logits, 0.05)
        one.update(*sum_of_logits(logits), YES)
    other = SoftmaxCenter(5)
    other.load_state_dict({name: value.clone() for name, value in one.state_dict().items()})
    for logits in steps[2:]:
        assert torch.equal(one.probabilities(logits, 0.05), other.probabilities(logits, 0.05))
        for center in (one, other):
            center.update(*sum_of_logits(logits), YES)
    assert set(one.state_dict()) == {"center", "pending"}
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def joined() -> tuple[Tensor, Tensor]:
    """Logits [12, 5] and weights; the first 7 rows are rank 0's, of which 1 is padding, and of rank 1's 2."""
    logits, weights = 4 * normal(12, 5, seed=3), normal(12, seed=4).abs() + 0.1
    logits[7:] += 9  # each rank's greatest is another
    weights[[6, 9, 11]] = 0
    logits[weights == 0] = torch.nan
    return logits, weights


def two_steps(logits: Tensor, weights: Tensor) -> dict[str, Tensor]:
    center = SoftmaxCenter(5)
    first = center.probabilities(logits, 0.5)
    center.update(*sum_of_logits(logits, weights), YES)
    state = {name: value.clone() for name, value in center.state_dict().items()}
    return {
        "sinkhorn": sinkhorn(logits, 0.5, weights),
        "first": first,
        "second": center.probabilities(logits, 0.5),
        "center": center.center,
        "pending": state["pending"],
    }


def one_of_two(rank: int, folder: str) -> None:
    """What one process gives of the joined batch, this one gives of its part."""
    torch.set_num_threads(1)
    expected: dict[str, Any] = torch.load(f"{folder}/expected.pt")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mine = slice(0, 7) if rank == 0 else slice(7, 12)
    logits, weights = joined()
    found = two_steps(logits[mine], weights[mine])
    for name in ("sinkhorn", "first", "second"):
        torch.testing.assert_close(
            found[name], expected[name][mine], rtol=1e-5, atol=1e-7, equal_nan=name != "sinkhorn", msg=name
        )
    for name in ("center", "pending"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6, msg=name)
    both = [torch.zeros(5), torch.zeros(5)]
    dist.all_gather(both, found["center"])
    assert torch.equal(both[0], both[1])
    dist.destroy_process_group()


def test_two_processes_give_what_one_gives_of_the_joined_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    logits, weights = joined()
    torch.save(two_steps(logits, weights), tmp_path / "expected.pt")
    mp.spawn(one_of_two, args=(str(tmp_path),), nprocs=2)
