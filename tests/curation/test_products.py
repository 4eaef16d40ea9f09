import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from curation import products
from curation.products import Multiplier

ROOT = Path(__file__).parents[2]


def saturates() -> bool:
    extreme = torch.full((16, 512), 127, dtype=torch.int8)
    return bool((torch._int_mm(extreme, extreme.t()) != 512 * 127**2).any())


def random_codes(rng: np.random.Generator, num_rows: int, width: int, limit: int = 79) -> np.ndarray:
    return rng.integers(-limit, limit + 1, (num_rows, width)).astype(np.int8)


def all_products(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return x.astype(np.int64) @ y.astype(np.int64).T


def assert_products(multiplier: Multiplier, x: np.ndarray, y: np.ndarray) -> None:
    """All are there once, exactly."""
    found = np.full((len(x), len(y)), -1, dtype=np.int64)
    for rows, columns, tile in multiplier.tiles(x, y):
        assert tile.dtype == np.int32
        place = found[rows, columns]
        assert (place == -1).all()
        place[:] = tile[: place.shape[0], : place.shape[1]]
    np.testing.assert_array_equal(found, all_products(x, y))


def random_bounds(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, share: float) -> tuple[np.ndarray, ...]:
    """Cutoffs that about `share` of the products reach, some rows' all or none, many exactly; and allowances."""
    allowance = rng.integers(0, 3000, len(y)).astype(np.int32)
    reach = all_products(x, y) + allowance
    cutoff = np.zeros(len(x), dtype=np.int32)
    if reach.size:
        place = np.clip(np.round((1 - share) * len(y) + rng.normal(0, 2, len(x))), 0, len(y) - 1).astype(int)
        cutoff = np.take_along_axis(np.sort(reach, axis=1), place[:, None], axis=1)[:, 0].astype(np.int32)
        cutoff[rng.random(len(x)) < 0.1] = -(2**30)
        cutoff[rng.random(len(x)) < 0.1] = 2**30
    return cutoff, allowance


def slow_candidates(
    x: np.ndarray, y: np.ndarray, cutoff: np.ndarray, allowance: np.ndarray, upper: bool, rows: int, columns: int
) -> list[tuple[np.ndarray, ...]]:
    """Tile by tile, columns before rows; tiles without pairs are left out."""
    product = all_products(x, y)
    kept = product + allowance >= cutoff[:, None]
    if upper:
        kept &= np.arange(len(x))[:, None] < np.arange(len(y))
    tiles = []
    for left in range(0, len(y), columns):
        for top in range(0, len(x), rows):
            i, j = np.nonzero(kept[top : top + rows, left : left + columns])
            tiles.append((i + top, j + left, product[i + top, j + left]))
    return [tile for tile in tiles if len(tile[0])]


def assert_candidates(
    multiplier: Multiplier, x: np.ndarray, y: np.ndarray, bounds: tuple[np.ndarray, ...], upper: bool = False
) -> int:
    found = list(multiplier.candidates(x, y, *bounds, upper))
    expected = slow_candidates(x, y, *bounds, upper, multiplier._rows, multiplier._columns)
    assert len(found) == len(expected)
    for tile, slow_tile in zip(found, expected, strict=True):
        for column, slow_column in zip(tile, slow_tile, strict=True):
            assert column.dtype == np.int32
            np.testing.assert_array_equal(column, slow_column)
    return sum(len(i) for i, _, _ in found)


def small_multiplier(monkeypatch: pytest.MonkeyPatch, scan: str = "cpu") -> Multiplier:
    monkeypatch.setattr(products, "TILE_ROWS", 512)
    monkeypatch.setattr(products, "TILE_COLUMNS", 320)
    multiplier = Multiplier()
    if scan == "gpu":
        monkeypatch.setattr(multiplier, "_scan_cpu", multiplier._scan_gpu)
    return multiplier


@pytest.mark.parametrize("takes_int8", [False, True])
@pytest.mark.parametrize("width", [8, 24, 96, 520, 1024, 1032, 2056])
def test_products_are_those_of_integers(width: int, takes_int8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if takes_int8 and saturates():
        pytest.skip("int8 sums of this processor saturate")
    monkeypatch.setattr(products, "takes_int8", lambda: takes_int8)
    multiplier, rng = Multiplier(), np.random.default_rng(width)
    for num_x, num_y in ((1, 1), (1, 700), (257, 63), (300, 65), (1025, 5), (2, 1100), (0, 4), (4, 0)):
        x, y = random_codes(rng, num_x, width), random_codes(rng, num_y, width)
        x[:1], y[:1] = 127, 127  # the largest sum there is
        assert_products(multiplier, x, y)


@pytest.mark.parametrize(("int8", "float32"), [(3.0, 1.0), (1.0, 3.0), (1.5, 1.0)])
def test_the_faster_form_multiplies_int8_in_doubt(int8: float, float32: float, monkeypatch: pytest.MonkeyPatch) -> None:
    if saturates():
        pytest.skip("int8 sums of this processor saturate")
    products.takes_int8.cache_clear()
    monkeypatch.setattr(products, "_seconds", lambda multiply, *_: int8 if multiply.__name__ == "_int_mm" else float32)
    assert products.takes_int8() is (int8 < 3)
    products.takes_int8.cache_clear()


OLDER = """
import numpy as np
from curation.codes import encode
from curation.products import Multiplier
rng = np.random.default_rng(0)
for dim in (7, 128, 129, 512):
    x = rng.standard_normal((600, dim)) * (rng.random((600, dim)) < rng.choice([0.02, 0.1, 1], (600, 1)))
    x[:30] = np.eye(dim)[np.arange(30) % dim]
    values = encode(x.astype(np.float16)).values
    expected = values.astype(np.int64) @ values.astype(np.int64).T
    for rows, columns, tile in Multiplier().tiles(values, values):
        part = expected[rows, columns]
        assert np.array_equal(tile[: part.shape[0], : part.shape[1]], part)
"""


@pytest.mark.parametrize("instructions", ["AVX2", "AVX512_CORE"])
def test_products_are_exact_on_processors_whose_int8_sums_saturate(instructions: str) -> None:
    """Without VNNI the library adds pairs of products in int16; codes must leave room for that."""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": instructions, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", OLDER], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("scan", ["cpu", "gpu"])
@pytest.mark.parametrize("seed", range(2))
def test_candidates_are_a_literal_filter(seed: int, scan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    multiplier, rng = small_multiplier(monkeypatch, scan), np.random.default_rng(seed)
    sides = ((1, 1), (511, 319), (512, 320), (513, 321), (1024, 640), (1, 641), (1025, 1))
    for num_x, num_y in sides:
        x, y = random_codes(rng, num_x, 16), random_codes(rng, num_y, 16)
        for share in (0.003, 0.5):
            assert_candidates(multiplier, x, y, random_bounds(rng, x, y, share))
    every = np.full(700, -(2**30), dtype=np.int32), np.zeros(400, dtype=np.int32)
    x, y = random_codes(rng, 700, 8), random_codes(rng, 400, 8)
    assert assert_candidates(multiplier, x, y, every) == 700 * 400
    none = np.full(700, 2**30, dtype=np.int32), np.zeros(400, dtype=np.int32)
    assert assert_candidates(multiplier, x, y, none) == 0


@pytest.mark.parametrize("scan", ["cpu", "gpu"])
@pytest.mark.parametrize("tiles", ["wide", "high", "default"])
def test_candidates_of_a_set_with_itself(tiles: str, scan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if tiles != "default":
        sides = (128, 320) if tiles == "wide" else (512, 64)
        monkeypatch.setattr(products, "TILE_ROWS", sides[0])
        monkeypatch.setattr(products, "TILE_COLUMNS", sides[1])
    multiplier, rng = Multiplier(), np.random.default_rng(3)
    if scan == "gpu":
        monkeypatch.setattr(multiplier, "_scan_cpu", multiplier._scan_gpu)
    for num_rows in (0, 1, 2, 64, 128, 129, 321, 640, 1030):
        x = random_codes(rng, num_rows, 16)
        assert_candidates(multiplier, x, x, random_bounds(rng, x, x, 0.3), upper=True)
        every = np.full(num_rows, -(2**30), dtype=np.int32), np.zeros(num_rows, dtype=np.int32)
        assert assert_candidates(multiplier, x, x, every, upper=True) == num_rows * (num_rows - 1) // 2


def test_default_tiles_and_calls_of_every_shape_in_turn() -> None:
    """Buffers are used again: what an earlier, larger call left in them is never read."""
    multiplier, rng = Multiplier(), np.random.default_rng(0)
    for num_x, num_y, width in ((1100, 1500, 16), (300, 70, 16), (1024, 1024, 8), (3, 1030, 32), (1, 1, 8)):
        x, y = random_codes(rng, num_x, width), random_codes(rng, num_y, width)
        bounds = random_bounds(rng, x, y, 0.01)
        assert_candidates(multiplier, x, y, bounds)
        for part in (x, y):
            part.flags.writeable = False
        assert_candidates(multiplier, x[::-1], y, (bounds[0][::-1], bounds[1]))


def test_results_of_one_tile_outlive_the_next() -> None:
    rng = np.random.default_rng(0)
    x, multiplier = random_codes(rng, 2100, 8), Multiplier()
    every = np.full(2100, -(2**30), dtype=np.int32), np.zeros(2100, dtype=np.int32)
    held = [tuple(column.copy() for column in tile) for tile in multiplier.candidates(x, x, *every)]
    for tile, copied in zip(list(multiplier.candidates(x, x, *every)), held, strict=True):
        for column, expected in zip(tile, copied, strict=True):
            np.testing.assert_array_equal(column, expected)


@pytest.mark.parametrize(("num_x", "num_y"), [(0, 0), (0, 5), (5, 0)])
def test_candidates_of_nothing(num_x: int, num_y: int) -> None:
    x, y = np.ones((num_x, 8), dtype=np.int8), np.ones((num_y, 8), dtype=np.int8)
    bounds = np.zeros(num_x, dtype=np.int32), np.zeros(num_y, dtype=np.int32)
    assert list(Multiplier().candidates(x, y, *bounds)) == []


def test_a_cutoff_raised_between_tiles_counts_from_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    multiplier = small_multiplier(monkeypatch)
    x = np.ones((1024, 8), dtype=np.int8)
    cutoff, found = np.full(1024, 8, dtype=np.int32), []
    for i, j, product in multiplier.candidates(x, x[:640], cutoff, np.zeros(640, dtype=np.int32)):
        found.append((int(i[0]), int(j[0])))
        assert (product == 8).all()
        cutoff[:512] = 9
    assert found == [(0, 0), (512, 0), (512, 320)]


@pytest.mark.gpu
def test_the_same_candidates_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setattr(products, "GPU_TILE", 512)
    multiplier, rng = Multiplier("cuda"), np.random.default_rng(0)
    for num_x, num_y in ((1, 1), (512, 513), (1100, 700)):
        x, y = random_codes(rng, num_x, 96, 127), random_codes(rng, num_y, 96, 127)
        assert_products(multiplier, x, y)
        assert_candidates(multiplier, x, y, random_bounds(rng, x, y, 0.1))
        assert_candidates(multiplier, x, x, random_bounds(rng, x, x, 0.1), upper=True)
