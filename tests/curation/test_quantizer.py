from collections.abc import Iterator

import numpy as np
import pytest
import torch

from curation import quantizer as quantizer_module
from curation.clustering import fit_kmeans
from curation.codes import encode
from curation.errors import ConfigError
from curation.quantizer import Quantizer, default_num_coarse, fit_quantizer, nearest_lists
from curation.sampling import proportional_shares
from curation.scoring import to_unit


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other over tiny blocks are slow on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def vectors(rng: np.random.Generator, num_rows: int, dim: int) -> np.ndarray:
    """Vectors around a few directions, with exact copies and zeros among them."""
    centers = rng.standard_normal((9, dim))
    x = (centers[rng.integers(0, 9, num_rows)] + rng.standard_normal((num_rows, dim))).astype(np.float16)
    x[:: max(num_rows // 5, 2)] = x[0]
    x[1::11] = 0
    return x


def random_quantizer(rng: np.random.Generator, num_coarse: int, dim: int) -> Quantizer:
    """Cells of 1 to 9 lists; a third of the coarse centroids and of the lists are copies of others."""
    starts = np.concatenate(([0], np.cumsum(rng.integers(1, 10, num_coarse))))
    coarse, fine = (to_unit(rng.standard_normal((k, dim)).astype(np.float32)) for k in (num_coarse, starts[-1]))
    for centroids in (coarse, fine):
        copies = rng.random(len(centroids)) < 0.3
        centroids[copies] = centroids[rng.integers(0, len(centroids), copies.sum())]
    return Quantizer(coarse, fine, starts)


def integer_products(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    a, b = encode(x), encode(y)
    assert a.scale == b.scale  # what lets the products of one query rank the lists
    return a.values.astype(np.int64) @ b.values.astype(np.int64).T


def slow_lists(x: np.ndarray, quantizer: Quantizer, m: int, probes: int) -> np.ndarray:
    to_coarse, to_fine = integer_products(x, quantizer.coarse), integer_products(x, quantizer.fine)
    result = np.full((len(x), m), -1)
    for row in range(len(x)):
        cells = sorted(range(len(quantizer.coarse)), key=lambda c: (-to_coarse[row, c], c))[:probes]
        lists = [n for c in cells for n in range(quantizer.starts[c], quantizer.starts[c + 1])]
        best = sorted(lists, key=lambda n: (-to_fine[row, n], n))[:m]
        result[row, : len(best)] = best
    return result


@pytest.mark.parametrize("blocks", ["small", "default"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dim", [8, 24, 128])
def test_nearest_lists_are_exactly_those(dim: int, seed: int, blocks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if blocks == "small":
        monkeypatch.setattr(quantizer_module, "LISTS_BLOCK", 60)
    rng = np.random.default_rng(seed)
    quantizer = random_quantizer(rng, 24, dim)
    x = vectors(rng, 130, dim)
    x[2:30:3] = quantizer.coarse[rng.integers(0, 24, 10)]  # often at equal products with several cells
    for m, probes in ((1, 1), (1, 24), (4, 1), (12, 2), (3, 5), (8, 23), (16, 24), (300, 24)):
        lists = nearest_lists(encode(x), quantizer, m, probes)
        assert lists.dtype == np.int32
        np.testing.assert_array_equal(lists, slow_lists(x, quantizer, m, probes))


def test_all_lists_are_searched_in_order_of_one_ranking() -> None:
    """With as many probes as cells, the result is the plain ranking of all lists."""
    rng = np.random.default_rng(5)
    quantizer, x = random_quantizer(rng, 10, 24), vectors(rng, 50, 24)
    ranking = np.argsort(-integer_products(x, quantizer.fine), axis=1, kind="stable")
    np.testing.assert_array_equal(nearest_lists(encode(x), quantizer, 7, 10), ranking[:, :7])
    np.testing.assert_array_equal(nearest_lists(encode(x), quantizer, 7, 99), ranking[:, :7])


def test_a_sixth_of_the_cells_is_searched_by_default() -> None:
    rng = np.random.default_rng(6)
    for num_coarse, probes in ((33, 5), (12, 2), (3, 1), (1, 1)):
        quantizer, x = random_quantizer(rng, num_coarse, 8), vectors(rng, 40, 8)
        np.testing.assert_array_equal(nearest_lists(encode(x), quantizer, 6), slow_lists(x, quantizer, 6, probes))


def test_more_rows_and_lists_than_a_tile_and_any_number_of_threads() -> None:
    rng = np.random.default_rng(7)
    starts = np.array([0, 3, 1_500, 1_501])
    coarse, fine = (to_unit(rng.standard_normal((k, 8)).astype(np.float32)) for k in (3, 1_501))
    quantizer, x = Quantizer(coarse, fine, starts), vectors(rng, 3_000, 8)
    lists = nearest_lists(encode(x), quantizer, 5, 3)
    ranking = np.argsort(-integer_products(x, fine), axis=1, kind="stable")
    np.testing.assert_array_equal(lists, ranking[:, :5])
    torch.set_num_threads(3)
    np.testing.assert_array_equal(lists, nearest_lists(encode(x), quantizer, 5, 3))


def test_no_rows() -> None:
    quantizer = random_quantizer(np.random.default_rng(0), 4, 8)
    assert nearest_lists(encode(np.empty((0, 8), dtype=np.float16)), quantizer, 3).shape == (0, 3)


def assert_sound(quantizer: Quantizer, num_coarse: int, num_lists: int, dim: int) -> None:
    assert quantizer.coarse.shape == (num_coarse, dim)
    assert quantizer.fine.shape == (num_lists, dim)
    assert quantizer.starts.dtype == np.int64
    assert (quantizer.starts[0], quantizer.starts[-1], len(quantizer.starts)) == (0, num_lists, num_coarse + 1)
    assert (np.diff(quantizer.starts) >= 1).all()
    for centroids in (quantizer.coarse, quantizer.fine):
        assert centroids.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(centroids.astype(np.float64), axis=1), 1.0, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("num_lists", "num_coarse"), [(1, 1), (2, 1), (7, 1), (100, 4), (300, 8)])
def test_fit_gives_exactly_the_lists(num_lists: int, num_coarse: int, seed: int) -> None:
    x = vectors(np.random.default_rng(seed), 400, 16)
    assert_sound(fit_quantizer(x, num_lists, seed=seed, threads=1), num_coarse, num_lists, 16)
    assert_sound(fit_quantizer(x, num_lists, num_coarse=1, seed=seed, threads=1), 1, num_lists, 16)
    assert_sound(fit_quantizer(x, num_lists, num_coarse=num_lists, seed=seed, threads=1), num_lists, num_lists, 16)


@pytest.mark.parametrize("seed", range(3))
def test_lists_are_fitted_to_the_vectors_of_their_cell(seed: int) -> None:
    x = vectors(np.random.default_rng(seed), 600, 16)
    quantizer = fit_quantizer(x, 60, num_coarse=6, iterations=3, seed=seed, threads=2)
    usable = x[x.any(axis=1)]
    cell = integer_products(usable, quantizer.coarse).argmax(axis=1)
    shares = proportional_shares(np.bincount(cell, minlength=6), 60)
    np.testing.assert_array_equal(np.diff(quantizer.starts), shares)
    for c in range(6):
        expected = fit_kmeans(usable[cell == c], int(shares[c]), iterations=3, seed=seed, threads=1)
        np.testing.assert_array_equal(quantizer.fine[quantizer.starts[c] : quantizer.starts[c + 1]], expected)


def test_coarse_cells_are_fitted_to_a_subsample(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def recorded(sample: np.ndarray, num_clusters: int, **settings: int) -> np.ndarray:
        sizes.append((len(sample), num_clusters))
        return fit_kmeans(sample, num_clusters, **settings)

    monkeypatch.setattr(quantizer_module, "fit_kmeans", recorded)
    x = np.random.default_rng(0).standard_normal((1_000, 8)).astype(np.float16)
    fit_quantizer(x, 10, num_coarse=4, seed=0, threads=1)
    assert sizes[0] == (4 * quantizer_module.POINTS_PER_COARSE, 4)
    assert sum(size for size, _ in sizes[1:]) == 1_000


def test_a_cell_without_vectors_keeps_its_centroid() -> None:
    """Only three directions for eight coarse cells: equal centroids, of which the first gets the vectors."""
    x = np.repeat(np.eye(8, dtype=np.float16)[:3], 20, axis=0)
    quantizer = fit_quantizer(x, 20, num_coarse=8, seed=0, threads=1)
    assert_sound(quantizer, 8, 20, 8)
    cell = integer_products(x, quantizer.coarse).argmax(axis=1)
    empty = np.setdiff1d(np.arange(8), cell)
    assert len(empty) >= 5
    np.testing.assert_array_equal(np.diff(quantizer.starts)[empty], 1)
    np.testing.assert_array_equal(quantizer.fine[quantizer.starts[empty]], quantizer.coarse[empty])


def test_fit_repeats_itself_on_any_number_of_threads() -> None:
    x = vectors(np.random.default_rng(1), 900, 24)
    first = fit_quantizer(x, 50, num_coarse=10, seed=3, threads=1)
    torch.set_num_threads(3)
    again, other = (fit_quantizer(x, 50, num_coarse=10, seed=seed, threads=2) for seed in (3, 4))
    for name in ("coarse", "fine", "starts"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert not np.array_equal(first.coarse, other.coarse)


def test_what_cannot_be_fitted_is_refused() -> None:
    x = np.concatenate((np.eye(8), np.zeros((4, 8)))).astype(np.float16)
    assert_sound(fit_quantizer(x, 8, seed=0, threads=1), 1, 8, 8)
    with pytest.raises(ConfigError, match=r"quantizer of 9 lists .* the sample has 8 usable ones"):
        fit_quantizer(x, 9, seed=0, threads=1)
    for num_coarse in (0, 5):
        with pytest.raises(ConfigError, match=f"4 lists cannot lie in {num_coarse} coarse cells"):
            fit_quantizer(x, 4, num_coarse=num_coarse, seed=0, threads=1)
    with pytest.raises(ConfigError, match="0 lists"):
        fit_quantizer(x, 0, seed=0, threads=1)


def test_default_number_of_coarse_cells() -> None:
    given = {0: 0, 1: 1, 7: 1, 16: 2, 64: 4, 1_024: 16, 4_096: 32, 16_384: 64, 65_536: 128}
    assert {num_lists: default_num_coarse(num_lists) for num_lists in given} == given
