import numpy as np
import pytest

from curation.filters import FILTER_REASONS, repeated, rule_verdict


@pytest.mark.parametrize(
    ("width", "height", "decodable", "verdict"),
    [
        (100, 100, True, None),
        (64, 192, True, None),  # exactly at both limits
        (192, 64, True, None),
        (63, 100, True, "too_small"),
        (100, 63, True, "too_small"),
        (10, 1000, True, "too_small"),  # the first reason that applies
        (64, 193, True, "too_elongated"),
        (193, 64, True, "too_elongated"),
        (0, 0, False, "undecodable"),
        (1, 500, False, "undecodable"),
    ],
)
def test_rule_verdict(width: int, height: int, decodable: bool, verdict: str | None) -> None:
    assert rule_verdict(width, height, decodable, min_side=64, max_aspect_ratio=3.0) == verdict
    assert verdict is None or verdict in FILTER_REASONS


@pytest.mark.parametrize("seed", range(6))
def test_repeated_keeps_the_lowest_row_of_each_id(seed: int) -> None:
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 4, (40, 2)).astype(np.uint64) + np.uint64(2**63)
    row = rng.permutation(1000)[:40]
    result = repeated(words, row)
    assert result.dtype == np.bool_
    for a in range(40):
        assert result[a] == any((words[a] == words[b]).all() and row[b] < row[a] for b in range(40))


def test_one_of_each_id_is_kept_even_if_rows_are_equal() -> None:
    words = np.array([[1, 1], [1, 2], [1, 1]], dtype=np.uint64)
    assert repeated(words, np.array([5, 5, 5])).tolist() == [False, False, True]


def test_repeated_of_little() -> None:
    assert repeated(np.empty((0, 2), dtype=np.uint64), np.empty(0, dtype=np.int64)).shape == (0,)
    assert repeated(np.zeros((1, 2), dtype=np.uint64), np.array([3])).tolist() == [False]
