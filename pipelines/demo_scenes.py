"""The scenes of the demo's pictures: one painter for each of twenty visual concepts.

A painter returns a scene, float32 [h, w, 3] in 0..1 (it may overshoot a little), with a layout and colours of its own.
Those of one concept look alike but are no copies of each other. The file is long because the world is: a painter a
concept, in the order of `PAINTERS`, each a dozen lines that nothing else knows of.
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from pipelines.demo_brushes import (
    Array,
    Random,
    blend,
    daylight,
    discs,
    grid,
    noise,
    pick,
    rgb,
    skyline,
    step,
    to_bytes,
    to_floats,
)

Painter = Callable[[Random, int, int], Array]


def _clouds(rng: Random, h: int, w: int) -> Array:
    blue = pick(rng, (0.15, 0.38, 0.75), (0.3, 0.52, 0.85), (0.42, 0.5, 0.62), (0.1, 0.25, 0.6))
    scene = blend(blue, pick(rng, (0.65, 0.78, 0.9), (0.85, 0.75, 0.7)), grid(h, w)[0] * rng.uniform(0.2, 1))
    rise = h // 20
    tall = noise(rng, h + rise, w, rng.uniform(1.5, 5), rng.uniform(2, 6), 6)
    cover, below = tall[:h], tall[rise:]
    alpha = step(cover - rng.uniform(0.2, 0.5), rng.uniform(0.1, 0.35))
    light = np.clip(0.92 + 1.5 * (cover - below), 0.45, 1.1)
    return blend(scene, light[..., None] * pick(rng, (0.97, 0.95, 0.94), (0.75, 0.76, 0.8), (0.95, 0.82, 0.7)), alpha)


def _mountains(rng: Random, h: int, w: int) -> Array:
    y, _ = grid(h, w)
    scene, haze = daylight(rng, h, w), pick(rng, (0.72, 0.79, 0.88))
    rock = pick(rng, (0.3, 0.3, 0.33), (0.38, 0.3, 0.24), (0.2, 0.28, 0.22))
    count, snow = int(rng.integers(2, 5)), rng.uniform(-0.02, 0.22)
    relief = noise(rng, h, w, 7, 7)
    shade = (0.55 + 2.2 * (relief - np.roll(relief, 4, 1)) + 0.4 * relief)[..., None]
    for layer in range(count):
        line = (
            rng.uniform(0.05, 0.25)
            + 0.7 * layer / count
            + skyline(rng, w, rng.uniform(1.5, 4), 5) * rng.uniform(0.15, 0.4)
        )
        depth, near = y - line, (layer + 1) / count
        colour: Array = (haze + (rock * (1.4 - 0.6 * near) - haze) * (0.25 + 0.75 * near)) * (0.5 + shade)
        if layer < count - 1 or count == 2:
            colour = blend(colour, 0.6 + 0.45 * shade, step(snow + 0.2 * (relief - 0.5) - depth, 0.02))
        scene = blend(scene, colour, step(depth))
    return scene


def _sunset_sea(rng: Random, h: int, w: int) -> Array:
    y, x = grid(h, w)
    horizon, sun_x = rng.uniform(0.45, 0.72), rng.uniform(0.15, 0.85) * w / h
    sun_y, radius = horizon - rng.uniform(0.02, 0.3), rng.uniform(0.03, 0.075)
    glow = pick(rng, (1, 0.62, 0.2), (1, 0.45, 0.25), (1, 0.75, 0.45))
    top = pick(rng, (0.2, 0.15, 0.4), (0.45, 0.2, 0.35), (0.15, 0.3, 0.5))
    fade = np.clip(1 - 1.2 * np.abs(y - horizon) / horizon, 0, 1)
    clouds = step(noise(rng, h, w, 2, 7) - rng.uniform(0.45, 0.7), 0.3) * rng.uniform(0.3, 0.9)
    sky = blend(blend(top, glow, fade), pick(rng, (0.85, 0.4, 0.35)), clouds)
    distance = np.hypot(x - sun_x, y - sun_y)
    sky = blend(sky, pick(rng, (1, 0.93, 0.7)), np.maximum(step(radius - distance), 0.8 * np.exp(-5 * distance)))
    coast = horizon - rng.uniform(0, 0.35) * (skyline(rng, w, rng.uniform(1, 3), 4) - rng.uniform(0.3, 0.7))
    sky = blend(sky, top * 0.4 + glow * 0.15, step(y - coast))
    ripple = noise(rng, h, w, 5, 45, 2)
    glint = np.exp(-(((x - sun_x) / (0.05 + 0.5 * np.maximum(y - horizon, 0))) ** 2)) * (ripple > 0.45)
    sea = blend(blend(top * 0.5, glow * 0.75, fade * ripple), glow * 1.1, glint)
    return blend(sky, sea, step(y - horizon))


def _forest(rng: Random, h: int, w: int) -> Array:
    y, _ = grid(h, w)
    mist = pick(rng, (0.62, 0.7, 0.5), (0.55, 0.65, 0.62), (0.75, 0.72, 0.45))
    leaf = pick(rng, (0.12, 0.3, 0.1), (0.2, 0.36, 0.1), (0.1, 0.25, 0.15))
    foliage = noise(rng, h, w, 5, 5, 5)
    image = Image.fromarray(to_bytes(blend(mist, leaf, np.clip(1.6 * foliage - 0.3, 0, 1))))
    pen, bark, floor = ImageDraw.Draw(image), pick(rng, (0.2, 0.16, 0.12)), rng.uniform(0.7, 0.95)
    for near in np.linspace(0, 1, rng.integers(7, 22)).tolist():
        foot, crown = rng.uniform(0, w), rng.normal(0, 0.04 * w)
        low = (1 + 11 * near**2 * rng.uniform(0.5, 1.4)) * w / 240
        high, base = low * 0.6, h * (floor + (1.05 - floor) * near)
        trunk = [(foot - low, base), (foot + low, base), (foot + crown + high, 0), (foot + crown - high, 0)]
        pen.polygon(trunk, rgb(mist + (bark - mist) * (0.25 + 0.75 * near)))
    scene = to_floats(image) * (0.75 + 0.5 * noise(rng, h, w, 40, 6, 2))[..., None]
    ground = blend(leaf * 0.7, pick(rng, (0.4, 0.28, 0.14), (0.25, 0.42, 0.12)), noise(rng, h, w, 8, 20, 3))
    return blend(scene, ground, np.clip((y - floor) * 5 + foliage - 0.5, 0, 1) * 0.85)


def _meadow(rng: Random, h: int, w: int) -> Array:
    horizon = rng.uniform(0.15, 0.55)
    grass = pick(rng, (0.3, 0.5, 0.12), (0.45, 0.55, 0.2), (0.2, 0.42, 0.15), (0.55, 0.55, 0.25))
    field = blend(grass * 0.55, grass * 1.3, noise(rng, h, w, 45, 9, 2) * 0.7 + 0.3 * noise(rng, h, w, 2, 4, 3))
    land = step(grid(h, w)[0] - horizon - 0.08 * skyline(rng, w, 2, 2))
    image = Image.fromarray(to_bytes(blend(daylight(rng, h, w), field, land)))
    pen, petals = ImageDraw.Draw(image), ((0.95, 0.85, 0.2), (0.9, 0.2, 0.2), (0.95, 0.95, 0.95), (0.6, 0.4, 0.85))
    colours = [rgb(pick(rng, *petals)) for _ in range(2)]
    for _ in range(int(rng.integers(0, 5))):
        x, size = rng.uniform(0, w), rng.uniform(0.05, 0.2) * h
        y, shade = h * (horizon + 0.04) - size, rgb(grass * rng.uniform(0.3, 0.7))
        pen.line((x, y, x, y + 1.5 * size), rgb(pick(rng, (0.2, 0.15, 0.1))), int(size / 6) + 1)
        for dx, dy in rng.uniform(-0.5, 0.5, (9, 2)) * size:
            pen.ellipse((x + dx - size / 2, y + dy - size / 2, x + dx + size / 2, y + dy + size / 2), shade)
    for spot in range(int(rng.integers(40, 260))):
        near, x = rng.random() ** 1.5, rng.uniform(0, w)
        y, size = h * (horizon + 0.1 + (0.9 - horizon) * near), 0.6 + 4 * near * rng.uniform(0.5, 1)
        pen.ellipse((x - size, y - size * 0.8, x + size, y + size * 0.8), colours[spot % 2])
    return to_floats(image)


def _brick_wall(rng: Random, h: int, w: int) -> Array:
    y, x = grid(h, w)
    rows, joint = rng.uniform(6, 17), rng.uniform(0.05, 0.11)
    v = (y + rng.uniform(-0.12, 0.12) * x) * rows * (1 + rng.uniform(-0.1, 0.1) * x) + 5
    u = x * (rows / rng.uniform(2.2, 3.2)) + rng.uniform(-0.1, 0.1) * y + 0.5 * (np.floor(v) % 2) + 3
    row, column = np.floor(v).astype(int) % 41, np.floor(u).astype(int) % 43
    worn = 0.75 + 0.5 * noise(rng, h, w, 4, 4, 5)[..., None]
    clay = pick(rng, (0.6, 0.27, 0.2), (0.68, 0.42, 0.28), (0.72, 0.68, 0.62), (0.42, 0.3, 0.28), (0.78, 0.62, 0.4))
    brick = clay * rng.uniform(0.65, 1.25, (41, 43, 1)).astype(np.float32)[row, column]
    inside = step(0.5 - joint - np.abs(v % 1 - 0.5), 0.05) * step(0.5 - joint / 2.5 - np.abs(u % 1 - 0.5), 0.03)
    wall = blend(pick(rng, (0.7, 0.68, 0.64), (0.45, 0.42, 0.4), (0.85, 0.83, 0.8)), brick, inside)
    if rng.random() < 0.5:
        plaster = pick(rng, (0.8, 0.77, 0.7), (0.25, 0.4, 0.15), (0.6, 0.6, 0.62))
        wall = blend(wall, plaster, step(noise(rng, h, w, 1.5, 1.5) - rng.uniform(0.55, 0.75), 0.03))
    shadow = step(x * rng.uniform(-2, 2) + y * rng.uniform(-2, 2) + rng.uniform(-1, 1), 0.05)
    light: Array = worn * (1 - rng.uniform(0, 0.55) * shadow)[..., None]
    return wall * light


def _night_city(rng: Random, h: int, w: int) -> Array:
    shore = int(h * rng.uniform(0.65, 0.85)) if rng.random() < 0.6 else h
    dark = pick(rng, (0.03, 0.04, 0.12), (0.1, 0.05, 0.15), (0.05, 0.1, 0.18), spread=0.02)
    glow = pick(rng, (0.5, 0.25, 0.2), (0.2, 0.2, 0.45), (0.55, 0.4, 0.15))
    scene = blend(dark, glow, np.clip(grid(h, w)[0] * h / shore, 0, 1) ** 2 * (0.3 + 0.7 * skyline(rng, w, 2, 1)))
    light = pick(rng, (1, 0.85, 0.5), (0.85, 0.9, 1), (1, 0.7, 0.35))
    for _ in range(int(rng.integers(7, 17))):
        left, pitch = int(rng.uniform(-0.1, 0.95) * w), int(rng.integers(4, 10))
        house = scene[
            int(shore * rng.uniform(0.12, 0.8)) : shore, max(left, 0) : left + int(rng.uniform(0.07, 0.22) * w)
        ]
        y, x = np.arange(house.shape[0])[:, None], np.arange(house.shape[1])[None, :]
        lit = (rng.random((80, 80), np.float32) ** rng.uniform(1, 4))[y // pitch % 80, x // (pitch - 1) % 80]
        lit *= (y % pitch >= 2) & (x % (pitch - 1) >= 2)
        house[:] = pick(rng, (0.05, 0.05, 0.09), spread=0.04) + light * lit[..., None]
    if shore < h:
        depth = np.arange(h - shore)[:, None]
        wave = (np.arange(w)[None, :] + 3 * np.sin(depth * rng.uniform(0.4, 0.9))).astype(int) % w
        mirror = scene[np.maximum(shore - 1 - 2 * depth, 0), wave]
        scene[shore:] = mirror * (0.25 + 0.5 * noise(rng, h - shore, w, 6, 12, 2))[..., None]
    return scene


def _road(rng: Random, h: int, w: int) -> Array:
    y, x = grid(h, w)
    horizon, vanish = rng.uniform(0.3, 0.6), rng.uniform(0.25, 0.75) * w / h
    near = np.maximum(y - horizon, 0) / (1 - horizon)
    centre = vanish + rng.uniform(-0.4, 0.4) * near + rng.uniform(-0.5, 0.5) * near**2
    across = np.abs(x - centre) / (rng.uniform(0.3, 0.7) * near + 0.004)
    land = pick(rng, (0.35, 0.45, 0.18), (0.7, 0.52, 0.32), (0.85, 0.87, 0.9), (0.5, 0.45, 0.3))
    asphalt = pick(rng, (0.3, 0.3, 0.32)) * (0.8 + 0.3 * noise(rng, h, w, 40, 40, 2))[..., None]
    scene = blend(land * (0.6 + 0.6 * noise(rng, h, w, 10, 25))[..., None], asphalt, step(1 - across, 0.03))
    dashes = np.sin(rng.uniform(3, 7) / (near + 0.06) + rng.uniform(0, 6)) > -0.2
    lines = ((across < 0.035) & dashes) | (np.abs(across - 0.9) < 0.025)
    scene = blend(scene, pick(rng, (0.92, 0.92, 0.9), (0.95, 0.75, 0.15)), lines.astype(np.float32))
    hills = horizon - rng.uniform(0.02, 0.25) * skyline(rng, w, rng.uniform(1, 4), 3)
    sky = blend(daylight(rng, h, w), 0.3 * land + 0.5 * pick(rng, (0.5, 0.6, 0.7)), step(y - hills))
    return blend(sky, scene, step(y - horizon))


def _wood_planks(rng: Random, h: int, w: int) -> Array:
    upright = rng.random() < 0.5
    h, w = (w, h) if upright else (h, w)
    y, x = grid(h, w)
    base = pick(rng, (0.6, 0.4, 0.22), (0.42, 0.26, 0.15), (0.72, 0.56, 0.36), (0.5, 0.47, 0.43))
    v = y * rng.uniform(3, 8) + rng.uniform(-0.15, 0.15) * x + rng.random()
    plank = np.floor(v).astype(int) % 16
    rings = np.sin((noise(rng, h, w, 1.5, 9, 3) + 0.9 * rng.random(16, np.float32)[plank]) * rng.uniform(40, 80))
    tone = (0.6 + 0.6 * rng.random(16, np.float32))[plank] + 0.1 * rings + 0.25 * (noise(rng, h, w, 4, 70, 2) - 0.5)
    scene: Array = base * (tone * (0.25 + 0.75 * step(0.49 - np.abs(v % 1 - 0.5), 0.05)))[..., None]
    return scene.swapaxes(0, 1) if upright else scene


def _pool_water(rng: Random, h: int, w: int) -> Array:
    deep = pick(rng, (0.02, 0.35, 0.55), (0.05, 0.5, 0.6), (0.05, 0.3, 0.4), (0.1, 0.4, 0.3))
    cells = rng.uniform(3, 8)
    caustic = sum((1 - np.abs(2 * noise(rng, h, w, cells, cells * 1.5, 2) - 1)) ** 5 for _ in range(2))
    tone = blend(deep, deep + 0.3, noise(rng, h, w, 2, 2, 2) * grid(h, w)[0] * rng.uniform(0.3, 1.2))
    return blend(tone, pick(rng, (0.75, 0.97, 0.97)), np.clip(caustic, 0, 1.3) * rng.uniform(0.4, 0.75))


def _dunes(rng: Random, h: int, w: int) -> Array:
    y, _ = grid(h, w)
    scene = daylight(rng, h, w)
    sand = pick(rng, (0.85, 0.6, 0.35), (0.8, 0.45, 0.25), (0.9, 0.78, 0.58))
    side, count, start = int(rng.choice([-1, 1])), int(rng.integers(3, 7)), rng.uniform(0.05, 0.5)
    wind = np.sin((y * rng.uniform(90, 150) + 12 * noise(rng, h, w, 3, 3, 2)) * (0.6 + 0.6 * y))
    for layer in range(count):
        ridge = rng.uniform(0.08, 0.35) * skyline(rng, w, rng.uniform(0.7, 3), 1)
        slope = np.gradient(ridge[0]) * (side * h / 2)
        depth = y - (start + (1 - start) * layer / count + ridge)
        lit = np.clip(0.75 + 0.9 * slope - 0.5 * np.clip(depth, 0, 0.5) * (slope < 0), 0.3, 1.15)
        scene = blend(scene, sand * (lit + 0.05 * wind + 0.1 * layer / count)[..., None], step(depth))
    return scene


def _pebbles(rng: Random, h: int, w: int) -> Array:
    image = Image.new("RGB", (w, h), rgb(pick(rng, (0.2, 0.17, 0.14))))
    pen, size = ImageDraw.Draw(image), rng.uniform(0.05, 0.11) * (h + w) / 2
    kinds = ((0.55, 0.53, 0.5), (0.35, 0.35, 0.37), (0.75, 0.7, 0.62), (0.5, 0.38, 0.3), (0.45, 0.5, 0.55))
    tones = [pick(rng, kinds[kind]) for kind in rng.choice(5, 24, p=rng.dirichlet(np.full(5, 0.6)))]
    lean_x, lean_y = rng.uniform(-0.5, 0.5, 2).tolist()
    for stone in range(int(0.8 * h * w / size**2)):
        a, b = (size * rng.uniform(0.5, 1.3, 2)).tolist()
        cx, cy = rng.uniform(0, w), rng.uniform(0, h)
        for scale, shade in ((1.12, 0.3), (1.0, 0.75), (0.8, 0.95), (0.45, 1.15)):
            x, y, dx, dy = cx + lean_x * (1 - scale) * a, cy + lean_y * (1 - scale) * b, a * scale, b * scale
            pen.ellipse((x - dx, y - dy, x + dx, y + dy), rgb(tones[stone % 24] * shade))
    return to_floats(image.filter(ImageFilter.BoxBlur(1))) * (0.7 + 0.5 * noise(rng, h, w, 20, 20, 3))[..., None]


def _autumn_leaves(rng: Random, h: int, w: int) -> Array:
    image = Image.new("RGB", (w, h), rgb(pick(rng, (0.2, 0.14, 0.08))))
    pen, size = ImageDraw.Draw(image), rng.uniform(0.1, 0.18) * (h + w) / 2
    hues = ((0.85, 0.45, 0.1), (0.75, 0.2, 0.1), (0.9, 0.7, 0.2), (0.5, 0.3, 0.12), (0.5, 0.55, 0.15))
    mix, angle = rng.dirichlet(np.full(5, 0.7)), np.linspace(0, 2 * np.pi, 30, endpoint=False)
    outline = (0.55 + 0.3 * np.abs(np.cos(2.5 * angle)) + 0.15 * np.cos(angle)) * np.exp(1j * angle)
    veins = 0.8 * np.exp(1j * np.array([-0.8, 0.0, 0.8]))
    for _ in range(int(1.7 * h * w / size**2)):
        colour = pick(rng, hues[rng.choice(5, p=mix)])
        place, turn = complex(rng.uniform(0, w), rng.uniform(0, h)), np.exp(1j * rng.uniform(0, 6.3))
        edge, *tips = (place + size * rng.uniform(0.6, 1.2) * turn * shape for shape in (outline, veins))
        for offset, shade in ((2 + 3j, 0.3), (0j, 1.0)):
            pen.polygon((edge + offset).view(float).tolist(), rgb(colour * shade))
        for tip in tips[0].tolist():
            pen.line((place.real, place.imag, tip.real, tip.imag), rgb(colour * 0.75))
    return to_floats(image) * (0.6 + 0.6 * noise(rng, h, w, 10, 10))[..., None]


def _starry_sky(rng: Random, h: int, w: int) -> Array:
    y, x = grid(h, w)
    dark = pick(rng, (0.02, 0.03, 0.1), (0.06, 0.03, 0.12), (0.02, 0.08, 0.12), spread=0.02)
    scene = blend(dark, pick(rng, (0.1, 0.15, 0.35), (0.3, 0.15, 0.25), (0.1, 0.3, 0.3)), y * 0.8)
    turn, wide = rng.uniform(-1.4, 1.4), rng.uniform(0.08, 0.25)
    across = (y - rng.uniform(0.2, 0.8)) * math.cos(turn) + (x - w / h / 2) * math.sin(turn)
    dust = np.exp(-((across / wide) ** 2)) * noise(rng, h, w, 5, 5, 5) * rng.uniform(0.4, 1)
    scene = blend(scene, pick(rng, (0.75, 0.7, 0.85)), dust)
    count = int(rng.integers(150, 700))
    row, column, shine = rng.integers(0, h, count), rng.integers(0, w, count), rng.pareto(1.5, (count, 1))
    scene[row, column] += np.clip(shine, 0.2, 2.5)
    scene[row, column - 1] += np.clip(shine - 1, 0, 1)
    return blend(scene, dark * 0.4, step(y - rng.uniform(0.7, 1) - 0.2 * skyline(rng, w, rng.uniform(1, 5), 5)))


def _checker_floor(rng: Random, h: int, w: int) -> Array:
    y, x = grid(h, w)
    horizon, cells, turn = rng.uniform(0.05, 0.5), rng.uniform(0.7, 2.2), rng.uniform(0, 1.57)
    depth = cells / np.maximum(y - horizon + 0.04, 0.02)
    across = (x - rng.uniform(0.2, 1)) * depth
    u, v = across * math.cos(turn) + depth * math.sin(turn), depth * math.cos(turn) - across * math.sin(turn)
    check = ((np.floor(u) + np.floor(v)) % 2 - 0.5) * np.clip(2.2 - depth / 9, 0, 1) + 0.5
    dark = pick(rng, (0.08, 0.08, 0.09), (0.35, 0.1, 0.08), (0.1, 0.2, 0.3), (0.2, 0.3, 0.2), spread=0.05)
    pale = pick(rng, (0.9, 0.88, 0.84), (0.85, 0.75, 0.6))
    floor = blend(dark, pale, check) * (0.7 + 0.45 * noise(rng, h, w, 3, 2, 3))[..., None]
    panels = 0.05 * step(np.sin(x * rng.uniform(8, 40)) - 0.9) + 0.55 + 0.4 * noise(rng, h, w, 2, 2, 2)
    wall = pick(rng, (0.75, 0.7, 0.6), (0.5, 0.58, 0.62), (0.7, 0.45, 0.35)) * panels[..., None]
    return blend(wall, floor, step(y - horizon))


def _citrus(rng: Random, h: int, w: int) -> Array:
    board = pick(rng, (0.85, 0.85, 0.83), (0.25, 0.45, 0.5), (0.45, 0.3, 0.18), (0.2, 0.2, 0.22), (0.75, 0.6, 0.65))
    scene = board * (0.75 + 0.35 * noise(rng, h, w, 3, 3))[..., None]
    flesh = pick(rng, (0.98, 0.6, 0.1), (0.95, 0.85, 0.25), (0.7, 0.85, 0.3), (0.92, 0.35, 0.3), spread=0.05)
    for part, dy, dx in discs(rng, scene, np.sort(rng.uniform(0.13, 0.4, rng.integers(2, 8))) * min(h, w)):
        r, pieces = np.hypot(dx, dy), int(rng.integers(8, 12))
        sector = np.abs(np.sin((np.arctan2(dy, dx) + rng.uniform(0, 6)) * (pieces / 2))) * r
        pulp = flesh * (0.75 + 0.5 * noise(rng, r.shape[0], r.shape[1], 14, 14, 2))[..., None]
        part *= (1 - 0.5 * step(1.12 - np.hypot(dx - 0.06, dy - 0.08), 0.15))[..., None]
        rind = blend(flesh * 0.9, flesh * 0.25 + 0.72, step(0.93 - r, 0.03))
        part[:] = blend(part, blend(rind, pulp, step(0.86 - r, 0.03) * step(sector - 0.09, 0.05)), step(1 - r, 0.03))
    return scene


def _zebra(rng: Random, h: int, w: int) -> Array:
    y, x = grid(h, w)
    turn, bend = rng.uniform(-0.9, 0.9), rng.uniform(0.15, 0.5) * noise(rng, h, w, 2.5, 2.5, 2)
    wave = np.sin((x * math.cos(turn) + y * math.sin(turn) + bend) * rng.uniform(25, 55)) + rng.uniform(-0.15, 0.45)
    coat = blend(pick(rng, (0.1, 0.08, 0.07), spread=0.04), pick(rng, (0.88, 0.84, 0.76)), step(wave, 0.3))
    back = rng.uniform(-0.1, 0.35) + rng.uniform(-0.3, 0.3) * x + 0.12 * skyline(rng, w, 2, 1)
    belly = back + rng.uniform(0.6, 1.1)
    flank = np.clip(1.15 - 0.8 * np.abs((y - back) / (belly - back) - 0.4), 0.3, 1.1)
    coat *= (flank * (0.75 + 0.35 * noise(rng, h, w, 30, 30, 2)))[..., None]
    plain = pick(rng, (0.65, 0.58, 0.3), (0.4, 0.5, 0.22), (0.7, 0.55, 0.4))
    return blend(plain * (0.6 + 0.5 * noise(rng, h, w, 14, 5))[..., None], coat, step(y - back) * step(belly - y))


def _coins(rng: Random, h: int, w: int) -> Array:
    table = pick(rng, (0.4, 0.26, 0.16), (0.15, 0.3, 0.2), (0.75, 0.74, 0.7), (0.2, 0.2, 0.24))
    scene, turn = table * (0.7 + 0.5 * noise(rng, h, w, 3, 30))[..., None], rng.uniform(0, 6.3)
    for part, dy, dx in discs(rng, scene, rng.uniform(0.09, 0.2, rng.integers(5, 18)) * min(h, w)):
        metal = pick(rng, (0.85, 0.68, 0.3), (0.75, 0.75, 0.76), (0.7, 0.42, 0.28), spread=0.05)
        r = np.hypot(dx, dy)
        relief = 0.18 * ((noise(rng, r.shape[0], r.shape[1], 5, 5, 2) > 0.55) & (r < 0.72)) + 0.3 * (
            np.abs(r - 0.9) < 0.06
        )
        sheen = (0.75 + 0.3 * np.cos(np.arctan2(dy, dx) - turn) * r + relief).astype(np.float32)
        part *= (1 - 0.6 * step(1.12 - np.hypot(dx - 0.1, dy - 0.1), 0.2))[..., None]
        part[:] = blend(part, metal * sheen[..., None], step(1 - r, 0.04))
    return scene


def _flower(rng: Random, h: int, w: int) -> Array:
    y, x = grid(h, w)
    green = pick(rng, (0.2, 0.4, 0.12), (0.1, 0.25, 0.1), (0.35, 0.45, 0.2), (0.2, 0.25, 0.3))
    scene = blend(green * 0.5, green * 1.5, noise(rng, h, w, 3, 3, 2))
    hue = pick(rng, (0.9, 0.25, 0.4), (0.95, 0.8, 0.2), (0.92, 0.9, 0.92), (0.6, 0.3, 0.8), (0.95, 0.5, 0.2))
    petals, centre = int(rng.integers(5, 14)), pick(rng, (0.9, 0.75, 0.15), (0.35, 0.2, 0.1), (0.75, 0.8, 0.3))
    heart = centre * (0.6 + 0.6 * noise(rng, h, w, 50, 50, 1))[..., None]
    for size in np.sort(rng.uniform(0.18, 0.48, rng.integers(1, 4))).tolist():
        dx, dy = x - rng.uniform(0.2, 0.8) * w / h, (y - rng.uniform(0.25, 0.75)) / rng.uniform(0.7, 1)
        angle, radius = np.arctan2(dy, dx) + rng.uniform(0, 6.3), np.hypot(dx, dy) / size
        lobe = np.abs(np.cos(angle * petals / 2))
        shade = 0.45 + 0.45 * np.clip(radius, 0, 1) + 0.25 * lobe + 0.06 * np.cos(angle * petals * 7)
        scene = blend(scene, hue * shade[..., None], step(0.5 + 0.5 * np.sqrt(lobe) - radius, 0.04))
        scene = blend(scene, heart, step(rng.uniform(0.18, 0.32) - radius, 0.05))
    return scene


def _balloons(rng: Random, h: int, w: int) -> Array:
    scene = daylight(rng, h, w)
    silks = ((0.9, 0.15, 0.1), (0.95, 0.8, 0.1), (0.1, 0.3, 0.8), (0.95, 0.95, 0.95), (0.1, 0.6, 0.3), (0.6, 0.1, 0.6))
    for part, dy, dx in discs(rng, scene, np.sort(rng.uniform(0.06, 0.24, rng.integers(2, 8))) * min(h, w), 0.15, 2):
        girth = np.sqrt(np.clip(1 - np.where(dy < 0, 1, 0.75) * dy**2, 1e-4, 1), dtype=np.float32) * (dy < 1.12)
        longitude = np.arcsin(np.clip(dx / np.maximum(girth, 0.01), -1, 1))
        gores = (np.sin(longitude * int(rng.integers(3, 9))) > 0).astype(np.float32)
        silk = blend(pick(rng, *silks), pick(rng, *silks), gores) * (0.65 + 0.4 * np.cos(longitude + 0.6))[..., None]
        part[:] = blend(part, silk, step(girth - np.abs(dx), 0.04))
        part[(np.abs(dx) < 0.16) & (dy > 1.4) & (dy < 1.65)] = pick(rng, (0.3, 0.2, 0.1))
    return scene


PAINTERS: dict[str, Painter] = {
    painter.__name__.removeprefix("_"): painter
    for painter in (
        *(
            _clouds,
            _mountains,
            _sunset_sea,
            _forest,
            _meadow,
            _brick_wall,
            _night_city,
            _road,
            _wood_planks,
            _pool_water,
        ),
        *(_dunes, _pebbles, _autumn_leaves, _starry_sky, _checker_floor, _citrus, _zebra, _coins, _flower, _balloons),
    )
}
