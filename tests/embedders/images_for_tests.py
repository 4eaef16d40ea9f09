"""Small synthetic photographs: smooth colour, shapes and texture, so that JPEG and crops treat them as photographs."""

import io

import numpy as np
from PIL import Image


def photo(seed: int, width: int = 96, height: int = 72) -> Image.Image:
    draw = np.random.default_rng(seed)
    layers = []
    for side in (3, 8, 20):
        noise = draw.integers(0, 256, (side, side, 3), dtype=np.uint8)
        layers.append(np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC), dtype=float))
    return Image.fromarray(np.clip(0.5 * layers[0] + 0.35 * layers[1] + 0.15 * layers[2], 0, 255).astype(np.uint8))


def saved(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
