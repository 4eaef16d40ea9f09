import io
from concurrent.futures import ThreadPoolExecutor
from importlib import resources

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from embedders import dct
from embedders.dct import DctEmbedder
from embedders.images import UndecodableImage
from tests.embedders.images_for_tests import photo, saved


@pytest.fixture(scope="module")
def model() -> DctEmbedder:
    return DctEmbedder()


def vectors(model: DctEmbedder, images: list[bytes]) -> np.ndarray:
    return model.embed(np.stack([model.preprocess(data) for data in images]))


def test_vectors_are_float16_of_length_one(model: DctEmbedder) -> None:
    out = vectors(model, [saved(photo(n)) for n in range(5)])
    assert out.shape == (5, model.dim) and out.dtype == np.float16
    np.testing.assert_allclose(np.linalg.norm(out.astype(float), axis=1), 1, atol=2e-3)


def test_a_row_does_not_depend_on_its_batch(model: DctEmbedder) -> None:
    batch = np.random.default_rng(0).integers(0, 256, (37, 32, 32, 3), dtype=np.uint8)
    whole = model.embed(batch)
    for other in (batch[::-1].copy(), np.roll(batch, 5, axis=0)):
        again = model.embed(other)
        order = [next(k for k in range(37) if (other[k] == row).all()) for row in batch]
        np.testing.assert_array_equal(again[order], whole)
    np.testing.assert_array_equal(np.concatenate([model.embed(batch[k : k + 1]) for k in range(37)]), whole)


@pytest.mark.parametrize("colour", ["black", "white", "grey", "red"])
def test_flat_images_have_finite_vectors(model: DctEmbedder, colour: str) -> None:
    out = vectors(model, [saved(Image.new("RGB", (50, 40), colour))])
    assert np.isfinite(out).all() and np.abs(out).max() > 0


@pytest.mark.parametrize("size", [(32, 32), (96, 72), (500, 375)])
def test_copies_lie_above_and_other_images_below_the_thresholds(model: DctEmbedder, size: tuple[int, int]) -> None:
    images = [photo(n, *size) for n in range(12)]
    width, height = size
    copies = {
        "recompressed": lambda im: saved(im, quality=40),
        "resized": lambda im: saved(im.resize((width * 3 // 4, height * 3 // 4))),
        "cropped": lambda im: saved(im.crop((width // 16, 0, width, height - height // 16))),
        "brighter": lambda im: saved(ImageEnhance.Brightness(im).enhance(1.2)),
        "png": lambda im: saved(im, "PNG"),
        "webp": lambda im: saved(im, "WEBP"),
    }
    originals = vectors(model, [saved(im, quality=90) for im in images]).astype(np.float32)
    for name, make in copies.items():
        cosines = vectors(model, [make(im) for im in images]).astype(np.float32) @ originals.T
        assert np.diag(cosines).min() > model.copy_thresholds.self_dedup, name
        assert cosines[~np.eye(12, dtype=bool)].max() < model.copy_thresholds.reference, name


def test_orientation_and_threads_do_not_matter(model: DctEmbedder) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = saved(photo(1).transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)
    np.testing.assert_array_equal(model.preprocess(turned), model.preprocess(saved(photo(1), "PNG")))
    files = [saved(photo(n)) for n in range(16)]
    with ThreadPoolExecutor(4) as threads:
        for one, other in zip(threads.map(model.preprocess, files), map(model.preprocess, files), strict=True):
            np.testing.assert_array_equal(one, other)


def test_what_is_no_image_is_refused(model: DctEmbedder) -> None:
    with pytest.raises(UndecodableImage):
        model.preprocess(b"<html>")


def slow_dct(plane: np.ndarray, num: int) -> np.ndarray:
    """The definition of the two-dimensional DCT-II, with the first coefficient as the mean."""
    n = len(plane)
    out = np.zeros((num, num))
    for u in range(num):
        for v in range(num):
            total = 0.0
            for y in range(n):
                for x in range(n):
                    total += plane[y, x] * np.cos(np.pi * (y + 0.5) * u / n) * np.cos(np.pi * (x + 0.5) * v / n)
            out[u, v] = total * np.sqrt(2) ** ((u > 0) + (v > 0)) / n**2
    return out.ravel()


def test_dct_follows_its_definition() -> None:
    plane = np.random.default_rng(0).random((2, 32, 32)).astype(np.float32)
    np.testing.assert_allclose(dct._dct(plane, 4), [slow_dct(p, 4) for p in plane], atol=1e-6)


def slow_orientations(plane: np.ndarray) -> np.ndarray:
    side, grid, num = len(plane), dct.GRID, dct.ORIENTATIONS
    out = np.zeros((num, grid, grid))
    for y in range(side):
        for x in range(side):
            gx = plane[y, min(x + 1, side - 1)] - plane[y, max(x - 1, 0)]
            gy = plane[min(y + 1, side - 1), x] - plane[max(y - 1, 0), x]
            for o in range(num):
                turn = np.arctan2(gy, gx) - 2 * np.pi * o / num
                value = np.hypot(gx, gy) * max(0.0, np.cos(turn)) ** 3
                for cy in range(grid):
                    for cx in range(grid):
                        away = [abs((p + 0.5) / side * grid - 0.5 - c) for p, c in ((y, cy), (x, cx))]
                        out[o, cy, cx] += value * max(0.0, 1 - away[0]) * max(0.0, 1 - away[1])
    return out.ravel()


def test_orientations_follow_their_definition() -> None:
    plane = np.random.default_rng(1).random((2, 16, 16)).astype(np.float32)
    np.testing.assert_allclose(dct._orientations(plane), [slow_orientations(p) for p in plane], rtol=1e-4, atol=1e-5)


def test_the_fingerprint_covers_constants_and_code(model: DctEmbedder, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model.fingerprint == DctEmbedder().fingerprint and len(model.fingerprint) == 64
    monkeypatch.setattr(dct, "CODE_VERSION", dct.CODE_VERSION + 1)
    assert DctEmbedder().fingerprint != model.fingerprint


def test_the_constants_are_small_and_plain_arrays() -> None:
    content = resources.files("embedders").joinpath(dct.CONSTANTS).read_bytes()
    assert len(content) < 500_000
    with np.load(io.BytesIO(content), allow_pickle=False) as constants:
        assert constants["projection"].shape[0] == len(constants["mean"])


def test_features_are_those_the_constants_were_fitted_on() -> None:
    """A change of features without new constants and a new CODE_VERSION makes stored vectors wrong."""
    ramp = (np.arange(32 * 32 * 3) * 7919 % 251).astype(np.uint8).reshape(1, 32, 32, 3)
    some = [0.4903, -0.3281, 0.2755, 0.3481, 0.18, 0.187, 0.3082, 0.2657, 0.2669, 0.1869, 0.2536, 0.2867]
    np.testing.assert_allclose(dct.features(ramp)[0, ::72], some, atol=2e-4)
    assert dct.CODE_VERSION == 2  # 2: colour profiles are applied
