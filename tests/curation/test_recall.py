"""The arithmetic of the recall audit, against loops that say what is meant."""

import numpy as np
import pytest

from curation.errors import LvdError
from curation.recall import PAPER_K, Recall, RecallTally, bootstrap, joined, joined_with, macro_average

SEEDS = range(4)


def random_lists(rng: np.random.Generator, count: int, quantizers: int, depth: int, num_lists: int) -> np.ndarray:
    """Lists without repeats in a row, int32 [count, quantizers, depth]; some rows end early, some have none."""
    lists = np.argsort(rng.random((count, quantizers, num_lists)), axis=2)[:, :, :depth].astype(np.int32)
    lists[np.arange(depth) >= rng.integers(0, 3 * depth, (count, quantizers, 1))] = -1
    return lists


def is_compared(one: list[list[int]], two: list[list[int]], depth: int) -> bool:
    for first, second in zip(one, two, strict=True):
        if first[0] != -1 and first[0] in second[:depth]:
            return True
        if second[0] != -1 and second[0] in first[:depth]:
            return True
    return False


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("quantizers", "depth"), [(1, 1), (1, 5), (3, 4)])
def test_pairs_joined_are_those_that_the_definition_names(seed: int, quantizers: int, depth: int) -> None:
    rng = np.random.default_rng(seed)
    one, two = (random_lists(rng, 150, quantizers, depth, 9) for _ in range(2))
    expected = []
    for a, b in zip(one.tolist(), two.tolist(), strict=True):
        expected.append(next((m for m in range(1, depth + 1) if is_compared(a, b, m)), depth + 1))
    assert set(expected) >= {1, depth + 1}
    assert joined_with(one, two).tolist() == joined_with(two, one).tolist() == expected
    assert joined_with(one, two).dtype == np.int32
    assert joined(one, two).tolist() == [m <= depth for m in expected]


def test_no_list_is_not_a_list_in_common() -> None:
    none = np.full((1, 2, 3), -1, np.int32)
    assert joined_with(none, none).tolist() == [4]
    assert joined_with(none[:0], none[:0]).tolist() == []


def literal_recall(strata: list[dict[int, tuple[int, list[bool]]]]) -> list[float]:
    """The share of each vector with pairs; a stratum maps a vector to its true pairs and the hits of those stored."""
    shares = []
    for vector in sorted({v for stratum in strata for v in stratum}):
        found = total = 0.0
        for stratum in strata:
            if vector in stratum:
                true, hits = stratum[vector]
                found += true * sum(hits) / len(hits)
                total += true
        shares.append(found / total)
    return shares


def tallied(
    seed: int, num_sampled: int = 30, depth: int = 3
) -> tuple[RecallTally, list[dict[int, tuple[int, list[int], list[bool]]]]]:
    """A tally of random strata, and these: true pairs, lists needed and together of each vector."""
    rng = np.random.default_rng(seed)
    tally, strata = RecallTally(num_sampled, depth), []
    for _ in range(4):
        stratum: dict[int, tuple[int, list[int], list[bool]]] = {}
        for vector in rng.permutation(num_sampled - 3)[: rng.integers(0, 15)].tolist():
            stored = int(rng.integers(1, 6))
            true = stored + int(rng.integers(0, 60)) * int(rng.random() < 0.3)
            needed, together = rng.integers(1, depth + 2, stored).tolist(), (rng.random(stored) < 0.8).tolist()
            stratum[vector] = true, needed, together
        rows = [(v, t, n, c) for v, (t, ns, cs) in stratum.items() for n, c in zip(ns, cs, strict=True)]
        order = rng.permutation(len(rows))
        columns = np.asarray(rows, dtype=np.int64).reshape(-1, 4)[order].T
        tally.add(columns[0], columns[1], columns[3] > 0, columns[2].astype(np.int32))
        strata.append(stratum)
    return tally, strata


@pytest.mark.parametrize("seed", SEEDS)
def test_shares_are_averaged_over_vectors_and_scaled_to_what_was_counted(seed: int) -> None:
    tally, strata = tallied(seed)
    recall = tally.recall(2, seed=1)

    def expected(hits_of: int | None) -> float:
        def hits(needed: list[int], together: list[bool]) -> list[bool]:
            return together if hits_of is None else [n <= hits_of for n in needed]

        return float(np.mean(literal_recall([{v: (t, hits(n, c)) for v, (t, n, c) in s.items()} for s in strata])))

    true = [sum(s[v][0] for s in strata if v in s) for v in range(30)]
    assert recall.joined is not None
    assert recall.component.value == pytest.approx(expected(None), abs=1e-12)
    assert recall.joined.value == pytest.approx(expected(2), abs=1e-12)
    assert list(recall.joined_at) == pytest.approx([expected(m) for m in (1, 2, 3)], abs=1e-12)
    assert recall.num_sampled == 30
    assert recall.num_with_pairs == sum(t > 0 for t in true)
    assert recall.num_pairs == sum(true)
    assert recall.k_too_short == sum(t > 64 for t in true)
    assert recall.component.low < recall.component.value < recall.component.high


def test_the_paper_s_k_is_too_short_from_one_pair_more_on() -> None:
    for more in (0, 1):
        tally = RecallTally(1)
        tally.add(np.zeros(1, np.int64), np.full(1, PAPER_K + more), np.ones(1, bool), None)
        assert (tally.recall(0, 0).k_too_short, PAPER_K) == (more, 64)


def test_all_found_is_exactly_one() -> None:
    """Whatever share of the pairs stands for all: a target of 1 can be met."""
    tally = RecallTally(200, 2)
    for stored in (1, 3, 7, 49):
        vector = np.repeat(np.arange(200), stored)
        num_true = (vector % 97) + 100
        tally.add(vector, num_true, np.ones(len(vector), bool), np.full(len(vector), 2, np.int32))
    recall = tally.recall(2, 0)
    assert recall.joined == recall.component
    assert (recall.component.value, recall.component.low, recall.component.high) == (1.0, 1.0, 1.0)
    assert recall.joined_at == (0.0, 1.0)
    assert (recall.needed_lists(1.0), recall.needed_lists(0.5), recall.needed_lists(0.0)) == (2, 2, 1)


def test_nothing_measured_says_so() -> None:
    recall = RecallTally(5, 3).recall(3, 0)
    assert recall.joined == recall.component
    assert (recall.component.value, recall.component.low, recall.component.high) == (1.0, 0.0, 1.0)
    assert (recall.num_sampled, recall.num_with_pairs, recall.num_pairs) == (5, 0, 0)
    assert recall.needed_lists(0.9) is None


def test_engines_without_lists_have_the_component_figure_alone() -> None:
    tally = RecallTally(2)
    tally.add(np.asarray([0, 0, 1]), np.asarray([2, 2, 1]), np.asarray([True, False, True]), None)
    recall = tally.recall(0, 0)
    assert recall.joined is None and recall.joined_at == () and recall.needed_lists(0.1) is None
    assert recall.component.value == 0.75


def test_fewer_pairs_counted_than_given_is_an_error() -> None:
    with pytest.raises(LvdError, match="more pairs than were counted"):
        RecallTally(2).add(np.zeros(3, np.int64), np.full(3, 2), np.ones(3, bool), None)


def test_the_interval_is_that_of_drawing_vectors_again() -> None:
    rng = np.random.default_rng(0)
    shares = rng.choice([0.0, 0.4, 0.5, 1.0], 60)
    again = np.random.default_rng(1)
    means = sorted(float(shares[again.integers(60, size=60)].mean()) for _ in range(20_000))
    low, high = bootstrap(shares, seed=3, resamples=20_000)
    assert (low, high) == pytest.approx((means[500], means[19_499]), abs=0.006)
    assert low < macro_average(shares) < high


def test_the_interval_follows_from_shares_and_seed_alone() -> None:
    rng = np.random.default_rng(2)
    shares = rng.random(50)
    first = bootstrap(shares, 7)
    assert first == bootstrap(shares.copy(), 7) == bootstrap(rng.permutation(shares), 7)
    assert first != bootstrap(shares, 8)
    assert bootstrap(shares, -1) == bootstrap(shares, 2**64 - 1)


def test_the_interval_covers_the_truth_in_most_cases() -> None:
    """Vectors whose pairs are found together or not at all: 95 % is asked, 40 cases cannot tell it from 85 %."""
    covered = widths = 0.0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        chance = rng.beta(4, 1, 200)  # of each vector; mean 0.8
        shares = rng.binomial(5, chance) / 5
        low, high = bootstrap(shares, seed)
        covered += low <= 0.8 <= high
        widths += high - low
    assert covered >= 34
    assert widths / 40 < 0.1  # else any truth would be covered


def test_it_is_made_of_plain_values() -> None:
    recall = tallied(0)[0].recall(1, 0)
    assert isinstance(recall, Recall) and recall.joined is not None
    values = [recall.joined.value, recall.joined.low, recall.component.high, *recall.joined_at]
    assert {type(value) for value in values} == {float}
