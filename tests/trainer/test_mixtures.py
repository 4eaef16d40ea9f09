"""Which source gives which sample: exact counts, ratios that hold, whole steps of one source."""

import numpy as np
import pytest

from trainer.mixtures import CIRCLE, Mixture, Rotation, floor_sum


def test_floor_sum_against_the_definition() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        count, modulus, factor, offset = (int(x) for x in rng.integers([0, 1, 0, 0], [40, 60, 200, 200]))
        assert floor_sum(count, modulus, factor, offset) == sum((factor * k + offset) // modulus for k in range(count))


@pytest.mark.parametrize("seed", range(5))
def test_counts_are_those_of_the_choices(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0, 1, rng.integers(1, 6)).tolist()
    rotation = Rotation([*weights, 0.0], seed, "x")
    choices = rotation.choices(0, 3000)
    for num in (0, 1, 2, 17, 999, 3000):
        assert rotation.counts(num) == np.bincount(choices[:num], minlength=len(weights) + 1).tolist()
    far = 10**13
    stretch = rotation.choices(far, 500)
    grown = np.subtract(rotation.counts(far + 500), rotation.counts(far))
    assert grown.tolist() == np.bincount(stretch, minlength=len(weights) + 1).tolist()
    assert rotation.choices(far + 100, 7).tolist() == stretch[100:107].tolist()


def test_a_point_on_the_bound_of_two_shares_belongs_to_the_second() -> None:
    rotation = Rotation([1.0, 1.0], 0, "x")
    for past, choice in ((0, 1), (1, 0)):
        rotation._bounds = np.array([rotation._start + past, CIRCLE])
        assert rotation.choices(0, 1).tolist() == [choice]
        assert rotation.counts(1)[choice] == 1


def test_ratios_hold_within_a_few_in_any_stretch() -> None:
    weights = np.array([0.55, 0.3, 0.1, 0.04, 0.01])
    rotation = Rotation(weights.tolist(), 3, "x")
    for first in (0, 12345, 10**9):
        for count in (64, 1000, 100_000):
            seen = np.bincount(rotation.choices(first, count), minlength=5)
            assert np.abs(seen - weights * count).max() < 6
    assert rotation.choices(0, 50).tolist() != Rotation(weights.tolist(), 4, "x").choices(0, 50).tolist()


@pytest.mark.parametrize(
    ("weights", "alone"),
    [
        ([1.0], [False]),
        ([1.0], [True]),
        ([0.1, 0.6, 0.3], [True, False, False]),
        ([1.0, 2.0, 3.0, 4.0], [False, True, False, True]),
        ([3.0, 1.0], [True, True]),
    ],
)
def test_positions_count_on_and_ratios_hold(weights: list[float], alone: list[bool]) -> None:
    size, steps, cut = 12, 600, 5
    mixture = Mixture(weights, alone, size, seed=1)
    seen = np.zeros(len(weights), int)
    whole = np.zeros(len(weights), int)
    for step in range(steps):
        halves = [mixture.part(step, 0, cut), mixture.part(step, cut, size)]
        for sources, before in halves:
            present = np.unique(sources)
            assert [before[s] for s in present] == seen[present].tolist()
            seen += np.bincount(sources, minlength=len(weights))
        sources = np.concatenate([half[0] for half in halves])
        assert mixture.part(step, 0, size)[0].tolist() == sources.tolist()
        if set(sources.tolist()) & {s for s, a in enumerate(alone) if a}:
            assert len(set(sources.tolist())) == 1
            whole[sources[0]] += 1
    shares = np.array(weights) / sum(weights)
    assert np.abs(seen / (size * steps) - shares).max() < 0.01
    assert np.abs(whole - np.where(alone, shares * steps, 0)).max() < 5
    assert Mixture(weights, alone, size, seed=1).part(77, 2, 9)[1] == mixture.part(77, 2, 9)[1]
