"""Procedurally drawn pictures of a small photographic world: twenty visual concepts, and copies as the web makes them.

Each picture has its own layout, colours, light and grain, drawn from a generator keyed by (seed, concept, index). What
is painted is in `demo_scenes`; light, lens and grain, common to all, are here.
"""

import io
import math
import zlib

import numpy as np
from PIL import Image, ImageFilter

from pipelines.demo_brushes import Array, Random, noise, to_bytes
from pipelines.demo_scenes import PAINTERS

CONCEPTS = tuple(PAINTERS)
"""What there are pictures of, the commonest of the demo's web first."""

COPY_KINDS = ("recompressed", "cropped", "resized", "brightness")


def draw(concept: str, index: int, seed: int) -> bytes:
    """A picture of `concept` as JPEG, sides of 160 to 320 pixels. The same bytes for the same arguments and Pillow."""
    rng = np.random.default_rng([seed, zlib.crc32(concept.encode()), index])
    w = int(rng.integers(224, 321))
    h = max(160, int(w / rng.uniform(1.0, 1.6)))
    if rng.random() < 0.3:
        w, h = h, w
    return _photograph(rng, PAINTERS[concept](rng, h, w))


def make_copy(data: bytes, kind: str, rng: Random) -> bytes:
    """A near-copy of an image, as JPEG.

    Args:
        data: the image's bytes.
        kind: one of COPY_KINDS. `recompressed`: JPEG quality 30 to 70; `cropped`: 5 to 20 % of the area cut away;
            `resized`: sides scaled by 0.5 to 0.85 or 1.2 to 1.6; `brightness`: scaled by 0.7 to 0.85 or 1.15 to 1.3.
        rng: where the amounts are drawn from.
    """
    with Image.open(io.BytesIO(data)) as opened:
        image = opened.convert("RGB")
    (w, h), quality, larger = image.size, int(rng.integers(80, 93)), rng.random() < 0.5
    if kind == "recompressed":
        quality = int(rng.integers(30, 71))
    elif kind == "cropped":
        side = math.sqrt(1 - rng.uniform(0.05, 0.2))
        cw, ch = round(w * side), round(h * side)
        left, top = int(rng.integers(w - cw + 1)), int(rng.integers(h - ch + 1))
        image = image.crop((left, top, left + cw, top + ch))
    elif kind == "resized":
        scale = rng.uniform(1.2, 1.6) if larger else rng.uniform(0.5, 0.85)
        image = image.resize((round(w * scale), round(h * scale)), Image.Resampling.BICUBIC)
    elif kind == "brightness":
        factor = rng.uniform(1.15, 1.3) if larger else rng.uniform(0.7, 0.85)
        image = image.point([min(255, round(value * factor)) for value in range(256)] * 3)
    else:
        raise ValueError(f"no kind of copy: {kind}")
    return jpeg(image, quality)


def jpeg(image: Image.Image, quality: int) -> bytes:
    """The image as JPEG."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return out.getvalue()


def _photograph(rng: Random, scene: Array) -> bytes:
    """Uneven light, white balance, grain and a lens that is not quite sharp, over a painted scene."""
    h, w = scene.shape[:2]
    light = (0.72 + 0.5 * noise(rng, h, w, 2, 2, 1)) * rng.uniform(0.85, 1.1)
    scene = scene * (light[..., None] * rng.uniform(0.92, 1.08, 3).astype(np.float32))
    scene += ((rng.random((h, w), np.float32) - 0.5) * rng.uniform(0.03, 0.12))[..., None]
    image = Image.fromarray(to_bytes(scene)).filter(ImageFilter.BoxBlur(rng.uniform(0.3, 0.6)))
    return jpeg(image, int(rng.integers(75, 96)))
