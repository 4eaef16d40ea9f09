"""Samples per second and core of the trainer's loader, next to plain loops over the same bytes.

    python -m benchmarks.loader --photos photos350.parquet [--batch-size 32] [--workers 2] [--repeats 5]

A sample is an image with two global and eight local crops, as the published recipe has them. Measured in turn and
several times over, in one process by its CPU time, all threads together, which is what a core does that has nothing
else to do; medians are printed:
(a) decoding alone, with Pillow, and nothing made of it;
(b) a plain Pillow loop that decodes and makes the same crops: whole images, as torchvision's transforms do, and JPEGs
    reduced as far as the crops allow, as ours are;
(c) the loader, from Parquet to batches, in this process;
(d) webdataset, from a tar file to the same batches with the same crops (if it is installed).
Then (e): the loader with worker processes on all cores, once they have started, by the clock.
"""

import argparse
import functools
import io
import itertools
import math
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import PIL
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from benchmarks.measure import machine
from curation.hashing import image_id
from curation.shards import IMAGE_GROUP_ROWS
from trainer.batch import Batch
from trainer.crops import COLUMNS, FLIP, CropMaker, CropSettings, Views, collate, crop_boxes
from trainer.draws import Purpose, generator
from trainer.loader import Loader, Reject
from trainer.samples import Dataset, Source, open_dataset

COPIES = 8
"""Of each image in what is read."""
SHUFFLED = 256
"""Samples in webdataset's buffer."""

Crop = tuple[int, tuple[float, float, float, float], bool]
"""Side in pixels, edges in the image (left, top, right, bottom), whether it is flipped."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", required=True, help="Parquet with a column `image`")
    parser.add_argument("--images", type=int, default=None, help="take so many of them")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    images = pq.read_table(options.photos, columns=["image"])["image"].to_pylist()[: options.images]
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), images, options)


def measure(folder: Path, images: list[bytes], options: argparse.Namespace) -> None:
    """Everything, printed as it goes."""
    maker, dataset = CropMaker(CropSettings()), write_dataset(folder, images)
    make_loader = functools.partial(Loader, dataset, maker, batch_of, batch_size=options.batch_size)
    num_batches = max(1, len(images) // options.batch_size)
    plans = [plan(maker, data, number) for number, data in enumerate(images)]
    ours = iter(make_loader())
    works: dict[str, Callable[[], int]] = {
        "(a) decoding alone": lambda: decode(images),
        "(b) Pillow, whole images": lambda: pillow(images, plans, reduce=False),
        "(b) Pillow, reduced": lambda: pillow(images, plans, reduce=True),
        "(c) the loader": lambda: take(ours, num_batches),
    }
    if find_spec("webdataset"):
        theirs = webdataset(folder, images, maker, options.batch_size)
        works["(d) webdataset"] = lambda: sum(itertools.islice(theirs, num_batches))
    mean = sum(map(len, images)) / len(images) / 1000
    print(f"{machine()}; Pillow {PIL.__version__}; {len(images)} images of {mean:.0f} kB")
    rates = by_cpu_time(works, options.repeats)
    for name, rate in rates.items():
        times = rates["(c) the loader"] / rate
        print(f"{name:25s} {rate:7.1f} samples/s a core; the loader makes {times:.2f} times as many")
    if not find_spec("webdataset"):
        print("(d) is left out: webdataset is not installed")
    total = with_workers(make_loader(workers=options.workers), options.workers, options.repeats * num_batches)
    cores = min(options.workers, os.cpu_count() or 1)
    print(f"(e) the loader with {options.workers} workers {total:.1f} samples/s, {total / cores:.1f} per core")


def write_dataset(folder: Path, images: list[bytes]) -> Dataset:
    """The images in a Parquet file like the final shards, several times over: more than a worker holds."""
    place = str(folder / "photos.parquet")
    table = pa.table({"image_id": [image_id(data) for data in images], "image": images})
    table = pa.concat_tables([table] * COPIES)
    pq.write_table(
        table, place, IMAGE_GROUP_ROWS, use_dictionary=False, compression={"image_id": "zstd", "image": "none"}
    )
    return open_dataset([Source("photos", place)])


def batch_of(views: list[Views], names: list[str], step: int) -> Batch:
    """What the loader makes of a step, without masks."""
    return collate(views, names, None)


def take(batches: Iterator[tuple[int, Batch, list[Reject]]], num_batches: int) -> int:
    """The next batches; returns the number of their images."""
    return sum(len(batch.image_ids) for _, batch, _ in itertools.islice(batches, num_batches))


def decode(images: list[bytes]) -> int:
    """(a)"""
    for data in images:
        Image.open(io.BytesIO(data)).convert("RGB")
    return len(images)


def plan(maker: CropMaker, data: bytes, number: int) -> tuple[float, list[Crop]]:
    """What the maker draws for an image: pixels of the image for each of a crop, at least, and the crops."""
    settings = maker.settings
    draws = generator((0, number), Purpose.VIEWS).random((len(maker.sizes), COLUMNS))
    scales = np.array([settings.global_scale] * 2 + [settings.local_scale] * settings.local_crops)
    boxes = crop_boxes(draws, *Image.open(io.BytesIO(data)).size, scales, settings.ratio)
    edges = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1).tolist()
    flips = draws[:, FLIP] < settings.flip
    crops = [(size, tuple(box), bool(flip)) for size, box, flip in zip(maker.sizes, edges, flips, strict=True)]
    return float((boxes[:, 2:].min(axis=1) / maker.sizes).min()), crops


def pillow(images: list[bytes], plans: list[tuple[float, list[Crop]]], reduce: bool) -> int:
    """(b): boxes and flips are drawn before."""
    for data, (spare, crops) in zip(images, plans, strict=True):
        image: Image.Image = Image.open(io.BytesIO(data))
        width = image.width
        if reduce and spare > 1:
            image.draft("RGB", (math.ceil(width / spare), math.ceil(image.height / spare)))
        image = image.convert("RGB")
        factor = max(1, round(width / image.width))
        for size, box, flip in crops:
            left, top, right, bottom = (edge / factor for edge in box)
            box = left, top, min(right, image.width), min(bottom, image.height)
            crop = image.resize((size, size), Image.Resampling.BICUBIC, box)
            np.asarray(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else crop)
    return len(images)


def webdataset(folder: Path, images: list[bytes], maker: CropMaker, batch_size: int) -> Iterator[int]:
    """(d): endlessly the number of images of the next batch, which has been made."""
    from webdataset import WebDataset

    with tarfile.open(folder / "photos.tar", "w") as tar:
        for number, data in enumerate(images * COPIES):
            entry = tarfile.TarInfo(f"{number}.image")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    samples = iter(WebDataset(str(folder / "photos.tar"), shardshuffle=False).repeat().shuffle(SHUFFLED))
    for first in itertools.count(0, batch_size):
        mine = list(itertools.islice(samples, batch_size))
        views = [maker(sample["image"], (0, first + number)) for number, sample in enumerate(mine)]
        yield len(batch_of(views, [sample["__key__"] for sample in mine], 0).image_ids)


def by_cpu_time(works: dict[str, Callable[[], int]], repeats: int) -> dict[str, float]:
    """Images per second of CPU time of each, all threads of this process together; in turn, medians."""
    torch.set_num_threads(1)
    rates: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            begin = time.process_time()
            rate = work() / (time.process_time() - begin)
            if turn:  # the first warms up
                rates[name].append(rate)
    return {name: statistics.median(found) for name, found in rates.items()}


def with_workers(loader: Loader[Batch], workers: int, num_batches: int) -> float:
    """(e): images per second, from when all workers have filled what they keep ready."""
    batches = iter(loader)
    take(batches, 3 * workers)
    begin = time.perf_counter()
    return take(batches, num_batches) / (time.perf_counter() - begin)


if __name__ == "__main__":
    main()
