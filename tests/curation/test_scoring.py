import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NoReturn

import numpy as np
import pytest

from curation import scoring
from curation.errors import LvdError

FIRST = np.array([0])


def plain_cosine(u: np.ndarray, v: np.ndarray) -> np.float32:
    """The rule, spelled out: float64, in index order, rounded once."""
    dot = xx = yy = 0.0
    for a, b in zip(u.tolist(), v.tolist(), strict=True):
        dot, xx, yy = dot + a * b, xx + a * a, yy + b * b
    scale = math.sqrt(xx) * math.sqrt(yy)
    return np.float32(dot / scale if scale > 0 else 0.0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_cosine_pairs_is_the_rule_bit_for_bit(seed: int, dtype: type) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((17, 33)) * 10.0 ** rng.integers(-4, 4, (17, 1))).astype(np.float16)
    y: np.ndarray = rng.standard_normal((11, 33)).astype(dtype)
    i, j = rng.integers(0, 17, 200), rng.integers(0, 11, 200)
    expected = np.array([plain_cosine(x[a], y[b]) for a, b in zip(i, j, strict=True)])
    result = scoring.cosine_pairs(x, i, y, j)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, expected)
    np.testing.assert_array_equal(scoring.cosine_pairs(y, j, x, i), expected)


def shuffled_pairs(rng: np.random.Generator, num_pairs: int, num_x: int, num_y: int) -> tuple[np.ndarray, np.ndarray]:
    """Some in runs of equal i, as searches give them, some at random."""
    i, j = rng.integers(0, num_x, num_pairs), rng.integers(0, num_y, num_pairs)
    i[num_pairs // 3 :] = np.sort(i[num_pairs // 3 :])
    return i, j


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("dim", [1, 3, 8, 33, 512])
def test_pairs_in_any_order_and_number_score_as_they_do_alone(dim: int, dtype: type) -> None:
    rng = np.random.default_rng(dim)
    x = (rng.standard_normal((19, dim)) * 10.0 ** rng.integers(-6, 4, (19, 1))).astype(np.float16)
    y: np.ndarray = rng.standard_normal((13, dim)).astype(dtype)
    x[4], y[7] = 0, 0
    i, j = np.divmod(np.arange(19 * 13), 13)
    alone = np.concatenate([scoring.cosine_pairs(x, i[k : k + 1], y, j[k : k + 1]) for k in range(19 * 13)])
    np.testing.assert_array_equal(alone, [plain_cosine(x[a], y[b]) for a, b in zip(i, j, strict=True)])
    for num_pairs in (2, 3, 4, 5, 7, 8, 9, 31, 247):
        i, j = shuffled_pairs(rng, num_pairs, 19, 13)
        np.testing.assert_array_equal(scoring.cosine_pairs(x, i, y, j), alone[i * 13 + j])


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("seed", range(3))
def test_norms_at_hand_change_nothing(seed: int, dtype: type) -> None:
    rng = np.random.default_rng(seed)
    x: np.ndarray = rng.standard_normal((31, 40)).astype(dtype)
    y = rng.standard_normal((23, 40)).astype(np.float16)
    x[3], y[5] = 0, 0
    i, j = shuffled_pairs(rng, 301, 31, 23)
    expected = scoring.cosine_pairs(x, i, y, j)
    x_norms, y_norms = scoring.norms(x), scoring.norms(y)
    for given in ((x_norms, y_norms), (x_norms, None), (None, y_norms)):
        np.testing.assert_array_equal(scoring.cosine_pairs(x, i, y, j, *given), expected)


def test_norms_of_another_process_are_read_only() -> None:
    x = np.random.default_rng(0).standard_normal((6, 9)).astype(np.float16)
    i, j, norms = np.arange(6), np.arange(6)[::-1], scoring.norms(x)
    expected = scoring.cosine_pairs(x, i, x, j, norms, norms)
    norms.flags.writeable = False
    np.testing.assert_array_equal(scoring.cosine_pairs(x, i, x, j, norms, norms), expected)


def test_norms_not_known_yet_are_filled_in_where_a_pair_needs_them() -> None:
    x = np.random.default_rng(0).standard_normal((6, 9)).astype(np.float16)
    held, other = np.full(6, -1.0), np.full(6, -1.0)
    scoring.cosine_pairs(x, np.array([4, 2, 4]), x, np.array([1, 1, 0]), held, other)
    exact = scoring.norms(x)
    assert held.tolist() == [-1, -1, exact[2], -1, exact[4], -1]
    assert other.tolist() == [exact[0], exact[1], -1, -1, -1, -1]


def test_sums_run_in_index_order() -> None:
    x = np.array([[2.0**15, 2.0**-24, -(2.0**15)]], dtype=np.float16)
    y = np.array([[2.0**15, 2.0**-24, 2.0**15]], dtype=np.float16)
    # 2**30 + 2**-48 - 2**30 is 0 in this order in float64, and 2**-48 in another
    assert scoring.cosine_pairs(x, FIRST, y, FIRST).tolist() == [0.0]
    swapped = scoring.cosine_pairs(x[:, [0, 2, 1]], FIRST, y[:, [0, 2, 1]], FIRST)
    assert swapped[0] > 0.0


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_every_stored_value_is_read_exactly(dtype: type) -> None:
    codes = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    values: np.ndarray = codes[np.isfinite(codes)].astype(dtype)[:, None]
    assert scoring.norms(values).tolist() == [math.sqrt(float(Fraction(float(v)) ** 2)) for v in values[:, 0]]
    expected = np.sign(values[:, 0]).astype(np.float32)
    np.testing.assert_array_equal(scoring.to_unit(values)[:, 0], expected)


@pytest.mark.parametrize("seed", range(3))
def test_a_vector_is_exactly_1_from_itself_and_0_from_nothing(seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal((50, 129)).astype(np.float16)
    rows = np.arange(50)
    assert (scoring.cosine_pairs(x, rows, x, rows) == 1.0).all()
    assert (scoring.cosine_pairs(x, rows, -x, rows) == -1.0).all()
    assert (scoring.cosine_pairs(x, rows, np.zeros_like(x), rows) == 0.0).all()


@pytest.mark.parametrize("seed", range(3))
def test_units_have_length_one_and_stay_within_the_margin(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for dim in (1, 7, 512, 3000):
        x = (rng.standard_normal((20, dim)) + rng.choice([0, 3])).astype(np.float16)
        unit = scoring.to_unit(x)
        np.testing.assert_allclose(np.linalg.norm(unit.astype(np.float64), axis=1), 1.0, atol=1e-6)
        i, j = np.divmod(np.arange(400), 20)
        exact = scoring.cosine_pairs(x, i, x, j).astype(np.float64)
        worst = np.abs(np.add.accumulate(unit[i] * unit[j], axis=1, dtype=np.float32)[:, -1] - exact).max()
        assert worst < scoring.search_margin(dim) / 2


def test_zero_rows_stay_zero() -> None:
    x = np.zeros((2, 5), dtype=np.float16)
    assert not scoring.norms(x).any()
    assert not scoring.to_unit(x).any()


def test_empty_input() -> None:
    x = np.empty((0, 4), dtype=np.float16)
    assert scoring.norms(x).shape == (0,)
    assert scoring.to_unit(x).shape == (0, 4)
    assert scoring.cosine_pairs(x, FIRST[:0], x, FIRST[:0]).shape == (0,)


def test_reads_files_and_slices_as_they_are() -> None:
    x = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float16)
    rows = np.arange(3)
    expected = scoring.cosine_pairs(x[::2].copy(), rows, x[:3], rows)
    np.testing.assert_array_equal(scoring.cosine_pairs(x[::2], rows, x[:3], rows), expected)
    x.flags.writeable = False
    np.testing.assert_array_equal(scoring.cosine_pairs(x[::2], rows.astype(np.int32), x, rows), expected)
    fresh = x.copy()
    scoring.norms(fresh)
    assert fresh.flags.writeable


def test_bad_input_is_refused() -> None:
    x = np.ones((3, 4), dtype=np.float16)
    with pytest.raises(LvdError, match="4 and 5 numbers"):
        scoring.cosine_pairs(x, FIRST, np.ones((3, 5), dtype=np.float16), FIRST)
    for rows in (np.array([3]), np.array([-1])):
        with pytest.raises(IndexError):
            scoring.cosine_pairs(x, rows, x, FIRST)


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_rows_that_are_not_finite_are_refused(dtype: type, value: float) -> None:
    largest = np.finfo(dtype).max
    x = np.full((3, 4), largest, dtype=dtype)
    assert np.isfinite(scoring.norms(x)).all()
    x[1, 2] = value
    for function in (scoring.norms, scoring.to_unit):
        with pytest.raises(LvdError, match="row 1 has NaN or infinite"):
            function(x)


def test_compiles_without_a_folder_for_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    import numba

    def refuse(loop: Callable[..., Any]) -> NoReturn:
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(numba, "njit", lambda *args, cache=False: refuse if cache else args[0])
    assert scoring.compiled(lambda value: value + 1)(2) == 3
