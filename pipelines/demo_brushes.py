"""The brushes that the painters of the demo's scenes share: noise, colours, blending, skies, discs.

Scenes are float32 [h, w, 3] in 0..1 and may overshoot a little; what is drawn at random comes from the generator given.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from PIL import Image

Array = npt.NDArray[np.floating]
Random = np.random.Generator
Colour = tuple[float, float, float]


def to_bytes(scene: Array) -> npt.NDArray[np.uint8]:
    """A scene as a picture of bytes, uint8 [h, w, 3]; what overshoots is cut."""
    return (np.clip(scene, 0, 1) * 255).astype(np.uint8)


def to_floats(image: Image.Image) -> Array:
    """The inverse of `to_bytes`, float32 [h, w, 3], from an image."""
    return np.asarray(image, np.float32) / 255


def grid(h: int, w: int) -> tuple[Array, Array]:
    """Coordinates y [h, 1] from 0 to 1 and x [1, w] in the same unit, the picture's height."""
    return (np.arange(h, dtype=np.float32) / h)[:, None], (np.arange(w, dtype=np.float32) / h)[None, :]


def noise(rng: Random, h: int, w: int, across: float, down: float, octaves: int = 4) -> Array:
    """Fractal value noise float32 [h, w], stretched to 0..1; `across` and `down` are cells of the coarsest octave."""
    total = np.zeros((h, w), np.float32)
    for octave in range(octaves):
        size = [max(2, min(limit, round(n * 2**octave))) for limit, n in ((h, down), (w, across))]
        cells = Image.fromarray(rng.random(size, np.float32) * 0.55**octave)
        total += np.asarray(cells.resize((w, h), Image.Resampling.BICUBIC))
    low, high = float(total.min()), float(total.max())
    return (total - low) / (high - low)


def skyline(rng: Random, w: int, cells: float, octaves: int = 4) -> Array:
    """A skyline: noise float32 [1, w] in 0..1."""
    return noise(rng, 1, w, cells, 1, octaves)


def pick(rng: Random, *colours: Colour, spread: float = 0.08) -> Array:
    """A colour float32 [3] near one of those given."""
    return (np.array(colours[rng.integers(len(colours))]) + rng.uniform(-spread, spread, 3)).astype(np.float32)


def rgb(colour: Array) -> tuple[int, int, int]:
    """A colour [3] as Pillow takes it."""
    r, g, b = to_bytes(colour).tolist()
    return r, g, b


def step(value: Array, softness: float = 0.01) -> Array:
    """0 below zero, 1 above `softness`, straight between."""
    ramp: Array = np.clip(value / softness, 0, 1)
    return ramp


def blend(under: Array, over: Array, alpha: Array) -> Array:
    """`over` laid on `under` where alpha is 1: colours [3] or pictures [h, w, 3], alpha [h, w], [h, 1] or [1, w]."""
    mixed = (over - under) * alpha[..., None]
    mixed += under
    return mixed


def daylight(rng: Random, h: int, w: int) -> Array:
    """A daylight sky with some cloud."""
    top = pick(rng, (0.2, 0.42, 0.78), (0.35, 0.55, 0.85), (0.55, 0.65, 0.75))
    sky = blend(top, pick(rng, (0.82, 0.88, 0.92)), np.clip(grid(h, w)[0] * 1.4, 0, 1))
    return blend(sky, pick(rng, (0.95, 0.95, 0.95)), step(noise(rng, h, w, 2, 4, 3) - rng.uniform(0.4, 0.8), 0.4))


def discs(
    rng: Random, scene: Array, radii: Array, margin: float = 0, below: float = 1.2
) -> Iterator[tuple[Array, Array, Array]]:
    """Discs at random places: the part of the scene around each, and its coordinates dy [n, 1], dx [1, m] in radii.

    Centres keep `margin` of height and width away from the edges; parts reach `below` radii down.
    """
    h, w = scene.shape[:2]
    for radius in radii.tolist():
        cy, cx = rng.uniform(margin, 1 - margin) * h, rng.uniform(margin, 1 - margin) * w
        top, left = max(0, int(cy - 1.2 * radius)), max(0, int(cx - 1.2 * radius))
        part = scene[top : int(cy + below * radius) + 1, left : int(cx + 1.2 * radius) + 1]
        y, x = np.arange(top, top + part.shape[0])[:, None], np.arange(left, left + part.shape[1])[None, :]
        yield part, ((y - cy) / radius).astype(np.float32), ((x - cx) / radius).astype(np.float32)
