import itertools

import numpy as np
import pytest

from curation import nearest, neighbors, products
from curation.errors import LvdError
from curation.scoring import cosine_pairs
from tests.vectors import all_cosines


def vectors(rng: np.random.Generator, num_rows: int, dim: int = 12) -> np.ndarray:
    """Near-copies, exact copies, opposites and zeros among random vectors."""
    x = rng.standard_normal((num_rows, dim)).astype(np.float16)
    source = rng.integers(0, max(num_rows // 3, 1), num_rows)
    copied = rng.random(num_rows) < 0.5
    x[copied] = x[source][copied]
    near = rng.random(num_rows) < 0.3
    x[near] += (rng.standard_normal((near.sum(), dim)) * 0.2).astype(np.float16)
    x[rng.random(num_rows) < 0.05] = 0
    x[rng.random(num_rows) < 0.05] *= -1
    return x


def ids(rng: np.random.Generator, num_rows: int) -> np.ndarray:
    """Ids whose first words often tie."""
    return np.stack((rng.integers(0, 3, num_rows), rng.permutation(num_rows)), axis=1).astype(np.uint64)


def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "FIRST_ROWS", 3)
    monkeypatch.setattr(nearest, "MAX_QUERIES", 5)
    monkeypatch.setattr(nearest, "MAX_SCORED", 21)
    monkeypatch.setattr(products, "TILE_ROWS", 16)
    monkeypatch.setattr(products, "TILE_COLUMNS", 8)


def slow_pairs(x: np.ndarray, y: np.ndarray, threshold: float, symmetric: bool) -> tuple[np.ndarray, ...]:
    cosine = all_cosines(x, y)
    pairs = [
        (i, j, cosine[i, j])
        for i in range(len(x))
        for j in range(len(y))
        if cosine[i, j] > np.float32(threshold) and (i < j or not symmetric)
    ]
    return tuple(np.array([pair[column] for pair in pairs]) for column in range(3))


def assert_pairs(x: np.ndarray, y: np.ndarray, threshold: float, symmetric: bool) -> int:
    found = neighbors.pairs_above(x, y, threshold, symmetric=symmetric)
    assert [column.dtype for column in found] == [np.int64, np.int64, np.float32]
    for column, expected in zip(found, slow_pairs(x, y, threshold, symmetric), strict=True):
        np.testing.assert_array_equal(column, expected)
    return len(found[0])


@pytest.mark.parametrize("blocks", ["small", "default"])
@pytest.mark.parametrize("seed", range(4))
def test_pairs_above_finds_exactly_the_pairs(seed: int, blocks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if blocks == "small":
        small_blocks(monkeypatch)
    rng = np.random.default_rng(seed)
    x, y = vectors(rng, 40), vectors(rng, 33)
    y[:5] = x[np.flatnonzero(x.any(axis=1))[:5]]
    for threshold in (-2.0, -0.1, 0.0, 0.45, 0.6, 0.99, 1.0):
        num_pairs = assert_pairs(x, y, threshold, symmetric=False)
        assert (num_pairs == 0) == (threshold == 1.0)
        assert_pairs(x, x, threshold, symmetric=True)
    assert assert_pairs(x, y, -2.0, symmetric=False) == 40 * 33
    assert assert_pairs(x, x, -2.0, symmetric=True) == 40 * 39 // 2


@pytest.mark.parametrize("seed", range(3))
def test_a_pair_exactly_at_the_threshold_is_not_above_it(seed: int) -> None:
    x = vectors(np.random.default_rng(seed), 30)
    cosine = all_cosines(x, x)
    for value in np.unique(cosine)[::40]:
        assert_pairs(x, x, float(value), symmetric=False)
        i, j, _ = neighbors.pairs_above(x, x, float(value))
        assert not (cosine[i, j] == value).any()
        i, j, _ = neighbors.pairs_above(x, x, float(np.nextafter(value, np.float32(-2))))
        assert (cosine[i, j] == value).sum() == (cosine == value).sum()


def test_a_decimal_threshold_is_compared_as_float32() -> None:
    x = np.array([[3, 4], [1, 0], [0, 1]], dtype=np.float16)  # cosines of exactly 0.6 and 0.8
    assert neighbors.pairs_above(x, x, 0.6, symmetric=True)[1].tolist() == [2]
    assert neighbors.pairs_above(x, x, 0.8, symmetric=True)[1].tolist() == []


@pytest.mark.parametrize(("num_x", "num_y"), [(0, 0), (0, 3), (3, 0), (1, 1), (1, 5)])
def test_pairs_above_of_little(num_x: int, num_y: int) -> None:
    x, y = np.ones((num_x, 4), dtype=np.float16), np.ones((num_y, 4), dtype=np.float16)
    assert assert_pairs(x, y, 0.5, symmetric=False) == num_x * num_y
    assert assert_pairs(x, x, 0.5, symmetric=True) == num_x * (num_x - 1) // 2


def test_pairs_do_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = vectors(np.random.default_rng(5), 200, dim=64)
    whole = neighbors.pairs_above(x, x, 0.5, symmetric=True)
    small_blocks(monkeypatch)
    for column, again in zip(whole, neighbors.pairs_above(x, x, 0.5, symmetric=True), strict=True):
        np.testing.assert_array_equal(column, again)


def slow_top_k(queries: np.ndarray, pool: np.ndarray, k: int, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    cosine = all_cosines(queries, pool)
    rows = [
        sorted(range(len(pool)), key=lambda r: (-cosine[q, r], words[r, 0], words[r, 1]))[:k]
        for q in range(len(queries))
    ]
    index = np.array(rows, dtype=np.int64).reshape(len(queries), min(k, len(pool)))
    return index, np.take_along_axis(cosine, index, axis=1)


@pytest.mark.parametrize("blocks", ["small", "default"])
@pytest.mark.parametrize("seed", range(4))
def test_top_k_is_exact(seed: int, blocks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if blocks == "small":
        small_blocks(monkeypatch)
    rng = np.random.default_rng(seed)
    queries, pool, words = vectors(rng, 23), vectors(rng, 60), ids(rng, 60)
    queries[:6] = pool[:6]
    for k in (0, 1, 3, 20, 59, 60, 100):
        index, similarity = neighbors.top_k(queries, pool, k, words)
        expected_index, expected_similarity = slow_top_k(queries, pool, k, words)
        assert index.dtype == np.int64
        assert similarity.dtype == np.float32
        np.testing.assert_array_equal(index, expected_index)
        np.testing.assert_array_equal(similarity, expected_similarity)


@pytest.mark.parametrize("seed", range(3))
def test_top_k_widens_over_more_ties_than_the_search_proposes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pool = np.repeat(rng.standard_normal((4, 16)).astype(np.float16), 50, axis=0)
    pool = np.concatenate((pool, vectors(rng, 40, 16), np.zeros((30, 16), dtype=np.float16)))
    pool = pool[rng.permutation(len(pool))]
    words = ids(rng, len(pool))
    queries = np.concatenate((pool[:20], -pool[:5], np.zeros((2, 16), dtype=np.float16)))
    for k in (1, 4, 49, 51):
        index, _ = neighbors.top_k(queries, pool, k, words)
        np.testing.assert_array_equal(index, slow_top_k(queries, pool, k, words)[0])


def test_top_k_separates_what_float32_cannot() -> None:
    """Similarities that differ by one float32 step, beyond what a float32 product resolves."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal(256).astype(np.float16)
    pool = np.repeat(base[None], 300, axis=0)
    pool[np.arange(300), rng.integers(0, 256, 300)] += np.float16(0.002)
    words = ids(rng, 300)
    queries = np.concatenate((base[None], pool[:5]))
    for k in (1, 5, 40):
        index, similarity = neighbors.top_k(queries, pool, k, words)
        expected_index, expected_similarity = slow_top_k(queries, pool, k, words)
        np.testing.assert_array_equal(index, expected_index)
        np.testing.assert_array_equal(similarity, expected_similarity)


@pytest.mark.parametrize(("num_queries", "num_pool", "k"), [(0, 5, 2), (3, 0, 2), (0, 0, 2), (1, 1, 1), (1, 1, 9)])
def test_top_k_of_little(num_queries: int, num_pool: int, k: int) -> None:
    queries, pool = (np.ones((rows, 4), dtype=np.float16) for rows in (num_queries, num_pool))
    index, similarity = neighbors.top_k(queries, pool, k, np.zeros((num_pool, 2), dtype=np.uint64))
    assert index.shape == similarity.shape == (num_queries, min(k, num_pool))
    assert (similarity == 1.0).all()


@pytest.mark.parametrize("seed", range(3))
def test_merged_blocks_are_the_top_k_of_the_whole(seed: int) -> None:
    rng = np.random.default_rng(seed)
    queries, pool, words = vectors(rng, 9), vectors(rng, 50), ids(rng, 50)
    for k, cuts in ((4, (0, 10, 12, 12, 50)), (30, (0, 25, 50)), (80, (0, 49, 50))):
        parts = [slice(*ends) for ends in itertools.pairwise(cuts)]
        found = [neighbors.top_k(queries, pool[part], k, words[part]) for part in parts]
        similarity, merged_words, index = neighbors.merge_top_k(
            [similarity for _, similarity in found],
            [words[part][index] for part, (index, _) in zip(parts, found, strict=True)],
            [index + part.start for part, (index, _) in zip(parts, found, strict=True)],
            k,
        )
        expected_index, expected_similarity = neighbors.top_k(queries, pool, k, words)
        np.testing.assert_array_equal(index, expected_index)
        np.testing.assert_array_equal(similarity, expected_similarity)
        np.testing.assert_array_equal(merged_words, words[index])


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_pairs_above_refuses_rows_that_are_not_finite(value: float, dtype: type) -> None:
    x = np.ones((5, 6), dtype=dtype)
    bad = x.copy()
    bad[3, 2] = value
    for left, right in ((x, bad), (bad, x)):
        with pytest.raises(LvdError, match="row 3 has NaN or infinite"):
            neighbors.pairs_above(left, right, 0.5)


@pytest.mark.parametrize("dims", [1, 2, 17, 96])
def test_pairs_above_takes_either_type_and_any_length(dims: int) -> None:
    rng = np.random.default_rng(dims)
    x, y = vectors(rng, 45, dims), vectors(rng, 38, dims).astype(np.float32) * np.float32(1e-30)
    y[::3] = x[:39:3].astype(np.float32) * np.float32(1e30)
    for threshold in (0.45, 0.9, 0.9999):
        for left, right in ((x, y), (y, x), (y, y)):
            assert_pairs(left, right, threshold, symmetric=left is right)


def structured(rng: np.random.Generator, num_rows: int, dim: int) -> np.ndarray:
    """Near-copies in groups of very unequal size, 3 % exact copies and 1 % zeros among random vectors, float16."""
    x = rng.standard_normal((num_rows, dim), dtype=np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    copies = np.flatnonzero(rng.random(num_rows) < 0.4)
    origin = (rng.random(len(copies)) ** 4 * num_rows).astype(int)
    weight = rng.uniform(0.6, 0.97, (len(copies), 1)).astype(np.float32)
    x[copies] = weight * x[origin] + np.sqrt(1 - weight**2) * x[copies]
    same = np.flatnonzero(rng.random(num_rows) < 0.03)
    x[same] = x[rng.integers(0, num_rows, len(same))]
    x[rng.random(num_rows) < 0.01] = 0
    return x.astype(np.float16)


def brute_pairs(x: np.ndarray, threshold: float) -> tuple[np.ndarray, ...]:
    """Pairs i < j by float32 products; those within 1e-4 of the threshold are decided by `cosine_pairs`."""
    norm = np.linalg.norm(x.astype(np.float32), axis=1, keepdims=True)
    unit = x.astype(np.float32) / np.where(norm > 0, norm, 1)
    parts = []
    for start in range(0, len(x), 1000):
        product = unit[start : start + 1000] @ unit[start:].T
        i, j = np.divmod(np.flatnonzero(product > threshold - 1e-4), product.shape[1])
        value, i, j = product[i, j][i < j], (i + start)[i < j], (j + start)[i < j]
        close = np.flatnonzero(value < threshold + 1e-4)
        above = np.ones(len(i), dtype=bool)
        above[close] = cosine_pairs(x, i[close], x, j[close]) > np.float32(threshold)
        parts.append((i[above], j[above]))
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


@pytest.mark.parametrize(("num_rows", "dim", "thresholds"), [(20_000, 128, (0.45, 0.9)), (5000, 512, (0.6,))])
def test_pairs_of_many_vectors(num_rows: int, dim: int, thresholds: tuple[float, ...]) -> None:
    x = structured(np.random.default_rng(dim), num_rows, dim)
    for threshold in thresholds:
        i, j, similarity = neighbors.pairs_above(x, x, threshold, symmetric=True)
        expected = brute_pairs(x, threshold)
        assert len(expected[0]) > 1000
        for found, column in zip((i, j), expected, strict=True):
            np.testing.assert_array_equal(found, column)
        np.testing.assert_array_equal(similarity, cosine_pairs(x, i, x, j))


def test_vectors_of_different_length_are_refused() -> None:
    x, y = np.ones((3, 2), dtype=np.float16), np.ones((3, 4), dtype=np.float16)
    with pytest.raises(LvdError, match="2 and 4 numbers"):
        neighbors.pairs_above(x, y, 0.5)
    with pytest.raises(LvdError, match="2 and 4 numbers"):
        neighbors.top_k(x, y, 1, np.zeros((3, 2), dtype=np.uint64))
