"""The sieve drops and keeps what a count of bits, one by one, says, and rarely drops what lies above the threshold."""

import math

import numpy as np
import pytest

from curation import sieve
from curation.codes import allowances, at_most, cutoffs, encode
from curation.forest import Forest
from curation.scoring import cosine_pairs, popcount
from curation.sieve import BITS, WORDS, helps, most_bits, passes, sieved, sketches


def slow_bits(x: np.ndarray, y: np.ndarray) -> int:
    """Different bits of two sketches."""
    return sum(bin(int(a) ^ int(b)).count("1") for a, b in zip(x, y, strict=True))


def families(rng: np.random.Generator, count: int, dim: int) -> np.ndarray:
    """Vectors of few families, at cosines of about 0.4 to 0.8 within each."""
    weight = rng.uniform(0.6, 0.9, (count, 1))
    center, own = rng.standard_normal((12, dim))[rng.integers(0, 12, count)], rng.standard_normal((count, dim))
    return (weight * center + np.sqrt(1 - weight**2) * own).astype(np.float16)


@pytest.mark.parametrize("dim", [512, 576, 1024])
def test_sketches_are_the_signs_of_codes(dim: int) -> None:
    values = encode(families(np.random.default_rng(dim), 40, dim)).values
    made = sketches(values)
    assert made.dtype == np.uint64 and made.shape == (40, WORDS)
    for row, words in zip(values, made, strict=True):
        bits = [int(words[t // 64]) >> t % 64 & 1 for t in range(BITS)]
        assert bits == (row[:BITS] < 0).astype(int).tolist()


@pytest.mark.parametrize("seed", range(3))
def test_bits_are_counted_as_one_by_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = (rng.integers(0, 2**64, (60, WORDS), dtype=np.uint64) for _ in range(2))
    bits = [slow_bits(a, b) for a, b in zip(x, y, strict=True)]
    most = int(np.median(bits))
    assert passes(x, y, most).tolist() == [count <= most for count in bits]
    assert [int(popcount(word)) for word in x[0]] == [bin(int(word)).count("1") for word in x[0]]


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_what_passes_is_what_few_bits_and_the_codes_say(
    monkeypatch: pytest.MonkeyPatch, seed: int, upper: bool
) -> None:
    """More rows than are counted, fetched or found at once."""
    monkeypatch.setattr(sieve, "ROOM", 500)
    monkeypatch.setattr(sieve, "OWN_ROWS", 290)
    rng = np.random.default_rng(seed)
    codes = encode(families(rng, 700, 512))
    sketch, threshold = sketches(codes.values), 0.6
    cutoff, allowance = cutoffs(threshold, codes), allowances(codes, float(codes.error.max()))
    own = np.sort(rng.permutation(700)[:300]).astype(np.int32)
    guests = own if upper else rng.permutation(700)[:150].astype(np.int32)
    most = most_bits(threshold)
    pieces = list(sieved(sketch, codes, guests, own, most, cutoff, allowance, upper))
    found = {(int(i), int(j)): int(p) for piece in pieces for i, j, p in zip(*piece, strict=True)}
    wide = codes.values.astype(np.int64)
    expected = {
        (int(i), int(j)): int(wide[i] @ wide[j])
        for i in guests
        for j in own
        if (i < j or not upper)
        and wide[i] @ wide[j] + allowance[j] >= cutoff[i]
        and slow_bits(sketch[i], sketch[j]) <= most
    }
    assert found == expected
    assert len(pieces) > 1 and 500 < len(found) < len(guests) * len(own) / 4
    assert sum(len(piece[0]) for piece in pieces) == len(found)  # each once


@pytest.mark.parametrize("seed", range(3))
def test_with_a_forest_only_pairs_that_may_be_its_edges_are_told(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = families(rng, 300, 512)
    codes, threshold, names = encode(x), 0.5, rng.permutation(300)
    cutoff, allowance = cutoffs(threshold, codes), allowances(codes, float(codes.error.max()))
    every, forest = np.arange(300, dtype=np.int32), Forest(300, threshold)
    given = sketches(codes.values), codes, every, every, most_bits(threshold), cutoff, allowance, True
    ((i, j, product),) = sieved(*given)
    some = rng.random(len(i)) < 0.5
    score = cosine_pairs(x, i[some], x, j[some])
    above = score > np.float32(threshold)
    forest.add(names[i[some][above]], names[j[some][above]], score[above])
    expected = forest.undecided(names[i], names[j], at_most(product, codes.error[i], codes.error[j], codes.scale))
    ((a, b, _),) = sieved(*given, names, forest)
    assert list(zip(a, b, strict=True)) == list(zip(i[expected], j[expected], strict=True))
    assert 0 < expected.sum() < len(i) / 2


def test_nothing_meets_nothing() -> None:
    codes = encode(families(np.random.default_rng(0), 5, 512))
    some, none, bound = np.arange(5, dtype=np.int32), np.zeros(0, np.int32), np.zeros(5, np.int32)
    for guests, own in ((some, none), (none, some), (none, none)):
        assert not list(sieved(sketches(codes.values), codes, guests, own, BITS, bound, bound))


def pairs_at(rng: np.random.Generator, cosine: float, count: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of vectors with this cosine, up to rounding to float16."""
    x, y = np.linalg.qr(rng.standard_normal((count, dim, 2)))[0].transpose(2, 0, 1)
    return x.astype(np.float16), (cosine * x + math.sqrt(1 - cosine**2) * y).astype(np.float16)


@pytest.mark.parametrize("threshold", [0.45, 0.6, 0.75])
@pytest.mark.parametrize("dim", [512, 768])
def test_a_pair_at_the_threshold_is_lost_once_in_hundreds_one_above_it_never(dim: int, threshold: float) -> None:
    rng = np.random.default_rng(dim)
    lost = []
    for cosine in (threshold, threshold + 0.1, 0.0):
        x, y = (sketches(encode(each).values) for each in pairs_at(rng, cosine, 3_000, dim))
        lost.append(1 - passes(x, y, most_bits(threshold)).mean())
    assert lost[0] < 0.005 and lost[1] == 0.0 and lost[2] > 0.995


def test_the_limit_follows_the_angle() -> None:
    assert [most_bits(cosine) for cosine in (1.0, -1.0, 2.0, -2.0)] == [0, BITS, 0, BITS]
    assert most_bits(0.0) == BITS // 2 + int(3 * math.sqrt(BITS) / 2)
    assert most_bits(0.5) == math.floor(BITS / 3 + 3 * math.sqrt(BITS * 2 / 9))
    limits = [most_bits(cosine) for cosine in np.linspace(-1, 1, 101)]
    assert limits == sorted(limits, reverse=True)


def test_a_sieve_helps_long_vectors_above_thresholds_that_unrelated_ones_are_below() -> None:
    assert helps(0.6, 512) and helps(0.45, 512) and helps(0.6, 1024)
    assert not helps(0.6, 504) and not helps(0.3, 512) and not helps(-1.0, 512)
