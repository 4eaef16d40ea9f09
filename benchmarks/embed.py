"""Images per second of the embed stage, next to the model's own limit and to the usual way with transformers.

    python -m benchmarks.embed --photos photos350.parquet [--model small] [--repeats 3]

One run measures, in turn and several times over, and prints medians:
(a) the forward pass alone on ready tensors, ours and transformers' with the same weights, in float32 and bfloat16;
(b) decoding and resizing alone, one core, and a bare Pillow loop that does the same;
(c) the stage end to end, with Ray, a worker a core, from Parquet to Parquet;
(d) the way one would write it with transformers: its image processor, AutoModel, float32, batches of 32, no overlap.
The limit of (c) on a CPU is 1 / (seconds of a forward pass on all cores + seconds of a decode / cores), on a GPU the
smaller of the two rates. Weights are random: they change no time.
"""

import argparse
import dataclasses
import hashlib
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from benchmarks.measure import machine
from curation import schemas
from curation.hashing import image_id
from curation.manifest import Origin
from curation.shards import PartWriter, ShardSet
from embedders import checkpoints
from embedders.base import Runtime
from embedders.load import load_embedder, resolve_runtime
from embedders.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from embedders.vit import VARIANTS, VisionTransformer
from pipelines.embed import BATCH_SIZES, EmbedUnit
from pipelines.executor import open_executor
from pipelines.progress import quiet
from pipelines.recipe import EmbedderSettings
from pipelines.unit import run_unit

PREPROCESSING = Preprocessing(resize=256, crop=(224, 224), resample=3, mean=IMAGENET_MEAN, std=IMAGENET_STD)
TRANSFORMERS_BATCH = 32
PART_ROWS = 175


def rate(work: Callable[[], int]) -> float:
    """Images per second of one call, which returns how many there were."""
    begin = time.perf_counter()
    images = work()
    return images / (time.perf_counter() - begin)


def median_rates(works: dict[str, Callable[[], int]], repeats: int) -> dict[str, float]:
    """Medians of rates taken in turn, after one call each that warms up and is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            found = rate(work)
            if turn:
                taken[name].append(found)
    return {name: statistics.median(values) for name, values in taken.items()}


def make_models(size: str, folder: Path) -> tuple[Path, Path]:
    """One random network as a file of ours and as a transformers directory."""
    torch.manual_seed(0)
    network = VisionTransformer(dataclasses.replace(VARIANTS[size], interpolation="hf"), layer_scale=1.0)
    ours, theirs = folder / "model.safetensors", folder / "transformers"
    checkpoints.save_vit(network, ours, PREPROCESSING)
    checkpoints.save_transformers(network, theirs, PREPROCESSING)
    return ours, theirs


def read_images(place: str, limit: int) -> list[bytes]:
    """Bytes of the images in a Parquet file's column `image`."""
    images: list[bytes] = pq.read_table(place, columns=["image"])["image"].slice(0, limit).to_pylist()
    return images


def copies(images: list[bytes], count: int) -> list[bytes]:
    """`count` files, repeated as needed, each made distinct by bytes that follow the picture."""
    return [images[n % len(images)] + n.to_bytes(4, "little") for n in range(count)]


def write_source(folder: Path, images: list[bytes]) -> tuple[str, str]:
    """The images as sets that the stage takes: images, and a filter's verdicts that keep all."""
    parts = [images[start : start + PART_ROWS] for start in range(0, len(images), PART_ROWS)]
    for kind, schema in (("images", schemas.IMAGES), ("filtered", schemas.FILTERED)):
        shard_set = ShardSet(str(folder / kind))
        origin = Origin(kind, "benchmark", 1, {"images": len(images)}, (), {"source": "photos", "role": "pool"})
        shard_set.begin(origin)
        for number, part in enumerate(parts):
            columns: dict[str, list[Any]] = {"image_id": [image_id(data) for data in part], "image": part}
            columns |= {"row": list(range(len(part))), "kept": [True] * len(part), "format": ["jpeg"] * len(part)}
            columns |= {"width": [500] * len(part), "height": [500] * len(part)}  # which the stage does not look at
            table = pa.table({n: columns.get(n, [None] * len(part)) for n in schema.names}, schema=schema)
            with PartWriter(shard_set.uri, number, schema, origin.fingerprint) as writer:
                writer.write(table, row_group_size=64)
        shard_set.finish(origin, len(parts), {})
    return str(folder / "images"), str(folder / "filtered")


def forward_ours(model: Path, device: str, precision: str, threads: int, batch: npt.NDArray[np.uint8]) -> Any:
    """A function that runs our forward pass, compiled, and returns how many images went through."""
    runtime = resolve_runtime(f"vit:{model}", device, precision, threads, "auto")
    embedder = load_embedder(f"vit:{model}", runtime)
    ready = embedder.upload(batch)
    return lambda: len(embedder.embed(ready))


def open_transformers(folder: Path, device: str) -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder).eval().to(device)


def forward_transformers(folder: Path, device: str, precision: str, batch: npt.NDArray[np.uint8]) -> Any:
    """The same for transformers; in bfloat16 all of the network is, which is faster than autocast."""
    model = open_transformers(folder, device)
    images = torch.from_numpy(batch).to(device).permute(0, 3, 1, 2).float() / 255
    if precision == "bfloat16":
        model, images = model.bfloat16(), images.bfloat16()

    def forward() -> int:
        with torch.inference_mode():
            return len(model(pixel_values=images).last_hidden_state[:, 0].float().cpu())

    return forward


def with_transformers(folder: Path, images: list[bytes], device: str) -> Callable[[], int]:
    """(d): as in its documentation."""
    from transformers import AutoImageProcessor

    opened: Any = AutoImageProcessor
    processor, model = opened.from_pretrained(folder), open_transformers(folder, device)

    def embed() -> int:
        for start in range(0, len(images), TRANSFORMERS_BATCH):
            pictures = [
                Image.open(io.BytesIO(data)).convert("RGB") for data in images[start : start + TRANSFORMERS_BATCH]
            ]
            with torch.inference_mode():
                inputs = processor(images=pictures, return_tensors="pt").to(device)
                model(**inputs).last_hidden_state[:, 0].cpu().numpy()
        return len(images)

    return embed


def bare_pillow(images: list[bytes]) -> int:
    """(b)'s yardstick: the whole image decoded, its shorter side brought to 256, the centre cut out."""
    for data in images:
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        scale = 256 / min(picture.size)
        width, height = (round(side * scale) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - 224) // 2, (height - 224) // 2
        np.asarray(picture.crop((left, top, left + 224, top + 224)))
    return len(images)


class Stage:
    """(c): the stage over a small and a large source; both pay for starting up, so the difference tells the rate."""

    def __init__(
        self, folder: Path, model: Path, device: str, workers: int, images: list[bytes], sizes: list[int]
    ) -> None:
        self.settings = EmbedderSettings(model=f"vit:{model}", device=device)  # type: ignore[arg-type]
        self.folder, self.workers = folder, workers
        self.sources = {n: write_source(folder / f"photos-{n}", copies(images, n)) for n in sizes}

    def seconds(self, size: int) -> float:
        """Wall-clock seconds of one run from nothing, Ray's start included."""
        out = self.folder / f"embeddings-{hashlib.sha256(os.urandom(8)).hexdigest()[:8]}"
        begin = time.perf_counter()
        executor = open_executor(self.workers, None, local=False)
        try:
            run_unit(EmbedUnit("photos", self.settings, *self.sources[size], str(out)), executor, quiet())
        finally:
            executor.close()
        assert ShardSet(str(out)).num_rows == size
        return time.perf_counter() - begin


def worst_cosine(model: Path, device: str, threads: int, inputs: npt.NDArray[np.uint8]) -> float:
    """The lowest cosine between an image's vectors in bfloat16, compiled, and in float32, not compiled."""
    runtimes = (
        Runtime(device, "float32", threads, False),
        resolve_runtime(f"vit:{model}", device, "bfloat16", threads, True),
    )
    full, half = (_vectors(model, runtime, inputs) for runtime in runtimes)
    return float((np.sum(full * half, axis=1) / np.linalg.norm(full, axis=1) / np.linalg.norm(half, axis=1)).min())


def _vectors(model: Path, runtime: Runtime, inputs: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    embedder = load_embedder(f"vit:{model}", runtime)
    batch = BATCH_SIZES["cpu"]
    pieces = [embedder.embed(embedder.upload(inputs[n : n + batch])) for n in range(0, len(inputs) - batch + 1, batch)]
    return np.concatenate(pieces).astype(np.float64)


def matmul_rate(device: str, precision: str) -> float:
    """FLOP a second of a product of the size that the network has most of, the best of ten."""
    dtype = getattr(torch, precision)
    rows, width = BATCH_SIZES[device] * 257, 1024
    x, w = (
        torch.randn(rows, width, device=device, dtype=dtype),
        torch.randn(4 * width, width, device=device, dtype=dtype),
    )
    best = float("inf")
    for _ in range(10):
        begin = time.perf_counter()
        with torch.inference_mode():
            torch.nn.functional.linear(x, w)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 2 * rows * width * 4 * width / best


def flops_per_image(size: str) -> float:
    """Of our network's matrix products for one image of 224 pixels; the last block only makes keys and values."""
    config = VARIANTS[size]
    tokens = 1 + (224 // config.patch_size) ** 2
    ffn = 3 * config.hidden if config.ffn == "swiglu" else 2 * config.hidden
    linear = config.dim * (4 * config.dim + ffn)
    return 2.0 * tokens * ((config.depth - 1) * (linear + 2 * tokens * config.dim) + 2 * config.dim**2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", required=True, help="a Parquet file with a column image")
    parser.add_argument("--model", default="small", choices=sorted(VARIANTS))
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", type=int, default=350, help="of the photos, so many")
    parser.add_argument("--stage", type=int, nargs=2, default=[350, 1750], help="images of the stage's two runs")
    options = parser.parse_args()
    images = read_images(options.photos, options.images)
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), images, options)


def measure(folder: Path, images: list[bytes], options: argparse.Namespace) -> None:
    """Everything in one run; prints as it goes."""
    cores = os.cpu_count() or 1
    ours, theirs = make_models(options.model, folder)
    chosen = resolve_runtime(f"vit:{ours}", options.device, "auto", cores, "auto")
    device, precision = chosen.device, chosen.precision
    batch_size = BATCH_SIZES[device]
    print(f"{machine()}, torch {torch.__version__}, {device}, ViT {options.model}, batches of {batch_size}")
    pixels = np.stack([PREPROCESSING.pixels(data) for data in images])
    batch = np.resize(pixels, (batch_size, *pixels.shape[1:]))

    works: dict[str, Callable[[], int]] = {}
    for kind in dict.fromkeys(("float32", precision)):
        works[f"ours {kind}"] = forward_ours(ours, device, kind, cores, batch)
        works[f"transformers {kind}"] = forward_transformers(theirs, device, kind, batch)
    rates = median_rates(works, options.repeats * 3)
    for kind in dict.fromkeys(("float32", precision)):
        mine, other = rates[f"ours {kind}"], rates[f"transformers {kind}"]
        share = mine * flops_per_image(options.model) / matmul_rate(device, kind)
        print(
            f"(a) forward {kind:9s} {mine:8.1f} images/s, transformers {other:8.1f}: {mine / other:.2f} times; "
            f"{share:.2f} of the {kind} matmul rate"
        )
    print(f"    lowest cosine of {precision} to float32: {worst_cosine(ours, device, cores, pixels[:64]):.5f}")

    decode = median_rates({"ours": lambda: _decode(images), "bare": lambda: bare_pillow(images)}, options.repeats)
    print(
        f"(b) decode+resize, one core {decode['ours']:8.1f} images/s, bare Pillow {decode['bare']:8.1f}: "
        f"{decode['ours'] / decode['bare']:.2f} times"
    )

    stage = Stage(folder, ours, options.device, cores, images, options.stage)
    stage.seconds(min(options.stage))  # fills the compiler's cache
    usual = with_transformers(theirs, images[: 3 * TRANSFORMERS_BATCH], device)
    usual()
    small, large = sorted(options.stage)
    stage_rates, whole, usual_rates = [], [], []
    for _ in range(options.repeats):
        first, second = stage.seconds(small), stage.seconds(large)
        stage_rates.append((large - small) / (second - first))
        whole.append(large / second)
        usual_rates.append(rate(usual))
    c, d = statistics.median(stage_rates), statistics.median(usual_rates)
    a, b = rates[f"ours {precision}"], decode["ours"]
    limit = 1 / (1 / a + 1 / (b * cores)) if device == "cpu" else min(a, b * cores)
    print(
        f"(c) the stage {c:8.1f} images/s ({statistics.median(whole):.1f} with start-up, {large} images); "
        f"limit {limit:.1f}: {c / limit:.2f} of it"
    )
    print(f"(d) transformers, float32, as usual {d:8.1f} images/s: (c) is {c / d:.2f} times that")


def _decode(images: list[bytes]) -> int:
    for data in images:
        PREPROCESSING.pixels(data)
    return len(images)


if __name__ == "__main__":
    main()
