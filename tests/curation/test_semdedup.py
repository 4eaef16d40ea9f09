import numpy as np
import pytest

from curation import semdedup
from curation.errors import LvdError
from curation.scoring import cosine_pairs


def cluster(seed: int, num_rows: int = 80) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vectors with exact and near copies, distances from few values, ids whose first words often tie."""
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((num_rows, 8)).astype(np.float16)
    copied = rng.random(num_rows) < 0.6
    vectors[copied] = vectors[rng.integers(0, max(num_rows // 4, 1), num_rows)][copied]
    near = rng.random(num_rows) < 0.4
    vectors[near] += (rng.standard_normal((near.sum(), 8)) * 0.2).astype(np.float16)
    vectors[rng.random(num_rows) < 0.05] = 0
    distance = rng.choice(np.array([0.1, 0.2, 0.25, 0.4], dtype=np.float32), num_rows)
    words = np.stack((rng.integers(0, 3, num_rows), rng.permutation(num_rows)), axis=1).astype(np.uint64)
    words[rng.random(num_rows) < 0.5] += np.uint64(2**63)  # above int64
    return vectors, distance, words


def slow_semdedup(vectors: np.ndarray, distance: np.ndarray, words: np.ndarray, threshold: float) -> list[tuple]:
    """(kept, original, similarity) of each row, from the whole matrix."""
    order = sorted(range(len(vectors)), key=lambda r: (-distance[r], words[r, 0], words[r, 1]))
    rows = np.arange(len(vectors))
    expected = [(True, -1, np.float32(np.nan))] * len(vectors)
    for at, row in enumerate(order):
        cosine = cosine_pairs(vectors, np.full(len(rows), row), vectors, rows)
        best = max(order[:at], key=lambda r: cosine[r], default=None)  # the first of equals
        if best is not None and cosine[best] > np.float32(threshold):
            expected[row] = (False, best, cosine[best])
    return expected


@pytest.mark.parametrize("block_rows", [1, 7, 80, 2048])
@pytest.mark.parametrize("seed", range(5))
def test_rows_are_dropped_by_the_published_rule(seed: int, block_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semdedup, "BLOCK_ROWS", block_rows)
    vectors, distance, words = cluster(seed, 80 if block_rows > 1 else 25)
    for threshold in (-2.0, 0.0, 0.6, 0.97, 1.0):
        kept, original, similarity = semdedup.semdedup(vectors, distance, words, threshold)
        assert (kept.dtype, original.dtype, similarity.dtype) == (np.bool_, np.int64, np.float32)
        expected = slow_semdedup(vectors, distance, words, threshold)
        np.testing.assert_array_equal(kept, [row[0] for row in expected])
        np.testing.assert_array_equal(original, [row[1] for row in expected])
        np.testing.assert_array_equal(similarity, np.array([row[2] for row in expected], dtype=np.float32))
        assert kept.all() == (threshold == 1.0)


def test_the_order_of_rows_does_not_matter() -> None:
    vectors, distance, words = cluster(9)
    kept, original, similarity = semdedup.semdedup(vectors, distance, words, 0.9)
    mixed = np.random.default_rng(0).permutation(len(vectors))
    again = semdedup.semdedup(vectors[mixed], distance[mixed], words[mixed], 0.9)
    np.testing.assert_array_equal(again[0], kept[mixed])
    np.testing.assert_array_equal(np.where(again[1] < 0, -1, mixed[again[1]]), original[mixed])
    np.testing.assert_array_equal(again[2], similarity[mixed])


def test_far_rows_are_kept_and_dropped_rows_count() -> None:
    """Each of four rows at 40 degrees from the next resembles its neighbors alone (0.77, the next but one 0.17)."""
    angle = np.radians([0, 40, 80, 120])
    vectors = np.stack((np.cos(angle), np.sin(angle)), axis=1).astype(np.float16)
    words = np.zeros((4, 2), dtype=np.uint64)
    words[:, 1] = np.arange(4)
    chain = np.array([0.4, 0.3, 0.2, 0.1], dtype=np.float32)
    assert semdedup.semdedup(vectors, chain, words, 0.7)[1].tolist() == [-1, 0, 1, 2]
    assert semdedup.semdedup(vectors, -chain, words, 0.7)[1].tolist() == [1, 2, 3, -1]
    ends_first = np.array([0.4, 0.1, 0.2, 0.3], dtype=np.float32)
    assert semdedup.semdedup(vectors, ends_first, words, 0.7)[0].tolist() == [True, False, False, True]


@pytest.mark.parametrize("num_rows", [0, 1])
def test_little_is_kept(num_rows: int) -> None:
    kept, original, similarity = semdedup.semdedup(*cluster(0, num_rows), 0.5)
    assert (kept.tolist(), original.tolist()) == ([True] * num_rows, [-1] * num_rows)
    assert np.isnan(similarity).all() and similarity.shape == (num_rows,)


def test_lengths_that_differ_are_refused() -> None:
    vectors, distance, words = cluster(0)
    with pytest.raises(LvdError, match="80 vectors have 79 distances and 80 ids"):
        semdedup.semdedup(vectors, distance[1:], words, 0.9)
