"""The k nearest against brute force: in blocks of any size, in cells, with ties that fill rooms, and at some size."""

import numpy as np
import pytest

from curation import nearest
from curation.join import Members
from curation.nearest import NONE, Nearest
from curation.products import Multiplier
from curation.rows import rows_of
from curation.scoring import cosine_pairs, norms

Near = tuple[np.ndarray, np.ndarray, np.ndarray]


def tied(rng: np.random.Generator, num_rows: int, dim: int) -> np.ndarray:
    """Many equal vectors, vectors that differ by a step of float16, zeros, and random ones."""
    base = rng.standard_normal((5, dim)).astype(np.float16)
    x = base[rng.integers(0, 5, num_rows)]
    stepped = rng.random(num_rows) < 0.3
    x[stepped, rng.integers(0, dim, stepped.sum())] += np.float16(0.002)
    x[rng.random(num_rows) < 0.1] = 0
    free = rng.random(num_rows) < 0.3
    x[free] = rng.standard_normal((free.sum(), dim)).astype(np.float16)
    return x


def make(seed: int, num_pool: int = 300, num_queries: int = 21, dim: int = 16) -> tuple[np.ndarray, ...]:
    """Queries, pool, ids that tie (some wholly), and numbers."""
    rng = np.random.default_rng(seed)
    words = np.stack((rng.integers(0, 3, num_pool), rng.integers(0, num_pool, num_pool)), axis=1).astype(np.uint64)
    return tied(rng, num_queries, dim), tied(rng, num_pool, dim), words, rng.permutation(10 * num_pool)[:num_pool]


def brute(
    queries: np.ndarray, pool: np.ndarray, words: np.ndarray, numbers: np.ndarray, k: int, met: np.ndarray
) -> Near:
    """The k best of what each query has met, bool [n, m], in the documented order."""
    similarity = np.full((len(queries), k), -np.inf, np.float32)
    found_words = np.full((len(queries), k, 2), np.iinfo(np.uint64).max, np.uint64)
    found = np.full((len(queries), k), NONE)
    for q in range(len(queries)):
        rows = np.flatnonzero(met[q])
        score = cosine_pairs(queries, np.full(len(rows), q), pool, rows)
        order = np.lexsort((numbers[rows], words[rows, 1], words[rows, 0], -score))[:k]
        count = len(order)
        similarity[q, :count], found_words[q, :count] = score[order], words[rows[order]]
        found[q, :count] = numbers[rows[order]]
    return similarity, found_words, found


def assert_same(found: Near, expected: Near) -> None:
    for column, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(column, other)


@pytest.mark.parametrize("k", [1, 4, 32, 400])
@pytest.mark.parametrize("seed", range(3))
def test_blocks_of_any_size_give_the_k_best(seed: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, pool, words, numbers = make(seed)
    expected = brute(queries, pool, words, numbers, k, np.ones((len(queries), len(pool)), bool))
    for size, room in ((300, 1), (300, 20), (77, 200), (8, 3)):
        monkeypatch.setattr(nearest, "FIRST_ROWS", size // 3)
        monkeypatch.setattr(nearest, "MAX_SCORED", 50 * room)
        monkeypatch.setattr(nearest, "room_of", lambda k, room=room: k + room)
        found = Nearest(rows_of(np.arange(len(queries)), queries), k)
        for start in range(0, len(pool), size):
            rows = slice(start, start + size)
            found.search(rows_of(numbers[rows], pool[rows]), words[rows], Multiplier())
        assert_same(found.best(), expected)


@pytest.mark.parametrize("batch", [1, 1000])
@pytest.mark.parametrize("seed", range(4))
def test_cells_give_the_k_best_of_what_is_stored_where_a_query_visits(
    seed: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nearest, "BATCH", batch)
    queries, pool, words, numbers = make(seed)
    rng = np.random.default_rng(seed)
    home = np.sort(rng.integers(0, 9, len(pool)))
    home[home == 4] = 5  # a cell without rows, and one that nobody visits
    visits = rng.random((len(queries), 9)) < 0.3
    visits[:, 2] = False
    stored = Members(np.searchsorted(home, np.arange(10)), np.arange(len(pool), dtype=np.int32))
    cells, rows = np.nonzero(visits.T)
    visiting = Members(np.searchsorted(cells, np.arange(10)), rows.astype(np.int32))
    for k in (1, 3, 40, 200):
        found = Nearest(rows_of(np.arange(len(queries)), queries), k)
        found.search_cells(rows_of(numbers, pool), words, stored, visiting, Multiplier())
        assert_same(found.best(), brute(queries, pool, words, numbers, k, visits[:, home]))


def test_cells_and_blocks_add_up() -> None:
    """What one call has found is what the next must surpass."""
    queries, pool, words, numbers = make(7)
    half = len(pool) // 2
    found = Nearest(rows_of(np.arange(len(queries)), queries), 5)
    found.search(rows_of(numbers[:half], pool[:half]), words[:half], Multiplier())
    everything = Members(np.array([0, half]), np.arange(half, dtype=np.int32))
    all_queries = Members(np.array([0, len(queries)]), np.arange(len(queries), dtype=np.int32))
    pieces = rows_of(numbers[half:], pool[half:])
    found.search_cells(pieces, words[half:], everything, all_queries, Multiplier())
    assert_same(found.best(), brute(queries, pool, words, numbers, 5, np.ones((len(queries), len(pool)), bool)))


@pytest.mark.parametrize(("num_queries", "num_pool"), [(0, 5), (3, 0), (0, 0)])
def test_little(num_queries: int, num_pool: int) -> None:
    queries, pool = np.ones((num_queries, 4), np.float16), np.ones((num_pool, 4), np.float16)
    found = Nearest(rows_of(np.arange(num_queries), queries), 2)
    found.search(rows_of(np.arange(num_pool), pool), np.zeros((num_pool, 2), np.uint64), Multiplier())
    assert found.best()[2].shape == (num_queries, 2)
    assert (found.best()[2] == NONE).all()


def test_lengths_far_from_one_do_not_matter() -> None:
    queries, pool, words, numbers = make(3)
    expected = brute(queries, pool, words, numbers, 6, np.ones((len(queries), len(pool)), bool))
    scaled = pool.astype(np.float32) * np.float32(2.0**90), queries.astype(np.float32) * np.float32(2.0**-90)
    found = Nearest(rows_of(np.arange(len(queries)), scaled[1]), 6)
    found.search(rows_of(numbers, scaled[0]), words, Multiplier())
    assert_same(found.best(), expected)


def test_50_000_by_2_000() -> None:
    """Float32 products propose what may be among the k best, with a margin; the score decides."""
    rng = np.random.default_rng(0)
    k, dim = 8, 32
    centers = rng.standard_normal((300, dim), dtype=np.float32)
    x = centers[rng.integers(0, 300, 52_000)] + 0.5 * rng.standard_normal((52_000, dim), dtype=np.float32)
    x[40_000:41_000] = x[:1_000]
    pool, queries = x[:50_000].astype(np.float16), x[50_000:].astype(np.float16)
    words = np.stack([np.zeros(50_000), rng.permutation(50_000)], axis=1).astype(np.uint64)
    found = Nearest(rows_of(np.arange(2_000), queries), k)
    for start in range(0, 50_000, 20_000):
        rows = np.arange(start, min(start + 20_000, 50_000))
        found.search(rows_of(rows, pool[rows]), words[rows], Multiplier())
    unit = pool.astype(np.float32) / norms(pool)[:, None].astype(np.float32)
    for start in range(0, 2_000, 250):
        own = queries[start : start + 250].astype(np.float32)
        product = own / norms(queries[start : start + 250])[:, None].astype(np.float32) @ unit.T
        least = np.partition(product, -k, axis=1)[:, -k] - 1e-4
        met = product >= least[:, None]
        expected = brute(queries[start : start + 250], pool, words, np.arange(50_000), k, met)
        assert_same(tuple(column[start : start + 250] for column in found.best()), expected)  # type: ignore[arg-type]
