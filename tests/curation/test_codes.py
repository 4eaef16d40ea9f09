import numpy as np
import pytest
from scipy.linalg import hadamard

from curation import codes
from curation.errors import LvdError
from tests.vectors import all_cosines

DIMS = [1, 3, 8, 17, 24, 96, 128, 129, 384, 512]  # of 17 and 129 numbers, a one-hot vector does not fit in int8


def vectors(rng: np.random.Generator, num_rows: int, dim: int, dtype: type) -> np.ndarray:
    """Dense and spiky vectors of all magnitudes, near-copies, opposites and zeros."""
    x = rng.standard_normal((num_rows, dim)) + rng.choice([0, 1], (num_rows, 1))
    few = rng.random(num_rows) < 0.3
    x[few] *= rng.random((few.sum(), dim)) < 3 / dim
    one = np.flatnonzero(rng.random(num_rows) < 0.2)
    x[one] = 0
    x[one, rng.integers(0, min(dim, 4), len(one))] = 1
    near = rng.random(num_rows) < 0.4
    x[near] = (x[rng.integers(0, num_rows, num_rows)] * 0.9 + 0.05 * x)[near]
    x[rng.random(num_rows) < 0.2] *= -1
    largest = np.abs(x).max(axis=1, keepdims=True)
    limits = [2.0**-24, 2.0**-18, 1e-4, 1.0, 60_000.0] if dtype is np.float16 else [1e-44, 1e-20, 1.0, 60_000.0, 1e38]
    x = x / np.where(largest > 0, largest, 1) * rng.choice(limits, (num_rows, 1))
    x[rng.random(num_rows) < 0.05] = 0
    return x.astype(dtype)


def all_products(left: codes.Codes, right: codes.Codes) -> np.ndarray:
    return left.values.astype(np.int64) @ right.values.astype(np.int64).T


def rotated_units(x: np.ndarray) -> np.ndarray:
    """Unit vectors after permutation, signs and one Hadamard matrix for each block, float64."""
    dim = x.shape[1]
    order, signs, block = codes._rotation(dim)
    raw = x.astype(np.float64)
    norm = np.linalg.norm(raw, axis=1, keepdims=True)
    unit = raw / np.where(norm > 0, norm, 1)
    return ((unit[:, order] * signs).reshape(len(x), -1, block) @ hadamard(block)).reshape(len(x), dim)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("dim", DIMS)
def test_the_bound_holds_for_every_pair(dim: int, dtype: type) -> None:
    for seed in range(3):
        rng = np.random.default_rng(seed)
        x, y = vectors(rng, 70, dim, dtype), vectors(rng, 60, dim, np.float16)
        y[:20] = vectors(rng, 70, dim, np.float16)[:20] if dtype is np.float32 else x[:20]
        left, right = codes.encode(x), codes.encode(y)
        score, product = all_cosines(x, y), all_products(left, right)
        e, f = left.error[:, None].astype(np.float64), right.error.astype(np.float64)
        assert (np.abs(score - left.scale**2 * product) <= e + f + e * f + codes.SLACK).all()
        reach = product + codes.allowances(right, float(left.error.max()))
        for j in range(len(y)):
            assert (reach[:, j] >= codes.cutoffs(score[:, j], left)).all()
            others = np.broadcast_to(right.error[j], len(x))
            highest = codes.at_most(product[:, j].astype(np.int32), left.error, others, left.scale)
            assert highest.dtype == np.float32
            assert (highest >= score[:, j]).all()


@pytest.mark.parametrize("seed", range(3))
def test_cutoffs_allowances_and_at_most_grant_the_bound_and_little_more(seed: int) -> None:
    """Errors up to 1, as no data has them together: every term of the bound counts."""
    rng = np.random.default_rng(seed)
    num_pairs, scale = 400, codes.encode(np.ones((1, 512), dtype=np.float16)).scale
    values = np.zeros((num_pairs, 8), dtype=np.int8)
    e, f = (rng.choice([0.0, 0.01, 0.5, 1.0], num_pairs).astype(np.float32) for _ in range(2))
    left, right = codes.Codes(values, e, scale), codes.Codes(values, f, scale)
    product = rng.integers(-400_000, 400_000, num_pairs).astype(np.int32)
    own, other = e.astype(np.float64), f.astype(np.float64)
    most = scale**2 * product + own + other + own * other  # with the error of the row, not the largest one
    highest = codes.at_most(product, e, f, scale)
    assert (highest >= most).all()
    assert (highest <= most + 4 * codes.SLACK).all()
    for row in range(num_pairs):
        reach = product[row] + codes.allowances(right, float(e[row]))[row]
        assert reach >= codes.cutoffs(float(most[row]), left)[row]
        assert reach < codes.cutoffs(float(most[row]) + 2 * codes.SLACK + 2 * scale**2, left)[row]


def test_cutoffs_take_one_score_or_one_a_row_and_any_number() -> None:
    left = codes.encode(vectors(np.random.default_rng(0), 9, 24, np.float16))
    for score in (-2.0, 0.45, 0.6, 1.0):
        several = codes.cutoffs(np.full(9, score, dtype=np.float32), left)
        assert several.dtype == np.int32
        assert np.abs(several - codes.cutoffs(score, left)).max() <= 1
    assert (codes.cutoffs(-1e30, left) <= -(127**2) * 24).all()
    assert (codes.cutoffs(1e30, left) > 2 * 127**2 * 24).all()


@pytest.mark.parametrize("dim", DIMS)
def test_codes_are_rounded_rotated_units_and_errors_their_distance(dim: int) -> None:
    for dtype in (np.float16, np.float32):
        x = vectors(np.random.default_rng(dim), 100, dim, dtype)
        found, unit = codes.encode(x), rotated_units(x)
        width = -(-dim // 8) * 8
        assert (found.values.dtype, found.error.dtype) == (np.int8, np.float32)
        assert found.values.shape == (100, width)
        assert not found.values[:, dim:].any()
        coordinates = found.values[:, :dim] * found.scale
        largest = np.abs(found.values).max() * found.scale
        inside = np.abs(unit) <= largest
        assert (np.abs(unit - coordinates)[inside] <= found.scale / 2 * (1 + 1e-9)).all()
        distance = np.linalg.norm(unit - coordinates, axis=1)
        assert (found.error >= distance * (1 - 1e-9)).all()
        np.testing.assert_allclose(found.error, distance, rtol=1e-5, atol=1e-12)
        np.testing.assert_allclose(unit @ unit.T, all_cosines(x, x), atol=1e-6)  # rotation keeps products


@pytest.mark.parametrize("dim", [8, 24, 96, 128, 384, 512])
def test_rotation_spreads_spikes_so_that_errors_stay_small(dim: int) -> None:
    few = np.zeros((100, dim), dtype=np.float16)
    few[np.arange(100), np.arange(100) % dim] = 1
    many = np.random.default_rng(dim).standard_normal((100, dim)).astype(np.float16)
    for x in (few, many):
        assert codes.encode(x).error.max() < 0.03


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("dim", [3, 96, 128])
def test_codes_do_not_depend_on_how_rows_are_split(dim: int, dtype: type) -> None:
    x = vectors(np.random.default_rng(dim), 61, dim, dtype)
    whole = codes.encode(x)
    x.flags.writeable = False
    for size in (1, 3, 8, 11, 60):
        for start in range(0, len(x), size):
            part = codes.encode(x[start : start + size])
            np.testing.assert_array_equal(part.values, whole.values[start : start + size])
            np.testing.assert_array_equal(part.error, whole.error[start : start + size])
            assert part.scale == whole.scale
    np.testing.assert_array_equal(codes.encode(x[::-2]).values, whole.values[::-2])


def test_a_number_means_the_same_in_both_types() -> None:
    x = vectors(np.random.default_rng(1), 50, 128, np.float16)
    half, single = codes.encode(x), codes.encode(x.astype(np.float32))
    np.testing.assert_array_equal(half.values, single.values)
    np.testing.assert_array_equal(half.error, single.error)


def test_zero_vectors_have_zero_codes_and_no_error() -> None:
    x = np.ones((12, 24), dtype=np.float16)
    x[[0, 5, 11]] = 0
    found = codes.encode(x)
    assert np.flatnonzero(~found.values.any(axis=1)).tolist() == [0, 5, 11]
    assert np.flatnonzero(found.error == 0).tolist() == [0, 5, 11]


def test_codes_of_nothing() -> None:
    found = codes.encode(np.empty((0, 24), dtype=np.float16))
    assert len(found) == 0 and found.values.shape == (0, 24)
    assert codes.cutoffs(0.5, found).shape == codes.allowances(found, 0.0).shape == (0,)


def test_take_copies_rows_and_views_slices() -> None:
    found = codes.encode(vectors(np.random.default_rng(0), 20, 17, np.float16))
    rows = np.array([7, 3, 3, 19])
    for part, at in ((found.take(rows), rows), (found.take(slice(4, 9)), slice(4, 9))):
        np.testing.assert_array_equal(part.values, found.values[at])
        np.testing.assert_array_equal(part.error, found.error[at])
        assert part.scale == found.scale
    assert np.shares_memory(found.take(slice(4, 9)).values, found.values)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_are_refused(value: float, dtype: type) -> None:
    x = np.ones((30, 8), dtype=dtype)
    x[17, 3] = value
    with pytest.raises(LvdError, match="row 17 has NaN or infinite"):
        codes.encode(x)
