"""Fits the constants of the descriptor `dct` and sets its thresholds, on Parquet files with a column `image`.

    python benchmarks/calibrate_descriptor.py --fit PHOTOS.parquet THUMBNAILS.parquet    # writes embedders/data/dct.npz
    python benchmarks/calibrate_descriptor.py PHOTOS.parquet THUMBNAILS.parquet          # prints the tables

Of each file the first half, at most 8,000 rows, is for the fit; the other rows are held out for the calibration: they
are the pool, and 2,000 of each file are planted in it again as copies, all kinds in turn. Same files, same numbers.


Real pools have near-copies of their own. A pair is counted as true if it was planted, or if a slow judge that shares no
code with the descriptor says so: correlation of luma above 0.9 after the best alignment by crop and shift.
"""

import argparse
import io
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from PIL import Image, ImageEnhance

from curation.components import UnionFind
from curation.neighbors import pairs_above
from embedders import dct

Generator = np.random.Generator
Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]
Row = tuple[float, float, int, int, float]
"""Threshold, share of the planted copies found, images dropped, wrongly dropped, precision."""

FIT_ROWS = 8_000
PLANTED = 2_000
REFERENCES = 1_000
DIM = 128
PRECISION = 0.95
THRESHOLDS = [percent / 100 for percent in range(70, 91)]
JUDGE = 0.9


def _jpeg(image: Image.Image, quality: float = 85) -> bytes:
    return _saved(image, "JPEG", quality=int(quality))


def _saved(image: Image.Image, kind: str, **options: int) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _crop(image: Image.Image, low: float, high: float, draw: Generator) -> Image.Image:
    """Cuts a share of between low and high off both the width and the height, at a random place."""
    keep = 1 - draw.uniform(low, high)
    width, height = round(image.width * keep), round(image.height * keep)
    x, y = draw.integers(0, image.width - width + 1), draw.integers(0, image.height - height + 1)
    return image.crop((int(x), int(y), int(x) + width, int(y) + height))


def _resize(image: Image.Image, draw: Generator) -> Image.Image:
    scale = draw.uniform(0.25, 0.75)
    size = (max(16, round(image.width * scale)), max(16, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC)


def _light(image: Image.Image, draw: Generator) -> Image.Image:
    bright = ImageEnhance.Brightness(image).enhance(draw.uniform(0.7, 1.3))
    return ImageEnhance.Contrast(bright).enhance(draw.uniform(0.7, 1.3))


COPIES: dict[str, Callable[[Image.Image, Generator], bytes]] = {
    "recompress q30-90": lambda image, draw: _jpeg(image, draw.uniform(30, 90)),
    "resize 0.25-0.75": lambda image, draw: _jpeg(_resize(image, draw)),
    "webp or png": lambda image, draw: _saved(image, "PNG" if draw.random() < 0.5 else "WEBP"),
    "brightness, contrast": lambda image, draw: _jpeg(_light(image, draw)),
    "crop 5-10 %": lambda image, draw: _jpeg(_crop(image, 0.05, 0.10, draw)),
    "crop 10-15 %": lambda image, draw: _jpeg(_crop(image, 0.10, 0.15, draw)),
    "crop 15-20 %": lambda image, draw: _jpeg(_crop(image, 0.15, 0.20, draw)),
    "crop, light, q50-90": lambda image, draw: _jpeg(_light(_crop(image, 0.05, 0.2, draw), draw), draw.uniform(50, 90)),
}


def copy(data: bytes, kind: str, row: int) -> bytes:
    """A copy of an image file; the draw depends on the kind and the row alone."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return COPIES[kind](image, np.random.default_rng((list(COPIES).index(kind), row)))


def thumbnails(files: list[bytes]) -> Pixels:
    return np.stack([dct.thumbnail(data) for data in files])


def describe(pixels: Pixels) -> Float32:
    return np.concatenate([dct.features(pixels[i : i + 256]) for i in range(0, len(pixels), 256)])


def fit(files: list[bytes]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float16]]:
    """Mean [F] and projection [F, DIM]: linear discriminant analysis, with each image and its copies as a class.

    The columns v solve T v = w (C + 0.01 T) v for the largest w, with T the covariance of the images and C that of the
    differences between an image and its copies, scaled so that v' (C + 0.01 T) v = 1.
    """
    x = describe(thumbnails(files)).astype(np.float64)
    within = np.zeros((x.shape[1], x.shape[1]))
    for kind in COPIES:
        difference = x - describe(thumbnails([copy(data, kind, row) for row, data in enumerate(files)]))
        within += difference.T @ difference / len(x) / len(COPIES)
    total = np.cov(x.T)
    noise = within + 0.01 * total + 1e-6 * np.trace(total) / len(total) * np.eye(len(total))
    scale, axes = np.linalg.eigh(noise)
    whitening = axes / np.sqrt(scale)
    _, directions = np.linalg.eigh(whitening.T @ total @ whitening)
    projection = whitening @ directions[:, : -DIM - 1 : -1]
    return x.mean(axis=0).astype(np.float32), projection.astype(np.float16)


def embed(pixels: Pixels) -> npt.NDArray[np.float16]:
    model = dct.DctEmbedder()
    return np.concatenate([model.embed(pixels[i : i + 256]) for i in range(0, len(pixels), 256)])


def aligned_correlation(a: Pixels, b: Pixels) -> Float32:
    """Correlation of luma between thumbnails [m, 32, 32, 3], the best over crops of up to 20 % of either one: [m]."""
    weights = np.array([0.299, 0.587, 0.114], dtype=np.float32)
    best = np.full(len(a), -1, dtype=np.float32)
    planes = _smooth(a @ weights), _smooth(b @ weights)
    for whole, cropped in (planes, planes[::-1]):
        unit = _unit(whole)
        for down, across in _crop_matrices():
            window: Float32 = np.matmul(np.matmul(down, cropped), across.T)
            best = np.maximum(best, np.sum(unit * _unit(window), axis=1, dtype=np.float32))
    return best


def _smooth(plane: Float32) -> Float32:
    """Each pixel with its eight neighbours, by weights 1/4, 1/2, 1/4 along both axes."""
    for _ in range(2):
        padded = np.pad(plane, ((0, 0), (1, 1), (0, 0)), mode="edge")
        smooth: Float32 = (padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]) / np.float32(4)
        plane = smooth.transpose(0, 2, 1)
    return plane


def _unit(plane: Float32) -> Float32:
    rows = plane.reshape(len(plane), -1)
    rows = rows - rows.mean(axis=1, keepdims=True)
    unit: Float32 = rows / np.sqrt(np.sum(rows * rows, axis=1, keepdims=True) + 1e-3)
    return unit


def _crop_matrices() -> list[tuple[Float32, Float32]]:
    """Pairs of matrices [32, 32] that cut a window out of a thumbnail and stretch it, rows and columns alike."""
    matrices = []
    for keep in (1, 0.95, 0.9, 0.85, 0.8):
        same = []
        for offset in np.linspace(0, 1 - keep, 1 if keep == 1 else 5):
            position = np.clip((np.arange(32) + 0.5) * keep + offset * 32 - 0.5, 0, 31)
            same.append(np.maximum(0, 1 - np.abs(position[:, None] - np.arange(32))).astype(np.float32))
        matrices += [(down, across) for down in same for across in same]
    return matrices


def judge(a: Pixels, i: Int64, b: Pixels, j: Int64) -> npt.NDArray[np.bool_]:
    """Whether the pairs (a[i], b[j]) are copies of one image by `aligned_correlation`."""
    blocks = [slice(s, s + 512) for s in range(0, len(i), 512)]
    return np.concatenate([aligned_correlation(a[i[s]], b[j[s]]) > JUDGE for s in blocks] + [np.zeros(0, dtype=bool)])


def num_dropped(num: int, i: Int64, j: Int64) -> int:
    """Images that go when one of each connected component stays."""
    forest = UnionFind(num)
    forest.union(i, j)
    return num - len(np.unique(forest.labels()))


def self_dedup_table(pool: Pixels, copies: Pixels, source: Int64) -> list[Row]:
    """Self-dedup of a pool with planted copies; copies[k] is a copy of pool[source[k]]."""
    pixels = np.concatenate((pool, copies))
    vectors = embed(pixels)
    i, j, similarity = pairs_above(vectors, vectors, THRESHOLDS[0], symmetric=True)
    origin = np.concatenate((np.arange(len(pool)), source))
    true = origin[i] == origin[j]
    true[~true] = judge(pixels, i[~true], pixels, j[~true])
    rows = []
    for threshold in THRESHOLDS:
        above = similarity > threshold
        found = len(np.unique(j[above & (origin[i] == origin[j])]))
        dropped, right = (num_dropped(len(pixels), i[keep], j[keep]) for keep in (above, above & true))
        rows.append((threshold, found / len(copies), dropped, dropped - right, right / max(dropped, 1)))
    return rows


def reference_table(pool: Pixels, copies: Pixels, references: Pixels) -> list[Row]:
    """Relative dedup of a pool with planted copies against references; copies[k] is a copy of references[k]."""
    pixels = np.concatenate((pool, copies))
    i, j, similarity = pairs_above(embed(pixels), embed(references), THRESHOLDS[0])
    true = i - len(pool) == j
    true[~true] = judge(pixels, i[~true], references, j[~true])
    rows = []
    for threshold in THRESHOLDS:
        above = similarity > threshold
        found = int(np.sum(above & (i - len(pool) == j))) / len(copies)
        dropped, right = (len(np.unique(i[keep])) for keep in (above, above & true))
        rows.append((threshold, found, dropped, dropped - right, right / max(dropped, 1)))
    return rows


def show(title: str, rows: list[Row]) -> float:
    """Prints a table; returns the lowest threshold from which on precision is at least PRECISION."""
    print(f"\n{title}\n\n| threshold | copies found | dropped | wrongly | precision |\n|---|---|---|---|---|")
    for threshold, found, dropped, wrong, precision in rows:
        print(f"| {threshold:.2f} | {found:.3f} | {dropped:.0f} | {wrong:.0f} | {precision:.3f} |")
    bad = [threshold for threshold, *_, precision in rows if precision < PRECISION]
    return min((row[0] for row in rows if row[0] > max(bad, default=0)), default=float("nan"))


def show_recall(sets: dict[str, list[bytes]], thresholds: tuple[float, float]) -> None:
    """Prints the share of copies above each threshold by kind and file."""
    print("\n| file | kind of copy | copies | above {:.2f} | above {:.2f} |".format(*thresholds))
    print("|---|---|---|---|---|")
    for name, files in sets.items():
        originals = embed(thumbnails(files[:PLANTED])).astype(np.float32)
        for kind in COPIES:
            copied = embed(thumbnails([copy(data, kind, row) for row, data in enumerate(files[:PLANTED])]))
            similarity = np.sum(originals * copied, axis=1)
            shares = " | ".join(f"{np.mean(similarity > t):.3f}" for t in thresholds)
            print(f"| {name} | {kind} | {len(copied)} | {shares} |")


def show_unrelated(sets: dict[str, list[bytes]]) -> None:
    """Prints how far apart different images of a file are."""
    for name, files in sets.items():
        vectors = embed(thumbnails(files[:PLANTED])).astype(np.float32)
        cosines = (vectors @ vectors.T)[np.triu_indices(len(vectors), 1)]
        quantiles = np.quantile(cosines, (0.5, 0.999))
        print(
            f"{name}: cosine of different images: median {quantiles[0]:.2f}, 99.9 % below {quantiles[1]:.2f}; "
            f"{100 * np.mean(cosines > 0.6):.4f} % above 0.6"
        )


def show_speed(sets: dict[str, list[bytes]]) -> None:
    """Prints milliseconds of processor time an image."""
    model = dct.DctEmbedder()
    for name, files in sets.items():
        begin = time.process_time()
        pixels = thumbnails(files[:PLANTED])
        middle = time.process_time()
        for start in range(0, len(pixels), 64):
            model.embed(pixels[start : start + 64])
        seconds = middle - begin, time.process_time() - middle
        print("{}: {:.2f} ms to decode, {:.2f} ms to embed".format(name, *(1e3 * s / len(pixels) for s in seconds)))


def calibrate(sets: dict[str, list[bytes]]) -> None:
    kinds = list(COPIES)
    chosen = [(name, row) for name, files in sets.items() for row in range(min(PLANTED, len(files)))]
    copies = thumbnails([copy(sets[name][row], kinds[n % len(kinds)], row) for n, (name, row) in enumerate(chosen)])
    pool = thumbnails([data for files in sets.values() for data in files])
    begin = dict(zip(sets, np.cumsum([0] + [len(files) for files in sets.values()]), strict=False))
    source = np.array([begin[name] + row for name, row in chosen])
    print(f"pool of {len(pool)} held-out images, {len(copies)} copies planted")
    show_unrelated(sets)
    show_speed(sets)
    best = show("Self-dedup", self_dedup_table(pool, copies, source))
    references, rest = source[-REFERENCES:], np.setdiff1d(np.arange(len(pool)), source[-REFERENCES:])
    reference = show(f"{REFERENCES} references", reference_table(pool[rest], copies[-REFERENCES:], pool[references]))
    print(f"\nlowest thresholds of {PRECISION:.0%} precision: self-dedup {best:.2f}, reference {reference:.2f}")
    show_recall(sets, (best, reference))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="Parquet files with a column `image` of image bytes")
    parser.add_argument("--fit", action="store_true", help="fit the constants and write them, instead of calibrating")
    args = parser.parse_args()
    sets = {path.stem: pq.read_table(path, columns=["image"])["image"].to_pylist() for path in args.files}
    num_fit = {name: min(FIT_ROWS, len(files) // 2) for name, files in sets.items()}
    if args.fit:
        mean, projection = fit([data for name, files in sets.items() for data in files[: num_fit[name]]])
        np.savez(Path(dct.__file__).parent / dct.CONSTANTS, mean=mean, projection=projection)
    else:
        calibrate({name: files[num_fit[name] :] for name, files in sets.items()})


if __name__ == "__main__":
    main()
