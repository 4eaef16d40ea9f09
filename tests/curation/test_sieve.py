"""The sieve drops and keeps what bits and codes, one by one, say, and a forest is that of all pairs that pass."""

from dataclasses import replace

import numpy as np
import pytest

from curation import sieve
from curation.codes import allowances, at_most, cutoffs
from curation.components import spanning_forest
from curation.forest import Forest
from curation.rows import Rows, rows_of
from curation.scoring import cosine_pairs
from curation.sieve import Sieve
from curation.signs import MostBits, most_bits, passes


def families(rng: np.random.Generator, count: int, dim: int) -> np.ndarray:
    """Vectors of few families, at cosines of about 0.4 to 0.8 within each."""
    weight = rng.uniform(0.6, 0.9, (count, 1))
    center, own = rng.standard_normal((12, dim))[rng.integers(0, 12, count)], rng.standard_normal((count, dim))
    return (weight * center + np.sqrt(1 - weight**2) * own).astype(np.float16)


def sieve_of(x: Rows, threshold: float, forest: Forest | None = None) -> Sieve:
    cutoff, allowance = cutoffs(threshold, x.codes), allowances(x.codes, float(x.codes.error.max()))
    return Sieve(x, threshold, most_bits(threshold), cutoff, allowance, forest)


@pytest.mark.parametrize("among", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_what_passes_is_what_few_bits_and_the_codes_say(
    monkeypatch: pytest.MonkeyPatch, seed: int, among: bool
) -> None:
    """More rows than are counted, fetched or found at once."""
    monkeypatch.setattr(sieve, "ROOM", sieve.GUESTS * 580)
    monkeypatch.setattr(sieve, "OWN_ROWS", 580)
    rng = np.random.default_rng(seed)
    x = rows_of(np.arange(900), families(rng, 900, 512)).sketched(0.6)
    asked = sieve_of(x, 0.6)
    own = np.sort(rng.permutation(900)[:700]).astype(np.int32)
    guests = np.setdiff1d(np.arange(900, dtype=np.int32), own)
    pieces = list(asked.met(guests, own, among))
    found = {(int(i), int(j)): int(p) for piece in pieces for i, j, p in zip(*piece, strict=True)}
    wide = x.codes.values.astype(np.int64)
    product, pairs = wide @ wide.T, [(i, j) for i in guests for j in own]
    pairs += [(i, j) for i in own for j in own if among and i < j]
    few = passes(*(x.sketches[list(side)] for side in zip(*pairs, strict=True)), most_bits(0.6))
    expected = {
        (int(i), int(j)): int(product[i, j])
        for (i, j), passed in zip(pairs, few, strict=True)
        if passed and product[i, j] + asked.allowance[j] >= asked.cutoff[i]
    }
    assert found == expected
    assert len(pieces) > 3 and 500 < len(found) < len(pairs) / 4
    assert sum(len(piece[0]) for piece in pieces) == len(found)  # each once


@pytest.mark.parametrize("seed", range(3))
def test_with_a_forest_only_pairs_that_may_be_its_edges_are_told(seed: int) -> None:
    rng = np.random.default_rng(seed)
    vectors, threshold, names = families(rng, 300, 512), 0.5, rng.permutation(300)
    x, every, none = rows_of(names, vectors).sketched(threshold), np.arange(300, dtype=np.int32), np.zeros(0, np.int32)
    forest = Forest(300, threshold)
    ((i, j, product),) = sieve_of(x, threshold).met(none, every)
    some = rng.random(len(i)) < 0.5
    score = cosine_pairs(vectors, i[some], vectors, j[some])
    above = score > np.float32(threshold)
    forest.add(names[i[some][above]], names[j[some][above]], score[above])
    bound = at_most(product, x.codes.error[i], x.codes.error[j], x.codes.scale)
    expected = forest.undecided(names[i], names[j], bound)
    ((a, b, _),) = sieve_of(x, threshold, forest).met(none, every)
    assert list(zip(a, b, strict=True)) == list(zip(i[expected], j[expected], strict=True))
    assert 0 < expected.sum() < len(i) / 2


def crowd(rng: np.random.Generator, count: int, dim: int) -> np.ndarray:
    """Near-copies of one image at cosines from 0.3 up, exact copies among them, and a few of nothing."""
    weight = rng.choice([0.0, 0.55, 0.8, 0.9, 0.97], (count, 1), p=[0.1, 0.2, 0.3, 0.3, 0.1])
    x = weight * rng.standard_normal(dim) + np.sqrt(1 - weight**2) * rng.standard_normal((count, dim))
    x *= rng.uniform(0.01, 50, (count, 1))
    x[rng.integers(0, count, count // 10)] = x[rng.integers(0, count, count // 10)]
    return x.astype(np.float16)


def test_crowds_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where most pass, of enough rows, and where there is a forest."""
    seen: list[int] = []
    made = sieve._Crowd.untied
    monkeypatch.setattr(sieve._Crowd, "untied", lambda *args: (seen.append(1), made(*args))[1])
    rng, none = np.random.default_rng(0), np.zeros(0, np.int32)
    for vectors, has_forest, least, is_crowd in (
        (crowd(rng, 300, 512), True, 300, True),
        (crowd(rng, 300, 512), True, 301, False),
        (crowd(rng, 300, 512), False, 300, False),
        (families(rng, 300, 512), True, 300, False),
    ):
        seen.clear()
        monkeypatch.setattr(sieve, "LEAST_CROWD", least)
        x = rows_of(np.arange(300), vectors).sketched(0.6)
        list(sieve_of(x, 0.6, Forest(300, 0.6) if has_forest else None).met(none, np.arange(300, dtype=np.int32)))
        assert bool(seen) == is_crowd


@pytest.mark.parametrize("room", [200 * sieve.GUESTS, 1 << 17])
@pytest.mark.parametrize("threshold", [0.45, 0.6, 0.75])
@pytest.mark.parametrize("seed", range(3))
def test_the_forest_of_a_crowd_is_that_of_all_pairs_that_pass(
    seed: int, threshold: float, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of all that is told, most pairs are left out."""
    monkeypatch.setattr(sieve, "ROOM", room)
    monkeypatch.setattr(sieve, "OWN_ROWS", 200)
    monkeypatch.setattr(sieve, "LEAST_CROWD", 1)
    monkeypatch.setattr(sieve, "MIDDLE", 1 + 4 * seed)
    rng = np.random.default_rng(seed)
    vectors = crowd(rng, 700, 512)
    x = rows_of(np.arange(700), vectors).sketched(threshold)
    own = np.sort(rng.permutation(700)[:500]).astype(np.int32)
    guests = np.setdiff1d(np.arange(700, dtype=np.int32), own)
    first, every_bit = most_bits(threshold)
    most = MostBits(first - 15, every_bit - 30)  # so that it drops what it seldom does
    found = list(replace(sieve_of(x, threshold, Forest(700, threshold)), most=most).met(guests, own))
    forests = []
    every = np.array([(i, j) for i in range(700) for j in own if i not in own or i < j]).T
    for i, j in (np.concatenate([np.stack(piece[:2]) for piece in found], axis=1), every):
        passed = passes(x.sketches[i], x.sketches[j], most)
        score = cosine_pairs(vectors, i, vectors, j)
        kept = passed & (score > np.float32(threshold))
        a, b = np.minimum(i, j)[kept].astype(np.int64), np.maximum(i, j)[kept].astype(np.int64)
        tree = spanning_forest(a, b, score[kept])
        forests.append(sorted(zip(a[tree], b[tree], score[kept][tree], strict=True)))
    assert forests[0] == forests[1]
    assert len(forests[0]) > 300
    assert sum(len(piece[0]) for piece in found) < kept.sum() / 2


def test_nothing_meets_nothing() -> None:
    x = rows_of(np.arange(5), families(np.random.default_rng(0), 5, 512)).sketched(0.6)
    some, none = np.arange(5, dtype=np.int32), np.zeros(0, np.int32)
    for guests, own in ((some, none), (none, none)):
        assert not list(sieve_of(x, 0.6).met(guests, own))
