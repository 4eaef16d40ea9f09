"""Names, digests and draws: known values, independence and order."""

import hashlib
import math

import numpy as np
import pytest

from curation.hashing import ID_HEX, bucket_of, digest, id_sum, id_words, image_id, keyed_hash
from tests.builders import random_ids


def test_image_id_is_half_a_sha256() -> None:
    assert image_id(b"") == "e3b0c44298fc1c149afbf4c8996fb924"
    assert image_id(b"abc") == hashlib.sha256(b"abc").hexdigest()[:ID_HEX]


def test_digest_knows_values_not_their_order() -> None:
    assert digest({"b": [1, 2.5], "a": None}) == digest({"a": None, "b": [1, 2.5]})
    assert digest({"a": "é"}) == hashlib.sha256(b'{"a":"\\u00e9"}').hexdigest()
    different = [1, 1.5, "1", True, None, [1], {"1": 1}, [[1]], [1, 1], {}, []]
    assert len({digest(value) for value in different}) == len(different)
    for bad in (math.nan, object()):
        with pytest.raises((TypeError, ValueError)):
            digest({"x": bad})


def test_id_words_are_the_ids() -> None:
    ids = random_ids(np.random.default_rng(0), 50)
    words = id_words(ids)
    assert words.dtype == np.uint64
    assert [(int(high) << 64) | int(low) for high, low in words] == [int(name, 16) for name in ids]
    assert id_words([]).shape == (0, 2)
    with pytest.raises(ValueError, match="hex"):
        id_words(["x" * ID_HEX])


@pytest.mark.parametrize("seed", range(3))
def test_id_sum_is_the_sum_modulo_2_to_the_128(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids = random_ids(rng, 300)
    words = id_words(ids)
    assert id_sum(words) == sum(int(name, 16) for name in ids) % 2**128
    assert id_sum(words[rng.permutation(300)]) == id_sum(words)
    assert id_sum(words[1:]) != id_sum(words)
    assert id_sum(words[:0]) == 0
    assert id_sum(id_words(["f" * 32, "0" * 31 + "1"])) == 0


def test_draws_have_stayed_what_they_were() -> None:
    """Changing these values changes every selection and every shuffle."""
    words = id_words(["00" * 16, "0123456789abcdef0123456789abcdef", "ff" * 16])
    draws = {
        (0, "cluster", 0): [6603795084647410433, 4318903798317026068, 14194367715703410891],
        (1, "cluster", 0): [14832604110479985628, 16996494768534763083, 15914326543347994620],
        (0, "shuffle", 0): [6539694609890343002, 768352358307762311, 12737994627973393745],
        (-1, "shuffle", 3): [14185349817586555514, 9913487723211869135, 1066538018498162514],
    }
    for (seed, purpose, copy), expected in draws.items():
        assert keyed_hash(seed, purpose, words, copy).tolist() == expected


def slow_hash(seed: int, purpose: str, name: str, copy: int) -> int:
    """`keyed_hash` of one image in Python's integers."""

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    salt = (seed % 2**64).to_bytes(8, "big")
    key = int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=16, salt=salt).digest(), "big")
    high, low = divmod(int(name, 16), 2**64)
    mixed = mix(mix(high ^ (key >> 64)) ^ low)
    return mix(((mixed + copy) % 2**64) ^ (key % 2**64))


def test_draws_equal_arithmetic_on_integers() -> None:
    ids = random_ids(np.random.default_rng(1), 40)
    copies = np.arange(40) % 5
    draws = keyed_hash(7, "balance 0", id_words(ids), copies)
    assert draws.tolist() == [slow_hash(7, "balance 0", n, int(c)) for n, c in zip(ids, copies, strict=True)]


def unit_draws(seed: int, purpose: str, copy: int = 0, count: int = 20_000) -> np.ndarray:
    """Draws in [0, 1) of ids that differ in few bits."""
    words = np.stack([np.zeros(count), np.arange(count)], axis=1).astype(np.uint64)
    return keyed_hash(seed, purpose, words, copy) / 2.0**64


@pytest.mark.parametrize(("seed", "purpose"), [(0, "cluster"), (1, "cluster"), (2**63, "shuffle")])
def test_draws_are_uniform(seed: int, purpose: str) -> None:
    counts = np.histogram(unit_draws(seed, purpose), bins=64, range=(0, 1))[0]
    expected = 20_000 / 64
    assert ((counts - expected) ** 2 / expected).sum() < 63 + 6 * math.sqrt(2 * 63)
    assert len(np.unique(unit_draws(seed, purpose))) == 20_000


@pytest.mark.parametrize("other", [(1, "cluster", 0), (0, "shuffle", 0), (0, "cluster", 1), (0, "cluster ", 0)])
def test_draws_for_other_seeds_purposes_and_copies_are_independent(other: tuple[int, str, int]) -> None:
    one, two = unit_draws(0, "cluster"), unit_draws(*other)
    assert abs(np.corrcoef(one, two)[0, 1]) < 5 / math.sqrt(20_000)
    joint = np.histogram2d(one, two, bins=8, range=[[0, 1], [0, 1]])[0]
    expected = 20_000 / 64
    assert ((joint - expected) ** 2 / expected).sum() < 63 + 6 * math.sqrt(2 * 63)


@pytest.mark.parametrize("num_buckets", [1, 2, 3, 7, 1000, 2**31 - 1])
def test_buckets_are_ranges_in_order(num_buckets: int) -> None:
    rng = np.random.default_rng(num_buckets)
    edges = np.array([0, 1, 2**32, 2**63, 2**64 - 1], dtype=np.uint64)
    values = np.sort(np.concatenate([rng.integers(0, 2**64, 5000, dtype=np.uint64), edges]))
    buckets = bucket_of(values, num_buckets)
    assert buckets.dtype == np.int64
    assert (np.diff(buckets) >= 0).all()
    assert buckets.tolist() == [((int(v) >> 32) * num_buckets) >> 32 for v in values]
    assert (buckets[0], buckets[-1]) == (0, num_buckets - 1)
    if num_buckets <= 7:
        counts = np.bincount(buckets, minlength=num_buckets)
        assert abs(counts - 5005 / num_buckets).max() < 6 * math.sqrt(5005 / num_buckets) + 1
