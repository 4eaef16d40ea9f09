import numpy as np
import pytest

from curation import hubs
from curation.products import Multiplier
from tests.vectors import all_cosines


@pytest.fixture(scope="module")
def multiplier() -> Multiplier:
    return Multiplier()


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def around(rng: np.random.Generator, pivot: np.ndarray, cosine: np.ndarray) -> np.ndarray:
    """Unit vectors in random directions from a unit vector, at these cosines to it, float64 [n, d]."""
    aside = rng.standard_normal((len(cosine), len(pivot)))
    aside = unit(aside - (aside @ pivot)[:, None] * pivot)
    return cosine[:, None] * pivot + np.sqrt(1 - cosine**2)[:, None] * aside


def repeated(rng: np.random.Generator, dtype: type) -> np.ndarray:
    """Equal rows, and rows that differ in one bit or in a sign of zero."""
    x: np.ndarray = rng.standard_normal((40, 6)).astype(dtype)
    x = x[rng.integers(0, 40, 300)]
    x[rng.random(300) < 0.1] = 0
    x[rng.random(300) < 0.05] = -0.0
    changed = np.flatnonzero(rng.random(300) < 0.3)
    at = changed, rng.integers(0, 6, len(changed))
    x[at] = np.nextafter(x[at], dtype(9))
    return x


def slow_leaders(x: np.ndarray) -> list[int]:
    first: dict[bytes, int] = {}
    return [first.setdefault(row.tobytes(), at) for at, row in enumerate(x)]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("seed", range(4))
def test_leaders_are_the_first_rows_of_the_same_bytes(seed: int, dtype: type) -> None:
    x = repeated(np.random.default_rng(seed), dtype)
    hashes = hubs.content_hash(x)
    assert hashes.dtype == np.uint64
    assert len({(row.tobytes(), value) for row, value in zip(x, hashes.tolist(), strict=True)}) == len(set(hashes))
    assert len(set(hashes)) == len({row.tobytes() for row in x})
    lead = hubs.leaders(x, hashes)
    assert lead.dtype == np.int64
    assert lead.tolist() == slow_leaders(x)
    assert len(set(lead)) < len(x)


@pytest.mark.parametrize("num_hashes", [1, 2, 5])
def test_leaders_of_unequal_rows_with_equal_hashes(num_hashes: int) -> None:
    rng = np.random.default_rng(num_hashes)
    x = rng.standard_normal((12, 4)).astype(np.float16)[rng.integers(0, 12, 100)]
    hashes = hubs.content_hash(x) % np.uint64(num_hashes)
    assert hubs.leaders(x, hashes).tolist() == slow_leaders(x)


def test_rows_never_follow_one_of_other_bytes() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((12, 4)).astype(np.float32)[rng.integers(0, 12, 100)]
    lead = hubs.leaders(x, np.zeros(100, dtype=np.uint64))
    assert (x[lead] == x).all()
    assert (lead[lead] == lead).all()


def test_hashes_differ_for_any_order_of_values() -> None:
    x = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0], [-1, 0, 0]], dtype=np.float16)
    assert len(set(hubs.content_hash(x).tolist())) == 5
    np.testing.assert_array_equal(hubs.content_hash(x[::2]), hubs.content_hash(x)[::2])


def test_leaders_of_nothing() -> None:
    x = np.empty((0, 4), dtype=np.float16)
    assert hubs.leaders(x, hubs.content_hash(x)).shape == (0,)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("dim", [16, 128, 512])
def test_any_two_members_of_a_ball_are_similar(dim: int, dtype: type, multiplier: Multiplier) -> None:
    rng = np.random.default_rng(dim)
    pivot = unit(rng.standard_normal((1, dim)))[0]
    cosine = np.concatenate((rng.uniform(hubs.BALL - 0.002, 1, 150), rng.normal(hubs.BALL, 1e-4, 100)))
    x = around(rng, pivot, np.clip(cosine, -1, 1))
    x[1::2] = 2 * (x[::2] @ pivot)[:, None] * pivot - x[::2]  # opposite each other: as far apart as can be
    rows, center = (x * rng.choice([0.1, 1, 7], (len(x), 1))).astype(dtype), pivot[None].astype(dtype)
    ball, similarity = hubs.balls(rows, center, multiplier)
    score = all_cosines(rows, center)[:, 0]
    np.testing.assert_array_equal(ball, np.where(score >= np.float32(hubs.BALL), 0, -1))
    np.testing.assert_array_equal(similarity, np.where(ball == 0, score, np.float32(0)))
    inside = rows[ball == 0]
    assert 50 < len(inside) < len(x) - 20
    between = all_cosines(inside, inside)
    assert between.min() >= hubs.TAU
    assert between.min() < hubs.TAU + 1e-3  # the ball is not needlessly small


@pytest.mark.parametrize("seed", range(3))
def test_balls_picks_the_most_similar_pivot_and_the_first_of_equals(seed: int, multiplier: Multiplier) -> None:
    rng = np.random.default_rng(seed)
    centers = unit(rng.standard_normal((3, 48)))
    pivots = np.concatenate([around(rng, center, rng.uniform(0.99, 1, 500)) for center in centers])
    pivots = pivots.astype(np.float16)
    pivots[rng.integers(0, 1500, 200)] = pivots[rng.integers(0, 1500, 200)]  # more than one tile; equal ones, far apart
    x = np.concatenate([around(rng, center, rng.uniform(0.985, 1, 60)) for center in centers]).astype(np.float16)
    x = np.concatenate((x, pivots[rng.integers(0, 1500, 40)], np.zeros((2, 48), np.float16), -x[:3]))
    ball, similarity = hubs.balls(x, pivots, multiplier)
    assert (ball.dtype, similarity.dtype) == (np.int32, np.float32)
    score = all_cosines(x, pivots)
    near = score.max(axis=1) >= np.float32(hubs.BALL)
    np.testing.assert_array_equal(ball, np.where(near, score.argmax(axis=1), -1))
    np.testing.assert_array_equal(similarity, np.where(near, score.max(axis=1), np.float32(0)))
    assert 0 < near.sum() < len(x)


def test_balls_of_nothing(multiplier: Multiplier) -> None:
    some, none = np.ones((3, 8), dtype=np.float16), np.empty((0, 8), dtype=np.float16)
    for x, pivots in ((some, none), (none, some), (none, none)):
        ball, similarity = hubs.balls(x, pivots, multiplier)
        assert ball.tolist() == [-1] * len(x)
        assert similarity.tolist() == [0.0] * len(x)


def planted(rng: np.random.Generator, num_hubs: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Hubs of 20 to 120 vectors within a quarter of a ball's angle, among random vectors and small groups."""
    quarter = np.cos(np.arccos(hubs.BALL) / 4)
    centers = unit(rng.standard_normal((num_hubs, dim)))
    sizes = rng.integers(20, 120, num_hubs)
    parts = [around(rng, center, rng.uniform(quarter, 1, size)) for center, size in zip(centers, sizes, strict=True)]
    small = [around(rng, p, rng.uniform(quarter, 1, 15)) for p in unit(rng.standard_normal((10, dim)))]
    x = np.concatenate([*parts, *small, rng.standard_normal((500, dim)), np.zeros((50, dim))])
    return x[rng.permutation(len(x))].astype(np.float16), centers.astype(np.float16)


@pytest.mark.parametrize("num_hubs", [0, 1, 6])
@pytest.mark.parametrize("seed", range(3))
def test_pivots_are_one_of_each_planted_hub(seed: int, num_hubs: int, multiplier: Multiplier) -> None:
    rng = np.random.default_rng(seed)
    sample, centers = planted(rng, num_hubs, dim=96)
    pivots = hubs.find_pivots(sample, multiplier)
    assert pivots.dtype == np.int64
    assert len(pivots) == num_hubs
    if num_hubs:
        near = all_cosines(sample[pivots], centers) >= hubs.BALL
        assert sorted(near.argmax(axis=1)) == list(range(num_hubs)) and near.any(axis=1).all()
        ball, _ = hubs.balls(sample, sample[pivots], multiplier)
        assert (all_cosines(sample, centers).max(axis=1) < hubs.BALL)[ball < 0].all()  # all members are covered


@pytest.mark.parametrize("seed", range(3))
def test_the_densest_places_become_pivots_first(seed: int, multiplier: Multiplier) -> None:
    rng = np.random.default_rng(seed)
    centers, sizes = unit(rng.standard_normal((4, 64))), np.array([30, 100, 16, 60])
    crowds = [around(rng, center, np.full(size, 0.9999)) for center, size in zip(centers, sizes, strict=True)]
    sample = np.concatenate(crowds)[rng.permutation(sizes.sum())].astype(np.float16)
    pivots = hubs.find_pivots(sample, multiplier)
    assert all_cosines(sample[pivots], centers.astype(np.float16)).argmax(axis=1).tolist() == [1, 3, 0, 2]


@pytest.mark.parametrize("radius", [0.979, 0.9951])
@pytest.mark.parametrize("seed", range(6))
def test_no_pivot_lies_in_the_ball_of_another(seed: int, radius: float, multiplier: Multiplier) -> None:
    """Two crowds whose middles are close to each other, while their edges are not, by codes or by score."""
    rng = np.random.default_rng(seed)
    first = unit(rng.standard_normal((1, 128)))[0]
    second = around(rng, first, np.array([0.9955]))[0]
    crowds = [around(rng, p, np.full(size, radius)) for p, size in ((first, 60), (second, 30))]
    crowds += [around(rng, first, rng.uniform(0.95, 1, 200))] if seed % 2 else []
    sample = np.concatenate((first[None], second[None], *crowds)).astype(np.float16)
    pivots = hubs.find_pivots(sample, multiplier)
    score = all_cosines(sample[pivots], sample[pivots])
    assert len(pivots) > 0 or radius < hubs.BALL
    assert (score[np.triu_indices(len(pivots), 1)] < hubs.BALL).all()


def test_pivots_are_sought_among_the_first_rows_only(monkeypatch: pytest.MonkeyPatch, multiplier: Multiplier) -> None:
    monkeypatch.setattr(hubs, "TRIALS", 300)
    rng = np.random.default_rng(0)
    lone, center = rng.standard_normal((400, 64)), unit(rng.standard_normal((1, 64)))[0]
    hub = around(rng, center, np.full(40, 0.9999))
    late = np.concatenate((lone, hub)).astype(np.float16)
    assert hubs.find_pivots(late, multiplier).tolist() == []
    for place in (0, 255, 256, 299):
        early = late.copy()
        early[[place, 420]] = early[[420, place]]
        assert hubs.find_pivots(early, multiplier).tolist() == [place]


def test_pivots_of_nothing(multiplier: Multiplier) -> None:
    for sample in (np.empty((0, 8), np.float16), np.zeros((100, 8), np.float16)):
        assert hubs.find_pivots(sample, multiplier).tolist() == []
