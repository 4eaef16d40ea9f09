"""Signs of codes pass what a count of bits, one by one, says, and rarely lose what lies above the threshold."""

import math

import numpy as np
import pytest

from curation.codes import encode
from curation.scoring import lowest_bit, popcount, single_bits
from curation.signs import BITS, FIRST_WORDS, WORDS, MostBits, helps, most_bits, passes, sketches


def slow_bits(x: np.ndarray, y: np.ndarray) -> int:
    """Different bits of two sketches."""
    return sum(bin(int(a) ^ int(b)).count("1") for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("dim", [512, 576, 1024])
def test_sketches_are_the_signs_of_codes(dim: int) -> None:
    values = encode(np.random.default_rng(dim).standard_normal((40, dim)).astype(np.float16)).values
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
    first = [slow_bits(a[:FIRST_WORDS], b[:FIRST_WORDS]) for a, b in zip(x, y, strict=True)]
    most = MostBits(int(np.median(first)), int(np.median(bits)))
    few = [left <= most.first and count <= most.all for left, count in zip(first, bits, strict=True)]
    assert passes(x, y, most).tolist() == few
    assert sum(few) < min(sum(left <= most.first for left in first), sum(count <= most.all for count in bits))
    assert [int(popcount(word)) for word in x[0]] == [bin(int(word)).count("1") for word in x[0]]
    assert [int(lowest_bit(word)) for word in x[0]] == [bin(int(word))[::-1].index("1") for word in x[0]]
    assert [int(lowest_bit(word)) for word in single_bits()] == list(range(64))


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
    half = BITS // 2
    assert [most_bits(cosine) for cosine in (1.0, -1.0, 2.0, -2.0)] == [(0, 0), (half, BITS), (0, 0), (half, BITS)]
    assert most_bits(0.0) == (half // 2 + int(3.5 * math.sqrt(half) / 2), half + int(3 * math.sqrt(BITS) / 2))
    assert most_bits(0.5).all == math.floor(BITS / 3 + 3 * math.sqrt(BITS * 2 / 9))
    assert most_bits(0.5).first == math.floor(half / 3 + 3.5 * math.sqrt(half * 2 / 9))
    for limits in zip(*(most_bits(cosine) for cosine in np.linspace(-1, 1, 101)), strict=True):
        assert list(limits) == sorted(limits, reverse=True)


def test_a_sieve_helps_long_vectors_above_thresholds_that_unrelated_ones_are_below() -> None:
    assert helps(0.6, 512) and helps(0.45, 512) and helps(0.6, 1024)
    assert not helps(0.6, 504) and not helps(0.3, 512) and not helps(-1.0, 512)
